"""LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`, read, merged and written.

A merged weight is W + scale * B A, in float32; scale is alpha / rank, or alpha / sqrt(rank) with `use_rslora`. Modules
that were trained as a whole (`modules_to_save`) replace those of the base. An activated adapter
(`alora_invocation_tokens`) is only on from its invocation in a prompt: it can be neither merged nor replace anything.
Whatever else PEFT knows is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models.files import errors_begin_with, read_json, shown
from hybrid_cache.models.folders import ADAPTERS, check_adapter
from hybrid_cache.models.names import Names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_RANK = 1 << 16
MAX_ALPHA = 1 << 20
MAX_INVOCATION = 1 << 10
FACTORS = (".lora_A.weight", ".lora_B.weight")
# Settings that change what an adapter means, with the values that mean nothing.
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "layer_replication": ([],),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base weights
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What an adapter says about itself."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # last parts of module names
    base: str | None = None
    saved: tuple[str, ...] = ()  # modules that are replaced as a whole
    dropout: float = 0.0
    rslora: bool = False
    invocation: tuple[int, ...] = ()  # tokens that switch it on; none: it always is

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def to_json(self) -> str:
        """The `adapter_config.json` that PEFT reads."""
        values = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.targets),
            "modules_to_save": list(self.saved) or None,
            "use_rslora": self.rslora,
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "alora_invocation_tokens": list(self.invocation) or None,
            "inference_mode": True,
        }
        return json.dumps(values, indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class Adapter:
    """Changes to weights, by their names in the checkpoint of the base."""

    name: str
    config: LoraConfig
    factors: Mapping[str, tuple[Tensor, Tensor]]  # A [rank, inputs], B [outputs, rank]
    replaced: Mapping[str, Tensor]

    @property
    def weights(self) -> frozenset[str]:
        """Names of the weights that change."""
        return frozenset({*self.factors, *self.replaced})

    def named_in(self, names: Names) -> Adapter:
        """The same, for a checkpoint whose names have other prefixes. Raises ModelError for two of one weight."""
        factors = {names.find(name): pair for name, pair in self.factors.items()}
        replaced = {names.find(name): tensor for name, tensor in self.replaced.items()}
        if len(factors) + len(replaced) < len(self.weights):
            raise ModelError(f"adapter {self.name} changes a weight under two names")
        return replace(self, factors=factors, replaced=replaced)

    @property
    def num_parameters(self) -> int:
        pairs = (tensor for pair in self.factors.values() for tensor in pair)
        return sum(tensor.numel() for tensor in (*pairs, *self.replaced.values()))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As `save` takes them: by name, A [rank, in], B [out, rank] and replaced weights of any shape [...]."""
        named = {
            f"{name.removesuffix('.weight')}{suffix}": factor
            for name, pair in self.factors.items()
            for suffix, factor in zip(FACTORS, pair, strict=True)
        }
        return named | dict(self.replaced)

    def parts(self, name: str) -> tuple[Tensor, ...]:
        """The tensors that change this weight [out, in]: A [rank, in] and B [out, rank], or its replacement."""
        return self.factors[name] if name in self.factors else (self.replaced[name],)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """weight [out, in] -> what it is with the adapter, in float32; a replaced weight may have any shape.

        Raises ModelError if shapes do not fit.
        """
        if name in self.replaced:
            self._fit(name, self.replaced[name].shape, weight.shape)
            return self.replaced[name].float()
        A, B = self.factors[name]
        self.check_fits(name, weight.shape)
        return weight.float() + self.config.scale * (B.float() @ A.float())

    def check_fits(self, name: str, shape: Sequence[int]) -> None:
        """Raises ModelError if the factors for a weight do not go with its shape."""
        A, B = self.factors[name]
        if len(shape) != 2:
            raise UnsupportedModel(f"adapter {self.name}: {name} {list(shape)} is no matrix of a linear layer")
        self._fit(name, (B.shape[0], A.shape[1]), shape)

    def _fit(self, name: str, own: Sequence[int], base: Sequence[int]) -> None:
        if tuple(own) != tuple(base):
            raise ModelError(f"adapter {self.name}: {name} changes {list(own)}, but the base has {list(base)}")


def resolve(adapter: str) -> Path:
    """A local folder, or the name of an adapter inside the package."""
    if not Path(adapter).is_dir() and adapter in ADAPTERS:
        return Path(__file__).parent / ADAPTERS[adapter]
    return Path(adapter)


