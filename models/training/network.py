r"""The trainable network: GraniteMoeHybrid without experts, in plain differentiable torch.

Parameter names are those of published Granite-4-H checkpoints, so a state dict is already a checkpoint.

A row holds one dialogue and the questions about it. Every question is a *branch*: it reads the dialogue up to the
message it was asked after, and its own tokens; nothing reads it back. So one pass over a dialogue trains many
questions, and no answer is ever in the context of another question.

    tokens     m m m m m m m m m  q q q a a  q q q a a  . .       m dialogue, q question, a answer, . padding
    trunk      \_____________  /  \_______/  \_______/
    attach                           4          9                 tokens of the dialogue that the branch reads
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybrid_cache.models import deltas

# Given what a mixer would cache of each token [B, T, ...], one tensor after another -> what later tokens read instead.
Cached = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes and multipliers, named as in the `config.json` that is written from them."""

    vocab_size: int = 4096
    hidden_size: int = 192
    layer_types: tuple[str, ...] = ("mamba", "attention", "mamba", "mamba", "attention", "mamba")
    shared_intermediate_size: int = 384
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    mamba_n_heads: int = 6
    mamba_d_head: int = 64
    mamba_d_state: int = 32
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_chunk_size: int = 64
    embedding_multiplier: float = 8.0
    residual_multiplier: float = 0.5
    attention_multiplier: float = 0.1767766952966369
    logits_scaling: float = 0.25
    rms_norm_eps: float = 1e-5

    @property
    def inner(self) -> int:
        return self.mamba_expand * self.hidden_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def to_config(self) -> dict[str, object]:
        """The Hugging Face `config.json`, with every multiplier spelled out."""
        return {
            "architectures": ["GraniteMoeHybridForCausalLM"],
            "model_type": "granitemoehybrid",
            **asdict(self),
            "layer_types": list(self.layer_types),
            "num_hidden_layers": len(self.layer_types),
            "intermediate_size": self.shared_intermediate_size,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "mamba_n_groups": 1,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "position_embedding_type": "nope",
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "normalization_function": "rmsnorm",
            "tie_word_embeddings": True,
            "use_cache": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 4,
            "dtype": "bfloat16",
        }

    @classmethod
    def from_config(cls, config: dict[str, object]) -> Shape:
        fields = {name: config[name] for name in cls.__slots__}
        return cls(**{**fields, "layer_types": tuple(config["layer_types"])})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of dialogues with branches; `T` tokens a row, padded at the end.

    tokens [B, T]
    scanned [B, T, T]   True where the state-space layers let row position i read j
    attended [B, T, T]  the same for attention
    anchor, root [B, T] last trunk token that i's branch reads, and the token packed before the branch; 0 on the trunk
    torn [n]            flat positions whose three predecessors are not the three packed before them
    torn_past [n, 3]    those predecessors, oldest first; B*T where there is none
    gain [B, T, T]      how much of j counts for i in the state-space layers; None is all of it
    """

    tokens: Tensor
    scanned: Tensor
    attended: Tensor
    anchor: Tensor
    root: Tensor
    torn: Tensor
    torn_past: Tensor
    gain: Tensor | None = None


def own(entry: Tensor) -> Tensor:
    """What a mixer caches itself; [B, T, ...] -> the same."""
    return entry


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., width] -> [..., width] float32."""
        return F.rms_norm(hidden.float(), hidden.shape[-1:], self.weight, self.eps)


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_linear = nn.Linear(shape.hidden_size, 2 * shape.shared_intermediate_size, bias=False)
        self.output_linear = nn.Linear(shape.shared_intermediate_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, T, hidden] -> [B, T, hidden]."""
        gate, up = self.input_linear(hidden).chunk(2, dim=-1)
        return self.output_linear(F.silu(gate) * up)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention without positions: order reaches it only through the state-space layers below."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, kv_width = shape.hidden_size, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor, batch: Batch, cached: Cached = own) -> Tensor:
        """hidden [B, T, hidden] -> [B, T, hidden]."""

        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], -1, self.shape.head_dim).transpose(1, 2)

        q, k, v = heads(self.q_proj(hidden)), heads(cached(self.k_proj(hidden))), heads(cached(self.v_proj(hidden)))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=batch.attended[:, None],
            scale=self.shape.attention_multiplier,
            enable_gqa=self.shape.num_key_value_heads != self.shape.num_attention_heads,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def branch_decay(dA: Tensor, batch: Batch) -> Tensor:
    """Log decay from the start of the row along each token's own past.

    dA [B, T, heads] -> [B, T, heads]
    """
    total = dA.cumsum(dim=1)
    index = (batch.anchor[..., None].expand_as(total), batch.root[..., None].expand_as(total))
    return total + total.gather(1, index[0]) - total.gather(1, index[1])


def decay_matrix(total: Tensor, scanned: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(total_i - total_j) where i may read j, else 0; the difference is taken in fp32.

    total [B, T, heads]   scanned [B, T, T] -> [B, heads, T, T]
    """
    total = total.transpose(1, 2)
    span = (total[..., :, None] - total[..., None, :]).to(dtype)
    return span.masked_fill(~scanned[:, None], -math.inf).exp()


