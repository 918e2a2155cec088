"""Attention over keys and values of low rank."""

import torch
from torch import Tensor

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.kernels.elementwise import gated
from hybrid_cache.kernels.ops import KVTensors, Linear, Ops
from hybrid_cache.models.blocks.attention import Rotary
from hybrid_cache.models.blocks.common import CacheEntry, Mixer, Norm, linear
from hybrid_cache.models.shapes import LatentAttentionShape
from hybrid_cache.models.weights import Weights


class LatentAttention(Mixer):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434), with the matrices that make keys and values of
    a latent row absorbed on the other side of the products: the latent row is cached, and all heads share it.

        (W_k c) . q = c . (W_k^T q)        sum of p W_v c = W_v (sum of p c)

    rotary     positions, on the shared part of the keys and of each query; None for none
    head_gate  gives for each head one number, whose sigmoid multiplies what the head returns
    """

    shape: LatentAttentionShape

    def __init__(
        self,
        ops: Ops,
        weights: Weights,
        shape: LatentAttentionShape,
        out: Linear,
        *,
        bias: bool,
        norm_eps: float,
        rotary: Rotary | None = None,
        head_gate: Linear | None = None,
    ) -> None:
        s = self.shape = shape
        self._ops = ops
        self._q_latent: Linear | None = None
        if s.q_rank is None:
            self._q = self._queries(weights.take("q_proj.weight", s.num_heads * s.query_dim, s.hidden), rotary)
        else:
            self._q_latent = linear(ops, weights, {"q_a_proj": s.q_rank}, s.hidden, bias=bias)
            self._q_norm = Norm(ops, weights, "q_a_layernorm", s.q_rank, norm_eps)
            self._q = self._queries(weights.take("q_b_proj.weight", s.num_heads * s.query_dim, s.q_rank), rotary)
        kv, kv_bias = weights.take("kv_a_proj_with_mqa.weight", s.cached_dim, s.hidden), None
        if bias:
            kv_bias = _paired(weights.take("kv_a_proj_with_mqa.bias", s.cached_dim), s.shared_dim, rotary)
        self._kv = ops.linear(_paired(kv, s.shared_dim, rotary), kv_bias)
        self._kv_norm = Norm(ops, weights, "kv_a_layernorm", s.kv_rank, norm_eps)
        each = weights.take("kv_b_proj.weight", s.num_heads * (s.own_dim + s.value_dim), s.kv_rank)
        w_k, w_v = each.view(s.num_heads, -1, s.kv_rank).split_with_sizes([s.own_dim, s.value_dim], dim=1)
        self._to_latent = [ops.linear(w.T.contiguous()) for w in w_k]
        self._from_latent = [ops.linear(w.contiguous()) for w in w_v]
        self._out = out
        self._rotary = rotary
        self._head_gate = head_gate

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, KVTensors)
        s, rows = self.shape, x.shape[0]
        q = self._q(x if self._q_latent is None else self._q_norm(self._q_latent(x)))
        own, q_shared = q.view(rows, s.num_heads, -1).split_with_sizes([s.own_dim, s.shared_dim], dim=2)
        latent, k_shared = self._kv(x).split_with_sizes([s.kv_rank, s.shared_dim], dim=1)
        k_shared = k_shared[:, None]
        if self._rotary is not None:
            both = self._rotary(torch.cat([q_shared, k_shared], dim=1), batch.positions)
            q_shared, k_shared = both.split_with_sizes([s.num_heads, 1], dim=1)
        q = torch.cat([_each_head(self._to_latent, own), q_shared], dim=2)
        kv = torch.cat([self._kv_norm(latent)[:, None], k_shared], dim=2)
        if batch.effects is not None:
            batch.effects.keys(cache, None if self._rotary is None else self._rotary.inv_freq, s.kv_rank)
        y = self._ops.attention(q, kv, kv, s.query_dim**-0.5, batch.layout, cache)
        y = _each_head(self._from_latent, y[:, :, : s.kv_rank])
        if self._head_gate is not None:
            y = gated(y, self._head_gate(x)[:, :, None])
        return self._out(y.flatten(1))

    def _queries(self, weight: Tensor, rotary: Rotary | None) -> Linear:
        s = self.shape
        heads = weight.view(s.num_heads, s.query_dim, -1)
        return self._ops.linear(torch.cat([_paired(head, s.shared_dim, rotary) for head in heads]))


def _each_head(linears: list[Linear], x: Tensor) -> Tensor:
    """x [R, heads, in] -> [R, heads, out]; a product of its own for each head, so that each is a plain one."""
    return torch.stack([linear(x[:, head].contiguous()) for head, linear in enumerate(linears)], dim=1)


def _paired(weight: Tensor, size: int, rotary: Rotary | None) -> Tensor:
    """The last `size` rows are rotated in neighbouring pairs; moves the pairs' first values before the second ones."""
    if rotary is None:
        return weight
    rotated = weight[-size:]
    return torch.cat([weight[:-size], rotated[0::2], rotated[1::2]])
