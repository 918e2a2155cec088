"""Products with weights whose bits do not depend on the number of rows.

An output is one sum over the inner dimension. Whatever the block size, a tensor core instruction takes the same STEP of
it for all elements of the block, the loop goes through the steps in order into one float32 accumulator, and a row of a
product reads only its own row. So block sizes may follow the number of rows: few rows take narrow blocks that spread
the weight over the GPU, many rows take large ones. That instructions for other block sizes round alike is not written
down by the maker; `agreeing_blocks` tries it once on each device and drops the sizes that do not. There is no split of
the sum, and nothing is autotuned.

float32 rows are multiplied without tensor cores or in three TF32 parts (see PRECISION), never in one.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_cache.kernels.triton_kernels.aot import Limit, Spec
from hybrid_cache.kernels.triton_kernels.conv import narrow

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
PRECISION = "tf32x3"
GROUP = 8  # row blocks that run through the weight together
MIN_PROGRAMS = 64  # fewer leave most of the GPU idle
COMBINE_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Block:
    """What one program computes: m rows, n columns, k of the inner dimension at a time."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


# Largest first. On sm_90 a product of 64 rows is one instruction of four warps (wgmma), on sm_80 one of 16 rows is one
# of one warp (mma). Three stages of the largest fit into 99 KB, which the small GPUs of these generations have.
HALF_BLOCKS = {
    80: (Block(128, 128, 64, 8, 3), Block(64, 128, 64, 4, 3), Block(16, 64, 128, 4, 4)),
    90: (Block(128, 128, 64, 8, 4), Block(64, 128, 64, 4, 4), Block(64, 32, 128, 4, 4)),
}
FLOAT_BLOCKS = (Block(64, 64, 32, 8, 3),)
INTERPRETED_BLOCKS = (Block(64, 128, 128, 4, 1),)


