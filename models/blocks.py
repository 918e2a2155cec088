"""The parts that hybrid models are made of. Each takes packed rows x [R, hidden] and gives [R, hidden] back.

A part holds packed weights; its `shape` says what it costs and what it keeps in the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.batch import ForwardBatch
from hybrid_cache.kernels.layout import MIN_ROWS
from hybrid_cache.kernels.ops import Experts, KVTensors, Linear, Mamba1Weights, Mamba2Weights, Ops, StateTensors
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import (
    AttentionShape,
    LayerShape,
    LinearShape,
    Mamba1Shape,
    Mamba2Shape,
    MLPShape,
    ModelShape,
    MoEShape,
)
from hybrid_cache.models.weights import Checkpoint, Weights

CacheEntry = KVTensors | StateTensors
Router = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def linear(ops: Ops, weights: Weights, parts: Mapping[str, int], in_features: int, *, bias: bool = False) -> Linear:
    """One packed projection for `parts` (name -> output features), all of the same input, outputs side by side."""
    matrices = [weights.take(f"{name}.weight", size, in_features) for name, size in parts.items()]
    biases = [weights.take(f"{name}.bias", size) for name, size in parts.items()] if bias else []
    return ops.linear(_join(matrices), _join(biases) if bias else None)


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def linear_shape(part: Linear) -> LinearShape:
    return LinearShape(part.in_features, part.out_features)


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
        self.shape = MLPShape(gate_up.in_features, down.in_features)

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
    """A few experts for each row, chosen by a router."""

    def __init__(self, shape: MoEShape, router: Linear, experts: Experts, route: Router) -> None:
        self.shape = shape
        self._router = router
        self._experts = experts
        self._route = route

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = self._route(self._router(x), self.shape.num_active)
        return self._experts(x, ids, weights)


class Attention:
    """Causal attention with grouped queries; rotary positions if `inv_freq` is given."""

    def __init__(
        self,
        ops: Ops,
        shape: AttentionShape,
        qkv: Linear,
        out: Linear,
        *,
        scale: float,
        inv_freq: Tensor | None,
    ) -> None:
        self.shape = shape
        self._ops = ops
        self._qkv = qkv
        self._out = out
        self._split = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        self._rotary_split = [shape.num_heads + shape.num_kv_heads, shape.num_kv_heads]
        self._scale = scale
        self._inv_freq = inv_freq

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, KVTensors)
        qkv = self._qkv(x).view(x.shape[0], -1, self.shape.head_dim)
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


class Mamba2:
    """State-space mixer with one scalar decay per head. All checkpoints call its weights by the same names."""

    def __init__(
        self,
        ops: Ops,
        weights: Weights,
        shape: Mamba2Shape,
        *,
        conv_bias: bool,
        proj_bias: bool,
        norm_eps: float,
        dt_min: float,
        dt_max: float,
    ) -> None:
        s = self.shape = shape
        self._mamba2 = ops.mamba2
        self._in = linear(ops, weights, {"in_proj": s.projected}, s.hidden, bias=proj_bias)
        self._weights = Mamba2Weights(
            conv_weight=weights.take("conv1d.weight", s.channels, 1, s.conv_width).view(s.channels, s.conv_width),
            conv_bias=weights.take("conv1d.bias", s.channels) if conv_bias else None,
            dt_bias=weights.take_float32("dt_bias", s.num_heads),
            A=-weights.take_float32("A_log", s.num_heads).exp(),
            D=weights.take_float32("D", s.num_heads),
            norm_weight=weights.take("norm.weight", s.inner),
            norm_eps=norm_eps,
            norm_group=s.inner // s.num_groups,
            num_heads=s.num_heads,
            head_dim=s.head_dim,
            d_state=s.d_state,
            num_groups=s.num_groups,
            dt_min=dt_min,
            dt_max=dt_max,
        )
        self._out = linear(ops, weights, {"out_proj": s.hidden}, s.inner, bias=proj_bias)

    def __call__(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> Tensor:
        assert isinstance(cache, StateTensors)
        return self._out(self._mamba2(self._in(x), self._weights, batch.layout, cache))


class Mamba1:
    """State-space mixer with one decay per channel and state, and norms on dt, B and C (Jamba's form)."""

    def __init__(
        self,
        ops: Ops,
        weights: Weights,
        shape: Mamba1Shape,
        *,
        conv_bias: bool,
        proj_bias: bool,
        norm_eps: float,
    ) -> None:
        s = self.shape = shape
        self._ops = ops
        self._in = linear(ops, weights, {"in_proj": 2 * s.inner}, s.hidden, bias=proj_bias)
        self._conv_weight = weights.take("conv1d.weight", s.inner, 1, s.conv_width).view(s.inner, s.conv_width)
        self._conv_bias = weights.take("conv1d.bias", s.inner) if conv_bias else None
        self._x = linear(ops, weights, {"x_proj": s.projected}, s.inner)
        self._x_split = [s.dt_rank, s.d_state, s.d_state]
        self._dt_norm = Norm(ops, weights, "dt_layernorm", s.dt_rank, norm_eps)
        self._b_norm = Norm(ops, weights, "b_layernorm", s.d_state, norm_eps)
        self._c_norm = Norm(ops, weights, "c_layernorm", s.d_state, norm_eps)
        self._dt = linear(ops, weights, {"dt_proj": s.inner}, s.dt_rank)
        self._weights = Mamba1Weights(
            A=-weights.take_float32("A_log", s.inner, s.d_state).exp(),
            D=weights.take_float32("D", s.inner),
            dt_bias=weights.take_float32("dt_proj.bias", s.inner),
        )
        self._out = linear(ops, weights, {"out_proj": s.hidden}, s.inner, bias=proj_bias)

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


class ModelLayer(Protocol):
    """A layer as the model's accounts see it."""

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Of its parts, in the order of use."""
        ...


class CausalModel:
    """What models share around their layers: token embedding, final norm, output head, and the facts about them."""

    def __init__(
        self,
        config: Config,
        weights: Checkpoint,
        ops: Ops,
        dtype: torch.dtype,
        *,
        layers: Sequence[ModelLayer],
        norm: Norm,
        tied: bool,
        logits_divisor: float = 1.0,
    ) -> None:
        """Takes the remaining weights. `tied`: a file without a head uses the embedding."""
        hidden = config.integer("hidden_size")
        self.vocab_size = config.integer("vocab_size")
        self.max_length = config.integer("max_position_embeddings")
        shapes = tuple(shape for layer in layers for shape in layer.shapes)
        self.shape = ModelShape(type(self).__name__, shapes, hidden, self.vocab_size, dtype)
        self.cache_spec = self.shape.cache_spec
        self.prefill_cost = self.shape.prefill_cost
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
