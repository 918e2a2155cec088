"""Models with weights that are drawn where they are used: no file is read or written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from hybrid_cache.device.batch import HybridModel
from hybrid_cache.kernels.codes import Matrix
from hybrid_cache.kernels.ops import Linear, Ops
from hybrid_cache.models import registry
from hybrid_cache.models.adapters import Adapter, LoraConfig
from hybrid_cache.models.bank import HEAD, AdapterBank
from hybrid_cache.models.config import Config
from hybrid_cache.models.loading import beside
from hybrid_cache.models.registry import ShapedModel
from hybrid_cache.models.scheme import NOT_CODED, Scheme

_SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
# One small hybrid for each kind of state: Mamba-2, Mamba-1, gated delta rule, delta rule with a decay for each column,
# linear attention, RG-LRU, short convolutions.
SMALL: Mapping[str, Mapping[str, object]] = {
    "granite": {
        **_SMALL,
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_state": 64,
        "shared_intermediate_size": 192,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.2,
    },
    "jamba": {
        **_SMALL,
        "model_type": "jamba",
        "num_hidden_layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_dt_rank": 16,
    },
    "qwen3 next": {
        **_SMALL,
        "model_type": "qwen3_next",
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "kimi linear": {
        **_SMALL,
        "model_type": "kimi_linear",
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "linear_head_dim": 32,
        "linear_num_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
    "minimax": {
        **_SMALL,
        "model_type": "minimax",
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "recurrent gemma": {
        **_SMALL,
        "model_type": "recurrent_gemma",
        "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
        "attention_window_size": 100,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    },
    "lfm2": {
        **_SMALL,
        "model_type": "lfm2",
        "num_hidden_layers": 2,
        "layer_types": ["conv", "full_attention"],
    },
}

# 152 M parameters like Granite 4 H, without experts: 20 layers of which three attend, no rotary positions.
MID_GRANITE: Mapping[str, object] = {
    "model_type": "granitemoehybrid",
    "vocab_size": 8192,
    "hidden_size": 768,
    "num_hidden_layers": 20,
    "layer_types": ["attention" if i in (5, 11, 17) else "mamba" for i in range(20)],
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "mamba_n_heads": 24,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "intermediate_size": 1536,
    "shared_intermediate_size": 1536,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "attention_multiplier": 0.125,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


def layer_of(name: str, otherwise: int) -> int:
    """Which layer a weight is one of; otherwise: if it is of none."""
    layer = re.search(r"layers\.(\d+)\.", name)
    return otherwise if layer is None else int(layer[1])


class RandomWeights:
    """Any weight that is asked for, drawn on a device: matrices keep the size of what they multiply.

    Models of one seed have the same weights below the layer from which another seed counts.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
        bank: AdapterBank | None = None,
        *,
        other: int = 0,
        first: int | None = None,
        scheme: Scheme = NOT_CODED,
    ) -> None:
        """other: seed of the weights in layers from `first` on"""
        self.scheme = scheme
        self.num_bytes = 0
        self.bank = bank
        self._device = device
        self._dtype = dtype
        self._seed = seed
        self._other, self._first = other, first
        self._rng = torch.Generator(device).manual_seed(seed)
        self._other_rng = torch.Generator(device).manual_seed(other)
        self._digests = dict[str, bytes]()

    def take(self, name: str, *shape: int) -> Tensor:
        return self._draw(name, shape, self._dtype)

    def take_matrix(self, name: str, out: int, inputs: int, *, head: bool = False) -> Matrix:
        return (self.scheme.head if head else self.scheme.matrix)(self.take(name, out, inputs))

    def take_float32(self, name: str, *shape: int) -> Tensor:
        return self._draw(name, shape, torch.float32)

    def take_joined(self, names: Sequence[str], *shape: int) -> Tensor:
        return self.take(names[0], *shape)

    def has(self, name: str) -> bool:
        return name.endswith("experts.gate_up_proj")

    def beside(self, packed: Linear, parts: Mapping[str, int]) -> Linear:
        return packed if self.bank is None else self.bank.linear(packed, parts, self._dtype)

    def ignore(self, pattern: str) -> None:
        """Nothing is left over."""

    def finish(self) -> Mapping[str, bytes]:
        return self._digests

    def _draw(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.num_bytes += prod(shape) * dtype.itemsize
        values = torch.empty(shape, device=self._device, dtype=dtype).normal_(generator=self._rng)
        is_other = self._first is not None and layer_of(name, -1) >= self._first
        if is_other:
            values.normal_(generator=self._other_rng)
        self._digests[name] = f"{self._seed} {self._other if is_other else ''}".encode()
        if "conv" in name:
            return values.mul_(0.5)
        if "A_log" in name:
            return values.mul_(0.5).add_(1.0)
        if "dt_bias" in name or "dt_proj.bias" in name:
            return values.mul_(0.5).sub_(2.0)  # steps around 0.1
        if len(shape) > 1:
            return values if "embed" in name else values.mul_(shape[-1] ** -0.5)
        return values.mul_(0.2) if name.endswith("bias") else values.mul_(0.2).add_(1.0)


def random_model(
    config: Mapping[str, object],
    ops: Ops,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    adaptable: bool = False,
    other: int = 0,
    first: int | None = None,
    scheme: Scheme = NOT_CODED,
) -> tuple[ShapedModel, int]:
    """-> a model of random weights on the device of `ops`, and the bytes of its weights.

    adaptable: adapters may stand beside it   other: seed of the weights in layers from `first` on
    """
    bank = AdapterBank(ops) if adaptable else None
    weights = RandomWeights(ops.device, dtype, seed, bank, other=other, first=first, scheme=scheme)
    with ops.device:
        model = registry.find(config.get("model_type"))(Config(config), weights, ops, dtype)
    return model, weights.num_bytes


def random_adapter(model: ShapedModel, rank: int, seed: int, *, first: int = 0) -> Adapter:
    """For all matrices that it may stand beside of the layers from `first` on; it moves outputs by about a tenth."""
    assert model.bank is not None
    rng = torch.Generator().manual_seed(seed)
    factors = {
        name: (
            torch.randn(rank, size_in, generator=rng) * size_in**-0.5,
            torch.randn(size_out, rank, generator=rng) * 0.1 * rank**-0.5,
        )
        for name, (size_out, size_in) in model.bank.shapes.items()
        if name != HEAD and layer_of(name, first) >= first
    }
    return Adapter(f"random-{seed}", LoraConfig(rank, float(rank), ()), factors, {})


def activated_by(trunk: ShapedModel, adapter: Adapter, invocation: tuple[int, ...]) -> HybridModel:
    """A model with an adapter beside it that these tokens switch on."""
    return beside(trunk, replace(adapter, config=replace(adapter.config, invocation=invocation)))
