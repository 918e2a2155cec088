"""Falcon Mamba: Mamba-1 layers and nothing else, with norms without weights on dt, B and C."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.blocks.common import CacheEntry, Norm, PlainNorm
from hybrid_cache.models.blocks.mamba import Mamba1
from hybrid_cache.models.blocks.model import UNBOUNDED, CausalModel
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import Mamba1Shape
from hybrid_cache.models.weights import Checkpoint, Scope, Weights


def build(config: Config, weights: Checkpoint, ops: Ops, dtype: torch.dtype) -> "FalconMamba":
    return FalconMamba(config, weights, ops, dtype)


class FalconMamba(CausalModel):
    def __init__(self, config: Config, weights: Checkpoint, ops: Ops, dtype: torch.dtype) -> None:
        config.choice("hidden_act", "silu", ["silu"])
        self._dtype = dtype
        self._stream_dtype = torch.float32 if config.flag("residual_in_fp32", True) else dtype
        self._layers = tuple(
            Layer(config, Scope(weights, f"backbone.layers.{i}."), ops, dtype)
            for i in range(config.integer("num_hidden_layers"))
        )
        super().__init__(
            config,
            weights,
            ops,
            dtype,
            layers=self._layers,
            norm=_norm("backbone.norm_f", config, weights, ops),
            tied=config.flag("tie_word_embeddings", True),
            embedding="backbone.embeddings.weight",
            max_length=UNBOUNDED,
        )

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = F.embedding(batch.token_ids, self._embedding).to(self._stream_dtype)
        for layer, tensors in zip(self._layers, cache, strict=True):
            hidden += layer(hidden.to(self._dtype), batch, tensors)
        return self._norm(hidden[batch.output_rows]).to(self._dtype)


class Layer:
    def __init__(self, config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> None:
        self._norm = _norm("norm", config, weights, ops)
        self._mixer = _mixer(config, Scope(weights, "mixer."), ops, dtype)
        self.shapes = (self._mixer.shape,)

    def __call__(self, x: Tensor, batch: ForwardBatch, tensors: CacheEntry) -> Tensor:
        return self._mixer(self._norm(x), batch, tensors)


def _mixer(config: Config, weights: Weights, ops: Ops, dtype: torch.dtype) -> Mamba1:
    hidden = config.integer("hidden_size")
    shape = Mamba1Shape(
        hidden=hidden,
        inner=config.integer("intermediate_size", int(config.number("expand", 2) * hidden)),
        d_state=config.integer("state_size", 16),
        dt_rank=config.integer_or_auto("time_step_rank", -(-hidden // 16)),
        conv_width=config.integer("conv_kernel", 4, at_least=2),
        dtype=dtype,
    )
    eps = config.number("mixer_rms_eps", 1e-6)
    return Mamba1(
        ops,
        weights,
        shape,
        conv_bias=config.flag("use_conv_bias", True),
        proj_bias=config.flag("use_bias", False),
        norm=lambda _, size: PlainNorm(ops, size, eps, dtype),
    )


def _norm(name: str, config: Config, weights: Weights, ops: Ops) -> Norm:
    return Norm(ops, weights, name, config.integer("hidden_size"), config.number("layer_norm_epsilon", 1e-5))
