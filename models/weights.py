"""Weights by name: what an architecture asks for while it is built, and where they come from."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from math import isfinite, prod
from pathlib import Path
from typing import Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels.codes import Matrix
from hybrid_cache.kernels.ops import Linear
from hybrid_cache.models.adapters import Adapter
from hybrid_cache.models.bank import AdapterBank
from hybrid_cache.models.depth import digest_of
from hybrid_cache.models.files import TABLE_BYTES, few, read_json, shown
from hybrid_cache.models.folders import GGUF, NUMBERED, find_gguf
from hybrid_cache.models.gguf.file import GgufFile
from hybrid_cache.models.names import Names, core
from hybrid_cache.models.quant_methods.method import Method
from hybrid_cache.models.scheme import Scheme

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DERIVED = r"rotary_emb\.inv_freq$"  # we compute these ourselves
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_WEIGHTS = 1 << 18  # that are described without being there
MAX_SIZE = 1 << 44  # of one of them, in numbers
_LAYER = re.compile(r"(.*?\blayers\.)(\d+)\.")
_CODES = re.compile(r"[._](?:qweight|qzeros|(?:weight_)?(?:packed|scale|scale_inv|scales|blocks|absmax)|SCB)$")
_SHARD = re.compile(r"model-(\d{1,5})-of-(\d{1,5})\.safetensors")


class Weights(Protocol):
    """Gives each tensor once, checked against the shape that the architecture expects.

    scheme: how matrices are multiplied
    """

    scheme: Scheme

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor [*shape] in the compute dtype. Raises ModelError if it is missing or has another shape."""
        ...

    def take_matrix(self, name: str, out: int, inputs: int, *, head: bool = False) -> Matrix:
        """[out, in] as a projection, or the head, multiplies with it. Raises as `take`."""
        ...

    def take_float32(self, name: str, *shape: int) -> Tensor:
        """The tensor [*shape] in float32. Raises as `take`."""
        ...

    def take_joined(self, names: Sequence[str], *shape: int) -> Tensor:
        """[*shape] from tensors one after another along their first dimension, of any lengths. Raises as `take`."""
        ...

    def has(self, name: str) -> bool: ...

    def beside(self, packed: Linear, parts: Mapping[str, int]) -> Linear:
        """A projection with matrices that were taken as they are, beside which adapters may stand, if any may come.

        parts: their names, with output features, in their order in the projection
        """
        ...


class ModelWeights(Weights, Protocol):
    """All weights of one model.

    bank: where adapters may stand beside it, else None
    """

    bank: AdapterBank | None

    def ignore(self, pattern: str) -> None:
        """Tensors in whose name the regular expression is found may be left over."""
        ...

    def finish(self) -> Mapping[str, bytes]:
        """-> digests of all tensors that were taken, in their order; empty where weights have no values.

        Raises ModelError if any were not, except the ignored ones.
        """
        ...


class Scope:
    """The weights under one prefix, as in `model.layers.3.`."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self._weights = weights
        self._prefix = prefix
        self.scheme = weights.scheme

    def take(self, name: str, *shape: int) -> Tensor:
        return self._weights.take(self._prefix + name, *shape)

    def take_matrix(self, name: str, out: int, inputs: int, *, head: bool = False) -> Matrix:
        return self._weights.take_matrix(self._prefix + name, out, inputs, head=head)

    def take_float32(self, name: str, *shape: int) -> Tensor:
        return self._weights.take_float32(self._prefix + name, *shape)

    def take_joined(self, names: Sequence[str], *shape: int) -> Tensor:
        return self._weights.take_joined([self._prefix + name for name in names], *shape)

    def has(self, name: str) -> bool:
        return self._weights.has(self._prefix + name)

    def beside(self, packed: Linear, parts: Mapping[str, int]) -> Linear:
        return self._weights.beside(packed, {self._prefix + name: size for name, size in parts.items()})


class _Slice(Protocol):
    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...


class _File(Protocol):
    """What we use of a safetensors handle, which has no types of its own."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> _Slice: ...

    def get_tensor(self, name: str) -> Tensor: ...


