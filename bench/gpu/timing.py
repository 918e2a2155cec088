"""Times on a card, by its own clock; and what the card does at best, to hold them against."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

FLUSH_BYTES = 1 << 28  # several times any L2
COPY_BYTES = {"cuda": 1 << 32, "cpu": 1 << 22}
MATRIX = {"cuda": 8192, "cpu": 256}
TARGET_S = 0.05  # for all timings of one call
MIN_REPEATS, MAX_REPEATS = 5, 100


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured in the same run as what they are compared with."""

    bytes_per_s: float  # of a large copy, read and written
    flops_per_s: float  # of a large bfloat16 product

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The shortest that so much can take."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


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

    def ceilings(self) -> Ceilings:
        source = torch.ones(COPY_BYTES[self._device.type] // 4, device=self._device)
        target = torch.empty_like(source)
        copied = self.seconds(lambda: target.copy_(source))
        size = MATRIX[self._device.type]
        a, b = (torch.randn(size, size, device=self._device).bfloat16() for _ in range(2))
        return Ceilings(2.0 * source.nbytes / copied, 2.0 * size**3 / self.seconds(lambda: a @ b))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, device=device, dtype=dtype).normal_()
