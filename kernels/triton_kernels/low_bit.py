"""Products with weights of 4 and 8 bits: codes become bfloat16 on the way to the tensor cores.

A step is a group of 32 inputs: its codes, whole numbers that bfloat16 holds, are multiplied and summed in float32, and
the sum goes into the total times the group's scale. The step is the same for all block sizes, so, as in `matmul`, a
row's bits do not depend on the number of rows. Codes of 4 bits lie two in a byte: input i of a group below, i + 16
above.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_cache.kernels.codes import GROUP, Coded
from hybrid_cache.kernels.triton_kernels.aot import Limit, Spec
from hybrid_cache.kernels.triton_kernels.conv import narrow
from hybrid_cache.kernels.triton_kernels.matmul import Block, block_for

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
BLOCKS = (Block(64, 128, GROUP, 4, 4), Block(16, 64, GROUP, 4, 4))
INTERPRETED_BLOCKS = (Block(16, 64, GROUP, 4, 1),)


@triton.jit
def _dot(x, codes, total):
    """x [M, K] and codes [K, N] -> total [M, N] float32 and their product."""
    a, b = x, codes.to(tl.float32).to(tl.bfloat16)
    if INTERPRET:
        a, b = x.to(tl.float32), codes.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit(do_not_specialize=["num_rows"])
def _coded_kernel(
    x,
    codes,
    scales,
    bias,
    out,
    num_rows,
    x_stride,
    OUT,
    IN: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid (row blocks, column blocks). codes [OUT, IN * BITS / 8] bytes, scales [OUT, IN / GROUP]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there, outputs = rows < num_rows, tl.minimum(columns, OUT - 1)
    WIDTH: tl.constexpr = GROUP * BITS // 8  # bytes of a group
    inner = tl.arange(0, WIDTH)
    x_block = x + rows[:, None] * x_stride + inner[None, :]
    code_block = codes + outputs[None, :] * (IN * BITS // 8) + inner[:, None]
    scale_row = scales + outputs * (IN // GROUP)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, IN, GROUP):
        some = tl.load(code_block)
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if BITS == 4:
            low, high = (some << 4).to(tl.int8, bitcast=True) >> 4, some.to(tl.int8, bitcast=True) >> 4
            part = _dot(tl.load(x_block, there[:, None], 0.0), low, part)
            part = _dot(tl.load(x_block + WIDTH, there[:, None], 0.0), high, part)
        else:
            part = _dot(tl.load(x_block, there[:, None], 0.0), some.to(tl.int8, bitcast=True), part)
        total += part * tl.load(scale_row).to(tl.float32)[None, :]
        x_block += GROUP
        code_block += WIDTH
        scale_row += 1
    if HAS_BIAS:
        total += tl.load(bias + columns, columns < OUT, 0.0).to(tl.float32)[None, :]
    target = out + rows[:, None] * OUT + columns[None, :]
    tl.store(target, narrow(total, out.dtype.element_ty), there[:, None] & (columns < OUT)[None, :])


class TritonCodedLinear:
    """x @ weight.T + bias for rows in bfloat16; a row's bits depend on nothing but the row."""

    def __init__(self, weight: Coded, bias: Tensor | None) -> None:
        """weight [out, in]   bias [out]"""
        self.out_features, self.in_features = weight.shape
        self._bits = weight.bits
        self._codes, self._scales = pack(weight), weight.scales.contiguous()
        self._bias = None if bias is None else bias.contiguous()
        self._blocks = agreeing_blocks(weight.codes.device)

    def __call__(self, x: Tensor) -> Tensor:
        block = block_for(self._blocks, len(x), self.out_features)
        return multiply(x, self._codes, self._scales, self._bias, self._bits, block)


def pack(weight: Coded) -> Tensor:
    """-> bytes [out, in * bits / 8]."""
    if weight.bits == 8:
        return weight.codes.contiguous().view(torch.uint8)
    low, high = (weight.codes.int() & 15).view(len(weight.codes), -1, 2, GROUP // 2).unbind(2)
    return (low | high << 4).to(torch.uint8).flatten(1)


def multiply(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int, block: Block) -> Tensor:
    """x [R, in] -> [R, out]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows, (size_out, num_groups) = len(x), scales.shape
    out = x.new_empty(num_rows, size_out)
    if num_rows:
        _coded_kernel[triton.cdiv(num_rows, block.m), triton.cdiv(size_out, block.n)](
            *(x, codes, scales, scales if bias is None else bias, out, num_rows, x.stride(0), size_out),
            IN=num_groups * GROUP,
            BITS=bits,
            HAS_BIAS=bias is not None,
            **_constants(block),
        )
    return out


def _constants(block: Block) -> dict[str, int]:
    sizes = {"BLOCK_M": block.m, "BLOCK_N": block.n, "GROUP": GROUP}
    return {**sizes, "num_warps": block.num_warps, "num_stages": block.num_stages}


@functools.cache
def agreeing_blocks(device: torch.device) -> Sequence[Block]:
    """The block sizes that give the same bits as the largest one on this device."""
    if device.type != "cuda":
        return INTERPRETED_BLOCKS
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(130, 1088, generator=rng, device="cpu").to(device, torch.bfloat16)
    codes = torch.randint(256, (264, 1088), generator=rng, device="cpu").to(device, torch.uint8)
    scales = torch.rand(264, 34, generator=rng, device="cpu").to(device, torch.float16)
    results = {block: multiply(x, codes, scales, None, 8, block) for block in BLOCKS}
    return tuple(block for block, found in results.items() if torch.equal(found, results[BLOCKS[0]]))


SPECS = [
    Spec(
        _coded_kernel,
        {
            **dict.fromkeys(("x", "bias", "out"), "*bf16"),
            "codes": "*u8",
            "scales": "*fp16",
            "num_rows": "i32",
            "x_stride": "i32:16",
            "OUT": "i32:16",
        },
        {
            **{name: value for name, value in _constants(block).items() if not name.startswith("num_")},
            "IN": 4096,
            "BITS": bits,
            "HAS_BIAS": True,
        },
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        limits={arch: Limit(tensor_cores=True) for arch in (80, 90)},
        label=f"int{bits} {block.m}x{block.n}",
    )
    for bits in (4, 8)
    for block in BLOCKS
]
