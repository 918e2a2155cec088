"""Where a part of the check runs, and for how long."""

import time
from dataclasses import dataclass

import torch

from hybrid_cache.bench.common.ceilings import QUICK, Ceilings, measure_ceilings
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.kernels.torch_ops import TorchOps


@dataclass(frozen=True, slots=True)
class Setting:
    """`backend` is triton, or torch for a trial on a CPU; `quick` makes everything as small as it can be."""

    device: torch.device
    backend: str
    quick: bool
    deadline: float  # of time.monotonic

    @property
    def late(self) -> bool:
        """No time to begin anything new."""
        return self.seconds_left <= 0

    @property
    def seconds_left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    def ceilings(self) -> Ceilings:
        """What the device does at best, with products in bfloat16."""
        return measure_ceilings(torch.bfloat16, self.device, QUICK if self.quick else None)

    def ops(self, *, checked: bool = True, fast: bool = False) -> Ops:
        """`checked`: kernels are tried before their first use, and torch takes the place of those that fail."""
        if self.backend == "torch":
            return TorchOps()
        from hybrid_cache.kernels.triton_ops import CheckedTritonOps, TritonOps  # they need triton

        return CheckedTritonOps(fast) if checked else TritonOps(fast)
