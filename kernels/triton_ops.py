"""The GPU backend: Triton kernels for what torch has no operation for, and for what has to be exact.

The same arguments and the same grid as every backend (see `ops`). Block sizes are fixed and nothing is autotuned, so an
order of summation never depends on the batch, the state of the GPU, or the process. Without a GPU the kernels run in
Triton's interpreter (`TRITON_INTERPRET=1`), for tests; tensors on other devices go to `TorchOps`, and so does
what no kernel has code for.
"""

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Concatenate

import torch
import triton
from torch import Tensor

from hybrid_cache.kernels import sampling, torch_ops
from hybrid_cache.kernels.codes import Coded, Matrix
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import Draws, Experts, KVTensors, Linear, Mamba1Weights, Mamba2Weights, StateTensors
from hybrid_cache.kernels.problems import some_draws
from hybrid_cache.kernels.runs import Run, Runs, arrange
from hybrid_cache.kernels.shared_prefix import schedule_shared
from hybrid_cache.kernels.torch_ops import LoopExperts, P, TorchOps
from hybrid_cache.kernels.triton_kernels import attention, conv, delta, low_bit, matmul, rows, sample, scan, ssd
from hybrid_cache.kernels.unsupported import UnsupportedShape

# Triton 3.9 warns unless it is set whether a * b + c may be one instruction; 3.10 will say no.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

FAST = "fast mode: products are cuBLAS's, whose bits depend on the number of rows"
CPU = torch.device("cpu")
CHECK_ROWS = 70
CHECK_DRAWS = 18
NUM_SLOTS = 8  # or pages
# Share of the output's root mean square; what is wrong is further off than any rounding.
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Operation -> how many of its first arguments have rows, and which argument is the cache.
_MIXERS = {
    "attention": (3, 5),
    "mamba2": (1, 3),
    "causal_conv": (1, 4),
    "mamba1_scan": (5, 7),
    "linear_attention": (3, 5),
    "rg_lru": (3, 5),
    "gated_delta": (5, 6),
    "kimi_delta": (5, 6),
}

Pairs = list[tuple[Tensor, Tensor]]
"""What a kernel says, and what torch does."""


def with_kernel(
    plain: Callable[Concatenate[TorchOps, P], Tensor], kernel: Callable[P, Tensor]
) -> Callable[Concatenate["TritonOps", P], Tensor]:
    """A method of `TorchOps` as one of `TritonOps`: a kernel of the same signature for the tensors it can reach.

    Shapes are those of the method in `Ops` ([R, ...] and so on). Callers pass tensors, weights, layout and cache by
    position; only options by name.
    """

    @functools.wraps(plain)
    def run(self: "TritonOps", /, *args: P.args, **options: P.kwargs) -> Tensor:
        return self._run(plain.__name__, kernel, functools.partial(plain, self), *args, **options)

    return run


