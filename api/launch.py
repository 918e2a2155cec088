"""From the options of a command to a model in memory."""

from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_cache.batch import HybridModel
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.kernels.selfcheck import check_exact
from hybrid_cache.models import loading
from hybrid_cache.selfcheck import check_model


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Which model, and on what it runs."""

    model: str | None = None  # None is the embedded one
    backend: str = "auto"
    dtype: str = "auto"
    threads: int = 0  # 0 keeps torch's choice


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in memory, and what people want to know about it."""

    name: str  # "embedded", the folder's name or the hub's
    path: Path
    model: HybridModel
    ops: Ops
    info: loading.ModelInfo

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
        ops = dispatch.select(options.backend)
    except dispatch.BackendUnavailable as error:
        raise ConfigError(str(error)) from error
    model = loading.load(path, dtype=options.dtype, ops=ops)
    dtype = str(model.cache_spec.hidden_dtype).removeprefix("torch.")
    return Loaded(_name(options.model), path, model, ops, loading.describe(loading.load_config(path), dtype=dtype))


def _name(model: str | None) -> str:
    if model is None:
        return "embedded"
    return Path(model).resolve().name if Path(model).is_dir() else model


def failed_probes(loaded: Loaded) -> list[str]:
    """What the backend does not compute to the same bits in other company; empty if the cache is exact here."""
    return check_exact(loaded.ops, loaded.dtype) + check_model(loaded.model)
