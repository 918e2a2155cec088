"""The parts that hybrid models are made of. Each takes packed rows x [R, hidden] and gives [R, hidden] back.

A part holds packed weights and knows its price: `cost` counts the FLOPs of its matrix products, convolution, scan and
attention (a multiplication and an addition are two), `spec` says what it keeps in the cache.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.batch import ForwardBatch
from hybrid_cache.kernels.layout import MIN_ROWS, TILE
from hybrid_cache.kernels.ops import Experts, KVTensors, Linear, Mamba1Weights, Mamba2Weights, Ops, StateTensors
from hybrid_cache.models.config import Config
from hybrid_cache.models.weights import Checkpoint, Weights
from hybrid_cache.spec import AttentionSpec, CacheSpec, PrefillCost, StateSpec

CacheEntry = KVTensors | StateTensors
Router = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def linear(ops: Ops, weights: Weights, parts: Mapping[str, int], in_features: int, *, bias: bool = False) -> Linear:
    """One packed projection for `parts` (name -> output features), all of the same input, outputs side by side."""
    matrices = [weights.take(f"{name}.weight", size, in_features) for name, size in parts.items()]
    biases = [weights.take(f"{name}.bias", size) for name, size in parts.items()] if bias else []
    return ops.linear(_join(matrices), _join(biases) if bias else None)


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def linear_cost(*linears: Linear) -> PrefillCost:
    return PrefillCost(sum(2.0 * part.in_features * part.out_features for part in linears), 0.0)


def gated_cost(hidden: int, inner: int) -> PrefillCost:
    """One gated feed-forward expert."""
    return PrefillCost(6.0 * hidden * inner, 0.0)


def total_cost(costs: Iterable[PrefillCost]) -> PrefillCost:
    costs = list(costs)
    return PrefillCost(sum(c.per_token for c in costs), sum(c.per_token_per_position for c in costs))


class Norm:
    """Root-mean-square norm."""

    def __init__(self, ops: Ops, weights: Weights, name: str, size: int, eps: float) -> None:
        self._rms_norm = ops.rms_norm
        self._weight = weights.take(f"{name}.weight", size)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return self._rms_norm(x, self._weight, self._eps)


class MLP:
    """Gated feed-forward layer; `gate_mul` is `ops.silu_mul` or `ops.gelu_mul`."""

    def __init__(self, gate_up: Linear, down: Linear, gate_mul: Callable[[Tensor], Tensor]) -> None:
        self._gate_up = gate_up
        self._down = down
        self._gate_mul = gate_mul
        self.cost = linear_cost(gate_up, down)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._gate_mul(self._gate_up(x)))


def softmax_of_chosen(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights of the k chosen experts add up to one."""
    chosen, ids = logits.float().topk(k, dim=-1)
    return ids, chosen.softmax(dim=-1)