class TritonOps(TorchOps):
    """See the module. `fast` leaves matrix products to cuBLAS, whose bits depend on the number of rows.

    reasons: operation -> why it is left to torch, for the latest such call; empty where kernels do everything
    """

    name = "triton"
    packs = False  # kernels write whole tiles

    def __init__(self, fast: bool = False) -> None:
        super().__init__()
        interpreted = bool(triton.knobs.runtime.interpret)
        self.device = CPU if interpreted else torch.device("cuda", torch.cuda.current_device())
        self.reasons: dict[str, str] = {}
        self.inexact = FAST if fast else ""
        self._fast = fast

    def linear(self, weight: Matrix, bias: Tensor | None = None) -> Linear:
        if self._fast or not _reachable(_values(weight)):
            return super().linear(weight, bias)
        if isinstance(weight, Coded):
            return low_bit.TritonCodedLinear(weight, bias)
        return matmul.TritonLinear(weight, bias)

    def experts(
        self, w_in: Sequence[Matrix], w_out: Sequence[Matrix], act: Callable[[Tensor], Tensor] | None = None
    ) -> Experts:
        plain_in, plain_out = _plain(w_in), _plain(w_out)
        if plain_in is None or plain_out is None or not _reachable(plain_in[0]):
            return super().experts(w_in, w_out, act)
        return matmul.TritonExperts(plain_in, plain_out, act or self.silu_mul)

    rms_norm = with_kernel(TorchOps.rms_norm, rows.rms_norm)
    rotary = with_kernel(TorchOps.rotary, rows.rotary)
    attention = with_kernel(TorchOps.attention, attention.attention)
    mamba2 = with_kernel(TorchOps.mamba2, ssd.mamba2)
    causal_conv = with_kernel(TorchOps.causal_conv, conv.causal_conv)
    mamba1_scan = with_kernel(TorchOps.mamba1_scan, scan.mamba1_scan)
    linear_attention = with_kernel(TorchOps.linear_attention, ssd.linear_attention)
    rg_lru = with_kernel(TorchOps.rg_lru, scan.rg_lru)
    gated_delta = with_kernel(TorchOps.gated_delta, delta.gated_delta)
    kimi_delta = with_kernel(TorchOps.kimi_delta, delta.kimi_delta)
    log_sum_exp = with_kernel(TorchOps.log_sum_exp, sample.log_sum_exp)
    sample = with_kernel(TorchOps.sample, sample.sample)

    def silu_mul(self, x: Tensor) -> Tensor:
        return self._run("silu_mul", lambda x: rows.gated(x, "silu"), super().silu_mul, x)

    def gelu_mul(self, x: Tensor) -> Tensor:
        return self._run("gelu_mul", lambda x: rows.gated(x, "gelu"), super().gelu_mul, x)

    def gelu_tanh_mul(self, x: Tensor) -> Tensor:
        return self._run("gelu_tanh_mul", lambda x: rows.gated(x, "gelu_tanh"), super().gelu_tanh_mul, x)

    def relocate_keys(
        self,
        kv: KVTensors,
        source_rows: Tensor,
        target_rows: Tensor,
        delta: Tensor,
        inv_freq: Tensor | None,
        first: int = 0,
    ) -> None:
        move = rows.relocate_keys if _reachable(kv.k) else super().relocate_keys
        move(kv, source_rows, target_rows, delta, inv_freq, first)

    def mask_tokens(self, logits: Tensor, rows: Tensor, words: Tensor) -> None:
        mask = sample.mask_tokens if _reachable(logits) else super().mask_tokens
        mask(logits, rows, words)

    def _run(
        self, name: str, kernel: Callable[..., Tensor], plain: Callable[..., Tensor], *args: object, **options: object
    ) -> Tensor:
        """`kernel(*args, **options)`, or the same of `plain` where there is no kernel for them."""
        x = args[0]
        assert isinstance(x, Tensor)
        if not _reachable(x):
            return plain(*args, **options)
        try:
            return kernel(*args, **options)
        except UnsupportedShape as error:  # raised before anything was changed
            self.reasons[name] = str(error)
            return plain(*args, **options)


def _values(matrix: Matrix) -> Tensor:
    return matrix if isinstance(matrix, Tensor) else matrix.scales


def _plain(matrices: Sequence[Matrix]) -> list[Tensor] | None:
    """None if some are codes."""
    plain = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
    return plain if len(plain) == len(matrices) else None


