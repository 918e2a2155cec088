"""Attention and positions."""

import torch
from torch import Tensor

from hybrid_cache.batch import ForwardBatch
from hybrid_cache.kernels.ops import KVTensors, Linear, Ops
from hybrid_cache.models.blocks.common import CacheEntry, Norm, sigmoid
from hybrid_cache.models.shapes import AttentionShape


class Attention:
    """Causal attention with grouped queries.

    inv_freq        rotary positions on the first `2 * len(inv_freq)` values of each head; None for no positions
    q_norm, k_norm  norms of each head's query and key, before they are turned
    window          a token sees itself and so many tokens - 1 before it; None for all
    gated           `qkv` gives for each head a query and then a gate, whose sigmoid multiplies what the head returns
    """

    def __init__(
        self,
        ops: Ops,
        shape: AttentionShape,
        qkv: Linear,
        out: Linear,
        *,
        scale: float,
        inv_freq: Tensor | None,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        window: int | None = None,
        gated: bool = False,
    ) -> None:
        self.shape = shape
        self._ops = ops
        self._qkv = qkv
        self._out = out
        self._split = [shape.num_heads * (2 if gated else 1), shape.num_kv_heads, shape.num_kv_heads]
        self._scale = scale
        self._inv_freq = inv_freq
        self._q_norm = q_norm
        self._k_norm = k_norm
        self._window = window
        self._gated = gated
        self._plain = q_norm is None and k_norm is None and not gated  # queries and keys lie side by side

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, KVTensors)
        s = self.shape
        qkv = self._qkv(x).view(x.shape[0], -1, s.head_dim)
        q, k, v = qkv.split_with_sizes(self._split, dim=1)
        qk, gate = qkv[:, : -s.num_kv_heads], None
        if self._gated:
            q, gate = q.reshape(x.shape[0], s.num_heads, 2 * s.head_dim).chunk(2, dim=-1)
        if not self._plain:
            q, k = _normed(q, self._q_norm), _normed(k, self._k_norm)
        if self._inv_freq is not None:
            if not self._plain:
                qk = torch.cat([q, k], dim=1)
            q, k = self._turned(qk, batch.positions, self._inv_freq).split_with_sizes(
                [s.num_heads, s.num_kv_heads], dim=1
            )
        y = self._ops.attention(q, k, v, self._scale, batch.layout, cache, self._window)
        if gate is not None:
            y = (y.float() * sigmoid(gate)).to(y.dtype)
        return self._out(y.flatten(1))

    def _turned(self, x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        size = 2 * len(inv_freq)
        if size == x.shape[-1]:
            return self._ops.rotary(x, positions, inv_freq)
        return torch.cat([self._ops.rotary(x[..., :size], positions, inv_freq), x[..., size:]], dim=-1)


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm(x.reshape(-1, x.shape[-1])).view(x.shape)


def rotary_frequencies(theta: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponents
