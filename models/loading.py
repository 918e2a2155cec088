"""From a model folder to a model that can run: config.json and safetensors files, nothing else, checked strictly."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from hybrid_cache.device.adapted import AdaptedModel
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.errors import ConfigError, ModelError, UnsupportedModel
from hybrid_cache.kernels.codes import Matrix
from hybrid_cache.kernels.names import LEAST_CONTEXT
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models import adapters, deltas, registry
from hybrid_cache.models.adapters import Adapter
from hybrid_cache.models.bank import AdapterBank
from hybrid_cache.models.config import Config
from hybrid_cache.models.files import errors_begin_with, read_json
from hybrid_cache.models.folders import find_gguf, resolve
from hybrid_cache.models.gguf.file import read_model
from hybrid_cache.models.quant_methods.method import Method
from hybrid_cache.models.quant_methods.named import method_of
from hybrid_cache.models.registry import ShapedModel
from hybrid_cache.models.shapes import ModelShape
from hybrid_cache.models.shelf import Shelf
from hybrid_cache.models.weights import SafetensorsWeights, ShapesOnly
from hybrid_cache.spec import CacheSpec, PrefillCost

logger = logging.getLogger("hybrid_cache")

COMPUTE_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def load(
    path: str | Path,
    *,
    dtype: str = "auto",
    ops: Ops,
    adapter: str | Path | None = None,
    merges: bool = True,
    shelf: Shelf | None = None,
    max_length: int | None = None,
    weights: str = "auto",
) -> HybridModel:
    """Reads a model folder or a delta, tensor by tensor, and merges the LoRA adapter of another folder into it.

    merges: else the adapter's products are computed beside those of the model, which stay as they are; other bits
    shelf: of models that share what they have in common
    max_length: tokens of context at most, where the model has more; it changes no bit of what is computed
    weights: one of `names.WEIGHTS`

    `dtype` is the type that rows are computed and cached in. "auto" is bfloat16 for a checkpoint in bfloat16, and
    float32 for one in float32 or float16: float32 holds every float16 value, bfloat16 does not.
    """
    changes = None if adapter is None else adapters.load(adapter)
    if changes is not None and merges and (invocation := changes.config.invocation):
        raise UnsupportedModel(f"adapter {adapter} is activated by the tokens {[*invocation]}, and cannot be merged")
    if changes is None or merges:
        return _shortened(_build(Path(path), dtype, ops, changes, shelf, weights=weights), max_length)
    trunk = load_trunk(path, dtype=dtype, ops=ops, shelf=shelf, adapter=changes, max_length=max_length, weights=weights)
    return beside(trunk, changes)


@dataclass(frozen=True, slots=True)
class Named:
    """A model by what a command line calls it."""

    title: str  # in tables and names of files
    folder: Path  # of its weights and text files
    own_folder: Path  # its adapter's, if it has one
    model: HybridModel


def load_named(name: str, *, dtype: str = "auto", ops: Ops, merges: bool = False) -> Named:
    """`DIR`, or what ships, and after a + an adapter, which stands beside it unless it is merged.

    Raises HybridCacheError.
    """
    base, _, adapter = name.partition("+")
    folder = resolve(base)
    model = load(folder, dtype=dtype, ops=ops, adapter=adapter or None, merges=merges)
    title = Path(base).name + (f"+{adapters.name_of(adapter)}" if adapter else "")
    return Named(title, folder, adapters.resolve(adapter) if adapter else folder, model)


def load_trunk(
    path: str | Path,
    *,
    dtype: str = "auto",
    ops: Ops,
    shelf: Shelf | None = None,
    adapter: Adapter | None = None,
    max_length: int | None = None,
    weights: str = "auto",
) -> ShapedModel:
    """As `load`, a model beside which adapters may stand; with the modules that an adapter replaces as a whole."""
    replaced = replace(adapter, factors={}) if adapter is not None and adapter.replaced else None
    return _shortened(_build(Path(path), dtype, ops, replaced, shelf, AdapterBank(ops), weights), max_length)


def beside(trunk: ShapedModel, adapter: Adapter) -> AdaptedModel:
    """A model with an adapter beside it: it shares all but the factors, which go with its last user.

    trunk: as `load_trunk` makes it, for this adapter if that replaces modules. Raises ModelError for what does not fit.
    """
    assert trunk.bank is not None
    model, invocation = trunk.bank.adapted(trunk, replace(adapter, replaced={})), adapter.config.invocation
    return model.invoked_by(invocation) if invocation else model


def _build(
    folder: Path,
    dtype: str,
    ops: Ops,
    adapter: Adapter | None,
    shelf: Shelf | None,
    bank: AdapterBank | None = None,
    weights: str = "auto",
) -> ShapedModel:
    """adapter: merged into the weights   bank: for those that may stand beside the model"""
    compute_dtype = _compute_dtype(dtype)
    values = load_config(folder)
    delta = deltas.find(folder)
    folder = folder if delta is None else delta.base
    if compute_dtype is None and find_gguf(folder) is not None:  # codes do not say what they were made from
        compute_dtype = _named_dtype(values)
    stored = stored_in(folder)
    if stored is not None:
        compute_dtype = compute_dtype or _named_dtype(values)  # codes do not say what they were made from
    with errors_begin_with(folder):
        build = registry.find(values.get("model_type"))
        with (
            ops.device,
            SafetensorsWeights(folder, compute_dtype, stored, ops.device, adapter, bank, weights) as taken,
        ):
            if delta is not None:
                delta.lay_over(taken)
            into, on = (taken, ops) if shelf is None else (shelf.weights(taken), shelf.ops(ops))
            model = build(Config(values), into, on, taken.dtype)
            _log_codes(folder, stored, taken)
            return model


def _log_codes(folder: Path, stored: Method | None, weights: SafetensorsWeights) -> None:
    """What became of matrices that a file has in codes."""
    kept = f"{weights.num_kept} matrices are multiplied as they are stored, others dequantized when read"
    facts = [*(() if stored is None else (stored.title, *stored.notes)), kept if weights.num_kept else ""]
    if stored is not None and not weights.num_kept:
        facts[-1] = "dequantized when read"
    if text := "; ".join(filter(None, facts)):
        logger.info("%s: %s", folder.name, text)


def context(asked: int, most: int) -> int:
    """Tokens of context that are asked for, of a model that has `most`. Raises ConfigError for more, or very few."""
    least = min(LEAST_CONTEXT, most)
    if not least <= asked <= most:
        raise ConfigError(f"max_model_len is {asked:,}, must be from {least} to {most:,}, this model's own context")
    return asked


def _shortened(model: ShapedModel, max_length: int | None) -> ShapedModel:
    if max_length is not None:
        model.max_length = min(max_length, model.max_length)
    return model


def load_config(path: str | Path) -> dict[str, object]:
    """The config.json of a folder, or of a delta's base, or what a GGUF file says in its place. Raises ModelError if
    there is none that can be read."""
    folder = deltas.base_of(Path(path))
    if (found := find_gguf(folder)) is not None:
        return read_model(found).config
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder")
    return read_config(folder / "config.json")


def read_config(path: Path) -> dict[str, object]:
    """The values of one config.json; other files of its folder are not read. Raises ModelError."""
    with errors_begin_with(path.parent):
        values = read_json(path)
        with errors_begin_with(path.name):
            method_of(values)
    return values


def stored_in(path: str | Path) -> Method | None:
    """How the quantized matrices of a folder, or of a delta's base, are stored; None for plain weights and for files.

    Raises ModelError.
    """
    folder = deltas.base_of(Path(path))
    if not folder.is_dir() or find_gguf(folder) is not None:
        return None
    with errors_begin_with(folder):
        return method_of(read_json(folder / "config.json"), folder)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a config says about a model, without its weights."""

    model_type: str
    dtype: torch.dtype
    layers: Mapping[str, int]  # parts that keep something, by the `kind` of their shapes
    num_parameters: int
    vocab_size: int
    max_length: int
    stretched: str | None  # how its positions make more of the context than it was trained for
    kv_bytes_per_token: int
    checkpoint_bytes: int
    prefill_cost: PrefillCost
    cache_spec: CacheSpec
    shape: ModelShape  # the parts that all of these add up from