class CheckedTritonOps(TritonOps):
    """Tries a kernel on a small case before its first use for arguments of a kind, against `TorchOps` on this device.

    The case has the shapes, types, weights and some rows of the first call. A kernel that fails there, or is wrong, is
    never called with arguments of this kind; torch is.
    """

    def __init__(self, fast: bool = False) -> None:
        super().__init__(fast)
        self._verdicts: dict[Hashable, bool] = {}

    def linear(self, weight: Matrix, bias: Tensor | None = None) -> Linear:
        if self._fast or not _reachable(_values(weight)):
            return super().linear(weight, bias)
        plain, made = TorchOps.linear(self, weight, bias), super().linear

        def probe() -> Pairs:
            like = weight if isinstance(weight, Tensor) else weight.scales.bfloat16()
            x = _random(like, CHECK_ROWS, weight.shape[1])
            return [(made(weight, bias)(x), plain(x))]

        number = weight.dtype if isinstance(weight, Tensor) else weight.bits
        kind = ("linear", number, tuple(weight.shape), bias is None)
        return made(weight, bias) if self._agrees("linear", kind, probe) else plain

    def experts(
        self, w_in: Sequence[Matrix], w_out: Sequence[Matrix], act: Callable[[Tensor], Tensor] | None = None
    ) -> Experts:
        plain_in, plain_out = _plain(w_in), _plain(w_out)
        if plain_in is None or plain_out is None or not _reachable(plain_in[0]):
            return super().experts(w_in, w_out, act)
        w_in, w_out = plain_in, plain_out
        act, made = act or self.silu_mul, super().experts
        plain = LoopExperts([torch_ops.pack(w) for w in w_in], [torch_ops.pack(w) for w in w_out], act)

        def probe() -> Pairs:
            x = _random(w_in[0], CHECK_ROWS, w_in[0].shape[1])
            shares, ids = _random(x, CHECK_ROWS, len(w_in)).float().abs().topk(min(2, len(w_in)))
            return [(made(w_in, w_out, act)(x, ids, shares), plain(x, ids, shares))]

        kind = ("experts", w_in[0].dtype, len(w_in), *w_in[0].shape, *w_out[0].shape)
        return made(w_in, w_out, act) if self._agrees("experts", kind, probe) else plain

    def relocate_keys(
        self,
        kv: KVTensors,
        source_rows: Tensor,
        target_rows: Tensor,
        delta: Tensor,
        inv_freq: Tensor | None,
        first: int = 0,
    ) -> None:
        plain, made = TorchOps.relocate_keys, super().relocate_keys

        def probe() -> Pairs:
            places = (torch.arange(3, 9), torch.arange(TILE - 2, TILE + 4), torch.tensor([0, 7, -300, TILE, 1, -1]))
            sources, targets, delta = (x.to(kv.k.device) for x in places)
            found, expected = (KVTensors(_slots_like(kv.k), _slots_like(kv.v)) for _ in range(2))
            made(found, sources, targets, delta, inv_freq, first)
            plain(self, expected, sources, targets, delta, inv_freq, first)
            return [(found.k, expected.k), (found.v, expected.v)]

        kind = ("relocate_keys", _kind(kv), None if inv_freq is None else len(inv_freq), first)
        if self._agrees("relocate_keys", kind, probe):
            made(kv, source_rows, target_rows, delta, inv_freq, first)
        else:
            plain(self, kv, source_rows, target_rows, delta, inv_freq, first)

    def mask_tokens(self, logits: Tensor, rows: Tensor, words: Tensor) -> None:
        plain, made = TorchOps.mask_tokens, super().mask_tokens

        def probe() -> Pairs:
            found, expected = (_random(logits, CHECK_ROWS, logits.shape[1]) for _ in range(2))
            few, bits = torch.tensor([2, 0], device=logits.device), _random(logits, 2, words.shape[1]).float()
            made(found, few, bits.view(torch.int32))
            plain(self, expected, few, bits.view(torch.int32))
            return [(found.clamp_(-9), expected.clamp_(-9))]  # minus infinity is no number to compare

        if self._agrees("mask_tokens", ("mask_tokens", _kind(logits)), probe):
            made(logits, rows, words)
        else:
            plain(self, logits, rows, words)

    def _run(
        self, name: str, kernel: Callable[..., Tensor], plain: Callable[..., Tensor], *args: object, **options: object
    ) -> Tensor:
        x = args[0]
        assert isinstance(x, Tensor)
        if not _reachable(x):
            return plain(*args, **options)

        def probe() -> Pairs:
            both = functools.partial(kernel, **options), functools.partial(plain, **options)
            if name == "sample":
                return _both_on_draws(*both, x)
            if name in _MIXERS:
                return _both_on_tokens(*_MIXERS[name], *both, args)
            return _both_on_rows(*both, args)

        if not self._agrees(name, (name, *map(_kind, args), *map(_kind, options.values())), probe):
            return plain(*args, **options)
        return super()._run(name, kernel, plain, *args, **options)

    def _agrees(self, name: str, kind: Hashable, probe: Callable[[], Pairs]) -> bool:
        """Whether the kernel does what torch does, as found the first time."""
        if kind not in self._verdicts:
            try:
                problem = _difference(probe())
            except Exception as error:  # from a compiler, a launch, a kernel without code for these sizes
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
            if problem:
                self.reasons[name] = problem
            self._verdicts[kind] = not problem
        return self._verdicts[kind]


def _reachable(x: Tensor) -> bool:
    return x.is_cuda or bool(triton.knobs.runtime.interpret)


def _kind(value: object) -> Hashable:
    """What a kernel is compiled for; not how many rows, slots or pages there are."""
    match value:
        case Tensor():
            return value.dtype, value.shape[1:]
        case Draws():
            return value.greedy
        case KVTensors():
            return _kind(value.k), _kind(value.v)
        case StateTensors():
            return _kind(value.conv), _kind(value.state)
        case Mamba1Weights():
            return value.A.shape
        case Mamba2Weights():
            sizes = (value.num_heads, value.head_dim, value.d_state, value.num_groups, value.norm_group)
            return *sizes, value.norm_first, value.norm_weight is None, _kind(value.conv_weight)
        case bool() | int() | float():
            return value
    return None


