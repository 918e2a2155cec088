"""Falcon Mamba: Mamba-1 layers and nothing else, with norms without weights on dt, B and C."""

import torch

from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.arch.mamba import Mamba
from hybrid_cache.models.blocks.common import PlainNorm
from hybrid_cache.models.config import Config
from hybrid_cache.models.weights import ModelWeights


def build(config: Config, weights: ModelWeights, ops: Ops, dtype: torch.dtype) -> "FalconMamba":
    eps = config.number("mixer_rms_eps", 1e-6)
    return FalconMamba(config, weights, ops, dtype, lambda _, size: PlainNorm(ops, size, eps, dtype))


class FalconMamba(Mamba):
    """Only the norms of dt, B and C differ."""
