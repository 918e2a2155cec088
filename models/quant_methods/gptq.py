"""GPTQ and AWQ checkpoints. Their libraries want a GPU or bring large ones; the formats are a few lines.

Both store whole numbers of a few bits in words of 32, with one scale and one zero point for each group of inputs:

    GPTQ  .qweight int32 [in * bits / 32, out]   words along the inputs, from the lowest bit on; 2, 3, 4 or 8 bits
          .qzeros  int32 [groups, out * bits / 32]   one less than the zero point, `gptq_v2`: the zero point
          .scales  [groups, out]    .g_idx int32 [in]   the group of each input, where inputs were reordered
    AWQ   .qweight int32 [in, out / 8]   words along the outputs, the eight of a word in the order 0 2 4 6 1 3 5 7
          .qzeros  int32 [groups, out / 8]   likewise    .scales [groups, out]

    weight = (code - zero point) * scale
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hybrid_cache.models.config import Config
from hybrid_cache.models.quant_methods.method import (
    FLOATS,
    INTEGERS,
    Part,
    Parts,
    Shape,
    by_rows,
    collect,
    groups_named,
    refuse_shapes,
    scales_of_groups,
    stems_ending,
    unpack,
)

GPTQ_BITS = (2, 3, 4, 8)
AWQ_BITS = 4
PARTS = (Part(".qweight", INTEGERS), Part(".qzeros", INTEGERS), Part(".scales", FLOATS))
GROUPS = Part(".g_idx", INTEGERS, needed=False)
PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # in a word of AWQ, of outputs 0 to 7


class Gptq:
    """Sizes are read from the tensors, which may differ from module to module (`dynamic`)."""

    beside: str | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, config: Config, title: str = "GPTQ", *, zeros_less_one: bool | None = None) -> None:
        """zeros_less_one: None where the config says so"""
        bits, group = config.integer("bits", at_most=8), config.integer("group_size", -1, at_least=-1)
        if zeros_less_one is None:
            stored = config.choice("checkpoint_format", "gptq", ["gptq", "gptq_v2"])
            zeros_less_one = stored == "gptq"
        config.refuse("is_marlin_format")
        self._less, self._group_size = int(zeros_less_one), group
        self.title = f"{title}, {bits} bits, {_of_groups(group)}"
        self.settings = f"gptq zeros less {self._less}, groups of {group}"

    def matrices(self, kinds: Mapping[str, str]) -> dict[str, dict[str, str]]:
        return collect(kinds, stems_ending(kinds, ".qweight"), (*PARTS, GROUPS))

    def rows(self, found: Mapping[str, Shape]) -> int:
        return found[".qweight"][-1]

    def shapes(self, weight: str, found: Mapping[str, Shape], shape: Shape) -> Mapping[str, Shape]:
        bits, groups = _bits(weight, found, shape), _num_groups(weight, found, shape, self._group_size)
        out, width = shape
        sizes = {".qweight": (width * bits // 32, out), ".scales": (groups, out), ".g_idx": (width,)}
        return {**sizes, ".qzeros": (groups, out * bits // 32)}

    def decode(self, weight: str, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        words, zeros, scales = (parts[ending] for ending in (".qweight", ".qzeros", ".scales"))
        bits = _bits(weight, {".qweight": tuple(words.shape)}, shape)
        group = _group_of_inputs(weight, parts.get(".g_idx"), len(scales), shape[1], self._group_size)
        most = (1 << bits) - 1

        def rows(first: int, end: int) -> Tensor:
            columns = slice(first * bits // 32, end * bits // 32)
            zero = unpack(zeros[:, columns].int(), bits).int() + self._less & most
            return _scaled(unpack(words[:, first:end].T.int(), bits), zero, scales[:, first:end], group)

        return by_rows(rows, shape, dtype)

    def scales(self, weight: str, parts: Parts, shape: Shape) -> Tensor | None:
        scales = parts[".scales"]
        group = _group_of_inputs(weight, parts.get(".g_idx"), len(scales), shape[1], self._group_size)
        return scales_of_groups(scales.T, group)


class Awq:
    """The layout that AutoAWQ calls gemm."""

    beside: str | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, config: Config, title: str = "AWQ") -> None:
        config.integer(config.either("bits", "w_bit"), AWQ_BITS, at_least=AWQ_BITS, at_most=AWQ_BITS)
        group = config.integer(config.either("group_size", "q_group_size"), 128, at_least=-1)
        config.choice(config.either("version", "format"), "gemm", ["gemm", "GEMM"])
        self._group_size = group
        self.title = f"{title}, {AWQ_BITS} bits, {_of_groups(group)}"
        self.settings = f"awq gemm, groups of {group}"

    def matrices(self, kinds: Mapping[str, str]) -> dict[str, dict[str, str]]:
        return collect(kinds, stems_ending(kinds, ".qweight"), PARTS)

    def rows(self, found: Mapping[str, Shape]) -> int:
        return found[".qweight"][-1] * 8

    def shapes(self, weight: str, found: Mapping[str, Shape], shape: Shape) -> Mapping[str, Shape]:
        if len(shape) != 2 or shape[0] % 8:
            raise refuse_shapes(weight, found, shape)
        out, width = shape
        groups = _num_groups(weight, found, shape, self._group_size)
        return {".qweight": (width, out // 8), ".qzeros": (groups, out // 8), ".scales": (groups, out)}

    def decode(self, weight: str, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        words, zeros, scales = (parts[ending] for ending in (".qweight", ".qzeros", ".scales"))
        group = _group_of_inputs(weight, None, len(scales), shape[1], self._group_size)

        def rows(first: int, end: int) -> Tensor:
            columns = slice(first // 8, end // 8)
            codes, zero = (_in_order(unpack(part[:, columns].int(), AWQ_BITS)) for part in (words, zeros))
            return _scaled(codes.T, zero, scales[:, first:end], group)

        return by_rows(rows, shape, dtype)

    def scales(self, weight: str, parts: Parts, shape: Shape) -> Tensor | None:
        scales = parts[".scales"]
        return scales_of_groups(scales.T, _group_of_inputs(weight, None, len(scales), shape[1], self._group_size))


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """codes [rows, in], zeros and scales [groups, rows], group [in] -> float32 [rows, in]."""
    zero, scale = (values.float().T[:, group] for values in (zeros, scales))
    return (codes.float() - zero) * scale


def _in_order(codes: Tensor) -> Tensor:
    """[rows, out] as AWQ's words have them -> in their order."""
    return codes.view(len(codes), -1, 8)[..., PLACES].reshape(len(codes), -1)


