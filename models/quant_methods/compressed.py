"""compressed-tensors checkpoints, as llm-compressor writes them, decompressed by the library of that name.

    pack-quantized                      .weight_packed int32, .weight_scale, .weight_zero_point (packed), .weight_shape
    int-, float- and naive-quantized    .weight in int8 or float8, .weight_scale, .weight_zero_point

Which scheme a matrix has follows from its name, where the file has several. Groups of inputs in another order
(.weight_g_idx), which the library no longer reads, are unpacked with its functions and scaled here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models.files import shown
from hybrid_cache.models.quant_methods.method import (
    BESIDE,
    FLOAT8,
    FLOATS,
    GRAIN,
    INTEGERS,
    NOT_ACTIVATIONS,
    NOT_KV,
    Part,
    Parts,
    Shape,
    by_rows,
    collect,
    groups_named,
    refuse_shapes,
    same_shape,
    scales_of_groups,
    stems_ending,
)
from hybrid_cache.models.quant_methods.targets import Targets

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

METHOD = "compressed-tensors"
PACKED, PLAIN = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
FORMATS = (PACKED, *PLAIN, "mixed-precision")
CODES = FLOAT8 | {"I8"}
ZEROS = Part(".weight_zero_point", CODES | INTEGERS | FLOATS, needed=False)
PACKED_PARTS = (
    Part(".weight_packed", frozenset({"I32"})),
    Part(".weight_scale", FLOATS),
    Part(".weight_shape", INTEGERS, needed=False),
    Part(".weight_zero_point", frozenset({"I32"}), needed=False),
    Part(".weight_g_idx", INTEGERS, needed=False),
)
PLAIN_PARTS = (Part(".weight", CODES), Part(".weight_scale", FLOATS), ZEROS)
EXTRA = "needs the package compressed-tensors: pip install 'hybrid-cache[quantized]'"


class CompressedTensors:
    beside: str | None = BESIDE

    def __init__(self, values: Mapping[str, object]) -> None:
        """values: of `quantization_config`. Raises ModelError, UnsupportedModel for formats that are not read."""
        _check_formats(values)
        self._schemes = _schemes(values)
        self._targets = [Targets(scheme.targets) for scheme in self._schemes] if len(self._schemes) > 1 else []
        self.title = f"{METHOD}, {', '.join(dict.fromkeys(map(_title, self._schemes)))}"
        self.notes = tuple(_notes(self._schemes, values))
        self.settings = " ".join(scheme.model_dump_json() for scheme in self._schemes)

    def matrices(self, kinds: Mapping[str, str]) -> dict[str, dict[str, str]]:
        packed = stems_ending(kinds, ".weight_packed")
        plain = {w: w.removesuffix(".weight") for w, kind in kinds.items() if w.endswith(".weight") and kind in CODES}
        return collect(kinds, packed, PACKED_PARTS) | collect(kinds, plain, PLAIN_PARTS)

    def rows(self, found: Mapping[str, Shape]) -> int:
        return next(found[ending][0] for ending in (".weight_packed", ".weight") if ending in found)

    def shapes(self, weight: str, found: Mapping[str, Shape], shape: Shape) -> Mapping[str, Shape]:
        args, is_packed = self._args(weight), ".weight_packed" in found
        scale = _scale_shape(args, shape)
        if is_packed and args.type != "int":
            raise UnsupportedModel(f"weight {weight} is packed, and of type {args.type}, supported: int")
        if not args.symmetric and ".weight_zero_point" not in found:
            raise ModelError(f"missing weight: {weight}_zero_point, its zero points are not all 0")
        if scale is None or len(found[".weight_scale"]) > 2 or not same_shape(found[".weight_scale"], scale):
            raise refuse_shapes(weight, found, shape)
        out, width = shape
        words = -(-width * args.num_bits // 32)
        zeros = -(-out * args.num_bits // 32) if is_packed else out
        return {
            ".weight": shape,
            ".weight_packed": (out, words),
            ".weight_shape": (2,),
            ".weight_g_idx": (width,),
            ".weight_scale": found[".weight_scale"],
            ".weight_zero_point": (zeros, *scale[1:]) if is_packed else found[".weight_scale"],
        }

    def decode(self, weight: str, parts: Parts, shape: Shape, dtype: torch.dtype) -> Tensor:
        if (size := parts.get(".weight_shape")) is not None and tuple(size.tolist()) != shape:
            raise ModelError(f"weight {weight} is of {size.tolist()}, expected {[*shape]}")
        packed = _Packed(weight, parts, self._scheme(weight), shape)
        return by_rows(packed.rows, shape, dtype, grain=GRAIN * packed.block_rows)

    def scales(self, weight: str, parts: Parts, shape: Shape) -> Tensor | None:
        args, found = self._args(weight), parts[".weight_scale"].float()
        if args.type != "int" or args.strategy == "block" or len(shape) != 2:
            return None
        scales = found.reshape(1, 1).expand(shape[0], 1) if found.numel() == 1 else found.reshape(shape[0], -1)
        named, size = parts.get(".weight_g_idx"), args.group_size if args.strategy == "group" else None
        if named is not None:
            return scales_of_groups(scales, groups_named(weight, named, scales.shape[1]))
        return scales_of_groups(scales, torch.arange(shape[1]) // (size or shape[1]))

    def _args(self, weight: str) -> QuantizationArgs:
        args = self._scheme(weight).weights
        assert args is not None
        return args

    def _scheme(self, weight: str) -> QuantizationScheme:
        """By its name, else that of all layers of a class; the only one is everybody's, whatever names a file has."""
        if len(self._schemes) == 1:
            return self._schemes[0]
        module, every = weight.removesuffix(".weight"), [*zip(self._schemes, self._targets, strict=True)]
        named = (scheme for scheme, targets in every if targets.names(module))
        of_class = (scheme for scheme, targets in every if targets.has_class)
        if (scheme := next(named, None) or next(of_class, None)) is None:
            raise ModelError(
                f"weight {weight} is quantized, and no group of quantization_config.config_groups names it"
            )
        return scheme


