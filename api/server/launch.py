"""From the options of a command to a model in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.family import difference_of
from hybrid_cache.engine.selfcheck import check_model
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.kernels.selfcheck import check_exact
from hybrid_cache.models import adapters, loading
from hybrid_cache.models.depth import equal_layers
from hybrid_cache.models.shelf import Shelf


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Which model, and on what it runs."""

    model: str | None = None  # None is the embedded one
    backend: str = "auto"
    fast: bool = False  # as in `dispatch.select`
    dtype: str = "auto"
    threads: int = 0  # 0 keeps torch's choice
    adapter: str | None = None  # a folder in PEFT's layout, or the name of one that ships
    variants: Mapping[str, str] = field(default_factory=dict)  # name -> folder of another model of the same shape
    adapters: Mapping[str, str] = field(default_factory=dict)  # name -> adapter of a variant that is the model with it
    shares: bool = False  # more variants may come while it runs
    merges: bool = False  # these adapters are merged into copies of what they change


@dataclass(frozen=True, slots=True)
class LoadedVariant:
    """A model of the same shape beside the first one."""

    name: str
    path: Path  # of its folder, or its adapter's
    model: HybridModel
    text_path: Path  # whose tokenizer and templates it has
    adapter: str | None
    shared: float  # part of the bytes of its matrices that other models have, too
    equal_layers: int | None  # that it has in common with the first model, from the first on; None if not even what
    # comes before them


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, and what people want to know about it."""

    name: str  # "embedded", the folder's name or the hub's, and "+" the adapter's
    path: Path
    model: HybridModel
    ops: Ops
    info: loading.ModelInfo
    adapter: str | None = None  # its name
    variants: tuple[LoadedVariant, ...] = ()
    shelf: Shelf | None = None  # where there are variants, or may be
    asked_dtype: str = "auto"  # that folders of variants are read in, too

    @property
    def dtype(self) -> torch.dtype:
        return self.model.cache_spec.hidden_dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def load(options: LoadOptions) -> Loaded:
    """Reads the model's folder. Raises HybridCacheError."""
    if options.threads:
        torch.set_num_threads(options.threads)
    path = loading.embedded_path() if options.model is None else loading.resolve(options.model)
    try:
        ops = dispatch.select(options.backend, fast=options.fast)
    except dispatch.BackendUnavailable as error:
        raise ConfigError(str(error)) from error
    shelf = Shelf() if options.variants or options.adapters or options.shares else None
    model = loading.load(path, dtype=options.dtype, ops=ops, adapter=options.adapter, shelf=shelf)
    dtype = str(model.cache_spec.hidden_dtype).removeprefix("torch.")
    info = loading.describe(loading.load_config(path), dtype=dtype)
    adapter = None if options.adapter is None else adapters.name_of(options.adapter)
    name = _name(options.model) if adapter is None else f"{_name(options.model)}+{adapter}"
    loaded = Loaded(name, path, model, ops, info, adapter, (), shelf, options.dtype)
    variants = [load_variant(loaded, name, folder) for name, folder in options.variants.items()]
    variants += [
        load_variant(loaded, name, adapter=folder, merges=options.merges) for name, folder in options.adapters.items()
    ]
    return replace(loaded, variants=tuple(variants))


def load_variant(
    loaded: Loaded, name: str, folder: str | None = None, *, adapter: str | None = None, merges: bool = False
) -> LoadedVariant:
    """A model of the same shape, which shares the weights that are equal: that of a folder, or the first one with an
    adapter beside it, or merged into it.

    Raises HybridCacheError.
    """
    assert loaded.shelf is not None
    if adapter is not None and loaded.adapter is not None:
        raise ConfigError(f"adapter {loaded.adapter} is merged into the model: a variant with {name} has no base")
    path = loaded.path if folder is None else loading.resolve(folder)
    loaded.shelf.begin()
    dtype = loaded.dtype_name if folder is None else loaded.asked_dtype
    model = loading.load(path, dtype=dtype, ops=loaded.ops, adapter=adapter, merges=merges, shelf=loaded.shelf)
    difference = difference_of(loaded.model, model)
    if difference:
        raise ConfigError(f"{name}: {path} is no variant of {loaded.name}: {difference}")
    has_text = (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file()
    return LoadedVariant(
        name=name,
        path=path if adapter is None else adapters.resolve(adapter),
        model=model,
        text_path=path if has_text else loaded.path,
        adapter=None if adapter is None else adapters.name_of(adapter),
        shared=loaded.shelf.num_shared_bytes / max(loaded.shelf.num_bytes, 1),
        equal_layers=equal_layers(loaded.model.chain, model.chain),
    )


def _name(model: str | None) -> str:
    if model is None:
        return "embedded"
    return Path(model).resolve().name if Path(model).is_dir() else model


def inexact_reasons(loaded: Loaded) -> list[str]:
    """Why the cache is not exact here: what the backend says of itself, then probes that failed. Empty if it is."""
    said = [loaded.ops.inexact] if loaded.ops.inexact else []
    with torch.inference_mode():  # as when it serves
        models = {model.fingerprint: model for model in (loaded.model, *(each.model for each in loaded.variants))}
        probed = [why for model in models.values() for why in check_model(model)]
        return said + check_exact(loaded.ops, loaded.dtype) + list(dict.fromkeys(probed))
