"""Attention and positions."""

from dataclasses import replace
from math import ceil, floor, log, pi

import torch
from torch import Tensor

from hybrid_cache.device.batch import ForwardBatch
from hybrid_cache.errors import ModelError
from hybrid_cache.kernels.elementwise import gated
from hybrid_cache.kernels.ops import KVTensors, Linear, Ops
from hybrid_cache.models.blocks.common import CacheEntry, Mixer, Norm, tail
from hybrid_cache.models.config import Config
from hybrid_cache.models.shapes import AttentionShape


class Rotary:
    """Rotary positions (Su et al. 2021) on the first values of each head; see `rotary_frequencies`."""

    def __init__(
        self, ops: Ops, config: Config, size: int, theta: float = 10000.0, *, rope: Config | None = None
    ) -> None:
        """
        size   how many values of each head are rotated
        theta  the base where the config names none
        rope   the settings, where they are not `config.rope()`
        """
        self._ops = ops
        self.inv_freq, self._scale = rotary_frequencies(rope or config.rope(), size, theta)
        self._size = 2 * len(self.inv_freq)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [R, heads, head_dim]   positions [R] -> [R, heads, head_dim], the first values of each head rotated."""
        size = self._size
        rotated = self._ops.rotary(x if size == x.shape[-1] else x[..., :size], positions, self.inv_freq)
        if self._scale != 1.0:
            rotated *= self._scale
        return rotated if size == x.shape[-1] else torch.cat([rotated, x[..., size:]], dim=-1)


class Attention(Mixer):
    """Causal attention with grouped queries.

    rotary          positions; None for none
    q_norm, k_norm  norms of each head's query and key, or of all heads together, before they are rotated
    window          each token attends to the last `window` tokens, itself included; None for all
    gated           `qkv` gives for each head a query and then a gate, whose sigmoid multiplies what the head returns
    head_gate       gives for each head one number, whose sigmoid multiplies what the head returns
    """

    shape: AttentionShape

    def __init__(
        self,
        ops: Ops,
        shape: AttentionShape,
        qkv: Linear,
        out: Linear,
        *,
        scale: float,
        rotary: Rotary | None,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        window: int | None = None,
        gated: bool = False,
        head_gate: Linear | None = None,
    ) -> None:
        self.shape = replace(shape, window=window)
        self._ops = ops
        self._qkv = qkv
        self._out = out
        self._split = [shape.num_heads * (2 if gated else 1), shape.num_kv_heads, shape.num_kv_heads]
        self._scale = scale
        self._rotary = rotary
        self._q_norm = q_norm
        self._k_norm = k_norm
        self._window = window
        self._gated = gated
        self._head_gate = head_gate
        self._kv = tail(qkv, self._split[0] * shape.head_dim)
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
        if self._rotary is not None:
            if not self._plain:
                qk = torch.cat([q, k], dim=1)
            q, k = self._rotary(qk, batch.positions).split_with_sizes([s.num_heads, s.num_kv_heads], dim=1)
        if batch.effects is not None:
            batch.effects.keys(cache, None if self._rotary is None else self._rotary.inv_freq)
        y = self._ops.attention(q, k, v, self._scale, batch.layout, cache, self._window)
        if self._head_gate is not None:
            gate = self._head_gate(x)[:, :, None]
        if gate is not None:
            y = gated(y, gate)
        return self._out(y.flatten(1))

    def write(self, x: Tensor, batch: ForwardBatch, cache: CacheEntry) -> None:
        assert isinstance(cache, KVTensors)
        s = self.shape
        k, v = self._kv(x).view(x.shape[0], -1, s.head_dim).chunk(2, dim=1)
        k = _normed(k, self._k_norm)
        if self._rotary is not None:
            k = self._rotary(k, batch.positions)
        self._ops.write_rows(k, v, batch.layout, cache)


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm(x.reshape(-1, norm.size)).view(x.shape)


def rotary_frequencies(rope: Config, size: int, theta: float = 10000.0) -> tuple[Tensor, float]:
    """-> inverse frequencies [size / 2] float32, and a factor on the rotated values. `rope`: see `Config.rope`."""
    theta = rope.positive("rope_theta", theta)
    powers = theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    plain = 1.0 / powers
    kind = rope.choice("rope_type", "default", ["default", "dynamic", "linear", "llama3", "proportional", "yarn"])
    if kind == "linear":
        return plain / rope.positive("factor"), 1.0
    if kind == "llama3":
        return _llama3_frequencies(rope, plain), 1.0
    if kind == "proportional":  # the later pairs are not rotated at all
        plain[int(min(max(rope.number("partial_rotary_factor", 1.0), 0.0), 1.0) * size // 2) :] = 0.0
        return plain / rope.positive("factor", 1.0), 1.0
    if kind == "yarn":
        return _yarn_frequencies(rope, theta, size, powers), _yarn_scale(rope)
    return plain, 1.0  # of "dynamic" too, up to `max_position_embeddings`: see `context_of`


def _llama3_frequencies(rope: Config, plain: Tensor) -> Tensor:
    """Long waves are stretched, short ones stay, between them a ramp (Llama 3.1)."""
    factor, trained = rope.positive("factor"), _trained_length(rope)
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if high <= low:
        raise ModelError(f"config.json: high_freq_factor is {high}, expected more than low_freq_factor, {low}")
    turns = trained * plain / (2 * pi)  # in the trained length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - kept) + plain * kept


def _yarn_frequencies(rope: Config, theta: float, size: int, powers: Tensor) -> Tensor:
    """Peng et al. 2023, section 3.2: a ramp over the frequencies, bounded by numbers of turns in the trained length."""
    trained = _trained_length(rope)
    if theta <= 1:
        raise ModelError(f"config.json: rope_theta is {theta}, yarn needs more than 1")

    def index(turns: float) -> float:
        return size * log(trained / (turns * 2 * pi)) / (2 * log(theta))

    low, high = index(rope.positive("beta_fast", 32.0)), index(rope.positive("beta_slow", 1.0))
    if rope.flag("truncate", True):
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    stretched = ((torch.arange(len(powers)) - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return stretched / (_yarn_factor(rope) * powers) + (1 - stretched) / powers


def _yarn_scale(rope: Config) -> float:
    """What yarn multiplies queries and keys by (Peng et al. 2023, section 3.4)."""
    if rope.has("attention_factor"):
        return rope.positive("attention_factor")

    def scale(weight: float) -> float:
        factor = _yarn_factor(rope)
        return 1.0 if factor <= 1 else 0.1 * weight * log(factor) + 1.0

    over, under = (rope.number(name, 0.0) for name in ("mscale", "mscale_all_dim"))
    if min(over, under) < 0:
        raise ModelError(f"config.json: mscale is {over}, mscale_all_dim {under}, expected none below 0")
    return scale(over) / scale(under) if over and under else scale(1.0)


def _yarn_factor(rope: Config) -> float:
    if rope.has("factor"):
        return rope.positive("factor")
    return rope.integer("max_position_embeddings") / _trained_length(rope)


def _trained_length(rope: Config) -> int:
    """Before the frequencies were stretched."""
    if rope.has("original_max_position_embeddings"):
        return rope.integer("original_max_position_embeddings")
    return rope.integer("max_position_embeddings")