def _bits(weight: str, found: Mapping[str, Shape], shape: Shape) -> int:
    """From how many words the inputs take."""
    words = found[".qweight"][0]
    if len(shape) != 2:
        raise refuse_shapes(weight, found, shape)
    bits = words * 32 // shape[-1]
    if bits not in GPTQ_BITS or words * 32 != bits * shape[1] or shape[0] * bits % 32:
        raise refuse_shapes(weight, found, shape)
    return bits


def _num_groups(weight: str, found: Mapping[str, Shape], shape: Shape, size: int) -> int:
    """As many as there are scales for each output. Raises ModelError where the inputs do not make so many.

    size: that the config names, of which the last group may have fewer; single modules may have another
    """
    scales, width = found[".scales"], shape[-1]
    fits = len(scales) == 2 and (".g_idx" in found or _size_of_groups(scales[0], width, size) is not None)
    if not fits:
        raise refuse_shapes(weight, found, shape)
    return scales[0]


def _size_of_groups(num_groups: int, width: int, size: int) -> int | None:
    if size > 0 and -(-width // size) == num_groups:
        return size
    return None if width % num_groups else width // num_groups


def _group_of_inputs(weight: str, named: Tensor | None, num_groups: int, width: int, size: int) -> Tensor:
    """[in], the group of each input. Raises ModelError where a file names one that it does not have."""
    if named is not None:
        return groups_named(weight, named, num_groups)
    found = _size_of_groups(num_groups, width, size)
    assert found is not None
    return torch.arange(width) // found


def _of_groups(size: int) -> str:
    return "one scale for each output" if size < 1 else f"groups of {size}"
