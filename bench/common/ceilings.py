"""What a machine does at best, measured in the run that is compared with it."""

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from hybrid_cache.bench.common.timing import Timed, timed_in_turn
from hybrid_cache.kernels.memory import large_pages
from hybrid_cache.kernels.torch_ops import TorchOps


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of what is read and multiplied."""

    buffer_bytes: int  # larger than any cache
    matrices: tuple[int, ...]  # rows and columns


SIZES = {"cpu": Sizes(1 << 28, (1024, 1536, 2048)), "cuda": Sizes(1 << 32, (4096, 8192))}
QUICK = Sizes(1 << 22, (256,))  # for a trial whose numbers do not matter


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The roofline of a device."""

    gigabytes_per_s: float  # of reading a large buffer
    gigaflops_per_s: float  # of a large matrix product

    def seconds(self, num_bytes: float, flops: float) -> float:
        """The shortest time in which these bytes can be moved and FLOPs computed."""
        return max(num_bytes / self.gigabytes_per_s, flops / self.gigaflops_per_s) / 1e9

    def bound(self, num_bytes: float, flops: float) -> str:
        """Which of the two takes longer: memory or arithmetic."""
        return "memory" if num_bytes / self.gigabytes_per_s > flops / self.gigaflops_per_s else "arithmetic"


def measure_ceilings(dtype: torch.dtype, device: torch.device, sizes: Sizes | None = None) -> Ceilings:
    """The median of several reads, and the fastest product of two square matrices of `dtype`."""
    sizes = sizes or SIZES[device.type]
    on_cpu, size = device.type == "cpu", sizes.buffer_bytes
    buffer = (large_pages(size) if on_cpu else torch.empty(size, dtype=torch.uint8, device=device)).view(torch.float32)
    buffer.fill_(1)
    read = median(timed_in_turn([lambda: buffer.sum()], device, rounds=15)[0])
    fastest = 0.0
    for size in sizes.matrices:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        multiply = _square_product(a, b)
        fastest = max(fastest, 2.0 * size**3 / min(timed_in_turn([multiply], device, rounds=5)[0]))
    return Ceilings(sizes.buffer_bytes / read / 1e9, fastest / 1e9)


def _square_product(a: Tensor, b: Tensor) -> Timed:
    """The fastest product that torch has: with a packed weight on a CPU."""
    if a.device.type == "cpu":
        linear = TorchOps().linear(b)
        return lambda: linear(a)
    return lambda: a @ b
