"""The operations that models are built from, and the weights and cache tensors they take.

One `Ops` object is chosen at start (`dispatch.select`) and handed to the model. Letters as in the papers: R packed
rows, H heads, P head dim, N state size, G groups of B and C, K convolution width. Rows are in the model's dtype
(float32 or bfloat16); recurrent state, A, D, dt and everything that accumulates is float32.

Two promises hold for each method of each backend that says `exact`:

1. a row's result has the same bits whatever other rows, tiles or sequences are in the batch, and whatever lies in
   unused rows of pages and slots (it may be NaN);
2. tiles of one sequence give the same bits and states in one call as in several calls, cut at any tile's end.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from hybrid_cache.kernels.codes import Matrix
from hybrid_cache.kernels.layout import RowLayout


@dataclass(frozen=True, slots=True)
class KVTensors:
    """KV pages of one attention layer: k, v [pages, TILE, kv_heads, head_dim]. Only dimension 0 may be strided."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class StateTensors:
    """State slots of one layer. Only dimension 0 may be strided.

    conv [slots, K - 1, channels] rows before activation, oldest first   state [slots, *state_shape] float32
    """

    conv: Tensor
    state: Tensor


@dataclass(frozen=True, slots=True)
class Mamba2Weights:
    """Weights of a Mamba-2 mixer between its two projections (Dao and Gu 2024)."""

    conv_weight: Tensor  # [channels, K], channels = H * P + 2 * G * N
    conv_bias: Tensor | None  # [channels]
    dt_bias: Tensor  # [H] float32
    A: Tensor  # [H] float32, negative
    D: Tensor  # [H] float32
    norm_weight: Tensor | None  # [H * P]; None for y * silu(z) without a norm
    norm_eps: float
    norm_group: int  # channels normalised together; H * P for one norm over all
    num_heads: int
    head_dim: int
    d_state: int
    num_groups: int
    dt_min: float = 0.0  # dt is clamped to [dt_min, dt_max] after softplus
    dt_max: float = float("inf")
    norm_first: bool = False  # norm(y) * silu(z) in place of norm(y * silu(z))


@dataclass(frozen=True, slots=True)
class NormWeights:
    """Of a root-mean-square norm."""

    weight: Tensor  # [hidden]
    eps: float


@dataclass(frozen=True, slots=True)
class Mamba1Weights:
    """Weights of a Mamba-1 scan (Gu and Dao 2023)."""

    A: Tensor  # [channels, N] float32, negative
    D: Tensor  # [channels] float32
    dt_bias: Tensor  # [channels] float32


@dataclass(frozen=True, slots=True)
class Draws:
    """How the tokens of S rows are chosen; tensors are [S], on the device of the logits."""

    temperature: Tensor  # float32; 0 takes the largest logit
    top_k: Tensor  # int64; 0 keeps all
    top_p: Tensor  # float32 in (0, 1]
    min_p: Tensor  # float32 in [0, 1]
    point: Tensor  # float64 in [0, 1): where in the cumulated distribution the token is
    greedy: bool  # all temperatures are 0


class Linear(Protocol):
    """y = x @ W.T + b with a weight that has been packed for the device."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in_features] -> [R, out_features]."""
        ...


class Experts(Protocol):
    """Feed-forward experts: w_out_e @ act(w_in_e @ x)."""

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        """x [R, hidden]   expert_ids [R, k] int64   expert_weights [R, k] float32 -> [R, hidden].

        The weighted sum over the k experts runs in float32, in the order of `expert_ids`.
        """
        ...


class Factors(Protocol):
    """What one adapter adds to the projections of a model (LoRA, Hu et al. 2021), packed. It never changes."""

    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class RowAdapters:
    """Which adapter each row of a pass has.

    index [R] int64, on the CPU: places in `factors`, -1 for rows without one
    """

    index: Tensor
    factors: tuple[Factors, ...]

    @classmethod
    def one(cls, factors: Factors, num_rows: int) -> "RowAdapters":
        """All rows have the same one."""
        return cls(torch.zeros(num_rows, dtype=torch.int64), (factors,))

    def of(self, rows: Tensor) -> "RowAdapters":
        """Of some rows [L], in their order."""
        return replace(self, index=self.index[rows.cpu()])


