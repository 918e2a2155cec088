"""The models of `hybrid-cache bench exactness`: what ships, small random ones, and random ones of real widths."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hybrid_cache.bench.common.random_model import SMALL, activated_by, random_adapter, random_model
from hybrid_cache.bench.exactness.asked import ACTIVATED, VARIANT
from hybrid_cache.bench.exactness.mix import LONG, MIXED, SHARED, Phase
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.adapters import load as load_adapter
from hybrid_cache.models.folders import resolve
from hybrid_cache.models.loading import COMPUTE_DTYPES, beside, embedded_path, load, load_trunk
from hybrid_cache.models.scheme import NOT_CODED, Scheme
from hybrid_cache.models.tools.published import CONFIGS

INVOCATION = (11, 12)
RANK = 8
CODES = ("int8", "int4")
MERGED = "embedded-choreo"  # an adapter that ships and can be merged
_SHAPE: Mapping[str, object] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
# Attention only, whose messages can be relocated, and states only.
PURE: Mapping[str, Mapping[str, object]] = {
    "llama": {**_SHAPE, "model_type": "llama", "num_hidden_layers": 2},
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


_DEEP = {**_SHAPE, "num_hidden_layers": 4}
# Four layers or more, of which variants have some in common; three keep the stream in float32 whatever the weights are.
DEEP: Mapping[str, Mapping[str, object]] = {
    "granite": {
        **SMALL["granite"],
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "attention", "mamba", "attention"],
    },
    "jamba": SMALL["jamba"],
    "mamba2": {**PURE["mamba2"], "num_hidden_layers": 4},
    "falcon mamba": {**_DEEP, "model_type": "falcon_mamba", "state_size": 16, "time_step_rank": 8},
    "nemotron h": {
        **_DEEP,
        "model_type": "nemotron_h",
        "head_dim": 32,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "ssm_state_size": 32,
        "n_groups": 2,
        "layers_block_type": ["linear_attention", "full_attention", "linear_attention", "mlp"],
        "residual_in_fp32": True,
    },
    "zamba2": {
        **_DEEP,
        "model_type": "zamba2",
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba"],
        "num_mem_blocks": 2,
        "n_mamba_heads": 8,
        "mamba_d_state": 32,
        "adapter_rank": 8,
    },
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model by the name that a command line gives it."""

    name: str
    load: Callable[[str, Ops], list[HybridModel]]  # dtype -> it, and variants of it; raises HybridCacheError
    phase: Phase = MIXED


def by_name(variants: Sequence[HybridModel]) -> dict[str, HybridModel]:
    """By the names that requests have for them."""
    others = [each for each in variants if not each.invocation]
    invoked = [(ACTIVATED, each) for each in variants if each.invocation]
    return {**{f"{VARIANT} {number}": each for number, each in enumerate(others)}, **dict(invoked)}


def shipped() -> list[Subject]:
    """The embedded model with adapters beside it, and with one merged into it."""
    return [Subject("embedded", _beside_embedded), Subject(f"embedded+{MERGED}", partial(_embedded, MERGED))]


def small() -> list[Subject]:
    configs = {**SMALL, **PURE}
    return [Subject(f"small {name}", partial(_random, config)) for name, config in configs.items()]


def sharing() -> list[Subject]:
    return [Subject(f"bands {name}", partial(_layered, config), phase=SHARED) for name, config in DEEP.items()]


def wide() -> list[Subject]:
    configs = {name: {**CONFIGS[name], **changes} for name, changes in WIDE.items()}
    return [Subject(f"wide {name}", partial(_plain, config), phase=LONG) for name, config in configs.items()]


def named(name: str) -> Subject:
    """One of these, or a model folder. Raises ModelError."""
    known = _known()
    return known[name] if name in known else Subject(name, partial(_folder, resolve(name)))


def folders(names: Sequence[str]) -> list[str]:
    """Those that are none of the names above."""
    known = _known()
    return [name for name in names if name not in known]


def _known() -> Mapping[str, Subject]:
    return {subject.name: subject for subject in (*shipped(), *small(), *wide(), *sharing())}


def _read_as(dtype: str) -> tuple[str, str]:
    """Types of rows and weights: codes are named in place of the type of the rows, which is bfloat16."""
    return ("bfloat16", dtype) if dtype in CODES else (dtype, "auto")


def _drawn_as(dtype: str) -> tuple[torch.dtype, Scheme]:
    if dtype in CODES:
        return torch.bfloat16, Scheme.named(dtype, torch.bfloat16)
    return COMPUTE_DTYPES[dtype] or torch.float32, NOT_CODED


def _folder(path: Path, dtype: str, ops: Ops) -> list[HybridModel]:
    dtype, weights = _read_as(dtype)
    return [load(path, dtype=dtype, weights=weights, ops=ops)]


def _embedded(adapter: str, dtype: str, ops: Ops) -> list[HybridModel]:
    """With an adapter merged into it, and without."""
    dtype, weights = _read_as(dtype)
    return [load(embedded_path(), dtype=dtype, weights=weights, ops=ops, adapter=a) for a in (adapter, None)]


def _beside_embedded(dtype: str, ops: Ops) -> list[HybridModel]:
    """The model, with one adapter that ships and two random ones beside it."""
    dtype, weights = _read_as(dtype)
    trunk = load_trunk(embedded_path(), dtype=dtype, weights=weights, ops=ops)
    adapters = [load_adapter(MERGED), *(random_adapter(trunk, rank, seed=rank) for rank in (3, 16))]
    invoked = activated_by(trunk, random_adapter(trunk, RANK, seed=RANK), INVOCATION)
    return [trunk, *(beside(trunk, adapter) for adapter in adapters), invoked]


def _random(config: Mapping[str, object], dtype: str, ops: Ops) -> list[HybridModel]:
    """Random weights, with adapters beside them, other random weights, and some that are other from layer 1 on."""
    numbers, scheme = _drawn_as(dtype)
    trunk, _ = random_model(config, ops, numbers, 0, adaptable=True, scheme=scheme)
    adapters = [random_adapter(trunk, rank, seed=rank) for rank in (4, 17)]
    invoked = activated_by(trunk, random_adapter(trunk, RANK, seed=RANK), INVOCATION)
    upper, _ = random_model(config, ops, numbers, 0, other=2, first=1, scheme=scheme)
    others = random_model(config, ops, numbers, 1, scheme=scheme)[0], upper, invoked
    return [trunk, *(beside(trunk, adapter) for adapter in adapters), *others]


def _layered(config: Mapping[str, object], dtype: str, ops: Ops) -> list[HybridModel]:
    """Random weights; the same with others in the top quarter, in the top half, in all layers but the first; with an
    adapter on the top half; and with one that is invoked.
    """
    numbers, scheme = _drawn_as(dtype)
    trunk, _ = random_model(config, ops, numbers, 0, adaptable=True, scheme=scheme)
    num = len(trunk.layers)
    firsts = (num - num // 4, num // 2, 1)
    others = [random_model(config, ops, numbers, 0, other=first + 1, first=first, scheme=scheme)[0] for first in firsts]
    adapter, invoked = random_adapter(trunk, 4, seed=4, first=num // 2), random_adapter(trunk, RANK, seed=RANK)
    return [trunk, *others, beside(trunk, adapter), activated_by(trunk, invoked, INVOCATION)]


def _plain(config: Mapping[str, object], dtype: str, ops: Ops) -> list[HybridModel]:
    numbers, scheme = _drawn_as(dtype)
    return [random_model(config, ops, numbers, scheme=scheme)[0]]
