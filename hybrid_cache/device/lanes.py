"""Copies from a GPU to host memory while the pass goes on.

What a state or a page leaves behind is written to by the next pass, so it is first copied to a ring of staging memory
on the GPU, which takes microseconds, and from there to the host in a lane of its own. The ring is bounded: where it is
full, the pass waits for the oldest copies, on the GPU; the CPU waits for nothing.
"""

from collections import deque
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

Mark = TypeVar("Mark")
LARGEST = 4  # of the largest items fit into the ring, which lies beside the budget


class Lanes(Protocol[Mark]):
    """Two orders of work on one device, that of the pass and one beside it (`aside`)."""

    def copy(self, target: Tensor, source: Tensor, *, aside: bool) -> None:
        """Queues a copy."""
        ...

    def mark(self, *, aside: bool) -> Mark:
        """What has been queued in a lane so far."""
        ...

    def wait(self, mark: Mark, *, aside: bool) -> None:
        """What is queued in a lane from now on begins when that is done."""
        ...

    def finish(self) -> None:
        """Returns when all of it is done."""
        ...


class CudaLanes:
    """The stream that is current, and one of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def _stream(self, *, aside: bool) -> torch.cuda.Stream:
        return self._aside if aside else torch.cuda.current_stream(self._device)

    def copy(self, target: Tensor, source: Tensor, *, aside: bool) -> None:
        with torch.cuda.stream(self._stream(aside=aside)):
            target.copy_(source, non_blocking=True)

    def mark(self, *, aside: bool) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream(aside=aside))
        return event

    def wait(self, mark: torch.cuda.Event, *, aside: bool) -> None:
        self._stream(aside=aside).wait_event(mark)

    def finish(self) -> None:
        self._stream(aside=False).synchronize()
        self._aside.synchronize()


class Overlapped(Generic[Mark]):
    """Copies rows of bytes between a device and places in host memory, in order wherever order matters."""

    def __init__(self, lanes: Lanes[Mark], largest_bytes: int, device: torch.device) -> None:
        """largest_bytes: of a row"""
        self._lanes = lanes
        self._ring = torch.empty(LARGEST * largest_bytes, dtype=torch.uint8, device=device)
        self._next = 0
        self._under_way: deque[tuple[int, int, Mark]] = deque()  # parts [start, end) of the ring, oldest first
        self._stored: dict[object, Mark] = {}  # of places that nobody has waited for

    def store(self, place: object, host: Tensor, row: Tensor) -> None:
        """Copies a row of the device to a place in host memory; the row may be written to afterwards."""
        staged = self._room(len(row))
        self._lanes.copy(staged, row, aside=False)
        self._lanes.wait(self._lanes.mark(aside=False), aside=True)  # and for what was loaded from there before
        self._lanes.copy(host, staged, aside=True)
        mark = self._stored[place] = self._lanes.mark(aside=True)
        self._under_way.append((self._next - len(row), self._next, mark))

    def load(self, place: object, row: Tensor, host: Tensor) -> None:
        """Copies from a place in host memory to a row of the device, before whatever comes next in the pass."""
        mark = self._stored.pop(place, None)
        if mark is not None:
            self._lanes.wait(mark, aside=False)
        self._lanes.copy(row, host, aside=False)

    def finish(self) -> None:
        """Returns when nothing is under way."""
        self._lanes.finish()
        self._under_way.clear()
        self._stored.clear()

    def _room(self, num_bytes: int) -> Tensor:
        """The next part of the ring, free when the pass comes to it."""
        start = self._next if self._next + num_bytes <= len(self._ring) else 0
        self._next = start + num_bytes
        while any(first < self._next and start < end for first, end, _ in self._under_way):
            self._lanes.wait(self._under_way.popleft()[2], aside=False)
        return self._ring[start : self._next]