class SafetensorsWeights:
    """Streams tensors out of the safetensors files of one folder, or of a GGUF file. Use as a context manager."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype | None,
        stored: Method | None = None,
        device: torch.device = CPU,
        adapter: Adapter | None = None,
        bank: AdapterBank | None = None,
        weights: str = "auto",
    ) -> None:
        """`dtype` None takes the files' own; float16 is computed in float32, which holds all its values.

        `stored` is how quantized matrices are stored, if there are any; `device` is where tensors go; the changes of
        an adapter are merged into what is read. Other adapters may stand beside it with a `bank`. `weights` names a
        scheme.

        Raises ModelError for files that cannot be read or that contradict each other.
        """
        self._device = device
        self._files = ExitStack()
        self._handle: dict[str, _File] = {}
        for path in _shards(folder):
            file = self._open(path)
            for name in file.keys():  # noqa: SIM118  # not a dict
                if name in self._handle:
                    raise ModelError(f"weight {name} is in two files, one of them {path.name}")
                self._handle[name] = file
        self.dtype = dtype or self._file_dtype()
        self.scheme = Scheme.named(weights, self.dtype)
        self._stored = stored
        self._packed = {} if stored is None else stored.matrices({name: self._kind(name) for name in self._handle})
        parts = {part for named in self._packed.values() for part in named.values()}
        if twice := self._packed.keys() & self._handle.keys() - parts:
            raise ModelError(f"weights are stored plainly and quantized: {few(twice)}")
        self._names = set(self._handle) - parts | set(self._packed)
        self._left = set(self._names)
        self._ignored = [DERIVED] if stored is None or stored.beside is None else [DERIVED, stored.beside]
        self._digests = dict[str, bytes]()
        self._found = Names(self._names)
        self._adapter = None if adapter is None else adapter.named_in(self._found)
        self.bank = bank
        self.num_kept = 0  # matrices that stay codes
        self._latest: tuple[str, dict[str, Tensor]] = "", {}
        self._to_change = set(self._adapter.weights) if self._adapter else set()
        self._check_adapter(self._to_change - self._names)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def take(self, name: str, *shape: int) -> Tensor:
        return self._read(self._found.find(name), shape, self.dtype)

    def take_matrix(self, name: str, out: int, inputs: int, *, head: bool = False) -> Matrix:
        found, shape = self._found.find(name), (out, inputs)
        matrix = self.scheme.head if head else self.scheme.matrix
        if found in self._to_change or not self.scheme.keeps:
            return matrix(self.take(name, *shape))
        weight = self._read_base(found, shape, torch.float32 if self._is_coded(found) else self.dtype)
        if (kept := self.scheme.kept(weight, self._scales(found, shape))) is not None:
            self.num_kept += 1
            return kept
        return matrix(weight.to(self.dtype))

    def _is_coded(self, name: str) -> bool:
        return name in self._packed or isinstance(self._handle.get(name), GgufFile)

    def _scales(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """[out, in / 32] of a matrix in codes that are whole numbers."""
        if name in self._packed:
            assert self._stored is not None
            return self._stored.scales(name, self._parts(name), shape)
        file = self._handle[name]
        return file.scales(name) if isinstance(file, GgufFile) else None

    def take_float32(self, name: str, *shape: int) -> Tensor:
        return self._read(self._found.find(name), shape, torch.float32)

    def take_joined(self, names: Sequence[str], *shape: int) -> Tensor:
        lengths = [self._length(self._found.find(name)) for name in names]
        if sum(lengths) != shape[0]:
            raise ModelError(f"weights {', '.join(names)} have {sum(lengths)} rows, expected {shape[0]}")
        return torch.cat([self.take(name, n, *shape[1:]) for name, n in zip(names, lengths, strict=True)])

    def has(self, name: str) -> bool:
        return self._found.find(name) in self._names

    def lay_over(self, path: Path, unchanged: str) -> None:
        """Replaces weights by those of a safetensors file; `unchanged` is the digest of the weights that stay.

        Raises ModelError for weights that are not there, in another shape or dtype, and for another digest.
        """
        file = self._open(path)
        names = sorted(file.keys())
        for name in names:
            self._check_replaces(name, file.get_slice(name), path.name)
        if (found := self.digest_without(names)) != unchanged:
            raise ModelError(
                f"{path.name} was made for another base: the rest of its weights is {unchanged}, not {found}"
            )
        self._handle |= dict.fromkeys(names, file)

    def digest_without(self, names: Iterable[str]) -> str:
        """Of the names, shapes, types and contents of all tensors in the files but these."""
        digest = blake2b(digest_size=16)
        for name in sorted(self._handle.keys() - set(names)):
            digest.update(name.encode() + b" " + digest_of(self._finite(name)))
        return digest.hexdigest()

    def _check_replaces(self, name: str, new: _Slice, file: str) -> None:
        if name not in self._handle:
            raise ModelError(f"{file} changes weight {name}, which the base does not have")
        old = self._slice(name)
        if old.get_dtype() not in DTYPES or (new.get_shape(), new.get_dtype()) != (old.get_shape(), old.get_dtype()):
            raise ModelError(
                f"{file} has weight {name} {new.get_shape()} in {new.get_dtype()}, "
                f"but the base has {old.get_shape()} in {old.get_dtype()}"
            )

    def ignore(self, pattern: str) -> None:
        self._ignored.append(pattern)

    def finish(self) -> Mapping[str, bytes]:
        ignored = re.compile("|".join(self._ignored))
        left = sorted(name for name in self._left if not ignored.search(name) and not self._is_empty_bias(name))
        if left:
            raise ModelError(f"unexpected weights: {few(left)}{self._layers_left(left[0])}")
        self._check_adapter(self._to_change)
        if self._stored is not None and self._stored.settings:
            self._digests["quantization_config"] = blake2b(self._stored.settings.encode(), digest_size=16).digest()
        if self.num_kept:
            self._digests["codes"] = blake2b(b"kept", digest_size=16).digest()
        if self.scheme.name:
            self._digests["weights"] = blake2b(self.scheme.name.encode(), digest_size=16).digest()
        return self._digests

    def _is_empty_bias(self, name: str) -> bool:
        """GPTQ's writers give a bias of zeros to matrices that had none."""
        matrix = name.removesuffix(".bias") + ".weight"
        return name.endswith(".bias") and matrix in self._packed and not self._finite(name).any()

    def beside(self, packed: Linear, parts: Mapping[str, int]) -> Linear:
        found = {self._found.find(name): size for name, size in parts.items()}
        return packed if self.bank is None else self.bank.linear(packed, found, self.dtype)

    def _check_adapter(self, unknown: set[str]) -> None:
        if unknown and self._adapter:
            raise ModelError(f"adapter {self._adapter.name} changes weights that are not there: {few(unknown)}")

    def _read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._adapter is None or name not in self._to_change:
            return self._read_base(name, shape, dtype)
        self._to_change.remove(name)
        with CPU:
            weight = self._read_base(name, shape, torch.float32).to(CPU)
            for number, part in enumerate(self._adapter.parts(name)):
                self._put_down(f"{name} adapter {self._adapter.config.scale!r} {number}", part)
            merged = self._adapter.merged(name, weight).to(dtype)
            _check_finite(f"with adapter {self._adapter.name}, weight {name}", merged)
            return merged.to(self._device)

    def _read_base(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self._expect(name, shape)
        if name not in self._packed:
            stored = self._hashed(name)
            tensor = stored.to(self._device, dtype, copy=True)  # a copy, never a view of the file
            may_overflow = stored.dtype == torch.float32 != dtype
        else:
            tensor = self._dequantized(name, shape, dtype)
            may_overflow = True
        if may_overflow:
            _check_finite(f"weight {name}", tensor)
        return tensor

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Checks what the file says of a weight, and counts it as taken."""
        if name not in self._left:
            assert name not in self._names, f"{name} taken twice"
            self._check_read(name)
            raise ModelError(f"missing weight: {name} {list(shape)}{self._layers_missing(name)}")
        if name in self._packed:
            self._check_parts(name, shape)
        else:
            self._check_shape(name, shape)
            if self._kind(name) not in DTYPES:
                raise UnsupportedModel(f"weight {name} is {self._kind(name)}, supported: {', '.join(DTYPES)}")
        self._left.remove(name)

    def _check_read(self, name: str) -> None:
        """Raises UnsupportedModel if a weight that is missing is there in parts of another method."""
        before, experts, _ = core(name).partition(".experts.")
        stem = (before + experts).removesuffix(".weight")
        parts = [each for each in self._names if core(each).startswith(stem) and _CODES.search(each)]
        if parts:
            how = "without a quantization_config" if self._stored is None else f"beside {self._stored.title}"
            raise UnsupportedModel(f"weight {name} is stored {how} as {few(parts)}, which is not read")

    def _dequantized(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert self._stored is not None
        with CPU:
            return self._stored.decode(name, self._parts(name), shape, dtype).to(self._device)

    def _parts(self, name: str) -> dict[str, Tensor]:
        """Of a quantized matrix, by the endings of their names; those of the latest one are at hand."""
        if self._latest[0] != name:
            self._latest = name, {ending: self._hashed(part) for ending, part in self._packed[name].items()}
        return self._latest[1]

    def _shapes_of_parts(self, name: str) -> dict[str, tuple[int, ...]]:
        """Raises ModelError for codes that are no matrix, and for parts without a number."""
        found = {ending: tuple(self._slice(part).get_shape()) for ending, part in self._packed[name].items()}
        for number, (ending, size) in enumerate(found.items()):
            if 0 in size or (number == 0 and len(size) < 2):
                raise ModelError(
                    f"weight {self._packed[name][ending]} has shape {[*size]}, a part of a quantized matrix"
                )
        return found

    def _check_parts(self, name: str, shape: tuple[int, ...]) -> None:
        assert self._stored is not None
        expected = self._stored.shapes(name, self._shapes_of_parts(name), shape)
        for ending, part in self._packed[name].items():
            self._check_shape(part, expected[ending])

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        found = self._slice(name).get_shape()
        if tuple(found) != expected:
            mlx = ", as MLX writes it, which is not read" if _is_of_mlx(name, found, expected) else ""
            raise ModelError(f"weight {name} has shape {found}, expected {list(expected)}{mlx}")

    def _hashed(self, name: str) -> Tensor:
        tensor = self._finite(name)
        self._put_down(name, tensor)
        return tensor

    def _put_down(self, name: str, tensor: Tensor) -> None:
        self._digests[name] = digest_of(tensor)

    def _finite(self, name: str) -> Tensor:
        """A tensor as it lies in the file, which may be mapped into memory."""
        try:
            tensor = self._handle[name].get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise ModelError(f"weight {name} cannot be read: {e}") from e
        _check_finite(f"weight {name}", tensor)
        return tensor

    def _slice(self, name: str) -> _Slice:
        try:
            return self._handle[name].get_slice(name)
        except (SafetensorError, OSError) as e:
            raise ModelError(f"weight {name} cannot be read: {e}") from e

    def _kind(self, name: str) -> str:
        return self._slice(name).get_dtype()

    def _length(self, name: str) -> int:
        if name not in self._names:
            raise ModelError(f"missing weight: {name}{self._layers_missing(name)}")
        if self._stored is not None and name in self._packed:
            return self._stored.rows(self._shapes_of_parts(name))
        return self._slice(name).get_shape()[0]

    def _layers_missing(self, name: str) -> str:
        """Says so where a whole layer is not there."""
        place = _LAYER.match(core(name))
        if place is None or int(place[2]) < (found := _num_layers(self._names, place[1])):
            return ""
        return f"; there are weights for {found} layers, config.json: num_hidden_layers is larger"

    def _layers_left(self, name: str) -> str:
        """Says so where a whole layer is left over."""
        place = _LAYER.match(core(name))
        if place is None or int(place[2]) < _num_layers(self._names - self._left, place[1]):
            return ""
        found = _num_layers(self._names, place[1])
        return f"; there are weights for {found} layers, config.json: num_hidden_layers is smaller"

    def _file_dtype(self) -> torch.dtype:
        kinds = {self._kind(name) for name in self._handle if "embed" in name}
        return torch.bfloat16 if kinds == {"BF16"} else torch.float32

    def _open(self, path: Path) -> _File:
        if path.suffix == GGUF:
            return GgufFile(path)
        try:
            file: _File = self._files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as e:
            raise ModelError(f"{path.name} is not a complete safetensors file: {e}") from e
        return file


class ShapesOnly:
    """Gives weights without values: builds a model that has shapes and costs but cannot run."""

    bank: AdapterBank | None = None
    scheme = Scheme()

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.num_parameters = 0
        self._num_weights = 0

    def take(self, name: str, *shape: int) -> Tensor:
        self.num_parameters += prod(shape)
        self._num_weights += shape[0] if len(shape) == 3 and shape[1] > 1 else 1  # experts are taken apart
        if self._num_weights > MAX_WEIGHTS:
            raise ModelError(f"config.json: the model has more than {MAX_WEIGHTS} weights")
        if prod(shape) > MAX_SIZE:
            raise ModelError(f"config.json: weight {name} has {prod(shape)} numbers, at most {MAX_SIZE} are allowed")
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def take_matrix(self, name: str, out: int, inputs: int, *, head: bool = False) -> Matrix:
        return self.take(name, out, inputs)

    def take_float32(self, name: str, *shape: int) -> Tensor:
        return self.take(name, *shape).float()

    def take_joined(self, names: Sequence[str], *shape: int) -> Tensor:
        return self.take(names[0], *shape)

    def has(self, name: str) -> bool:
        return name.endswith("experts.gate_up_proj")  # all experts in one tensor are quicker than each by itself

    def ignore(self, pattern: str) -> None:
        pass

    def beside(self, packed: Linear, parts: Mapping[str, int]) -> Linear:
        return packed

    def finish(self) -> Mapping[str, bytes]:
        return {}


def _check_finite(what: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and tensor.itemsize == 1:
        tensor = tensor.float()  # what has no order in eight bits
    if not all(isfinite(float(bound)) for bound in tensor.aminmax()):
        raise ModelError(f"{what} contains values that are not finite")


def _is_of_mlx(name: str, found: Sequence[int], expected: Sequence[int]) -> bool:
    """MLX keeps convolutions with channels last, and may have added to norms or multiplied matrices without a word."""
    return "conv" in name and len(found) == 3 and [found[0], found[2], found[1]] == [*expected]


def _num_layers(names: Iterable[str], prefix: str) -> int:
    places = (_LAYER.match(core(name)) for name in names)
    return max((int(place[2]) + 1 for place in places if place and place[1] == prefix), default=0)


def _shards(folder: Path) -> Iterable[Path]:
    if (gguf := find_gguf(folder)) is not None:
        return [gguf]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        return _indexed_shards(folder)
    if shards := _numbered_shards(folder):
        return shards
    raise _no_weights(sorted(path.name for path in folder.iterdir()))


def _no_weights(names: Sequence[str]) -> ModelError:
    """Names what there is instead."""
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return UnsupportedModel(f"only safetensors weights are read, found {pickles[0]}")
    others = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    found = f", found {few(others)}" if others else ""
    return ModelError(f"neither model.safetensors nor {INDEX} is there{found}")


def _numbered_shards(folder: Path) -> list[Path]:
    """All `model-00001-of-0000N.safetensors`, where a tool wrote no index. Raises ModelError where some are missing."""
    places = {path: _SHARD.fullmatch(path.name) for path in sorted(folder.glob(NUMBERED))}
    shards = {path: (int(place[1]), int(place[2])) for path, place in places.items() if place}
    counts = {count for _, count in shards.values()}
    if shards and (len(counts) > 1 or {i for i, _ in shards.values()} != set(range(1, max(counts) + 1))):
        raise ModelError(f"{INDEX} is not there, and {few(path.name for path in shards)} are not all shards")
    return [*shards]


def _indexed_shards(folder: Path) -> Iterable[Path]:
    places = read_json(folder / INDEX, TABLE_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{INDEX} is not a weight index: weight_map is {shown(places)}")
    files: set[str] = set()
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{INDEX} names {shown(name)}, expected a safetensors file beside it")
        files.add(name)
    for name in files:
        if not (folder / name).is_file():
            raise ModelError(f"shard {name} is listed in {INDEX} but is not there")
    return [folder / name for name in sorted(files)]