class _Packed:
    """One matrix, of which a few rows are wanted at a time."""

    def __init__(self, weight: str, parts: Parts, scheme: QuantizationScheme, shape: Shape) -> None:
        assert scheme.weights is not None
        self._weight = weight
        self._parts, self._scheme, self._args, self._shape = parts, scheme, scheme.weights, shape
        self._is_packed = ".weight_packed" in parts
        self.block_rows = scheme.weights.block_structure[0] if scheme.weights.block_structure else 1

    def rows(self, first: int, end: int) -> Tensor:
        """-> float32 [end - first, in]. Float32 scales, since products come out in their type."""
        from compressed_tensors.compressors import BaseCompressor

        some = {ending.lstrip("."): self._part(ending, part, first, end) for ending, part in self._parts.items()}
        some["weight_scale"] = some["weight_scale"].float()
        some["weight_shape"] = torch.tensor([end - first, self._shape[1]])
        if "weight_g_idx" in some:
            return self._reordered(some)
        library = BaseCompressor.get_value_from_registry(PACKED if self._is_packed else PLAIN[-1])
        try:
            weight: Tensor = library.decompress(some, self._scheme)["weight"]
        except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:  # it believes files
            why = " ".join(str(e).split())[:200]
            raise ModelError(f"weight {self._weight} cannot be decompressed by {METHOD}: {why}") from e
        return weight

    def _part(self, ending: str, part: Tensor, first: int, end: int) -> Tensor:
        if ending in (".weight_g_idx", ".weight_shape") or len(part) == 1 or part.dim() == 0:
            return part
        if ending == ".weight_zero_point" and self._is_packed:
            bits = self._args.num_bits
            return part[first * bits // 32 : -(-end * bits // 32)]
        if ending in (".weight_scale", ".weight_zero_point"):
            return part[first // self.block_rows : -(-end // self.block_rows)]
        return part[first:end]

    def _reordered(self, some: dict[str, Tensor]) -> Tensor:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        scale, shape = some["weight_scale"], torch.Size(some["weight_shape"].tolist())
        group = groups_named(self._weight, some["weight_g_idx"], scale.shape[-1])
        codes = unpack_from_int32(some["weight_packed"], self._args.num_bits, shape).float()
        if "weight_zero_point" in some:
            zeros = unpack_from_int32(some["weight_zero_point"], self._args.num_bits, scale.shape, packed_dim=0)
            codes -= zeros.float()[:, group]
        weight: Tensor = codes * scale[:, group]
        return weight


def _scale_shape(args: QuantizationArgs, shape: Shape) -> Shape | None:
    if len(shape) != 2:
        return None
    match args.strategy:
        case "tensor":
            return (1,)
        case "channel":
            return (shape[0], 1)
        case "group" if args.group_size:
            return (shape[0], -(-shape[1] // args.group_size))
        case "block" if args.block_structure:
            high, wide = args.block_structure
            return (-(-shape[0] // high), -(-shape[1] // wide))
    return None


def _check_formats(values: Mapping[str, object]) -> None:
    groups = values.get("config_groups")
    inside = (
        [group.get("format") for group in groups.values() if isinstance(group, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    for found in (values.get("format"), *inside):
        if found is not None and found not in FORMATS:
            raise UnsupportedModel(f"quantization_config.format is {shown(found)}, supported: {', '.join(FORMATS)}")
    for name in ("sparsity_config", "transform_config"):
        found = values.get(name)
        if found and not (isinstance(found, Mapping) and found.get("format") == "dense"):
            raise UnsupportedModel(f"quantization_config.{name} is {shown(found)}, which is not supported")


def _schemes(values: Mapping[str, object]) -> tuple[QuantizationScheme, ...]:
    try:
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    except ImportError as e:
        raise UnsupportedModel(f"quantization_config.quant_method is {METHOD!r}, which {EXTRA}") from e
    try:
        given = {name: value for name, value in values.items() if value is not None}
        known = {name: _without_order(given[name]) for name in QuantizationConfig.model_fields if name in given}
        config = QuantizationConfig.model_validate(known)
    except Exception as e:  # its validators compare and look up whatever the file has
        raise ModelError(f"quantization_config is not understood: {' '.join(str(e).split())[:300]}") from e
    schemes = [s for s in config.config_groups.values() if isinstance(s, QuantizationScheme) and s.weights is not None]
    if not schemes:
        raise UnsupportedModel("quantization_config.config_groups quantizes no weights")
    return tuple(schemes)


def _without_order(value: object) -> object:
    """Without `actorder`: which group an input belongs to is in the tensors, and the library refuses an older word."""
    if isinstance(value, Mapping):
        return {name: _without_order(inner) for name, inner in value.items() if name != "actorder"}
    return value


def _title(scheme: QuantizationScheme) -> str:
    """As in W4A16 in groups of 128."""
    args = scheme.weights
    assert args is not None
    inputs = scheme.input_activations
    name = f"W{args.num_bits}A{inputs.num_bits if inputs is not None else 16} {args.type} by {args.strategy}"
    return f"{name} of {args.group_size}" if args.strategy == "group" else name


def _notes(schemes: Sequence[QuantizationScheme], values: Mapping[str, object]) -> Iterator[str]:
    if any(scheme.input_activations or scheme.output_activations for scheme in schemes):
        yield NOT_ACTIVATIONS
    if values.get("kv_cache_scheme"):
        yield NOT_KV
