"""What `bench kernels` times: one operation at one size, with the bytes and FLOPs that it cannot do without.

Sizes are those of models of one to eight billion parameters. A prefill case runs one prompt, a decode case one token of
many sequences. Bytes count each input, output, weight, page and state once; FLOPs count the products and sums of
the formulas, and nothing for exponentials.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_cache.bench.kernels.peers import transformers_peers
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import Draws, KVTensors, Ops
from hybrid_cache.kernels.problems import (
    CPU,
    AttentionProblem,
    ConvProblem,
    GatedDeltaProblem,
    KimiDeltaProblem,
    LinearAttentionProblem,
    Mamba1Problem,
    Mamba2Problem,
    Problem,
    RgLruProblem,
    move,
    some_draws,
)
from hybrid_cache.kernels.runs import Run, arrange
from hybrid_cache.kernels.shared_prefix import with_schedule

Timed = Callable[[], object]
Build = Callable[[Ops], Timed]


@dataclass(frozen=True, slots=True)
class Case:
    """`build` makes a call that runs the operation once; `others` are made by other libraries, by name."""

    name: str
    size: str
    flops: float
    bytes: float
    build: Build
    others: Mapping[str, Timed] = field(default_factory=dict)


def cases(dtype: torch.dtype, device: torch.device, prompt: int, sequences: int, context: int) -> Iterator[Case]:
    """
    prompt     tokens of a prefill
    sequences  decode rows
    context    tokens that each decode row attends to
    """
    sizes = _Sizes(dtype, device, prompt, sequences, context)
    yield from sizes.linears()
    yield from sizes.rows()
    yield from sizes.mixers()
    yield from sizes.attention()
    yield from sizes.tokens()


@dataclass(frozen=True, slots=True)
class _Sizes:
    dtype: torch.dtype
    device: torch.device
    prompt: int
    sequences: int
    context: int

    @property
    def _width(self) -> int:
        return self.dtype.itemsize

    def linears(self, out_features: int = 6448, in_features: int = 1536) -> Iterator[Case]:
        """The first projection of a Mamba-2 mixer."""
        weight = self._normal(out_features, in_features) * in_features**-0.5
        for rows in (4, 16, 64, self.prompt):
            x = self._normal(rows, in_features)
            yield Case(
                "linear",
                f"{in_features} to {out_features}, {rows:,} rows",
                flops=2.0 * rows * in_features * out_features,
                bytes=self._width * (weight.numel() + rows * (in_features + out_features)),
                build=_product(weight, x),
                others={"F.linear": partial(F.linear, x, weight)},
            )

    def rows(self, width: int = 2048) -> Iterator[Case]:
        x, weight = self._normal(self.prompt, width), self._normal(width)
        wide = self._normal(self.prompt, 2 * width)
        size = f"{self.prompt:,} rows of {width:,}"
        moved = float(self._width * x.numel())
        yield Case(
            "rms_norm",
            size,
            flops=4.0 * x.numel(),
            bytes=2 * moved,
            build=lambda ops: lambda: ops.rms_norm(x, weight, 1e-5),
            others={"F.rms_norm": lambda: F.rms_norm(x, (width,), weight, 1e-5)},
        )
        yield Case(
            "silu_mul",
            size,
            flops=2.0 * x.numel(),
            bytes=3 * moved,
            build=lambda ops: lambda: ops.silu_mul(wide),
            others={"F.silu": lambda: F.silu(wide[:, :width]) * wide[:, width:]},
        )

    def mixers(self) -> Iterator[Case]:
        """State-space and delta-rule layers, one prompt and many sequences."""
        rng = torch.Generator().manual_seed(0)
        dtype = self.dtype
        # Names, problem, FLOPs of a token in a tile, FLOPs of a step, values of a state.
        heads, size, state = 48, 64, 128
        inner = heads * size
        table: list[tuple[str, Problem, float, float, int]] = [
            (
                f"{heads} heads of {size}, state {state}",
                Mamba2Problem(dtype, rng, num_heads=heads, head_dim=size, d_state=state),
                2.0 * TILE * (state + inner) + 4.0 * inner * state,
                6.0 * inner * state,
                inner * state,
            ),
            (
                "3,072 channels, state 16",
                Mamba1Problem(dtype, rng, channels=3072, d_state=16),
                *(6.0 * 3072 * 16,) * 2,
                3072 * 16,
            ),
            ("3,328 channels", ConvProblem(dtype, rng, channels=3328), 8.0 * 3328, 8.0 * 3328, 0),
            (
                "16 heads of 128, state 128",
                GatedDeltaProblem(dtype, num_heads=16, num_groups=8, head_dim=128, d_state=128),
                16 * (6.0 * 128 * 128 + 4.0 * TILE * 128),
                16 * 8.0 * 128 * 128,
                16 * 128 * 128,
            ),
            (
                "16 heads of 128, state 128",
                KimiDeltaProblem(dtype, num_heads=16, head_dim=128, d_state=128),
                16 * (6.0 * 128 * 128 + 4.0 * TILE * 128),
                16 * 8.0 * 128 * 128,
                16 * 128 * 128,
            ),
            (
                "16 heads of 128, state 128",
                LinearAttentionProblem(dtype, rng, num_heads=16, head_dim=128, d_state=128),
                16 * (4.0 * 128 * 128 + 4.0 * TILE * 128),
                16 * 6.0 * 128 * 128,
                16 * 128 * 128,
            ),
            ("2,560 channels", RgLruProblem(dtype, rng, channels=2560), 8.0 * 2560, 8.0 * 2560, 2560),
        ]
        for sizes, problem, in_tile, in_step, state_values in table:
            for decode in (False, True):
                tokens = self.sequences if decode else self.prompt
                inputs = [x.to(self.device) for x in problem.inputs(tokens, rng)]
                states = 2.0 * 4 * state_values * (self.sequences if decode else 1)
                moved = sum(x.numel() * x.itemsize for x in inputs) * (1 + 1 / len(inputs))
                yield Case(
                    problem.name,
                    f"{sizes}, " + (f"{tokens} steps" if decode else f"{tokens:,} tokens"),
                    flops=tokens * (in_step if decode else in_tile),
                    bytes=states + moved,
                    build=self._mix(problem, inputs, decode),  # takes the problem to the device
                    others=transformers_peers(problem, inputs, decode),
                )

    def attention(self) -> Iterator[Case]:
        for heads, kv_heads, size in ((24, 8, 64), (16, 16, 128)):
            yield self._prefill_attention(heads, kv_heads, size)
            yield self._decode_attention(heads, kv_heads, size, "one sequence", 1, shared=False)
            yield self._decode_attention(heads, kv_heads, size, "all apart", self.sequences, shared=False)
            yield self._decode_attention(heads, kv_heads, size, "one prefix", self.sequences, shared=True)

    def _prefill_attention(self, heads: int, kv_heads: int, size: int) -> Case:
        problem = AttentionProblem(self.dtype, num_heads=heads, num_kv_heads=kv_heads, head_dim=size)
        inputs = [x.to(self.device) for x in problem.inputs(self.prompt, torch.Generator().manual_seed(0))]
        q, k, v = (x.transpose(0, 1)[None] for x in inputs)
        return Case(
            "attention",
            f"{heads} to {kv_heads} heads of {size}, {self.prompt:,} tokens",
            flops=2.0 * heads * size * self.prompt * (self.prompt + 1),
            bytes=float(self._width * 2 * self.prompt * size * (heads + kv_heads)),
            build=self._mix(problem, inputs, decode=False),
            others={"SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)},
        )

    def _decode_attention(
        self, heads: int, kv_heads: int, size: int, how: str, sequences: int, *, shared: bool
    ) -> Case:
        pages = self.context // TILE
        problem = AttentionProblem(self.dtype, num_heads=heads, num_kv_heads=kv_heads, head_dim=size)
        inputs = [x.to(self.device) for x in problem.inputs(sequences, torch.Generator().manual_seed(0))]
        copies = 1 if shared else sequences
        runs = [
            Run(
                0,
                1,
                pages * TILE,
                0,
                False,
                [*range(i % copies * pages, (i % copies + 1) * pages), copies * pages + i],
                [],
            )
            for i in range(sequences)
        ]
        cache = [self._normal(copies * pages + sequences, TILE, kv_heads, size) for _ in range(2)]
        layout = self._layout([], runs)
        q, k, v = (self._padded(x, layout) for x in inputs)
        kv = KVTensors(k=cache[0], v=cache[1])
        values = 2 * pages * TILE * kv_heads * size
        return Case(
            "decode attention",
            f"{heads} to {kv_heads} heads of {size}, {sequences} x {self.context:,}, {how}",
            flops=4.0 * sequences * heads * size * (pages * TILE + 1),
            bytes=float(self._width * copies * values),
            build=lambda ops: lambda: ops.attention(q, k, v, 0.1, layout, kv),
            others={"SDPA": self._dense(inputs[0], [pages_of[: copies * pages] for pages_of in cache])},
        )

    def tokens(self, vocab: int = 100_352) -> Iterator[Case]:
        """The end of a decode step, and what moving a message costs one attention layer."""
        rng = torch.Generator(CPU).manual_seed(0)
        logits = (3 * torch.randn(self.sequences, vocab, generator=rng, device=CPU)).to(self.device)
        libraries: list[tuple[str, tuple[float, int, float, float], dict[str, Timed]]] = [
            ("greedy", (0.0, 0, 1.0, 0.0), {"argmax": lambda: logits.argmax(1)}),
            ("temperature 1", (1.0, 0, 1.0, 0.0), {"multinomial": lambda: logits.softmax(1).multinomial(1)}),
            ("top_p 0.9", (1.0, 0, 0.9, 0.0), {"sort": lambda: _draw_sorted(logits, 0.9)}),
            ("top_k 50", (1.0, 50, 1.0, 0.0), {"topk": lambda: logits.topk(50).values.softmax(1).multinomial(1)}),
        ]
        for name, rule, others in libraries:
            draws = some_draws(self.sequences, self.device, [rule])
            yield Case(
                "sample",
                f"{self.sequences} rows of {vocab:,}, {name}",
                flops=2.0 * logits.numel(),
                bytes=4.0 * logits.numel(),
                build=partial(_sampling, logits, draws),
                others=others,
            )
        words = torch.randint(-(2**31), 2**31 - 1, (self.sequences, -(-vocab // 32)), generator=rng, device=CPU)
        masks = torch.arange(self.sequences, device=self.device), words.int().to(self.device)
        yield Case(
            "mask_tokens",
            f"{self.sequences} rows of {vocab:,}",
            flops=float(logits.numel()),
            bytes=8.0 * logits.numel(),
            build=lambda ops: lambda: ops.mask_tokens(logits, *masks),
            others={},
        )
        heads, size, num_pages = 8, 128, -(-self.prompt // TILE)
        pages = KVTensors(*(self._normal(2 * num_pages, TILE, heads, size) for _ in "kv"))
        sources = torch.arange(self.prompt, device=self.device)
        targets, turns = sources + num_pages * TILE, torch.full_like(sources, 100)
        inv_freq = 1e4 ** -(torch.arange(size // 2, device=self.device) / (size // 2))
        yield Case(
            "relocate_keys",
            f"{self.prompt:,} tokens, {heads} heads of {size}",
            flops=3.0 * self.prompt * heads * size,
            bytes=4.0 * self._width * self.prompt * heads * size,
            build=lambda ops: lambda: ops.relocate_keys(pages, sources, targets, turns, inv_freq),
        )

    def _dense(self, q: Tensor, pages: list[Tensor]) -> Timed:
        """Each row of q over as many keys, a head's side by side and its queries as rows, which suits torch best.

        Without page tables, and without the newest key. The numbers are those of the pages, taken for another order.
        """
        kv_heads, size = pages[0].shape[2:]
        keys, values = (
            t.view(-1, kv_heads, self.context // TILE * TILE, size).expand(len(q), -1, -1, -1) for t in pages
        )
        rows = q.view(len(q), kv_heads, -1, size)
        return lambda: F.scaled_dot_product_attention(rows, keys, values)

    def _mix(self, problem: Problem, inputs: list[Tensor], decode: bool) -> Build:
        """One prompt from the zero state, or one token of each sequence."""
        tokens = len(inputs[0])
        pages = -(-tokens // TILE)
        if decode:
            layout = self._layout([], [Run(0, 1, 0, i, False, [i], []) for i in range(tokens)])
        else:
            layout = self._layout([Run(0, tokens, 0, 0, True, list(range(pages)), [])], [])
        cache = [x.to(self.device) for x in problem.cache(max(tokens if decode else 1, pages), 0.0)]
        rows = [self._padded(x, layout) for x in inputs]
        move(problem, self.device)
        return lambda ops: lambda: problem.apply(ops, rows, layout, cache)

    def _layout(self, chunks: list[Run], decodes: list[Run]) -> RowLayout:
        layout, _ = arrange(chunks, decodes)
        return layout if self.device.type == "cpu" else with_schedule(layout).to(self.device)

    def _padded(self, x: Tensor, layout: RowLayout) -> Tensor:
        return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, layout.num_rows - len(x)))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(self.device, self.dtype)


def _sampling(logits: Tensor, draws: Draws, ops: Ops) -> Timed:
    return lambda: ops.sample(logits, draws)


def _draw_sorted(logits: Tensor, top_p: float) -> Tensor:
    """As sampling is written in plain torch."""
    probs, tokens = logits.softmax(1).sort(dim=1, descending=True)
    probs[probs.cumsum(1) - probs >= top_p] = 0
    return tokens.gather(1, probs.multinomial(1))


def _product(weight: Tensor, x: Tensor) -> Build:
    def build(ops: Ops) -> Timed:
        linear = ops.linear(weight)
        return lambda: linear(x)

    return build
