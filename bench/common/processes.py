"""Work in several processes, none of which outlives the one that started it."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import TypeVar

from hybrid_cache.errors import HybridCacheError

A = TypeVar("A")
R = TypeVar("R")


def spread(work: Callable[[A], R], items: Sequence[A], jobs: int) -> Iterator[tuple[int, R]]:
    """The results as they come, each with the number of its item.

    If the caller stops early, by an error or Ctrl-C, processes end at once, whatever they are at. Raises
    HybridCacheError if one of them was killed.
    """
    if jobs == 1:
        yield from enumerate(map(work, items))
        return
    before = active_children()
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), end_with_parent)
    try:
        futures = {pool.submit(work, item): i for i, item in enumerate(items)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException as error:
        for process in active_children():
            if process not in before:
                process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise HybridCacheError(f"one of {jobs} processes was killed, perhaps for want of memory") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even if that was killed. Ctrl-C is for the parent."""
    if sys.platform != "win32":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
