"""The latest lines of a record, in memory."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

SEGMENTS = 8  # that the memory is divided into; the oldest goes as a whole
OVERHEAD = 120  # bytes that a line takes beside its own


@dataclass(slots=True)
class _Segment:
    """Lines that need none before them."""

    lines: list[tuple[str, bytes]] = field(default_factory=list)  # with the namespace that each is about
    num_bytes: int = 0


class Ring:
    """Written by one thread, read by any."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._segments: deque[_Segment] = deque([_Segment()])
        self.num_bytes = 0
        self.num_forgotten = 0  # lines

    @property
    def segment_full(self) -> bool:
        return self._segments[-1].num_bytes >= self._most_bytes // SEGMENTS

    def new_segment(self) -> None:
        with self._lock:
            self._segments.append(_Segment())

    def add(self, namespace: str, line: bytes) -> None:
        with self._lock:
            size = len(line) + OVERHEAD
            self._segments[-1].lines.append((namespace, line))
            self._segments[-1].num_bytes += size
            self.num_bytes += size
            while self.num_bytes > self._most_bytes and len(self._segments) > 1:
                oldest = self._segments.popleft()
                self.num_bytes -= oldest.num_bytes
                self.num_forgotten += len(oldest.lines)

    def lines(self, may: Callable[[str], bool]) -> tuple[list[bytes], int]:
        """Those of the namespaces that are meant, and how many were forgotten of all."""
        with self._lock:
            return [line for s in self._segments for space, line in s.lines if may(space)], self.num_forgotten
