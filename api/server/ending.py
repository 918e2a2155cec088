"""The end of a server process, whatever hangs in it: a step of the engine, a slow reader, a thread."""

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

FLUSH_TIMEOUT_S = 3  # for clients that read slowly, once the engine has finished
FORCE_S = 4.5  # from the end of the drain to the end of the process
SECOND_S = 1.2  # from a second signal to the end of the process
LAST_WORDS_S = 0.1

logger = logging.getLogger("hybrid_cache.api")


def end_by_force() -> None:
    """Ends the process at once with status 1. Waits for nobody, not even for who reads the log."""
    words = "the process ends by force: something in it did not end"
    threading.Thread(target=logger.critical, args=(words,), daemon=True).start()
    time.sleep(LAST_WORDS_S)
    os._exit(1)


class Deadline:
    """Ends the process when time is up. Its own thread sees to that, and sees signals, even if the main one is busy."""

    def __init__(self, grace_s: float, end: Callable[[], None] = end_by_force) -> None:
        """grace_s: seconds that the first signal gives running requests"""
        self._after_signal = [grace_s + FORCE_S, SECOND_S]
        self._end = end
        self._end_s = math.inf
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        threading.Thread(target=self._watch, name="hybrid-cache-deadline", daemon=True).start()

    def watch_signals(self) -> None:
        """To be called on the main thread, in which all signals arrive."""
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def within(self, seconds: float) -> None:
        """The process ends within so many seconds from now, or earlier if that was said before."""
        self._end_s = min(self._end_s, time.monotonic() + seconds)
        with suppress(OSError):  # full: then it is awake
            self._writer.send(b"\0")

    def _watch(self) -> None:
        while (left := self._end_s - time.monotonic()) > 0:
            self._reader.settimeout(None if left == math.inf else left)
            try:
                received = self._reader.recv(64)
            except TimeoutError:
                continue
            for _ in filter((signal.SIGINT, signal.SIGTERM).__contains__, received):
                seconds = self._after_signal[0] if len(self._after_signal) == 1 else self._after_signal.pop(0)
                self._end_s = min(self._end_s, time.monotonic() + seconds)
        self._end()
        self._reader.close()
        self._writer.close()
