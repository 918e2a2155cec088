"""Random problems for the operations that mix tokens, for the start-up check and the tests.

A problem knows its weights. A `Stream` is one sequence: inputs for all its tokens, and where its cache lies.
`run_batch` packs pieces of streams into one batch, in any cut, and hands the outputs back piece by piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import Draws, KVTensors, Mamba1Weights, Mamba2Weights, Ops, StateTensors
from hybrid_cache.kernels.runs import Run, arrange
from hybrid_cache.kernels.shared_prefix import with_schedule

CPU = torch.device("cpu")


class Problem(Protocol):
    """One operation with its weights."""

    name: str

    def inputs(self, num_tokens: int, rng: torch.Generator) -> list[Tensor]:
        """One tensor for each row argument, [num_tokens, ...]."""
        ...

    def cache(self, size: int, filler: float) -> list[Tensor]:
        """Tensors [size, ...] of slots or pages, all `filler`; strided in dimension 0, as those of a real cache."""
        ...

    def apply(self, ops: Ops, inputs: Sequence[Tensor], layout: RowLayout, cache: Sequence[Tensor]) -> Tensor:
        """inputs [R, ...] each, cache as of `cache` -> [R, ...]; advances the cache."""
        ...


@dataclass(frozen=True, slots=True)
class Stream:
    """One sequence: `slot` for state-space operations, `pages` for attention."""

    inputs: list[Tensor]
    slot: int
    pages: list[int]

    def moved(self, slot: int, pages: list[int]) -> "Stream":
        return Stream(self.inputs, slot, pages)


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions [start, end) of a stream; starts from the zero state when `start` is 0."""

    stream: Stream
    start: int
    end: int
    captures: tuple[tuple[int, int], ...] = ()  # (tokens of the piece, slot)
    cuts: tuple[int, ...] = ()  # tokens of the piece after which a tile ends, for backends that pack

    def run(self, decode: bool) -> Run:
        pages = self.stream.pages[: -(-self.end // TILE)]
        fresh = self.start == 0 and not decode
        length, captures = self.end - self.start, list(self.captures)
        return Run(0, length, self.start, self.stream.slot, fresh, pages, captures, self.cuts)


def token(stream: Stream, position: int) -> Piece:
    """A decode row."""
    return Piece(stream, position, position + 1)


def run_batch(
    ops: Ops,
    problem: Problem,
    cache: Sequence[Tensor],
    chunks: Sequence[Piece],
    decodes: Sequence[Piece] = (),
    padding: float = 0.0,
) -> list[Tensor]:
    """One call -> the output rows [tokens, ...] of each piece, chunks first. Padding rows are filled with `padding`.

    Everything is on the device of `cache`, except the inputs of streams, which may be on any.
    """
    device = cache[0].device
    runs_of = ([piece.run(False) for piece in chunks], [piece.run(True) for piece in decodes])
    layout, runs = arrange(*runs_of, packed=ops.packs)
    pieces = [*chunks, *decodes]
    if device != CPU:
        layout = with_schedule(layout).to(device)
    shapes = [((layout.num_rows, *x.shape[1:]), x.dtype) for x in pieces[0].stream.inputs]
    inputs = [torch.full(shape, padding, dtype=dtype, device=device) for shape, dtype in shapes]
    for piece, run in zip(pieces, runs, strict=True):
        for packed, source in zip(inputs, piece.stream.inputs, strict=True):
            packed[run.row : run.row + run.length] = source[piece.start : piece.end]
    out = problem.apply(ops, inputs, layout, cache)
    return [out[run.row : run.row + run.length] for run in runs]


def pool(size: int, shape: Sequence[int], dtype: torch.dtype, filler: float) -> Tensor:
    """[size, *shape], with a gap of 64 bytes and more after each entry."""
    numel = int(torch.tensor(shape).prod())
    gap = 64 // dtype.itemsize
    stride = -(-numel // gap) * gap + gap
    return torch.full((size, stride), filler, dtype=dtype)[:, :numel].view(size, *shape)


AnyProblem = TypeVar("AnyProblem", bound=Problem)


def move(problem: AnyProblem, device: torch.device) -> AnyProblem:
    """Takes the problem's weights to a device, and returns it."""
    for name, value in vars(problem).items():
        setattr(problem, name, _moved(value, device))
    return problem


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def cache_on(device: torch.device, problem: Problem, size: int, filler: float) -> list[Tensor]:
    """The problem's cache, tensors [size, ...], on a device with the strides that it has on the host."""
    found = []
    for entries in problem.cache(size, filler):
        storage = torch.full((size, entries.stride(0)), filler, dtype=entries.dtype, device=device)
        found.append(storage.as_strided(entries.shape, entries.stride()))
    return found


class Mamba2Problem:
    name = "mamba2"

    def __init__(
        self,
        dtype: torch.dtype,
        rng: torch.Generator,
        *,
        num_heads: int = 4,
        head_dim: int = 16,
        d_state: int = 32,
        num_groups: int = 1,
        width: int = 4,
        norm_groups: int = 1,
        dt_min: float = 0.0,
        dt_max: float = float("inf"),
        bias: bool = True,
        norm: bool = True,
        norm_first: bool = False,
    ) -> None:
        inner = num_heads * head_dim
        channels = inner + 2 * num_groups * d_state
        self._dtype = dtype
        self._conv_shape = (width - 1, channels)
        self._state_shape = (num_heads, head_dim, d_state)
        self._row_width = inner + channels + num_heads
        self.weights = Mamba2Weights(
            conv_weight=_normal(rng, channels, width, scale=0.5).to(dtype),
            conv_bias=_normal(rng, channels, scale=0.2).to(dtype) if bias else None,
            dt_bias=_uniform(rng, num_heads, low=-4.0, high=-1.0),
            A=-_uniform(rng, num_heads, low=0.5, high=8.0),
            D=_normal(rng, num_heads),
            norm_weight=_uniform(rng, inner, low=0.5, high=1.5).to(dtype) if norm else None,
            norm_eps=1e-5,
            norm_group=inner // norm_groups,
            num_heads=num_heads,
            head_dim=head_dim,
            d_state=d_state,
            num_groups=num_groups,
            dt_min=dt_min,
            dt_max=dt_max,
            norm_first=norm_first,
        )

    def inputs(self, num_tokens: int, rng: torch.Generator) -> list[Tensor]:
        return [_normal(rng, num_tokens, self._row_width).to(self._dtype)]

    def cache(self, size: int, filler: float) -> list[Tensor]:
        return [
            pool(size, self._conv_shape, self._dtype, filler),
            pool(size, self._state_shape, torch.float32, filler),
        ]

    def apply(self, ops: Ops, inputs: Sequence[Tensor], layout: RowLayout, cache: Sequence[Tensor]) -> Tensor:
        return ops.mamba2(inputs[0], self.weights, layout, StateTensors(conv=cache[0], state=cache[1]))


class ConvProblem:
    name = "causal_conv"

    def __init__(
        self,
        dtype: torch.dtype,
        rng: torch.Generator,
        *,
        channels: int = 40,
        width: int = 4,
        bias: bool = True,
        activation: bool = True,
    ) -> None:
        self._dtype = dtype
        self._activation = activation
        self.weight = _normal(rng, channels, width, scale=0.5).to(dtype)
        self.bias = _normal(rng, channels, scale=0.2).to(dtype) if bias else None

    def inputs(self, num_tokens: int, rng: torch.Generator) -> list[Tensor]:
        return [_normal(rng, num_tokens, len(self.weight)).to(self._dtype)]

    def cache(self, size: int, filler: float) -> list[Tensor]:
        channels, width = self.weight.shape
        return [pool(size, (width - 1, channels), self._dtype, filler)]

    def apply(self, ops: Ops, inputs: Sequence[Tensor], layout: RowLayout, cache: Sequence[Tensor]) -> Tensor:
        return ops.causal_conv(inputs[0], self.weight, self.bias, layout, cache[0], self._activation)


class Mamba1Problem:
    name = "mamba1_scan"

    def __init__(self, dtype: torch.dtype, rng: torch.Generator, *, channels: int = 40, d_state: int = 16) -> None:
        self._dtype = dtype
        self.weights = Mamba1Weights(
            A=-_uniform(rng, channels, d_state, low=0.5, high=8.0),
            D=_normal(rng, channels),
            dt_bias=_uniform(rng, channels, low=-4.0, high=-1.0),
        )

    def inputs(self, num_tokens: int, rng: torch.Generator) -> list[Tensor]:
        channels, d_state = self.weights.A.shape
        widths = (channels, channels, d_state, d_state, channels)  # x, dt, B, C, z
        return [_normal(rng, num_tokens, width).to(self._dtype) for width in widths]

    def cache(self, size: int, filler: float) -> list[Tensor]:
        return [pool(size, self.weights.A.shape, torch.float32, filler)]

    def apply(self, ops: Ops, inputs: Sequence[Tensor], layout: RowLayout, cache: Sequence[Tensor]) -> Tensor:
        x, dt, B, C, z = inputs
        return ops.mamba1_scan(x, dt, B, C, z, self.weights, layout, cache[0])


class GatedDeltaProblem:
    name = "gated_delta"

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        num_heads: int = 4,
        num_groups: int = 2,
        head_dim: int = 24,
        d_state: int = 16,
        max_beta: float = 1.0,
    ) -> None:
        self._dtype = dtype
        self._sizes = (num_heads, num_groups, head_dim, d_state)
        self._max_beta = max_beta

    def inputs(self, num_tokens: int, rng: torch.Generator) -> list[Tensor]:
        num_heads, num_groups, head_dim, d_state = self._sizes
        shapes = ((num_groups, d_state), (num_groups, d_state), (num_heads, head_dim))
        q, k, v = (_normal(rng, num_tokens, *shape).to(self._dtype) for shape in shapes)
        g = _uniform(rng, num_tokens, num_heads, low=-6.0, high=1.0)  # forgets between all and nothing
        return [q, k, v, -g.exp(), _uniform(rng, num_tokens, num_heads, low=0.0, high=self._max_beta)]

    def cache(self, size: int, filler: float) -> list[Tensor]:
        num_heads, _, head_dim, d_state = self._sizes
        return [pool(size, (num_heads, head_dim, d_state), torch.float32, filler)]

    def apply(self, ops: Ops, inputs: Sequence[Tensor], layout: RowLayout, cache: Sequence[Tensor]) -> Tensor:
        q, k, v, g, beta = inputs
        return ops.gated_delta(q, k, v, g, beta, layout, cache[0])


class LinearAttentionProblem:
    name = "linear_attention"

    def __init__(
        self, dtype: torch.dtype, rng: torch.Generator, *, num_heads: int = 4, head_dim: int = 16, d_state: int = 16
    ) -> None:
        self._dtype = dtype
        self._widths = (d_state, d_state, head_dim)  # q, k, v
        self.slope = _uniform(rng, num_heads, low=0.004, high=0.9)

    def inputs(self, num_tokens: int, rng: torch.Generator) -> list[Tensor]:
        return [_normal(rng, num_tokens, len(self.slope), width).to(self._dtype) for width in self._widths]

    def cache(self, size: int, filler: float) -> list[Tensor]:
        d_state, _, head_dim = self._widths
        return [pool(size, (len(self.slope), head_dim, d_state), torch.float32, filler)]

    def apply(self, ops: Ops, inputs: Sequence[Tensor], layout: RowLayout, cache: Sequence[Tensor]) -> Tensor:
        q, k, v = inputs
        return ops.linear_attention(q, k, v, self.slope, layout, cache[0])


class RgLruProblem:
    name = "rg_lru"

    def __init__(self, dtype: torch.dtype, rng: torch.Generator, *, channels: int = 40) -> None:
        self._dtype = dtype
        self.decay = -_uniform(rng, channels, low=0.02, high=2.0)

    def inputs(self, num_tokens: int, rng: torch.Generator) -> list[Tensor]:
        return [_normal(rng, num_tokens, len(self.decay)).to(self._dtype) for _ in range(3)]  # x and two gates

    def cache(self, size: int, filler: float) -> list[Tensor]:
        return [pool(size, self.decay.shape, torch.float32, filler)]

    def apply(self, ops: Ops, inputs: Sequence[Tensor], layout: RowLayout, cache: Sequence[Tensor]) -> Tensor:
        x, input_gate, gate = inputs
        return ops.rg_lru(x, input_gate, gate, self.decay, layout, cache[0])


class KimiDeltaProblem:
    name = "kimi_delta"

    def __init__(
        self, dtype: torch.dtype, *, num_heads: int = 3, head_dim: int = 24, d_state: int = 16, most: float = 2.0
    ) -> None:
        """`most`: no column forgets more than exp(-most) at one token."""
        self._dtype = dtype
        self._sizes = (num_heads, head_dim, d_state)
        self._most = most

    def inputs(self, num_tokens: int, rng: torch.Generator) -> list[Tensor]:
        num_heads, head_dim, d_state = self._sizes
        q, k, v = (_normal(rng, num_tokens, num_heads, n).to(self._dtype) for n in (d_state, d_state, head_dim))
        g = -self._most * _uniform(rng, num_tokens, num_heads, d_state, low=0.0, high=1.0) ** 8
        return [q, k, v, g, _uniform(rng, num_tokens, num_heads, low=0.0, high=1.0)]

    def cache(self, size: int, filler: float) -> list[Tensor]:
        return [pool(size, self._sizes, torch.float32, filler)]

    def apply(self, ops: Ops, inputs: Sequence[Tensor], layout: RowLayout, cache: Sequence[Tensor]) -> Tensor:
        q, k, v, g, beta = inputs
        return ops.kimi_delta(q, k, v, g, beta, layout, cache[0])


class AttentionProblem:
    name = "attention"

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 32,
        window: int | None = None,
    ) -> None:
        self._dtype = dtype
        self._heads = (num_heads, num_kv_heads, num_kv_heads)
        self._head_dim = head_dim
        self._window = window

    def inputs(self, num_tokens: int, rng: torch.Generator) -> list[Tensor]:
        return [_normal(rng, num_tokens, heads, self._head_dim).to(self._dtype) for heads in self._heads]

    def cache(self, size: int, filler: float) -> list[Tensor]:
        return [pool(size, (TILE, self._heads[1], self._head_dim), self._dtype, filler) for _ in range(2)]

    def apply(self, ops: Ops, inputs: Sequence[Tensor], layout: RowLayout, cache: Sequence[Tensor]) -> Tensor:
        q, k, v = inputs
        kv = KVTensors(k=cache[0], v=cache[1])
        return ops.attention(q, k, v, 2.0 * self._head_dim**-0.5, layout, kv, self._window)


def _normal(rng: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=rng) * scale


def _uniform(rng: torch.Generator, *shape: int, low: float, high: float) -> Tensor:
    return torch.rand(shape, generator=rng) * (high - low) + low


RULES = (  # temperature, top_k, top_p, min_p
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 20, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.01, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.7, 50, 0.7, 0.01),
)


def some_draws(
    num_rows: int, device: torch.device = CPU, rules: Sequence[tuple[float, int, float, float]] = RULES
) -> Draws:
    """Draws for [num_rows] rows, which take the rules one after the other; the same points each time."""
    taken = [rules[i % len(rules)] for i in range(num_rows)]
    temperature, top_k, top_p, min_p = zip(*taken, strict=True)
    points = torch.rand(num_rows, generator=torch.Generator(CPU).manual_seed(0), dtype=torch.float64, device=CPU)
    return Draws(
        torch.tensor(temperature, device=device),
        torch.tensor(top_k, device=device),
        torch.tensor(top_p, device=device),
        torch.tensor(min_p, device=device),
        points.to(device),
        not any(temperature),
    )
