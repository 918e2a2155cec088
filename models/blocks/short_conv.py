"""Short convolutions between two gates."""

from torch import Tensor

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.kernels.ops import Ops, StateTensors
from hybrid_cache.models.blocks.common import CacheEntry, Mixer, linear
from hybrid_cache.models.shapes import ShortConvShape
from hybrid_cache.models.weights import Weights


class ShortConv(Mixer):
    """C * conv(B * x), all three from one projection (LFM2). It keeps a window of rows and no other state."""

    shape: ShortConvShape

    def __init__(self, ops: Ops, weights: Weights, shape: ShortConvShape, *, bias: bool) -> None:
        s = self.shape = shape
        self._ops = ops
        self._in = linear(ops, weights, {"in_proj": 3 * s.hidden}, s.hidden, bias=bias)
        self._weight = weights.take("conv.weight", s.hidden, 1, s.conv_width).view(s.hidden, s.conv_width)
        self._bias = weights.take("conv.bias", s.hidden) if bias else None
        self._out = linear(ops, weights, {"out_proj": s.hidden}, s.hidden, bias=bias)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        B, C, x = self._in(x).chunk(3, dim=1)
        y = self._ops.causal_conv(B * x, self._weight, self._bias, batch.layout, cache.conv, activation=False)
        return self._out(C * y)
