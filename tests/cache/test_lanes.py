"""Copies to host memory beside the pass: whatever order the lanes come to run in, the bytes are those of one lane."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid_cache.device.lanes import LARGEST, CudaLanes, Overlapped

SIZES = (64, 192)
PLACES = 5


class Late:
    """Lanes that run when chance will have it, as far as what they wait for allows."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._queues: tuple[list[Callable[[], bool]], list[Callable[[], bool]]] = ([], [])
        self._queued, self._done = [0, 0], [0, 0]
        self.num_late = 0  # copies that were queued aside when the pass had gone on

    def copy(self, target: Tensor, source: Tensor, *, aside: bool) -> None:
        def done() -> bool:
            target.copy_(source)
            return True

        self._add(done, aside)

    def mark(self, *, aside: bool) -> tuple[bool, int]:
        return aside, self._queued[aside]

    def wait(self, mark: tuple[bool, int], *, aside: bool) -> None:
        lane, number = mark
        self._add(lambda: self._done[lane] >= number, aside)

    def finish(self) -> None:
        while any(self._queues):
            self.some(1.0)

    def _add(self, step: Callable[[], bool], aside: bool) -> None:
        self._queues[aside].append(step)
        self._queued[aside] += 1
        self.some(0.3)

    def some(self, odds: float) -> None:
        """Runs what chance picks of what may run."""
        for lane in self._rng.sample((0, 1), 2):
            queue = self._queues[lane]
            while queue and self._rng.random() < odds and queue[0]():
                queue.pop(0)
                self._done[lane] += 1


def play(lanes: object, device: str, rng: random.Random, num_steps: int) -> None:
    """Random stores, loads and passes that overwrite the device; then compares with what should be there."""
    overlapped = Overlapped(lanes, max(SIZES), torch.device(device))  # type: ignore[var-annotated, arg-type]
    pinned = device == "cuda"
    hosts = {(n, i): torch.zeros(n, dtype=torch.uint8, pin_memory=pinned) for n in SIZES for i in range(PLACES)}
    rows = {(n, i): torch.zeros(n, dtype=torch.uint8, device=device) for n in SIZES for i in range(PLACES)}
    at_host, at_row = dict.fromkeys(hosts, 0), dict.fromkeys(rows, 0)
    for step in range(num_steps):
        place, row = rng.choice(list(hosts)), rng.choice(list(rows))
        row = place[0], row[1]
        match rng.randrange(8):
            case 0 | 1 | 2:
                overlapped.store(place, hosts[place], rows[row])
                at_host[place] = at_row[row]
            case 3 | 4:
                overlapped.load(place, rows[row], hosts[place])
                at_row[row] = at_host[place]
            case 7 if rng.random() < 0.2:
                overlapped.finish()
                for key, value in at_host.items():
                    assert hosts[key].unique().tolist() == [value]
            case _:  # a pass writes
                value = step % 251 + 1
                lanes.copy(rows[row], torch.full_like(rows[row], value), aside=False)  # type: ignore[attr-defined]
                at_row[row] = value
    overlapped.finish()
    for key, value in at_host.items():
        assert hosts[key].unique().tolist() == [value]
    for key, value in at_row.items():
        assert rows[key].unique().tolist() == [value]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 80))
def test_in_any_order_that_the_lanes_allow_the_bytes_are_right(seed: int, num_steps: int) -> None:
    rng = random.Random(seed)
    play(Late(rng), "cpu", rng, num_steps)


def test_the_pass_does_not_wait_while_the_ring_has_room() -> None:
    lanes = Late(random.Random(0))
    lanes.some = lambda odds: None  # type: ignore[method-assign]  # nothing runs
    waits: list[bool] = []
    wait = lanes.wait

    def noted(mark: tuple[bool, int], *, aside: bool) -> None:
        waits.append(aside)
        wait(mark, aside=aside)

    lanes.wait = noted  # type: ignore[method-assign]
    overlapped = Overlapped(lanes, 64, torch.device("cpu"))
    row, host = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    for i in range(LARGEST):
        overlapped.store(i, host, row)
    assert waits == [True] * LARGEST
    overlapped.store(LARGEST, host, row)
    assert waits == [True] * LARGEST + [False, True]
    overlapped.load("somewhere else", row, host)
    assert waits[-1] is True
    overlapped.load(LARGEST, row, host)
    assert waits[-1] is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("seed", range(5))
def test_the_same_on_a_gpu(seed: int) -> None:
    play(CudaLanes(torch.device("cuda")), "cuda", random.Random(seed), 400)