def _both_on_rows(kernel: Callable[..., Tensor], plain: Callable[..., Tensor], args: Sequence[object]) -> Pairs:
    """The first argument, and positions if there are any, have rows."""
    x = args[0]
    assert isinstance(x, Tensor)
    small: list[object] = [_random(x, CHECK_ROWS, *x.shape[1:]), *args[1:]]
    if x.dim() == 3:
        small[1] = torch.arange(CHECK_ROWS, device=x.device)
    return [(kernel(*small), plain(*small))]


def _both_on_draws(kernel: Callable[..., Tensor], plain: Callable[..., Tensor], logits: Tensor) -> Pairs:
    """Where in the distribution the drawn tokens are: rounding may decide between adjacent ones."""
    small, draws = _random(logits, CHECK_DRAWS, logits.shape[1]), some_draws(CHECK_DRAWS, logits.device)
    drawn = kernel(small, draws), plain(small, draws)
    said, expected = (sampling.points(small, draws, tokens) for tokens in drawn)
    return [(said, expected)]


def _both_on_tokens(
    num_row_args: int,
    cache_at: int,
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    args: Sequence[object],
) -> Pairs:
    """Rows of the real call in a small layout, on caches of our own."""
    x = args[0]
    assert isinstance(x, Tensor)
    layout, runs = _small_layout(x.device)
    index = torch.arange(layout.num_rows, device=x.device) % len(x)
    small: list[object] = [layout if isinstance(arg, RowLayout) else arg for arg in args]
    for i in range(num_row_args):
        rows_of = args[i]
        assert isinstance(rows_of, Tensor)
        small[i] = rows_of[index].nan_to_num()
    said = []
    for function in (kernel, plain):
        tensors, small[cache_at] = _small_cache(args[cache_at])
        out = function(*small)
        said.append([*(out[run.row : run.row + run.length] for run in runs), *tensors])
    return list(zip(*said, strict=True))


@functools.cache
def _small_layout(device: torch.device) -> tuple[RowLayout, Runs]:
    """A prompt of two tiles with a capture, three tokens of a resumed one, a decode row."""
    prompt = Run(0, TILE + 6, 0, 0, True, [0, 1], [(TILE, 3)])
    resumed = Run(0, 3, TILE, 1, False, [2, 3], [])
    decode = Run(0, 1, TILE + 1, 2, False, [4, 5], [])
    with CPU:  # whatever the default
        layout, runs = arrange([prompt, resumed], [decode])
        schedule = schedule_shared(layout.page_table[2:].numpy(), layout.decode_len.numpy())
    return replace(layout, decode_schedule=schedule).to(device), runs


def _small_cache(cache: object) -> tuple[list[Tensor], object]:
    """-> tensors of a few slots or pages, the same numbers each time, and the cache that they make up."""
    match cache:
        case KVTensors():
            k, v = _slots_like(cache.k), _slots_like(cache.v)
            return [k, v], KVTensors(k, v)
        case StateTensors():
            window, state = _slots_like(cache.conv), _slots_like(cache.state)
            return [window, state], StateTensors(window, state)
    assert isinstance(cache, Tensor)
    slots = _slots_like(cache)
    return [slots], slots


def _slots_like(cache: Tensor) -> Tensor:
    """With gaps between the slots, as in a pool."""
    numel = cache[0].numel()
    return _random(cache, NUM_SLOTS, numel + 64)[:, :numel].view(NUM_SLOTS, *cache.shape[1:])


def _random(like: Tensor, *shape: int) -> Tensor:
    """The same each time, in the dtype and on the device of `like`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device=CPU).to(like)


def _difference(pairs: Pairs) -> str:
    """Empty where a kernel says the same as torch, but for rounding."""
    tolerance = CHECK_TOLERANCE[pairs[0][1].dtype]
    for found, expected in pairs:
        if found.shape != expected.shape or found.dtype != expected.dtype:
            return f"has the shape {tuple(found.shape)} and type {found.dtype}"
        error, size = (t.double().square().mean().sqrt().item() for t in (found.double() - expected.double(), expected))
        if not error <= tolerance * size:  # NaN, too
            return f"differs from torch by {error / max(size, 1e-30):.2g} of its size"
    return ""