def describe(config: Mapping[str, object], *, dtype: str = "auto") -> ModelInfo:
    """The facts of a model from its config only; "auto" reads the dtype that the config names."""
    compute_dtype = _compute_dtype(dtype) or _named_dtype(config)
    weights = ShapesOnly(compute_dtype)
    model = registry.find(config.get("model_type"))(Config(config), weights, shape_ops(), compute_dtype)
    spec = model.cache_spec
    return ModelInfo(
        model_type=str(config["model_type"]),
        dtype=compute_dtype,
        layers=Counter(layer.kind for layer in model.shape.layers if layer.cache is not None),
        num_parameters=weights.num_parameters,
        vocab_size=model.vocab_size,
        max_length=model.max_length,
        stretched=model.context.stretched,
        kv_bytes_per_token=spec.kv_bytes_per_token,
        checkpoint_bytes=spec.slot_bytes,
        prefill_cost=model.prefill_cost,
        cache_spec=spec,
        shape=model.shape,
    )


def embedded_path() -> Path:
    """The model that ships inside the package."""
    return resolve(None)


def shape_ops() -> Ops:
    """Operations for a model that is built of shapes only and never run."""
    return cast(Ops, _ShapeOps())


def _compute_dtype(dtype: str) -> torch.dtype | None:
    if dtype not in COMPUTE_DTYPES:
        raise ModelError(f"dtype {dtype!r} is not supported; supported: {', '.join(COMPUTE_DTYPES)}")
    return COMPUTE_DTYPES[dtype]


def _named_dtype(config: Mapping[str, object]) -> torch.dtype:
    text = config.get("text_config")
    places = (config, text) if isinstance(text, Mapping) else (config,)
    named = next((place[name] for place in places for name in ("dtype", "torch_dtype") if place.get(name)), None)
    return torch.bfloat16 if named == "bfloat16" else torch.float32


class _ShapeOps:
    """Packs nothing; enough to build a model whose facts are asked for."""

    name = "shapes"
    device = torch.device("cpu")
    packs = True
    mamba2 = rms_norm = silu_mul = gelu_mul = gelu_tanh_mul = add_gated_mlp = add_mamba2 = mamba2_log_decay = None

    def linear(self, weight: Matrix, bias: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(in_features=weight.shape[1], out_features=weight.shape[0])

    def experts(self, w_in: object, w_out: object, act: object = None) -> None:
        return None
