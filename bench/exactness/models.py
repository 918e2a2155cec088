"""The models of `hybrid-cache bench exactness`: what ships, small random ones, and random ones of real widths."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hybrid_cache.bench.common.random_model import SMALL, random_model
from hybrid_cache.bench.exactness.mix import LONG, MIXED, Phase
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.adapters import SHIPPED
from hybrid_cache.models.loading import COMPUTE_DTYPES, embedded_path, load, resolve
from hybrid_cache.models.tools.published import CONFIGS

# Attention only, whose messages can be relocated, and states only.
PURE: Mapping[str, Mapping[str, object]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    "mamba2": {
        "model_type": "mamba2",
        "vocab_size": 512,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 32,
        "state_size": 32,
        "n_groups": 1,
    },
}
# Widths as they are published; fewer layers and tokens.
WIDE: Mapping[str, Mapping[str, object]] = {
    "granite-4-h-350m": {"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"], "vocab_size": 1024},
    "falcon-h1-0.5b": {"num_hidden_layers": 2, "max_position_embeddings": 32768, "vocab_size": 1024},
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model by the name that a command line gives it."""

    name: str
    load: Callable[[str, Ops], HybridModel]  # dtype; raises HybridCacheError
    other: Callable[[str, Ops], HybridModel] | None = None  # a variant of it: the same shape, other weights
    phase: Phase = MIXED


def shipped() -> list[Subject]:
    """The embedded model, by itself and with each adapter."""
    plain, first = partial(_load, embedded_path(), None), next(iter(SHIPPED))
    adapted = [Subject(f"embedded+{name}", partial(_load, embedded_path(), name), plain) for name in SHIPPED]
    return [Subject("embedded", plain, partial(_load, embedded_path(), first, merges=False)), *adapted]


def small() -> list[Subject]:
    configs = {**SMALL, **PURE}
    return [
        Subject(f"small {name}", partial(_random, config, 0), partial(_random, config, 1))
        for name, config in configs.items()
    ]


def wide() -> list[Subject]:
    configs = {name: {**CONFIGS[name], **changes} for name, changes in WIDE.items()}
    return [Subject(f"wide {name}", partial(_random, config, 0), phase=LONG) for name, config in configs.items()]


def named(name: str) -> Subject:
    """One of these, or a model folder. Raises ModelError."""
    known = {subject.name: subject for subject in (*shipped(), *small(), *wide())}
    return known[name] if name in known else Subject(name, partial(_load, resolve(name), None))


def folders(names: Sequence[str]) -> list[str]:
    """Those that are none of the names above."""
    known = {subject.name for subject in (*shipped(), *small(), *wide())}
    return [name for name in names if name not in known]


def _load(path: Path, adapter: str | None, dtype: str, ops: Ops, *, merges: bool = True) -> HybridModel:
    return load(path, dtype=dtype, ops=ops, adapter=adapter, merges=merges)


def _random(config: Mapping[str, object], seed: int, dtype: str, ops: Ops) -> HybridModel:
    return random_model(config, ops, COMPUTE_DTYPES[dtype] or torch.float32, seed)[0]
