"""Times on a GPU, by its own clock."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

FLUSH_BYTES = 1 << 28  # several times any L2
TARGET_S = 0.05  # for all timings of one call
MIN_REPEATS, MAX_REPEATS = 5, 100


class Clock:
    """Times calls on one device. Between two calls it writes over a large buffer, so that none finds its data in L2."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = FLUSH_BYTES if device.type == "cuda" else 1
        self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Median of one call, after a warm-up."""
        self.once(call)
        first = self.once(call)
        repeats = min(MAX_REPEATS, max(MIN_REPEATS, int(TARGET_S / max(first, 1e-6))))
        return median([self.once(call) for _ in range(repeats)])

    def once(self, call: Callable[[], object]) -> float:
        if self._device.type != "cuda":
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        self._flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def seconds_as_graph(self, call: Callable[[], object]) -> float:
        """As `seconds`, for a call that may be recorded: without the time that the host takes to launch its kernels."""
        if self._device.type != "cuda":
            return self.seconds(call)
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return self.seconds(graph.replay)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normally distributed numbers [*shape]."""
    return torch.empty(shape, device=device, dtype=dtype).normal_()
