"""The recurrent mixer of Griffin."""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.kernels.elementwise import sigmoid
from hybrid_cache.kernels.ops import Linear, Ops, StateTensors
from hybrid_cache.models.blocks.common import CacheEntry, Mixer, linear
from hybrid_cache.models.shapes import RgLruShape
from hybrid_cache.models.weights import Scope, Weights

SHARPNESS = 8.0  # c in the paper


class RgLru(Mixer):
    """A convolution and a real-gated linear recurrent unit (De et al. 2024), times the gelu of another branch."""

    shape: RgLruShape

    def __init__(self, ops: Ops, weights: Weights, shape: RgLruShape) -> None:
        s = self.shape = shape
        self._ops = ops
        self._in = linear(ops, weights, {"linear_y": s.width, "linear_x": s.width}, s.hidden, bias=True)
        self._conv_weight = weights.take("conv_1d.weight", s.width, 1, s.conv_width).view(s.width, s.conv_width)
        self._conv_bias = weights.take("conv_1d.bias", s.width)
        lru = Scope(weights, "rg_lru.")
        self._gates = _gates(ops, lru, s)
        self._decay = -SHARPNESS * softplus(lru.take_float32("recurrent_param", s.width))
        self._out = linear(ops, weights, {"linear_out": s.hidden}, s.width, bias=True)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        s = self.shape
        y, x = self._in(x).chunk(2, dim=1)
        x = self._ops.causal_conv(x, self._conv_weight, self._conv_bias, batch.layout, cache.conv, activation=False)
        gates = [gate(block) for gate, block in zip(self._gates, torch.split(x, s.block_size, dim=1), strict=True)]
        input_gate, gate = torch.stack(gates, dim=1).view(len(x), s.num_blocks, 2, s.block_size).unbind(2)
        if batch.effects is not None:
            batch.effects.decay(cache.state, self._decay * sigmoid(gate.flatten(1)))
        x = self._ops.rg_lru(x, input_gate.flatten(1), gate.flatten(1), self._decay, batch.layout, cache.state)
        return self._out(self._ops.gelu_tanh_mul(torch.cat([y, x], dim=1)))


def _gates(ops: Ops, weights: Weights, shape: RgLruShape) -> list[Linear]:
    """For each block of channels, a projection to the block's input gates, then to its recurrence gates."""
    num, size = shape.num_blocks, shape.block_size
    names = ("input_gate", "recurrent_gate")
    matrices = torch.cat([weights.take(f"{name}_weight", num, size, size).transpose(1, 2) for name in names], dim=1)
    biases = torch.cat([weights.take(f"{name}_bias", num, size) for name in names], dim=1)
    return [ops.linear(matrices[i], biases[i]) for i in range(num)]
