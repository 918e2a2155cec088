"""The CPU backend in C: one call for all that lies between two matrix products. See `native/*.c` for the arithmetic.

Products of bfloat16 weights are C too, where the CPU has AVX-512 (`native_products`); others stay with oneDNN, as in
`TorchOps`, and so does what C has no code for. Threads share tiles, heads and rows but never a sum, so results do not
depend on `torch.get_num_threads()` either.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from copy import copy
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_cache.kernels import native_calls, native_library, native_products
from hybrid_cache.kernels.codes import Coded, Matrix
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.memory import Pool
from hybrid_cache.kernels.native_low_rank import NativeBank
from hybrid_cache.kernels.native_products import NativeExperts, NativeLinear, threads_for
from hybrid_cache.kernels.ops import (
    Bank,
    Draws,
    Experts,
    KVTensors,
    Linear,
    Mamba1Weights,
    Mamba2Weights,
    NormWeights,
    StateTensors,
)
from hybrid_cache.kernels.sampling import check_words
from hybrid_cache.kernels.torch_ops import TorchOps

MAX_CONV_WIDTH = 8  # MAX_WIDTH in conv.h
LANES = 16
MIN_SHARED_ROWS = 2  # reading a page once for two rows is already cheaper than twice


class _Prepared:
    """A C structure, the tensors it points into, and the Python object it was made from."""

    __slots__ = ("address", "source", "structure", "tensors")

    def __init__(self, source: object, structure: ctypes.Structure, tensors: list[Tensor]) -> None:
        self.source = source
        self.structure = structure
        self.tensors = tensors
        self.address = ctypes.addressof(structure)


def _prepare_layout(layout: RowLayout) -> _Prepared:
    tensors = [getattr(layout, name).contiguous() for name in native_calls.LAYOUT_TENSORS]
    num_decode = layout.num_decode
    tensors += [torch.empty(size, dtype=torch.int64) for size in (num_decode, num_decode + 1, 2 * num_decode * 4)]
    sizes = [layout.num_rows, layout.num_tiles, num_decode, layout.decode_row]
    sizes += [len(layout.chunk_tile), len(layout.capture_chunk), layout.page_table.shape[1]]
    return _Prepared(layout, native_calls.Layout(*sizes, *(tensor.data_ptr() for tensor in tensors)), tensors)


def _prepare_conv(weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """-> taps [width, channels], bias [channels], float32."""
    channels = weight.shape[0]
    return [weight.float().T.contiguous(), torch.zeros(channels) if bias is None else bias.float().contiguous()]


def _prepare_mamba2(w: Mamba2Weights) -> _Prepared:
    tensors = [*_prepare_conv(w.conv_weight, w.conv_bias)]
    tensors += [t.float().contiguous() for t in (w.dt_bias, w.A, w.D)]
    if w.norm_weight is not None:
        tensors.append(w.norm_weight.float().contiguous())
    structure = native_calls.Mamba2(
        *(w.num_heads, w.head_dim, w.d_state, w.num_groups, w.conv_weight.shape[1], w.norm_group, w.norm_first),
        *(w.norm_eps, w.dt_min, w.dt_max),
        *(tensor.data_ptr() for tensor in tensors),  # the last one stays null without a norm
    )
    return _Prepared(w, structure, tensors)


def _prepare_heads(*rows: Tensor) -> _Prepared:
    """q, k [R, G, N], v [R, H, P], g [R, H] or [R, H, N], and beta [R, H] or nothing."""
    tensors = [x if x.dim() == 2 or x.stride(2) == 1 else x.contiguous() for x in rows]
    q, _, v, *_ = tensors
    structure = native_calls.Heads(
        *(v.shape[1], q.shape[1], v.shape[2], q.shape[2]),
        *(native_calls.Rows(x.data_ptr(), x.stride(0), x.stride(1)) for x in tensors),
    )
    return _Prepared(rows, structure, tensors)


class NativeOps(TorchOps):
    """Raises `native_library.BuildError` where the library cannot be built. See the module."""

    name = "native"

    def __init__(self, min_shared_rows: int = MIN_SHARED_ROWS) -> None:
        """min_shared_rows: how many decode rows must share pages before these are read once for all of them"""
        super().__init__()
        self._min_shared_rows = min_shared_rows
        self._c = native_library.load()
        native_calls.bind(self._c)
        self._layout: _Prepared | None = None
        self._weights: dict[int, _Prepared] = {}
        self._scans: dict[int, tuple[Mamba1Weights, list[Tensor]]] = {}
        self._convs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # weight, taps, bias
        self._latest_rotations: tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]] | None = None
        self._memory = Pool()
        self._scratch = threading.local()
        self._has_products = bool(self._c.linear_supported())
        self._has_low_bit = bool(self._c.low_bit_supported())

    def apart(self) -> "NativeOps":
        """The same, with memory of its own for what it packs and prepares, which goes with whoever uses it."""
        other = copy(self)
        other._memory, other._layout, other._latest_rotations = Pool(), None, None
        other._weights, other._scans, other._convs = {}, {}, {}
        return other

    def linear(self, weight: Matrix, bias: Tensor | None = None) -> Linear:
        if self._packs_weight(weight):
            return NativeLinear(self._c, self._memory, weight, bias)
        return super().linear(weight, bias)

    def experts(
        self, w_in: Sequence[Matrix], w_out: Sequence[Matrix], act: Callable[[Tensor], Tensor] | None = None
    ) -> Experts:
        if act is None and self._packs_weight(w_in[0]) and self._packs_weight(w_out[0]):
            return NativeExperts(self._c, self._memory, self._scratch_memory, w_in, w_out)
        return super().experts(w_in, w_out, act)

    def bank(self) -> Bank:
        return NativeBank(self._c, super().linear, self.device)

    def _packs_weight(self, weight: Matrix) -> bool:
        if isinstance(weight, Coded):
            return self._has_low_bit
        return self._has_products and weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 0

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if weight.dtype != x.dtype or x.stride(1) != 1:
            return super().rms_norm(x, weight, eps)
        rows, size = x.shape
        out = torch.empty(rows, size, dtype=x.dtype)
        self._c.rms_norm(
            *(x.data_ptr(), x.stride(0), rows, size, weight.data_ptr(), eps, out.data_ptr()),
            *(threads_for(rows * size), x.dtype is torch.bfloat16),
        )
        return out

    def silu_mul(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1:
            return super().silu_mul(x)
        rows, size = x.shape[0], x.shape[1] // 2
        out = torch.empty(rows, size, dtype=x.dtype)
        self._c.silu_mul(
            *(x.data_ptr(), x.stride(0), rows, size, out.data_ptr()),
            *(threads_for(rows * size), x.dtype is torch.bfloat16),
        )
        return out

    def rotary(self, x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        rows, heads, size = x.shape
        x = _with_rows(x, heads * size)
        angle = positions.float()[:, None] * inv_freq
        cos, sin = angle.cos(), angle.sin()
        out = torch.empty(rows, heads, size, dtype=x.dtype)
        self._c.rotary(
            *(x.data_ptr(), x.stride(0), rows, heads, size // 2, cos.data_ptr(), sin.data_ptr(), out.data_ptr()),
            *(threads_for(out.numel()), x.dtype is torch.bfloat16),
        )
        return out

    def relocate_keys(
        self,
        kv: KVTensors,
        source_rows: Tensor,
        target_rows: Tensor,
        delta: Tensor,
        inv_freq: Tensor | None,
        first: int = 0,
    ) -> None:
        pages = [native_calls.Pages(x.data_ptr(), x.stride(0), x[0, 0].numel()) for x in (kv.k, kv.v)]
        half, cos, sin = 0, None, None
        if inv_freq is not None:
            half, (cos, sin) = len(inv_freq), self._rotations(delta, inv_freq)
        self._c.relocate_keys(
            *(ctypes.addressof(page) for page in pages),
            *(source_rows.data_ptr(), target_rows.data_ptr(), len(source_rows), delta.data_ptr()),
            *(None if x is None else x.data_ptr() for x in (cos, sin)),
            *(kv.k.shape[3], first, half),
            *(threads_for(len(source_rows) * (pages[0].row + pages[1].row)), kv.k.dtype is torch.bfloat16),
        )

    def sample(self, logits: Tensor, draws: Draws) -> Tensor:
        logits = logits.contiguous()
        rows, vocab = logits.shape
        tokens = torch.empty(rows, dtype=torch.int64)
        columns = [getattr(draws, name).contiguous() for name in native_calls.DRAWS]
        given = native_calls.Draws(*(column.data_ptr() for column in columns))
        threads = threads_for(rows * vocab)
        self._c.sample(
            *(logits.data_ptr(), rows, vocab, ctypes.addressof(given), tokens.data_ptr()),
            *(self._scratch_memory(self._c.sample_scratch(vocab, threads)), threads),
        )
        return tokens

    def mask_tokens(self, logits: Tensor, rows: Tensor, words: Tensor) -> None:
        if logits.dtype not in (torch.float32, torch.bfloat16):
            return super().mask_tokens(logits, rows, words)
        check_words(logits, rows, words)
        vocab = logits.shape[1]
        self._c.mask_tokens(
            *(logits.data_ptr(), vocab, logits.stride(0), rows.data_ptr(), words.data_ptr(), len(rows)),
            *(threads_for(len(rows) * vocab), logits.dtype is torch.bfloat16),
        )

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        logits = logits.contiguous()
        rows, vocab = logits.shape
        most, sums = torch.empty(rows), torch.empty(rows)
        threads = threads_for(rows * vocab)
        self._c.log_sum_exp(
            *(logits.data_ptr(), rows, vocab, most.data_ptr(), sums.data_ptr()),
            *(self._scratch_memory(self._c.sample_scratch(vocab, threads)), threads),
        )
        return most.add_(sums.log_())

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
        num_rows, heads, size = q.shape
        kv_heads = k.shape[1]
        q, k, v = _with_rows(q, heads * size), _with_rows(k, kv_heads * size), _with_rows(v, kv_heads * size)
        out = torch.empty(num_rows, heads, size, dtype=q.dtype)
        task = native_calls.Attention(
            *(heads, kv_heads, size, q.stride(0), k.stride(0), v.stride(0), window or 0, scale),
            *(kv.k.data_ptr(), kv.v.data_ptr(), kv.k.stride(0), kv.v.stride(0)),
        )
        pairs = (TILE * TILE * layout.num_tiles + TILE * layout.num_decode) * layout.page_table.shape[1]
        address, threads = ctypes.addressof(task), threads_for(pairs * heads * size // 8)
        rows = self._layout_address(layout)
        scratch = self._scratch_memory(self._c.attention_scratch(rows, address, threads))
        self._c.attention(
            *(rows, address, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()),
            *(scratch, threads, q.dtype is torch.bfloat16),
        )
        return out

    def causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: RowLayout,
        conv: Tensor,
        activation: bool = True,
    ) -> Tensor:
        channels, width = weight.shape
        if width > MAX_CONV_WIDTH or conv.dtype != x.dtype:
            return super().causal_conv(x, weight, bias, layout, conv, activation)
        x = _with_rows(x, channels)
        taps, offset = self._conv_tensors(weight, bias)
        out = torch.empty(len(x), channels, dtype=x.dtype)
        self._c.causal_conv(
            *(self._layout_address(layout), x.data_ptr(), x.stride(0), channels, width),
            *(taps.data_ptr(), offset.data_ptr(), out.data_ptr(), conv.data_ptr(), conv.stride(0)),
            *(threads_for(out.numel()), activation, x.dtype is torch.bfloat16),
        )
        return out

    def mamba2(self, zxbcdt: Tensor, weights: Mamba2Weights, layout: RowLayout, cache: StateTensors) -> Tensor:
        if weights.conv_weight.shape[1] > MAX_CONV_WIDTH or cache.conv.dtype != zxbcdt.dtype:
            return super().mamba2(zxbcdt, weights, layout, cache)
        out = torch.empty(layout.num_rows, weights.num_heads * weights.head_dim, dtype=zxbcdt.dtype)
        self._run_mamba2(zxbcdt, weights, layout, cache, out)
        return out

    def mamba2_states(self, xbcdt: Tensor, weights: Mamba2Weights, layout: RowLayout, cache: StateTensors) -> None:
        if weights.conv_weight.shape[1] > MAX_CONV_WIDTH or cache.conv.dtype != xbcdt.dtype:
            return super().mamba2_states(xbcdt, weights, layout, cache)
        self._run_mamba2(xbcdt, weights, layout, cache, None)

    def _run_mamba2(
        self, rows: Tensor, weights: Mamba2Weights, layout: RowLayout, cache: StateTensors, out: Tensor | None
    ) -> None:
        rows = rows.contiguous()
        w, places = self._mamba2_address(weights), self._layout_address(layout)
        states = weights.num_heads * weights.head_dim * weights.d_state
        threads = threads_for(states * (TILE * layout.num_tiles + layout.num_decode) // 4)
        self._c.mamba2(
            *(places, w, rows.data_ptr(), None if out is None else out.data_ptr()),
            *(cache.conv.data_ptr(), cache.conv.stride(0), cache.state.data_ptr(), cache.state.stride(0)),
            *(self._scratch_memory(self._c.mamba2_scratch(places, w, threads)), threads, rows.dtype is torch.bfloat16),
        )

    def add_gated_mlp(
        self, hidden: Tensor, norm: NormWeights, multiplier: float, gate_up: Linear, down: Linear
    ) -> None:
        task = _residual(hidden, norm, multiplier)
        if task is None or not isinstance(gate_up, NativeLinear) or not isinstance(down, NativeLinear):
            super().add_gated_mlp(hidden, norm, multiplier, gate_up, down)
            return
        arguments = (ctypes.addressof(task), gate_up.address, down.address)
        self._c.add_gated_mlp(*arguments, self._scratch_memory(self._c.add_gated_mlp_scratch(*arguments)))

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
        task = _residual(hidden, norm, multiplier)
        simple = weights.conv_weight.shape[1] <= MAX_CONV_WIDTH and cache.conv.dtype is torch.bfloat16
        if not simple or task is None or not isinstance(into, NativeLinear) or not isinstance(out, NativeLinear):
            super().add_mamba2(hidden, norm, multiplier, into, out, weights, layout, cache, log_decay)
            return
        parts = (into.address, out.address, self._layout_address(layout), self._mamba2_address(weights))
        arguments = (ctypes.addressof(task), *parts)
        self._c.add_mamba2(
            *(*arguments, cache.conv.data_ptr(), cache.conv.stride(0), cache.state.data_ptr(), cache.state.stride(0)),
            None if log_decay is None else log_decay.data_ptr(),
            self._scratch_memory(self._c.add_mamba2_scratch(*arguments)),
        )

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
        channels, d_state = weights.A.shape
        inputs = [_with_rows(t, t.shape[1]) for t in (x, dt, B, C, z)]
        task = native_calls.Scan(
            *(channels, d_state),
            *(t.data_ptr() for t in (*self._scan_tensors(weights), *inputs)),
            *(t.stride(0) for t in inputs),
        )
        rows = self._layout_address(layout)
        out = torch.empty(len(x), channels, dtype=x.dtype)
        self._c.mamba1_scan(
            *(rows, ctypes.addressof(task), out.data_ptr(), state.data_ptr(), state.stride(0)),
            self._scratch_memory(self._c.mamba1_scratch(rows, d_state)),
            *(threads_for(out.numel() * d_state), x.dtype is torch.bfloat16),
        )
        return out

    def linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, slope: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        heads = _prepare_heads(q, k, v, (-slope).expand(len(v), -1))
        return self._mix(self._c.linear_attention, self._c.linear_attention_scratch, heads, v, layout, state)

    def gated_delta(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        heads = _prepare_heads(q, k, v, g, beta)
        return self._mix(self._c.gated_delta, self._c.delta_scratch, heads, v, layout, state)

    def kimi_delta(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        heads = _prepare_heads(q, k, v, g, beta)
        return self._mix(self._c.kimi_delta, self._c.delta_scratch, heads, v, layout, state)

    def _mix(
        self,
        function: Callable[..., None],
        scratch_size: Callable[[int, int], int],
        heads: _Prepared,
        v: Tensor,
        layout: RowLayout,
        state: Tensor,
    ) -> Tensor:
        threads = threads_for(state[0].numel() * (TILE * layout.num_tiles + layout.num_decode) // 4)
        out = torch.empty(v.shape, dtype=v.dtype)
        function(
            *(self._layout_address(layout), heads.address, out.data_ptr(), state.data_ptr(), state.stride(0)),
            *(self._scratch_memory(scratch_size(heads.address, threads)), threads, v.dtype is torch.bfloat16),
        )
        return out

    def rg_lru(
        self, x: Tensor, input_gate: Tensor, gate: Tensor, decay: Tensor, layout: RowLayout, state: Tensor
    ) -> Tensor:
        rows, channels = x.shape
        inputs, decay = [_with_rows(t, channels) for t in (x, input_gate, gate)], decay.contiguous()
        task = native_calls.Unit(
            channels, decay.data_ptr(), *(t.data_ptr() for t in inputs), *(t.stride(0) for t in inputs)
        )
        out = torch.empty(rows, channels, dtype=x.dtype)
        self._c.rg_lru(
            *(self._layout_address(layout), ctypes.addressof(task), out.data_ptr()),
            *(state.data_ptr(), state.stride(0), threads_for(4 * out.numel()), x.dtype is torch.bfloat16),
        )
        return out

    def _layout_address(self, layout: RowLayout) -> int:
        """All layers of a step share one layout object."""
        prepared = self._layout
        if prepared is None or prepared.source is not layout:
            prepared = self._layout = _prepare_layout(layout)
            self._c.find_shared_prefixes(prepared.address, self._min_shared_rows)
        return prepared.address

    def _mamba2_address(self, weights: Mamba2Weights) -> int:
        prepared = self._weights.get(id(weights))  # it holds the weights, so no other object gets this id
        if prepared is None:
            prepared = self._weights[id(weights)] = _prepare_mamba2(weights)
        return prepared.address

    def _conv_tensors(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        prepared = self._convs.get(id(weight))
        if prepared is None:
            taps, offset = _prepare_conv(weight, bias)
            prepared = self._convs[id(weight)] = (weight, taps, offset)
        return prepared[1:]

    def _rotations(self, delta: Tensor, inv_freq: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """cos, sin [N, d / 2] of positions [N], nothing where all are 0. All layers ask for the same ones."""
        last = self._latest_rotations
        if last is None or last[0] is not delta or not torch.equal(last[1], inv_freq):
            angle = delta.float()[:, None] * inv_freq
            rotations = (angle.cos(), angle.sin()) if bool(delta.any()) else (None, None)
            last = self._latest_rotations = (delta, inv_freq, rotations)
        return last[2]

    def _scan_tensors(self, weights: Mamba1Weights) -> list[Tensor]:
        """A / ln 2 [blocks, ROUND_UP(N), LANES], D and dt_bias [channels]."""
        prepared = self._scans.get(id(weights))
        if prepared is None:
            channels, d_state = weights.A.shape
            padded = F.pad(weights.A.float() / log(2), (0, -d_state % LANES, 0, -channels % LANES))
            A = padded.view(-1, LANES, padded.shape[1]).transpose(1, 2).contiguous()
            prepared = self._scans[id(weights)] = (
                weights,
                [A, *(t.float().contiguous() for t in (weights.D, weights.dt_bias))],
            )
        return prepared[1]

    def _scratch_memory(self, num_floats: int) -> int:
        """Address of at least `num_floats` floats, the same memory in each call of a thread."""
        memory: Tensor | None = getattr(self._scratch, "memory", None)
        if memory is None or len(memory) < num_floats:
            memory = self._scratch.memory = torch.empty(num_floats + num_floats // 4 + LANES)
        return memory.data_ptr()


def _residual(hidden: Tensor, norm: NormWeights, multiplier: float) -> native_calls.Residual | None:
    """None where C has no code for these tensors."""
    if hidden.dtype is not torch.bfloat16 or norm.weight.dtype is not torch.bfloat16 or not hidden.is_contiguous():
        return None
    threads = (torch.get_num_threads(), native_products.MIN_VALUES_FOR_THREADS)
    return native_calls.Residual(
        hidden.data_ptr(), *hidden.shape, norm.weight.data_ptr(), norm.eps, multiplier, *threads
    )


def _with_rows(x: Tensor, width: int) -> Tensor:
    """x [R, ...] as rows of `width` contiguous values, with any stride."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    assert expected == width
    return x
