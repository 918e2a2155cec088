"""Times of calls that take turns, so that what slows the machine for a while slows all of them."""

import time
from collections.abc import Callable, Sequence

import torch

SHORT_S = 2e-3  # calls are repeated until a timing takes at least this long

Timed = Callable[[], object]


def timed_in_turn(contenders: Sequence[Timed], device: torch.device, rounds: int) -> list[list[float]]:
    """Seconds of one call of each contender, `rounds` times in turn."""
    clock: Callable[[Timed, int], float] = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    repeats = []
    for call in contenders:
        call()
        repeats.append(max(1, round(SHORT_S / max(clock(call, 1), 1e-6))))
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for call, count, seconds in zip(contenders, repeats, times, strict=True):
            seconds.append(clock(call, count) / count)
    return times


def _cpu_seconds(call: Timed, count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - begin


def _cuda_seconds(call: Timed, count: int) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