def chosen_of_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights of all experts add up to one; the k largest are used as they are."""
    chosen, ids = logits.float().softmax(dim=-1).topk(k, dim=-1)
    return ids, chosen


class MoE:
    """k experts for each row, chosen by a router."""

    def __init__(self, router: Linear, experts: Experts, route: Router, k: int, expert_cost: PrefillCost) -> None:
        self._router = router
        self._experts = experts
        self._route = route
        self._k = k
        self.cost = total_cost([linear_cost(router), *[expert_cost] * k])

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = self._route(self._router(x), self._k)
        return self._experts(x, ids, weights)


class Attention:
    """Causal attention with grouped queries; rotary positions if `inv_freq` is given."""

    def __init__(
        self,
        ops: Ops,
        qkv: Linear,
        out: Linear,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        inv_freq: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._ops = ops
        self._qkv = qkv
        self._out = out
        self._split = [num_heads, num_kv_heads, num_kv_heads]
        self._rotary_split = [num_heads + num_kv_heads, num_kv_heads]
        self._head_dim = head_dim
        self._scale = scale
        self._inv_freq = inv_freq
        self.spec = AttentionSpec(num_kv_heads, head_dim, dtype)
        per_key = 4.0 * num_heads * head_dim  # q.k and p.v
        self.cost = total_cost([linear_cost(qkv, out), PrefillCost(per_key, per_key)])

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, KVTensors)
        qkv = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        if self._inv_freq is None:
            q, k, v = qkv.split_with_sizes(self._split, dim=1)
        else:
            qk, v = qkv.split_with_sizes(self._rotary_split, dim=1)
            q, k = self._ops.rotary(qk, batch.positions, self._inv_freq).split_with_sizes(self._split[:2], dim=1)
        y = self._ops.attention(q, k, v, self._scale, batch.layout, cache)
        return self._out(y.flatten(1))


def rotary_frequencies(theta: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / theta**exponents


@dataclass(frozen=True, slots=True)
class Mamba2Shape:
    """Sizes of a Mamba-2 mixer. `conv_bias` and `proj_bias` say which biases the checkpoint has."""

    hidden: int
    num_heads: int
    head_dim: int
    d_state: int
    num_groups: int
    conv_width: int
    conv_bias: bool
    proj_bias: bool
    norm_eps: float
    dt_min: float
    dt_max: float

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.num_groups * self.d_state


class Mamba2:
    """State-space mixer with one scalar decay per head. All checkpoints call its weights by the same names."""

    def __init__(self, ops: Ops, weights: Weights, s: Mamba2Shape, dtype: torch.dtype) -> None:
        self._mamba2 = ops.mamba2
        projected = s.inner + s.channels + s.num_heads
        self._in = linear(ops, weights, {"in_proj": projected}, s.hidden, bias=s.proj_bias)
        self._weights = Mamba2Weights(
            conv_weight=weights.take("conv1d.weight", s.channels, 1, s.conv_width).view(s.channels, s.conv_width),
            conv_bias=weights.take("conv1d.bias", s.channels) if s.conv_bias else None,
            dt_bias=weights.take_float32("dt_bias", s.num_heads),
            A=-weights.take_float32("A_log", s.num_heads).exp(),
            D=weights.take_float32("D", s.num_heads),
            norm_weight=weights.take("norm.weight", s.inner),
            norm_eps=s.norm_eps,
            norm_group=s.inner // s.num_groups,
            num_heads=s.num_heads,
            head_dim=s.head_dim,
            d_state=s.d_state,
            num_groups=s.num_groups,
            dt_min=s.dt_min,
            dt_max=s.dt_max,
        )
        self._out = linear(ops, weights, {"out_proj": s.hidden}, s.inner, bias=s.proj_bias)
        self.spec = StateSpec((s.conv_width - 1, s.channels), (s.num_heads, s.head_dim, s.d_state), dtype)
        self.cost = total_cost([linear_cost(self._in, self._out), _mamba2_cost(s)])

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        return self._out(self._mamba2(self._in(x), self._weights, batch.layout, cache))


def _mamba2_cost(s: Mamba2Shape) -> PrefillCost:
    conv = 2.0 * s.conv_width * s.channels
    inside_tile = 2.0 * TILE * (s.num_groups * s.d_state + s.inner)  # C.B of all pairs of rows, then times x
    across_tiles = 4.0 * s.inner * s.d_state  # C times the state at the start, B x into the state at the end
    return PrefillCost(conv + inside_tile + across_tiles, 0.0)


class Mamba1:
    """State-space mixer with one decay per channel and state, and norms on dt, B and C (Jamba's form)."""

    def __init__(
        self,
        ops: Ops,
        weights: Weights,
        *,
        hidden: int,
        inner: int,
        d_state: int,
        dt_rank: int,
        conv_width: int,
        conv_bias: bool,
        proj_bias: bool,
        norm_eps: float,
        dtype: torch.dtype,
    ) -> None:
        self._ops = ops
        self._in = linear(ops, weights, {"in_proj": 2 * inner}, hidden, bias=proj_bias)
        self._conv_weight = weights.take("conv1d.weight", inner, 1, conv_width).view(inner, conv_width)
        self._conv_bias = weights.take("conv1d.bias", inner) if conv_bias else None
        self._x = linear(ops, weights, {"x_proj": dt_rank + 2 * d_state}, inner)
        self._x_split = [dt_rank, d_state, d_state]
        self._dt_norm = Norm(ops, weights, "dt_layernorm", dt_rank, norm_eps)
        self._b_norm = Norm(ops, weights, "b_layernorm", d_state, norm_eps)
        self._c_norm = Norm(ops, weights, "c_layernorm", d_state, norm_eps)
        self._dt = linear(ops, weights, {"dt_proj": inner}, dt_rank)
        self._weights = Mamba1Weights(
            A=-weights.take_float32("A_log", inner, d_state).exp(),
            D=weights.take_float32("D", inner),
            dt_bias=weights.take_float32("dt_proj.bias", inner),
        )
        self._out = linear(ops, weights, {"out_proj": hidden}, inner, bias=proj_bias)
        self.spec = StateSpec((conv_width - 1, inner), (inner, d_state), dtype)
        conv, scan = 2.0 * conv_width * inner, 7.0 * inner * d_state  # dt A, exp, h, dt x, B, C, sum
        projections = linear_cost(self._in, self._x, self._dt, self._out)
        self.cost = total_cost([projections, PrefillCost(conv + scan, 0.0)])

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        x, z = self._in(x).chunk(2, dim=1)
        x = self._ops.causal_conv(x, self._conv_weight, self._conv_bias, batch.layout, cache.conv)
        dt, B, C = self._x(x).split_with_sizes(self._x_split, dim=1)
        dt = self._dt(self._dt_norm(dt))
        B, C = self._b_norm(B), self._c_norm(C)
        y = self._ops.mamba1_scan(x, dt, B, C, z, self._weights, batch.layout, cache.state)
        return self._out(y)


def wanted_rows(hidden: Tensor, batch: ForwardBatch) -> Tensor:
    """The output rows of the batch, first; padded to MIN_ROWS with copies of row 0."""
    rows = batch.output_rows
    missing = MIN_ROWS - rows.shape[0]
    return hidden[F.pad(rows, (0, missing)) if missing > 0 else rows]


class PricedLayer(Protocol):
    """A layer as the model's accounts see it: entries it keeps in the cache, in the order of use, and its price."""

    @property
    def specs(self) -> tuple[AttentionSpec | StateSpec, ...]: ...

    @property
    def cost(self) -> PrefillCost: ...


class CausalModel:
    """What models share around their layers: token embedding, final norm, output head, and the facts about them."""

    def __init__(
        self,
        config: Config,
        weights: Checkpoint,
        ops: Ops,
        dtype: torch.dtype,
        *,
        layers: Sequence[PricedLayer],
        norm: Norm,
        tied: bool,
        logits_divisor: float = 1.0,
    ) -> None:
        """Takes the remaining weights. `tied`: a file without a head uses the embedding."""
        hidden = config.integer("hidden_size")
        self.vocab_size = config.integer("vocab_size")
        self.max_length = config.integer("max_position_embeddings")
        self.cache_spec = CacheSpec(tuple(spec for layer in layers for spec in layer.specs), hidden, dtype)
        self.prefill_cost = total_cost([layer.cost for layer in layers])
        self._embedding = weights.take("model.embed_tokens.weight", self.vocab_size, hidden)
        shared = tied and not weights.has("lm_head.weight")
        self._head = ops.linear(self._embedding if shared else weights.take("lm_head.weight", self.vocab_size, hidden))
        self._norm = norm
        self._logits_divisor = logits_divisor
        facts = f"{type(self).__name__} {weights.finish()} {config.used_json()} {dtype} {ops.name}"
        self.fingerprint = blake2b(facts.encode(), digest_size=16).hexdigest()

    def logits(self, hidden: Tensor) -> Tensor:
        rows = hidden.shape[0]
        if rows < MIN_ROWS:
            hidden = F.pad(hidden, (0, 0, 0, MIN_ROWS - rows))
        logits = self._head(hidden)[:rows].float()
        return logits if self._logits_divisor == 1.0 else logits / self._logits_divisor
