"""From the options of a command to a model in memory."""

from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.selfcheck import check_model
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.kernels.selfcheck import check_exact
from hybrid_cache.models import adapters, loading


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Which model, and on what it runs."""

    model: str | None = None  # None is the embedded one
    backend: str = "auto"
    fast: bool = False  # as in `dispatch.select`
    dtype: str = "auto"
    threads: int = 0  # 0 keeps torch's choice
    adapter: str | None = None  # a folder in PEFT's layout, or the name of one that ships


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, and what people want to know about it."""

    name: str  # "embedded", the folder's name or the hub's, and "+" the adapter's
    path: Path
    model: HybridModel
    ops: Ops
    info: loading.ModelInfo
    adapter: str | None = None  # its name

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
    model = loading.load(path, dtype=options.dtype, ops=ops, adapter=options.adapter)
    dtype = str(model.cache_spec.hidden_dtype).removeprefix("torch.")
    info = loading.describe(loading.load_config(path), dtype=dtype)
    adapter = None if options.adapter is None else adapters.name_of(options.adapter)
    name = _name(options.model) if adapter is None else f"{_name(options.model)}+{adapter}"
    return Loaded(name, path, model, ops, info, adapter)


def _name(model: str | None) -> str:
    if model is None:
        return "embedded"
    return Path(model).resolve().name if Path(model).is_dir() else model


def inexact_reasons(loaded: Loaded) -> list[str]:
    """Why the cache is not exact here: what the backend says of itself, then probes that failed. Empty if it is."""
    said = [loaded.ops.inexact] if loaded.ops.inexact else []
    with torch.inference_mode():  # as when it serves
        return said + check_exact(loaded.ops, loaded.dtype) + check_model(loaded.model)
