"""Rendering and tokenising of long texts, on a few threads beside the event loop.

Tenants take turns by how much was done for them, as in the engine. Of one tenant short texts go first, but no text is
passed by one that came much later. Work whose client has gone is dropped, or ends at the next place where it looks.
"""

import asyncio
import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from hybrid_cache.engine.shares import Shares

T = TypeVar("T")
LONG_TEXT = 4000  # characters; to tokenise more takes ten milliseconds, too long for an event loop
PASSED_BY_S = 10e-6  # a text is passed by shorter ones that came this much later, in seconds a character
MOST_LATER = 64  # texts that nobody waits for; the oldest is forgotten
NUM_THREADS = min(4, max(2, (os.cpu_count() or 1) // 2))

_current = threading.local()


class Unwanted(BaseException):
    """The client has gone: nobody waits for this work. No error, and not to be caught as one."""


def still_wanted() -> None:
    """For long work to call now and then. Raises Unwanted."""
    job: _Job[Any] | None = getattr(_current, "job", None)
    if job is not None and job.dropped:
        raise Unwanted


@dataclass(slots=True, order=True)
class _Job(Generic[T]):
    due_s: float  # the lowest is next, of one tenant
    number: int
    size: int = field(compare=False)
    work: Callable[[], T] = field(compare=False)
    done: "asyncio.Future[T]" = field(compare=False)
    dropped: bool = field(default=False, compare=False)
    later: bool = field(default=False, compare=False)  # nobody waits for it


class TextWork:
    """The threads, and what waits for them. Safe to use from several event loops."""

    def __init__(self, num_threads: int = NUM_THREADS) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="hybrid-cache-text")
        self._lock = threading.Lock()
        self._waiting: dict[str, list[_Job[Any]]] = {}  # heaps by tenant
        self._later: deque[_Job[Any]] = deque()
        self._does_later = False  # a thread is at work on one of these
        self._shares = Shares()
        self._numbers = itertools.count()

    @property
    def num_waiting(self) -> int:
        """Texts that wait for a thread."""
        return sum(map(len, list(self._waiting.values())))

    async def run(self, tenant: str, size: int, work: Callable[[], T]) -> T:
        """The result of `work` on a text of `size` characters. Short work is done at once, on the event loop."""
        if size <= LONG_TEXT:
            return work()
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        job = _Job(time.monotonic() + PASSED_BY_S * size, next(self._numbers), size, work, done)
        self._add(tenant, job)
        self._threads.submit(self._work_on_next)
        try:
            return await done
        finally:
            job.dropped = True
            self._remove(tenant, job)

    async def run_later(self, size: int, work: Callable[[], T]) -> T | None:
        """The result of `work` that nobody waits for: on a thread, one at a time, while no other text waits.

        None if it was forgotten, because too many more came.
        """
        done: asyncio.Future[T | None] = asyncio.get_running_loop().create_future()
        job = _Job[T | None](0.0, next(self._numbers), size, work, done, later=True)
        with self._lock:
            forgotten = self._later.popleft() if len(self._later) == MOST_LATER else None
            self._later.append(job)
        if forgotten is not None:
            _tell(forgotten, None, None)
        self._threads.submit(self._work_on_next)
        try:
            return await done
        finally:
            job.dropped = True

    def _add(self, tenant: str, job: "_Job[Any]") -> None:
        with self._lock:
            heapq.heappush(self._waiting.setdefault(tenant, []), job)
            self._shares.enter(tenant)

    def _remove(self, tenant: str, job: "_Job[Any]") -> None:
        with self._lock:
            self._shares.leave(tenant)
            waiting = self._waiting.get(tenant, [])
            if job in waiting:
                waiting.remove(job)
                heapq.heapify(waiting)
            if not waiting:
                self._waiting.pop(tenant, None)

    def _next(self) -> "_Job[Any] | None":
        with self._lock:
            if not self._waiting:
                if self._does_later or not self._later:
                    return None
                self._does_later = True
                return self._later.popleft()
            tenant = min(self._waiting, key=self._shares.served)
            job = heapq.heappop(self._waiting[tenant])
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            self._shares.charge(tenant, job.size)
            return job

    def _work_on_next(self) -> None:
        job = self._next()
        if job is None:  # whoever asked for it has gone
            return
        _current.job = job
        try:
            result, error = job.work(), None
        except BaseException as failure:
            result, error = None, _bearable(failure)
        finally:
            _current.job = None
        _tell(job, result, error)
        if job.later:
            with self._lock:
                self._does_later = False
            if self._later:
                self._threads.submit(self._work_on_next)


def _tell(job: "_Job[Any]", result: object, error: Exception | None) -> None:
    try:
        job.done.get_loop().call_soon_threadsafe(_settle, job.done, result, error)
    except RuntimeError:  # the event loop has ended meanwhile
        return


def _bearable(failure: BaseException) -> Exception:
    """An error as an event loop may carry it to whoever waits: some end the loop, and one no future takes."""
    if isinstance(failure, Exception) and not isinstance(failure, StopIteration):
        return failure
    wrapped = RuntimeError(f"text work ended with {type(failure).__name__}")
    wrapped.__cause__ = failure
    return wrapped


def _settle(done: "asyncio.Future[object]", result: object, error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