@triton.jit
def _sum_of_products(
    x_rows,
    there,
    w_rows,
    IN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_rows [M], w_rows [N] pointers to rows of IN values, `there` [M] which of x exist -> [M, N] float32."""
    inner = tl.arange(0, BLOCK_K)
    x_block = x_rows[:, None] + inner[None, :]
    w_block = w_rows[None, :] + inner[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, IN, BLOCK_K):
        if IN % BLOCK_K == 0:
            a = tl.load(x_block, there[:, None], 0.0)
            b = tl.load(w_block)
        else:
            a = tl.load(x_block, there[:, None] & (inner < IN - start)[None, :], 0.0)
            b = tl.load(w_block, (inner < IN - start)[:, None], 0.0)
        if INTERPRET:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        x_block += BLOCK_K
        w_block += BLOCK_K
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    x_stride,
    OUT,
    IN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (blocks). A program computes BLOCK_M x BLOCK_N of x @ weight.T + bias."""
    in_group = GROUP * tl.cdiv(OUT, BLOCK_N)
    first = tl.program_id(0) // in_group * GROUP
    group = tl.minimum(tl.cdiv(num_rows, BLOCK_M) - first, GROUP)
    within = tl.program_id(0) % in_group
    rows = (first + within % group).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // group).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = rows < num_rows
    w_rows = weight + tl.minimum(columns, OUT - 1) * IN
    total = _sum_of_products(x + rows * x_stride, there, w_rows, IN, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + columns, columns < OUT, 0.0).to(tl.float32)[None, :]
    target = out + rows[:, None] * OUT + columns[None, :]
    tl.store(target, narrow(total, out.dtype.element_ty), there[:, None] & (columns < OUT)[None, :])


@triton.jit
def _experts_kernel(
    x,
    weight,
    order,
    block_expert,
    block_first,
    block_end,
    out,
    x_stride,
    NUM_CHOICES: tl.constexpr,
    GATHER: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (column blocks, row blocks). A program computes BLOCK_N outputs for BLOCK_M rows of one expert.

    Pairs (row, choice) are sorted by expert; order [pairs] says where a pair was before. A block has the pairs
    [block_first, block_end) and at most BLOCK_M of them; after the last block there are empty ones.
    GATHER: x has the rows, `out` gets the pairs sorted; otherwise x has sorted pairs and `out` gets them as they were.
    """
    first = tl.load(block_first + tl.program_id(1))
    end = tl.load(block_end + tl.program_id(1))
    if first < end:
        pairs = first + tl.arange(0, BLOCK_M)
        there = pairs < end
        columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        before = tl.load(order + pairs, there, 0)
        if GATHER:
            source, target = before // NUM_CHOICES, pairs
        else:
            source, target = pairs, before
        matrix = weight + tl.load(block_expert + tl.program_id(1)) * (IN * OUT)
        w_rows = matrix + tl.minimum(columns, OUT - 1) * IN
        total = _sum_of_products(x + source * x_stride, there, w_rows, IN, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        mask = there[:, None] & (columns < OUT)[None, :]
        tl.store(out + target[:, None] * OUT + columns[None, :], narrow(total, out.dtype.element_ty), mask)


@triton.jit
def _combine_kernel(choices, shares, out, NUM_CHOICES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows, column blocks). Sums a row's choices, each with its share, in their order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(NUM_CHOICES):
        pair = row * NUM_CHOICES + i
        total += tl.load(choices + pair * WIDTH + columns, mask, 0.0).to(tl.float32) * tl.load(shares + pair)
    tl.store(out + row * WIDTH + columns, narrow(total, out.dtype.element_ty), mask)


class TritonLinear:
    """x @ weight.T + bias; a row's bits depend on nothing but the row."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in]   bias [out]"""
        self.out_features, self.in_features = weight.shape
        self._weight = weight.contiguous()
        self._bias = None if bias is None else bias.contiguous()
        self._blocks = agreeing_blocks(weight.dtype, weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        return multiply(x, self._weight, self._bias, block_for(self._blocks, len(x), self.out_features))


class TritonExperts:
    """Sorts the (row, choice) pairs by expert and multiplies each expert's pairs in blocks of their own."""

    def __init__(self, w_in: Sequence[Tensor], w_out: Sequence[Tensor], act: Callable[[Tensor], Tensor]) -> None:
        """Arguments as of `Ops.experts`: [2 * inner, hidden] and [hidden, inner] for each expert."""
        self._w_in = torch.stack(list(w_in))
        self._w_out = torch.stack(list(w_out))
        self._act = act
        self._blocks = agreeing_blocks(self._w_in.dtype, self._w_in.device)
        self._edges = torch.arange(len(self._w_in) + 1, device=self._w_in.device)

    def __call__(self, x: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
        num_rows, num_choices = expert_ids.shape
        if not num_rows:
            return torch.empty_like(x)
        x = x if x.stride(1) == 1 else x.contiguous()
        pairs, hidden = num_rows * num_choices, self._w_out.shape[1]
        block = self._block(pairs)
        block_map = _map_blocks(expert_ids.flatten(), self._edges, block.m)
        between = x.new_empty(pairs, self._w_in.shape[1])
        _multiply_experts(x, self._w_in, block_map, between, num_choices, True, block)
        choices = x.new_empty(pairs, hidden)
        _multiply_experts(self._act(between), self._w_out, block_map, choices, num_choices, False, block)
        out = x.new_empty(num_rows, hidden)
        width = min(COMBINE_BLOCK, triton.next_power_of_2(hidden))
        _combine_kernel[num_rows, triton.cdiv(hidden, width)](
            choices, expert_weights.contiguous(), out, NUM_CHOICES=num_choices, WIDTH=hidden, BLOCK=width
        )
        return out

    def _block(self, pairs: int) -> Block:
        """The largest that an expert fills, were all chosen alike."""
        each = pairs // len(self._w_in)
        return next((block for block in self._blocks if 2 * each >= block.m), self._blocks[-1])


@dataclass(frozen=True, slots=True)
class _BlockMap:
    """See `_experts_kernel`."""

    order: Tensor  # [pairs] int64
    block_expert: Tensor  # [blocks] int64, as the next two
    block_first: Tensor
    block_end: Tensor


def _map_blocks(expert_ids: Tensor, edges: Tensor, block_m: int) -> _BlockMap:
    """The most blocks that there may be, so that nothing is read back. expert_ids [pairs], edges [num_experts + 1]."""
    num_experts, num_pairs = len(edges) - 1, len(expert_ids)
    ids, order = expert_ids.sort(stable=True)
    starts = torch.searchsorted(ids, edges)
    num_blocks = (starts.diff() + (block_m - 1)) // block_m
    last_block = num_blocks.cumsum(0)
    blocks = torch.arange(num_pairs // block_m + min(num_experts, num_pairs), device=ids.device)
    expert = torch.searchsorted(last_block, blocks, right=True).clamp_(max=num_experts - 1)
    # A block after the last one of the last expert begins after that expert's pairs, and is empty.
    first = starts[expert] + (blocks - (last_block - num_blocks)[expert]) * block_m
    return _BlockMap(order, expert, first, starts[expert + 1])


def _multiply_experts(
    x: Tensor, weight: Tensor, block_map: _BlockMap, out: Tensor, num_choices: int, gather: bool, block: Block
) -> None:
    _, size_out, size_in = weight.shape
    _experts_kernel[triton.cdiv(size_out, block.n), len(block_map.block_expert)](
        *(
            x,
            weight,
            block_map.order,
            block_map.block_expert,
            block_map.block_first,
            block_map.block_end,
            out,
            x.stride(0),
        ),
        NUM_CHOICES=num_choices,
        GATHER=gather,
        IN=size_in,
        OUT=size_out,
        **_constants(block),
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, block: Block) -> Tensor:
    """x [R, in], weight [out, in] contiguous -> [R, out]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows, (size_out, size_in) = len(x), weight.shape
    out = x.new_empty(num_rows, size_out)
    if num_rows:
        _linear_kernel[(triton.cdiv(num_rows, block.m) * triton.cdiv(size_out, block.n),)](
            *(x, weight, weight if bias is None else bias, out, num_rows, x.stride(0), size_out),
            IN=size_in,
            HAS_BIAS=bias is not None,
            GROUP=GROUP,
            **_constants(block),
        )
    return out


def _constants(block: Block) -> dict[str, int | str]:
    return {
        "BLOCK_M": block.m,
        "BLOCK_N": block.n,
        "BLOCK_K": block.k,
        "PRECISION": PRECISION,
        "num_warps": block.num_warps,
        "num_stages": block.num_stages,
    }


def block_for(blocks: Sequence[Block], num_rows: int, size_out: int) -> Block:
    """The largest that still gives the GPU enough programs."""
    for block in blocks:
        if triton.cdiv(num_rows, block.m) * triton.cdiv(size_out, block.n) >= MIN_PROGRAMS:
            return block
    return blocks[-1]


@functools.cache
def agreeing_blocks(dtype: torch.dtype, device: torch.device) -> tuple[Block, ...]:
    """The block sizes for this device that give the same bits as the largest one."""
    blocks = _blocks(dtype, device)
    if len(blocks) == 1:
        return blocks
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 1096, generator=rng, device="cpu").to(device, dtype) for n in (130, 264))
    expected = multiply(x, weight, None, blocks[0])
    return tuple(block for block in blocks if torch.equal(multiply(x, weight, None, block), expected))


def _blocks(dtype: torch.dtype, device: torch.device) -> tuple[Block, ...]:
    if device.type != "cuda":
        return INTERPRETED_BLOCKS
    if dtype is torch.float32:
        return FLOAT_BLOCKS
    return HALF_BLOCKS[90 if torch.cuda.get_device_capability(device) >= (9, 0) else 80]


_BLOCK_MAP = ("order", "block_expert", "block_first", "block_end")


def _specs(arch: int, block: Block, kind: str) -> list[Spec]:
    """Both kernels with one block size."""
    constants = {name: value for name, value in _constants(block).items() if not name.startswith("num_")}
    rows = dict.fromkeys(("x", "weight", "out"), f"*{kind}") | {"x_stride": "i32:16"}
    shapes = {
        _linear_kernel: (
            {**rows, "bias": f"*{kind}", "num_rows": "i32", "OUT": "i32:16"},
            {"IN": 4096, "HAS_BIAS": True, "GROUP": GROUP, **constants},
        ),
        _experts_kernel: (
            {**rows, **dict.fromkeys(_BLOCK_MAP, "*i64")},
            {"NUM_CHOICES": 8, "GATHER": True, "IN": 2048, "OUT": 1536, **constants},
        ),
    }
    return [
        Spec(
            kernel,
            types,
            constexprs,
            num_warps=block.num_warps,
            num_stages=block.num_stages,
            limits={arch: Limit(tensor_cores=True)},
            label=f"{kind} {block.m}x{block.n}x{block.k}",
            archs=(arch,),
        )
        for kernel, (types, constexprs) in shapes.items()
        if kernel is _linear_kernel or block.m >= 64 <= block.n
    ]


SPECS = [
    *(spec for arch, blocks in HALF_BLOCKS.items() for block in blocks for spec in _specs(arch, block, "bf16")),
    *(spec for arch in HALF_BLOCKS for block in FLOAT_BLOCKS for spec in _specs(arch, block, "fp32")),
    Spec(
        _combine_kernel,
        {"choices": "*bf16", "shares": "*fp32", "out": "*bf16"},
        {"NUM_CHOICES": 8, "WIDTH": 4096, "BLOCK": COMBINE_BLOCK},
        limits={80: Limit(registers=64), 90: Limit(registers=64)},
    ),
]
