"""Connections: how many may be open. One that nobody uses makes room for a new one, before files run out."""

import errno
import os
import resource
import select
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from hybrid_cache.errors import ConfigError

DEFAULT_CONNECTIONS = 1024
MOST_REMEMBERED = 64  # requests of a connection about which more is said when it closes
MAX_LEAVING = 16  # connections that are being closed to make room
SPARE_DESCRIPTORS = MAX_LEAVING + 16  # for them, and for all else that a serving process opens
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def connection_limit(asked: int | None = None) -> int:
    """How many connections there is room for: `asked`, or at most DEFAULT_CONNECTIONS.

    Raises the soft limit on open files as far as that takes. Raises ConfigError when `asked` do not fit.
    """
    wanted = DEFAULT_CONNECTIONS if asked is None else asked
    if wanted < 1:
        raise ConfigError(f"{wanted} connections, must be at least 1")
    used = len(os.listdir("/proc/self/fd")) + SPARE_DESCRIPTORS
    files = _raise_file_limit(used + wanted)
    room = files - used
    if room < (asked or 1):
        raise ConfigError(f"{wanted} connections, at most {max(room, 0)}: {files} files may be open, {used} are needed")
    return room


def _raise_file_limit(wanted: int) -> int:
    """Raises the soft limit on open files to `wanted` or the hard limit. Returns what it is then, at most `wanted`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


class Connection:
    """One connection, as the application sees it: what is to be done once it is closed, for its latest requests."""

    def __init__(self) -> None:
        self._then: deque[Callable[[], None]] = deque(maxlen=MOST_REMEMBERED)

    def when_closed(self, act: Callable[[], None]) -> None:
        """Forgets the oldest of too many."""
        self._then.append(act)

    def close(self) -> None:
        """It is closed. Idempotent."""
        while self._then:
            self._then.popleft()()


# The state of a request has the connection under this name.
CONNECTION = "connection"
current_connection: ContextVar[Connection | None] = ContextVar("current_connection", default=None)


class Connections:
    """The open connections of a server: at most `limit`, and a few that have been told to close.

    Those in a TLS handshake count, too.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._max_leaving = max(1, min(MAX_LEAVING, limit // 4))
        self._open: dict[int, socket.socket] = {}  # by descriptor
        self._idle: dict[int, None] = {}  # descriptors without a request in progress, idle longest first
        self._leaving: set[int] = set()  # told to close

    @property
    def full(self) -> bool:
        """Whether somebody would have to leave for one more."""
        return len(self._open) - len(self._leaving) >= self._limit

    @property
    def crowded(self) -> bool:
        """Whether those who leave have to be waited for."""
        return len(self._leaving) >= self._max_leaving

    def add(self, connection: socket.socket) -> None:
        self._open[connection.fileno()] = connection
        self._idle[connection.fileno()] = None

    def remove(self, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        self._idle.pop(descriptor, None)
        self._leaving.discard(descriptor)

    def rest(self, descriptor: int) -> None:
        """No request is in progress."""
        if descriptor in self._open and descriptor not in self._leaving:
            self._idle.setdefault(descriptor)

    def work(self, descriptor: int) -> None:
        """A request is in progress."""
        self._idle.pop(descriptor, None)

    def make_room(self) -> None:
        """Lets the connection go that has been idle longest, if any is."""
        if not self._idle:
            return
        descriptor = next(iter(self._idle))
        del self._idle[descriptor]
        self._leaving.add(descriptor)
        with suppress(OSError):  # the client was faster
            self._open[descriptor].shutdown(socket.SHUT_RDWR)


class Listener(socket.socket):
    """A bound socket that accepts no more connections than there is room for."""

    def __init__(self, bound: socket.socket, connections: Connections) -> None:
        """Takes the descriptor from `bound`."""
        super().__init__(bound.family, bound.type, bound.proto, fileno=bound.detach())
        self._connections = connections

    def accept(self) -> tuple[socket.socket, Any]:
        """Raises BlockingIOError when nobody waits, while others leave, and after turning somebody away."""
        if self._connections.full:
            if self._connections.crowded or not self._somebody_waits():
                raise BlockingIOError
            self._connections.make_room()
        try:
            accepted, address = super().accept()
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            self._connections.make_room()
            raise BlockingIOError from error
        if self._connections.full:
            accepted.close()
            raise BlockingIOError
        return _Accepted(accepted, self._connections), address

    def _somebody_waits(self) -> bool:
        waiting = select.poll()
        waiting.register(self, select.POLLIN)
        return bool(waiting.poll(0))


class _Accepted(socket.socket):
    """A connection that counts until its descriptor is closed."""

    def __init__(self, accepted: socket.socket, connections: Connections) -> None:
        super().__init__(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        self._connections = connections
        connections.add(self)

    def close(self) -> None:
        self._connections.remove(self.fileno())
        super().close()