class Bank(Protocol):
    """The projections of one model that adapters may add to, y += B A x, for those rows of a pass that have one.

    Rows without an adapter have the bits of the model alone, rows with one the same bits whatever other adapters there
    are. One thread at a time runs a model with a bank.
    """

    num_places: int

    def linear(self, base: Linear, sizes: Sequence[int]) -> tuple[Linear, range]:
        """-> the projection, to which adapters may add, and the places of its parts.

        sizes: output features of each part, in their order; together those of `base`
        """
        ...

    def factors(self, pairs: Mapping[int, tuple[Tensor, Tensor]]) -> Factors:
        """Packs what one adapter adds, by place: A [rank, in], B [out, rank], in the type of the rows."""
        ...

    def during(self, adapters: RowAdapters | None) -> AbstractContextManager[None]:
        """Inside, a pass runs whose rows have these adapters. Inside of that, another may run to its end."""
        ...

    def narrow(self, rows: Tensor) -> None:
        """From here on the pass goes on with these of its rows, in their order."""
        ...


class Ops(Protocol):
    """A backend. See the module's two promises."""

    name: str
    device: torch.device  # of all tensors
    packs: bool  # takes packed batches (`layout`)
    inexact: str  # why it does not promise exact results; empty if it does

    def linear(self, weight: Matrix, bias: Tensor | None = None) -> Linear:
        """Packs weight [out, in] (+ bias [out]) -> y = x @ weight.T + bias; the caller may drop its copy."""
        ...

    def bank(self) -> Bank:
        """For the projections of one model that adapters may add to."""
        ...

    def experts(
        self, w_in: Sequence[Matrix], w_out: Sequence[Matrix], act: Callable[[Tensor], Tensor] | None = None
    ) -> Experts:
        """Packs one [2 * inner, hidden] (gate rows first) and one [hidden, inner] matrix for each expert.

        act: None for `silu_mul`; another takes [R, rows of w_in] to [R, inner], each row by itself
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [R, d] -> x / sqrt(mean(x^2) + eps) * weight, computed in float32."""
        ...

    def silu_mul(self, x: Tensor) -> Tensor:
        """x [R, 2 * d] -> silu(x[:, :d]) * x[:, d:]."""
        ...

    def gelu_mul(self, x: Tensor) -> Tensor:
        """x [R, 2 * d] -> gelu(x[:, :d]) * x[:, d:], the exact (erf) gelu."""
        ...

    def gelu_tanh_mul(self, x: Tensor) -> Tensor:
        """x [R, 2 * d] -> gelu(x[:, :d]) * x[:, d:], the gelu with tanh in place of erf."""
        ...

    def rotary(self, x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        """x [R, heads, d], positions [R] int64, inv_freq [d / 2] float32 -> rotated (half-split, "neox" order)."""
        ...

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        layout: RowLayout,
        kv: KVTensors,
        window: int | None = None,
    ) -> Tensor:
        """Writes k, v into the pages at `layout.kv_rows`, then causal attention over each row's sequence.

        q [R, heads, d]   k, v [R, kv_heads, d], heads a multiple of kv_heads -> [R, heads, d]
        window: each token attends to the last `window` tokens, itself included; None for all
        """
        ...

    def mamba2(self, zxbcdt: Tensor, weights: Mamba2Weights, layout: RowLayout, cache: StateTensors) -> Tensor:
        """Everything between in_proj and out_proj: convolution, silu, scan, gate, norm; advances the states.

        zxbcdt [R, 2 * H * P + 2 * G * N + H]: gate z, then x, B, C (convolved), then dt -> [R, H * P]
        """
        ...

    def mamba2_states(self, xbcdt: Tensor, weights: Mamba2Weights, layout: RowLayout, cache: StateTensors) -> None:
        """What `mamba2` does to the states, to the same bits, where nobody needs what it gives.

        xbcdt [R, H * P + 2 * G * N + H]: as there, without z
        """
        ...

    def write_rows(self, k: Tensor, v: Tensor, layout: RowLayout, kv: KVTensors) -> None:
        """What `attention` writes: k, v [R, kv_heads, d] into the pages at `layout.kv_rows`."""
        ...

    def add_gated_mlp(
        self, hidden: Tensor, norm: NormWeights, multiplier: float, gate_up: Linear, down: Linear
    ) -> None:
        """hidden += multiplier * down(silu_mul(gate_up(rms_norm(hidden)))), with the bits of these operations.

        hidden [R, hidden] changes in place.
        """
        ...

    def add_mamba2(
        self,
        hidden: Tensor,
        norm: NormWeights,
        multiplier: float,
        into: Linear,
        out: Linear,
        weights: Mamba2Weights,
        layout: RowLayout,
        cache: StateTensors,
        log_decay: Tensor | None = None,
    ) -> None:
        """hidden += multiplier * out(mamba2(into(rms_norm(hidden)))), as `add_gated_mlp`.

        log_decay [R, H] float32 is overwritten with the logarithm of what each row multiplies the states by.
        """
        ...

    def mamba2_log_decay(self, zxbcdt: Tensor, weights: Mamba2Weights) -> Tensor:
        """zxbcdt [R, 2 * H * P + 2 * G * N + H] -> [R, H] float32, dt A of each row."""
        ...

    def causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: RowLayout,
        conv: Tensor,
        activation: bool = True,
    ) -> Tensor:
        """silu(depthwise causal convolution), or without the silu; advances `conv` [slots, K - 1, channels].

        x [R, channels]   weight [channels, K]   bias [channels] -> [R, channels]
        """
        ...

    def mamba1_scan(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor,
        weights: Mamba1Weights,
        layout: RowLayout,
        state: Tensor,
    ) -> Tensor:
        """h = exp(dt A) h + dt B x, y = (C h + D x) * silu(z), with dt = softplus(dt + dt_bias); advances `state`.

        x, dt, z [R, channels]   B, C [R, N]   state [slots, channels, N] float32 -> [R, channels]
        """
        ...

    def linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, slope: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        """h = exp(-slope) h + v k^T, y = h q for each head (Qin et al. 2024, arXiv 2401.04658); advances `state`.

        q, k [R, H, N]   v [R, H, P]   slope [H] float32, positive   state [slots, H, P, N] float32 -> [R, H, P]
        """
        ...

    def rg_lru(
        self, x: Tensor, input_gate: Tensor, gate: Tensor, decay: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        """h = a h + sqrt(1 - a^2) sigmoid(input_gate) x, with a = exp(decay sigmoid(gate)), for each channel.

        The real-gated linear recurrent unit (De et al. 2024, arXiv 2402.19427, section 2.4). The first token of a
        sequence comes in without the square root. Advances `state`.

        x, input_gate, gate [R, channels]   decay [channels] float32, negative   state [slots, channels] float32
        -> [R, channels]
        """
        ...

    def gated_delta(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        """The gated delta rule (Yang et al. 2024, arXiv 2412.06464): h = exp(g) h, h += beta (v - h k) k^T, y = h q.

        Queries and keys are first divided by sqrt(sum(x^2) + 1e-6), queries also by sqrt(N); advances `state`.

        q, k [R, G, N]   v [R, H, P], H a multiple of G   g, beta [R, H] float32, g <= 0
        state [slots, H, P, N] float32 -> [R, H, P]
        """
        ...

    def kimi_delta(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        """`gated_delta` with a decay for each of the N columns of the state (Kimi Team 2025, arXiv 2510.26692).

        q, k [R, H, N]   v [R, H, P]   g [R, H, N] float32, g <= 0   beta [R, H] float32
        state [slots, H, P, N] float32 -> [R, H, P]
        """
        ...

    def relocate_keys(
        self,
        kv: KVTensors,
        source_rows: Tensor,
        target_rows: Tensor,
        delta: Tensor,
        inv_freq: Tensor | None,
        first: int = 0,
    ) -> None:
        """Copies KV rows to other rows, for tokens whose positions there are `delta` higher.

        source_rows, target_rows [N] int64, page * TILE + offset; a row may not be in both
        delta [N] int64   inv_freq [d / 2] float32: the values [first, first + d) of a head are rotated; None for none
        """
        ...

    def sample(self, logits: Tensor, draws: Draws) -> Tensor:
        """logits [S, V] float32 -> one token a row, [S] int64.

        Weights are exp(logit / temperature). First the `top_k` largest are kept, and any equal to the last of them. Of
        these, a weight is kept if the larger ones add up to less than `top_p` of the sum, and if it is at least `min_p`
        times the largest. The token is the first at which the running sum of what is kept exceeds `point` times the
        whole. NaN counts as infinity; of equal logits the first is the largest.
        """
        ...

    def mask_tokens(self, logits: Tensor, rows: Tensor, words: Tensor) -> None:
        """Logits of tokens that may not come become -inf, in place; rows that are not named keep their bits.

        Token t of logits[rows[i]] may come if bit t % 32 of words[i, t / 32] is set.

        logits [S, V] of any float dtype, only dimension 0 may be strided   rows [C] int64, all different
        words [C, V / 32, rounded up] int32, contiguous
        """
        ...

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        """logits [S, V] float32 -> log(sum(exp(logits))) of each row, [S] float32."""
        ...