class Mamba2(nn.Module):
    """The state-space dual of Mamba-2 (Dao and Gu 2024) as one masked product over the row."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        inner, heads, width = shape.inner, shape.mamba_n_heads, shape.inner + 2 * shape.mamba_d_state
        self.in_proj = nn.Linear(shape.hidden_size, inner + width + heads, bias=False)
        self.conv1d = nn.Conv1d(width, width, shape.mamba_d_conv, groups=width, padding=shape.mamba_d_conv - 1)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner, shape.rms_norm_eps)
        self.out_proj = nn.Linear(inner, shape.hidden_size, bias=False)

    def convolve(self, x: Tensor, batch: Batch) -> Tensor:
        """Causal depthwise convolution along each token's own past; x [B, T, width]."""
        taps = self.conv1d.weight.squeeze(1).T.to(x.dtype).contiguous()  # [4, width]
        padded = F.pad(x, (0, 0, 3, 0))
        length = x.shape[1]
        out = sum((padded[:, k : k + length] * taps[k] for k in range(3)), x * taps[3])
        assert isinstance(out, Tensor)
        if len(batch.torn):
            rows = F.pad(x.flatten(0, 1), (0, 0, 0, 1))
            past = rows.index_select(0, batch.torn_past.flatten()).view(-1, 3, x.shape[-1])
            fixed = (past * taps[:3]).sum(1) + rows.index_select(0, batch.torn) * taps[3]
            out = out.flatten(0, 1).index_copy(0, batch.torn, fixed).view_as(x)
        return F.silu(out + self.conv1d.bias.to(x.dtype))  # type: ignore[union-attr]

    def forward(self, hidden: Tensor, batch: Batch, cached: Cached = own) -> Tensor:
        """hidden [B, T, hidden] -> [B, T, hidden]."""
        shape = self.shape
        inner, states, heads = shape.inner, shape.mamba_d_state, shape.mamba_n_heads
        gate, xBC, dt = torch.split(self.in_proj(hidden), [inner, inner + 2 * states, heads], dim=-1)
        # A window holds what goes into the convolution; what comes out of it, the steps and the decays make a state.
        mixed = cached(self.convolve(cached(xBC), batch))
        x, B, C = torch.split(mixed, [inner, states, states], dim=-1)
        dt = cached(F.softplus(dt.float() + self.dt_bias))
        total = branch_decay(cached(-dt * self.A_log.float().exp()), batch)
        x = x.reshape(*x.shape[:2], heads, shape.mamba_d_head).transpose(1, 2)
        scores = (C @ B.transpose(1, 2))[:, None] * decay_matrix(total, batch.scanned, C.dtype)
        if batch.gain is not None:
            scores = scores * batch.gain[:, None].to(scores.dtype)
        y = scores @ (x * dt.transpose(1, 2)[..., None].to(x.dtype)) + x * self.D[:, None, None].to(x.dtype)
        y = y.transpose(1, 2).flatten(2).float() * F.silu(gate.float())
        return self.out_proj(self.norm(y).to(hidden.dtype))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, shape: Shape, kind: str) -> None:
        super().__init__()
        self.residual_multiplier = shape.residual_multiplier
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.shared_mlp = Mlp(shape)
        if kind == "mamba":
            self.mamba = Mamba2(shape)
        else:
            self.self_attn = Attention(shape)
        self.kind = kind

    def forward(self, hidden: Tensor, batch: Batch, cached: Cached = own) -> Tensor:
        """hidden [B, T, hidden] -> [B, T, hidden]."""
        mixer = self.mamba if self.kind == "mamba" else self.self_attn
        mixed = mixer(self.input_layernorm(hidden), batch, cached)
        hidden = hidden + self.residual_multiplier * mixed
        return hidden + self.residual_multiplier * self.shared_mlp(self.post_attention_layernorm(hidden))  # type: ignore[no-any-return]


class Trunk(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, kind) for kind in shape.layer_types)
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Network(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        self.apply(self._initialise)

    @torch.no_grad()
    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0.0, 0.02)
        elif isinstance(module, nn.Linear):
            module.weight.normal_(0.0, module.in_features**-0.5)
        elif isinstance(module, Mamba2):
            heads = self.shape.mamba_n_heads
            # Memories of a few tokens up to a whole dialogue, so that nothing has to be learned to keep a fact.
            module.A_log.copy_(torch.linspace(math.log(0.01), math.log(4.0), heads))
            dt = torch.logspace(-1, -0.5, heads)
            module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))

    def embedded(self, tokens: Tensor) -> Tensor:
        """What the first layer is given; tokens [B, T] -> [B, T, hidden]."""
        return self.model.embed_tokens(tokens) * self.shape.embedding_multiplier  # type: ignore[no-any-return]

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states, normalised; [B, T, hidden]."""
        hidden = self.embedded(batch.tokens)
        for layer in self.model.layers:
            hidden = layer(hidden, batch)
        return self.model.norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> [..., V]."""
        weight = self.model.embed_tokens.weight
        return F.linear(hidden, weight) / self.shape.logits_scaling

    def forward(self, batch: Batch) -> Tensor:
        """-> logits [B, T, V]."""
        return self.logits(self.hidden(batch))


def plain(tokens: Tensor) -> Batch:
    """Rows without branches; tokens [B, T]."""
    rows, length = tokens.shape
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, -1, -1)
    zeros = torch.zeros_like(tokens)
    none = torch.zeros(0, dtype=torch.long)
    return Batch(tokens, causal, causal, zeros, zeros, none, none.view(0, 3))


def num_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def save(network: Network, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (bf16); the output is the whole network after rounding."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(network.shape.to_config(), indent=2) + "\n"
    (folder / "config.json").write_text(config)
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in network.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def load(folder: Path) -> Network:
    """The network in fp32 with the rounded weights of a folder written by `save`, or of a delta over one."""
    delta = deltas.find(folder)
    if delta is not None:
        network = load(delta.base)
        network.load_state_dict({k: v.float() for k, v in load_file(delta.weights).items()}, strict=False)
        return network
    network = Network(Shape.from_config(json.loads((folder / "config.json").read_text())))
    network.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return network