def name_of(path: str | Path) -> str:
    """What an adapter is called: as it ships, or as its folder."""
    folder = resolve(str(path)).resolve()
    return next((name for name, inside in ADAPTERS.items() if inside == folder.name), folder.name)


def load(path: str | Path) -> Adapter:
    """Reads an adapter folder, or the name of one that ships. Raises ModelError."""
    folder = resolve(str(path))
    check_adapter(str(path))
    with errors_begin_with(f"adapter {path}"):
        config = _read_config(folder)
        factors, replaced = _read_tensors(folder, config)
        if config.invocation and (replaced or config.saved):
            names = ", ".join(config.saved or replaced)
            raise UnsupportedModel(f"modules_to_save is {names[:100]}, which an activated adapter cannot replace")
    return Adapter(name_of(path), config, factors, replaced)


def save(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes both files.

    tensors  by module and parameter, as in `model.layers.0.mamba.in_proj.lora_A.weight`: A [rank, in], B [out, rank]
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(config.to_json())
    named = {PREFIX + name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)


def _read_config(folder: Path) -> LoraConfig:
    values = read_json(folder / CONFIG)
    if values.get("peft_type") != "LORA":
        raise UnsupportedModel(f"peft_type is {shown(values.get('peft_type'))}, supported: LORA")
    for key, neutral in NEUTRAL.items():
        if (value := values.get(key)) is not None and value not in neutral:
            raise UnsupportedModel(f"{key} is {shown(value)}, which is not supported")
    base = values.get("base_model_name_or_path")
    return LoraConfig(
        rank=_rank(values.get("r")),
        alpha=_alpha(values.get("lora_alpha")),
        targets=_names(values.get("target_modules")),
        base=base if isinstance(base, str) else None,
        saved=_names(values.get("modules_to_save")),
        rslora=values.get("use_rslora") is True,
        invocation=_invocation(values.get("alora_invocation_tokens")),
    )


def _rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise ModelError(f"r is {shown(value)}, must be a whole number in [1, {MAX_RANK}]")
    return value


def _alpha(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_ALPHA:
        raise ModelError(f"lora_alpha is {shown(value)}, must be a number in (0, {MAX_ALPHA}]")
    return value


def _invocation(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    tokens = value if isinstance(value, list) else [None]
    if len(tokens) > MAX_INVOCATION or not all(type(token) is int and token >= 0 for token in tokens):
        raise ModelError(f"alora_invocation_tokens is {shown(value)}, must be at most {MAX_INVOCATION} tokens")
    return tuple(tokens)


def _names(value: object) -> tuple[str, ...]:
    """Modules, which PEFT writes as a list or as one regular expression."""
    return (value,) if isinstance(value, str) else tuple(map(str, value)) if isinstance(value, list) else ()


def _read_tensors(folder: Path, config: LoraConfig) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{WEIGHTS} cannot be read: it is no file")
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as e:
        raise ModelError(f"{WEIGHTS} cannot be read: {e}") from e
    if not tensors:
        raise ModelError(f"{WEIGHTS} is empty")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise ModelError(f"tensor {key} does not begin with {PREFIX}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"tensor {key} contains values that are not finite numbers")
        name = key.removeprefix(PREFIX)
        if name.endswith(FACTORS):
            module = name[: -len(FACTORS[0])]
            factors[f"{module}.weight"] = _pair(tensors, PREFIX + module, config.rank)
        elif _is_saved(name, config.saved):
            replaced[name] = tensor
        else:
            raise UnsupportedModel(f"tensor {key} is neither a factor of a linear layer nor of modules_to_save")
    return factors, replaced


def _is_saved(name: str, saved: Sequence[str]) -> bool:
    parts = f".{name}"
    return any(f".{module}." in parts for module in saved)


def _pair(tensors: Mapping[str, Tensor], module: str, rank: int) -> tuple[Tensor, Tensor]:
    found = []
    for suffix in FACTORS:
        if module + suffix not in tensors:
            raise ModelError(f"missing factor: {module}{suffix}")
        found.append(tensors[module + suffix])
    A, B = found
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != rank or B.shape[1] != rank:
        shapes = f"{list(A.shape)} and {list(B.shape)}"
        raise ModelError(f"factors of {module} are {shapes}, expected [{rank}, inputs] and [outputs, {rank}]")
    return A, B
