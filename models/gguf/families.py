"""Architectures of GGUF files as checkpoints of ours: their config.json, and the names of their weights.

llama.cpp's converter leaves out what it does not compute with, and computes with what it leaves in; where a checkpoint
says more (rounding of steps, dropout), the defaults hold. Layers are what their tensors are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models.gguf.delta_net import Delta
from hybrid_cache.models.gguf.metadata import Metadata
from hybrid_cache.models.gguf.rotary import rope_of
from hybrid_cache.models.gguf.rules import (
    Names,
    Rule,
    as_it_is,
    depthwise,
    flat,
    flat_log_of_minus,
    less_one,
    linear,
    log_of_minus,
    of,
    one_row,
    rows_joined,
    two_halves,
)

Fields = dict[str, object]
MAX_LAYERS = 1024
UNBOUNDED = 1 << 20  # what the converter writes for models without a longest context


@dataclass(frozen=True, slots=True)
class Source:
    """What a family is made from. shapes: of the tensors in the file"""

    meta: Metadata
    shapes: Mapping[str, tuple[int, ...]]

    def layers_with(self, tensor: str) -> list[bool]:
        """Of each layer, whether it has a tensor."""
        return [f"blk.{i}.{tensor}" in self.shapes for i in range(self.num_layers)]

    def any_with(self, tensor: str) -> bool:
        return any(self.layers_with(tensor))

    def size(self, tensor: str, dim: int = 0) -> int:
        """Of a tensor in the first layer that has it. Raises ModelError if none has."""
        for index in range(self.num_layers):
            if (shape := self.shapes.get(f"blk.{index}.{tensor}")) is not None and dim < len(shape):
                return shape[dim]
        raise ModelError(f"missing tensor: {tensor} in any layer")

    @property
    def num_layers(self) -> int:
        """Without those that predict more than one token."""
        num = self.meta.integer("block_count")
        if num > MAX_LAYERS:
            raise ModelError(f"{self.meta.arch}.block_count is {num}, at most {MAX_LAYERS} layers are read")
        return num - min(num, self.meta.integer("nextn_predict_layers", 0))

    @property
    def num_heads(self) -> int:
        return self.meta.largest("attention.head_count")

    @property
    def num_kv_heads(self) -> int:
        return self.meta.largest("attention.head_count_kv", self.num_heads)

    @property
    def head_dim(self) -> int:
        hidden = self.meta.integer("embedding_length")
        return self.meta.integer("attention.key_length", hidden // max(1, self.num_heads))

    def common(self, model_type: str, eps: str = "rms_norm_eps") -> Fields:
        name = "attention.layer_norm_rms_epsilon"
        if not self.meta.has(name):
            name = "attention.layer_norm_epsilon"
        return {
            "model_type": model_type,
            "vocab_size": self.shapes["token_embd.weight"][0] if "token_embd.weight" in self.shapes else None,
            "hidden_size": self.meta.integer("embedding_length"),
            "num_hidden_layers": self.num_layers,
            "max_position_embeddings": self.meta.integer("context_length"),
            "tie_word_embeddings": "output.weight" not in self.shapes,
            eps: self.meta.number(name),
        }

    def attention(self) -> Fields:
        return {
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "attention_bias": self.any_with("attn_q.bias"),
        }

    def mamba2(self) -> Fields:
        """As Bamba, Falcon-H1 and Granite call it."""
        inner, heads = self.meta.integer("ssm.inner_size"), self.meta.integer("ssm.time_step_rank")
        return {
            "mamba_n_heads": heads,
            "mamba_d_head": inner // max(1, heads),
            "mamba_d_state": self.meta.integer("ssm.state_size"),
            "mamba_n_groups": self.meta.integer("ssm.group_count"),
            "mamba_d_conv": self.meta.integer("ssm.conv_kernel"),
            "mamba_conv_bias": self.any_with("ssm_conv1d.bias"),
            "mamba_proj_bias": self.any_with("ssm_in.bias"),
        }

    def expand(self) -> int | float:
        """How many times wider than its rows a state-space layer is."""
        expand = self.meta.integer("ssm.inner_size") / max(1, self.meta.integer("embedding_length"))
        return int(expand) if expand.is_integer() else expand


Family = Callable[[Source], tuple[Fields, Names]]


def top(norm: str, embedding: str = "model.embed_tokens", norm_source: str = "output_norm") -> dict[str, Rule]:
    return {
        f"{embedding}.weight": of("token_embd.weight"),
        f"{norm}.weight": of(f"{norm_source}.weight"),
        "lm_head.weight": of("output.weight"),
    }


def attention(
    num_heads: int = 0, num_kv_heads: int = 0, prefix: str = "self_attn.", out: str = "o_proj"
) -> dict[str, Rule]:
    """Numbers of heads where queries and keys were permuted, else none."""
    q, k = (two_halves(n) if n else as_it_is for n in (num_heads, num_kv_heads))
    return {
        **linear(f"{prefix}q_proj", "attn_q", q),
        **linear(f"{prefix}k_proj", "attn_k", k),
        **linear(f"{prefix}v_proj", "attn_v"),
        **linear(f"{prefix}{out}", "attn_output"),
    }


def mamba2(prefix: str) -> dict[str, Rule]:
    return {
        **linear(f"{prefix}in_proj", "ssm_in"),
        f"{prefix}conv1d.weight": of("ssm_conv1d.weight", by=depthwise),
        f"{prefix}conv1d.bias": of("ssm_conv1d.bias"),
        f"{prefix}dt_bias": of("ssm_dt.bias"),
        f"{prefix}A_log": of("ssm_a", by=flat_log_of_minus),
        f"{prefix}D": of("ssm_d", by=flat),
        f"{prefix}norm.weight": of("ssm_norm.weight", by=flat),
        **linear(f"{prefix}out_proj", "ssm_out"),
    }


def mamba1(prefix: str) -> dict[str, Rule]:
    return {
        **linear(f"{prefix}in_proj", "ssm_in"),
        f"{prefix}conv1d.weight": of("ssm_conv1d.weight", by=depthwise),
        f"{prefix}conv1d.bias": of("ssm_conv1d.bias"),
        **linear(f"{prefix}x_proj", "ssm_x"),
        **linear(f"{prefix}dt_proj", "ssm_dt"),
        f"{prefix}A_log": of("ssm_a", by=log_of_minus),
        f"{prefix}D": of("ssm_d"),
        **linear(f"{prefix}out_proj", "ssm_out"),
    }


def gated_mlp(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> dict[str, Rule]:
    return {
        **linear(f"{prefix}{gate}", "ffn_gate"),
        **linear(f"{prefix}{up}", "ffn_up"),
        **linear(f"{prefix}{down}", "ffn_down"),
    }


def experts(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> dict[str, Rule]:
    """Each by itself."""
    return {
        f"{prefix}{{}}.{gate}.weight": of("ffn_gate_exps.weight"),
        f"{prefix}{{}}.{up}.weight": of("ffn_up_exps.weight"),
        f"{prefix}{{}}.{down}.weight": of("ffn_down_exps.weight"),
    }


def granite_hybrid(source: Source) -> tuple[Fields, Names]:
    """Bamba is written under the same name, with positions."""
    if source.any_with("ssm_in.weight") and source.meta.flag("rope.scaling.finetuned", False):
        return _bamba(source)
    return _granite(source, rotated=not source.any_with("ssm_in.weight"))


def _granite(source: Source, rotated: bool = True) -> tuple[Fields, Names]:
    """All Granite models are what the hybrid ones are, with layers of attention only."""
    meta, mixed = source.meta, source.any_with("ffn_gate_exps.weight")
    is_mamba = source.layers_with("ssm_in.weight")
    mlp = "ffn_gate_shexp.weight" if mixed else "ffn_gate.weight"
    if mixed and not source.any_with(mlp):
        raise UnsupportedModel("Granite models with experts and without a shared MLP are not supported")
    config = {
        **source.common("granitemoehybrid"),
        **source.attention(),
        **(source.mamba2() | {"mamba_expand": source.expand()} if any(is_mamba) else {}),
        "layer_types": ["mamba" if each else "attention" for each in is_mamba],
        "position_embedding_type": "rope" if rotated else "nope",
        "rope_parameters": rope_of(meta) if rotated else None,
        "attention_multiplier": meta.number("attention.scale", max(1, source.head_dim) ** -0.5),
        "embedding_multiplier": meta.number("embedding_scale", 1.0),
        "residual_multiplier": meta.number("residual_scale", 1.0),
        "logits_scaling": meta.number("logit_scale", 1.0),
        "shared_intermediate_size": source.size(mlp),
        "num_local_experts": source.size("ffn_gate_exps.weight") if mixed else 0,
        "intermediate_size": source.size("ffn_gate_exps.weight", 1) if mixed else meta.largest("feed_forward_length"),
        "num_experts_per_tok": meta.largest("expert_used_count", 0),
    }
    shared = "_shexp" if mixed else ""
    layer = {
        "input_layernorm.weight": of("attn_norm.weight"),
        "post_attention_layernorm.weight": of("ffn_norm.weight"),
        **mamba2("mamba."),
        **attention(source.num_heads, source.num_kv_heads),
        "shared_mlp.input_linear.weight": of(f"ffn_gate{shared}.weight", f"ffn_up{shared}.weight", by=rows_joined),
        "shared_mlp.output_linear.weight": of(f"ffn_down{shared}.weight"),
        "block_sparse_moe.router.layer.weight": of("ffn_gate_inp.weight"),
        "block_sparse_moe.input_linear.weight": of("ffn_gate_exps.weight", "ffn_up_exps.weight", by=rows_joined),
        "block_sparse_moe.output_linear.weight": of("ffn_down_exps.weight"),
    }
    return config, Names("model.layers.", top("model.norm"), layer)


def _bamba(source: Source) -> tuple[Fields, Names]:
    meta = source.meta
    has_attention = source.layers_with("attn_q.weight")
    config = {
        **source.common("bamba"),
        **source.attention(),
        **source.mamba2(),
        "mamba_expand": source.expand(),
        "attn_layer_indices": [i for i, each in enumerate(has_attention) if each],
        "intermediate_size": meta.largest("feed_forward_length"),
        "mlp_bias": source.any_with("ffn_gate.bias"),
        "rope_parameters": rope_of(meta),
        "partial_rotary_factor": meta.integer("rope.dimension_count") / max(1, source.head_dim),
    }
    layer = {
        "input_layernorm.weight": of("attn_norm.weight"),
        "pre_ff_layernorm.weight": of("ffn_norm.weight"),
        **mamba2("mamba."),
        **attention(source.num_heads, source.num_kv_heads),
        **gated_mlp("feed_forward."),
    }
    return config, Names("model.layers.", top("model.final_layernorm"), layer)


def falcon_h1(source: Source) -> tuple[Fields, Names]:
    """All multipliers were multiplied into the weights, which has left none."""
    config = {
        **source.common("falcon_h1"),
        **source.attention(),
        **source.mamba2(),
        "mamba_d_ssm": source.meta.integer("ssm.inner_size"),
        "mamba_rms_norm": source.any_with("ssm_norm.weight"),
        "mamba_norm_before_gate": False,
        "projectors_bias": source.any_with("ssm_out.bias"),
        "intermediate_size": source.meta.largest("feed_forward_length"),
        "mlp_bias": source.any_with("ffn_gate.bias"),
        "rope_parameters": rope_of(source.meta),
    }
    layer = {
        "input_layernorm.weight": of("attn_norm.weight"),
        "pre_ff_layernorm.weight": of("ffn_norm"),
        **mamba2("mamba."),
        **attention(),
        **gated_mlp("feed_forward."),
    }
    if source.any_with("ffn_norm.weight"):
        layer["pre_ff_layernorm.weight"] = of("ffn_norm.weight")
    return config, Names("model.layers.", top("model.final_layernorm"), layer)


def jamba(source: Source) -> tuple[Fields, Names]:
    meta = source.meta
    has_attention, has_experts = source.layers_with("attn_q.weight"), source.layers_with("ffn_gate_exps.weight")
    config = {
        **source.common("jamba"),
        **source.attention(),
        **_turns("attn_layer", has_attention),
        **_turns("expert_layer", has_experts),
        "num_experts": source.size("ffn_gate_exps.weight") if any(has_experts) else 1,
        "num_experts_per_tok": meta.largest("expert_used_count", 1),
        "intermediate_size": meta.largest("feed_forward_length"),
        "mamba_expand": source.expand(),
        "mamba_d_state": meta.integer("ssm.state_size"),
        "mamba_dt_rank": meta.integer("ssm.time_step_rank"),
        "mamba_d_conv": meta.integer("ssm.conv_kernel"),
        "mamba_conv_bias": source.any_with("ssm_conv1d.bias"),
        "mamba_proj_bias": source.any_with("ssm_in.bias"),
    }
    layer = {
        "input_layernorm.weight": of("attn_norm.weight"),
        "pre_ff_layernorm.weight": of("ffn_norm.weight"),
        **mamba1("mamba."),
        **{f"mamba.{name}_layernorm.weight": of(f"ssm_{name}_norm.weight") for name in ("dt", "b", "c")},
        **attention(),
        **gated_mlp("feed_forward."),
        "feed_forward.router.weight": of("ffn_gate_inp.weight"),
    }
    return config, Names("model.layers.", top("model.final_layernorm"), layer, experts("feed_forward.experts."))


def _turns(what: str, chosen: list[bool]) -> Fields:
    """The period of layers that are the same distance from each other, and the first of them."""
    places = [i for i, each in enumerate(chosen) if each]
    if not places:
        return {f"{what}_period": len(chosen) + 1, f"{what}_offset": len(chosen)}
    period = places[1] - places[0] if len(places) > 1 else len(chosen)
    offset = places[0]
    if [i % period == offset for i in range(len(chosen))] != chosen:
        raise UnsupportedModel(f"{what} is at layers {places}, which are not the same distance from each other")
    return {f"{what}_period": period, f"{what}_offset": offset}


def nemotron_h(source: Source) -> tuple[Fields, Names]:
    meta = source.meta
    letters = {"M": "ssm_in.weight", "*": "attn_q.weight", "E": "ffn_gate_inp.weight", "-": "ffn_up.weight"}
    has = {letter: source.layers_with(tensor) for letter, tensor in letters.items()}
    pattern = [next((letter for letter in has if has[letter][i]), "?") for i in range(source.num_layers)]
    heads = meta.integer("ssm.time_step_rank")
    config = {
        **source.common("nemotron_h", "layer_norm_epsilon"),
        **source.attention(),
        "hybrid_override_pattern": "".join(pattern),
        "mamba_num_heads": heads,
        "mamba_head_dim": meta.integer("ssm.inner_size") // max(1, heads),
        "ssm_state_size": meta.integer("ssm.state_size"),
        "n_groups": meta.integer("ssm.group_count"),
        "conv_kernel": meta.integer("ssm.conv_kernel"),
        "use_conv_bias": source.any_with("ssm_conv1d.bias"),
        "use_bias": source.any_with("ssm_in.bias"),
        "mlp_bias": source.any_with("ffn_up.bias") or source.any_with("ffn_up_shexp.bias"),
        "intermediate_size": source.size("ffn_up.weight") if "-" in pattern else None,
    }
    if "E" in pattern:
        config |= {
            "n_routed_experts": source.size("ffn_up_exps.weight"),
            "num_experts_per_tok": meta.largest("expert_used_count"),
            "moe_intermediate_size": source.size("ffn_up_exps.weight", 1),
            "moe_shared_expert_intermediate_size": source.size("ffn_up_shexp.weight"),
            "moe_latent_size": meta.integer("moe_latent_size") if meta.has("moe_latent_size") else None,
            "norm_topk_prob": meta.flag("expert_weights_norm", False),
            "routed_scaling_factor": meta.number("expert_weights_scale", 1.0),
            "n_group": max(1, meta.integer("expert_group_count", 1)),
            "topk_group": max(1, meta.integer("expert_group_used_count", 1)),
        }
    layer = {
        "norm.weight": of("attn_norm.weight"),
        **mamba2("mixer."),
        **attention(source.num_heads, source.num_kv_heads, "mixer."),
        **linear("mixer.up_proj", "ffn_up"),
        **linear("mixer.down_proj", "ffn_down"),
        "mixer.gate.weight": of("ffn_gate_inp.weight"),
        "mixer.gate.e_score_correction_bias": of("exp_probs_b.bias"),
        **linear("mixer.shared_experts.up_proj", "ffn_up_shexp"),
        **linear("mixer.shared_experts.down_proj", "ffn_down_shexp"),
        **linear("mixer.fc1_latent_proj", "ffn_latent_down"),
        **linear("mixer.fc2_latent_proj", "ffn_latent_up"),
    }
    each = {
        "mixer.experts.{}.up_proj.weight": of("ffn_up_exps.weight"),
        "mixer.experts.{}.down_proj.weight": of("ffn_down_exps.weight"),
    }
    return config, Names("backbone.layers.", top("backbone.norm_f", "backbone.embeddings"), layer, each)


def lfm2(source: Source) -> tuple[Fields, Names]:
    meta, mixed = source.meta, source.any_with("ffn_gate_exps.weight")
    config = {
        **source.common("lfm2_moe" if mixed else "lfm2", "norm_eps"),
        **source.attention(),
        "layer_types": ["full_attention" if each else "conv" for each in source.layers_with("attn_q.weight")],
        "conv_L_cache": meta.integer("shortconv.l_cache"),
        "conv_bias": source.any_with("shortconv.conv.bias"),
        "intermediate_size": meta.largest("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,
        "rope_parameters": rope_of(meta),
    }
    if mixed:
        config |= {
            "num_experts": source.size("ffn_gate_exps.weight"),
            "num_experts_per_tok": meta.largest("expert_used_count"),
            "moe_intermediate_size": source.size("ffn_gate_exps.weight", 1),
            "num_dense_layers": meta.integer("leading_dense_block_count"),
            "use_expert_bias": source.any_with("exp_probs_b.bias"),
            "norm_topk_prob": meta.flag("expert_weights_norm", True),
            "routed_scaling_factor": meta.number("expert_weights_scale", 1.0),
        }
    layer = {
        "operator_norm.weight": of("attn_norm.weight"),
        "ffn_norm.weight": of("ffn_norm.weight"),
        "conv.conv.weight": of("shortconv.conv.weight", by=depthwise),
        "conv.conv.bias": of("shortconv.conv.bias"),
        **linear("conv.in_proj", "shortconv.in_proj"),
        **linear("conv.out_proj", "shortconv.out_proj"),
        **attention(out="out_proj"),
        "self_attn.q_layernorm.weight": of("attn_q_norm.weight"),
        "self_attn.k_layernorm.weight": of("attn_k_norm.weight"),
        **gated_mlp("feed_forward.", "w1", "w3", "w2"),
        "feed_forward.gate.weight": of("ffn_gate_inp.weight"),
        "feed_forward.expert_bias": of("exp_probs_b.bias"),
    }
    norm = "token_embd_norm" if "token_embd_norm.weight" in source.shapes else "output_norm"
    each = experts("feed_forward.experts.", "w1", "w3", "w2")
    return config, Names("model.layers.", top("model.embedding_norm", norm_source=norm), layer, each)


def mamba(source: Source) -> tuple[Fields, Names]:
    """Falcon Mamba is written under the same name, with norms of dt, B and C."""
    meta = source.meta
    config = {
        **source.common("falcon_mamba" if meta.flag("ssm.dt_b_c_rms", False) else "mamba", "layer_norm_epsilon"),
        "max_position_embeddings": None,
        "intermediate_size": meta.integer("ssm.inner_size"),
        "state_size": meta.integer("ssm.state_size"),
        "time_step_rank": meta.integer("ssm.time_step_rank"),
        "conv_kernel": meta.integer("ssm.conv_kernel"),
        "use_conv_bias": source.any_with("ssm_conv1d.bias"),
        "use_bias": source.any_with("ssm_in.bias"),
    }
    layer = {"norm.weight": of("attn_norm.weight"), **mamba1("mixer.")}
    return config, Names("backbone.layers.", top("backbone.norm_f", "backbone.embeddings"), layer)


def mamba_2(source: Source) -> tuple[Fields, Names]:
    meta = source.meta
    heads = meta.integer("ssm.time_step_rank")
    config = {
        **source.common("mamba2", "layer_norm_epsilon"),
        "max_position_embeddings": None,
        "expand": source.expand(),
        "num_heads": heads,
        "head_dim": meta.integer("ssm.inner_size") // max(1, heads),
        "state_size": meta.integer("ssm.state_size"),
        "n_groups": meta.integer("ssm.group_count"),
        "conv_kernel": meta.integer("ssm.conv_kernel"),
        "use_conv_bias": source.any_with("ssm_conv1d.bias"),
        "use_bias": source.any_with("ssm_in.bias"),
    }
    layer = {"norm.weight": of("attn_norm.weight"), **mamba2("mixer.")}
    return config, Names("backbone.layers.", top("backbone.norm_f", "backbone.embeddings"), layer)


def llama(source: Source) -> tuple[Fields, Names]:
    return _dense(source, "llama", attention(source.num_heads, source.num_kv_heads))


def qwen3(source: Source) -> tuple[Fields, Names]:
    norms = {f"self_attn.{name}_norm.weight": of(f"attn_{name}_norm.weight") for name in ("q", "k")}
    return _dense(source, "qwen3", attention() | norms)


def _dense(source: Source, model_type: str, mixer: Mapping[str, Rule]) -> tuple[Fields, Names]:
    for name in ("expert_count", "attention.sliding_window"):
        source.meta.refuse(name, 0)
    config = {
        **source.common(model_type),
        **source.attention(),
        "intermediate_size": source.meta.largest("feed_forward_length"),
        "mlp_bias": source.any_with("ffn_gate.bias"),
        "rope_parameters": rope_of(source.meta),
    }
    layer = {
        "input_layernorm.weight": of("attn_norm.weight"),
        "post_attention_layernorm.weight": of("ffn_norm.weight"),
        **mixer,
        **gated_mlp("mlp."),
    }
    return config, Names("model.layers.", top("model.norm"), layer)


def _qwen_next(source: Source, model_type: str, projections: Mapping[str, Rule]) -> tuple[Fields, Names]:
    """All norms but those inside delta nets are stored with the one that is added to them."""
    meta, mixed = source.meta, source.any_with("ffn_gate_exps.weight")
    delta = Delta.of(meta)
    rotated = meta.integer("rope.dimension_count") / max(1, source.head_dim)
    config = {
        **source.common(model_type),
        **source.attention(),
        "layer_types": [
            "full_attention" if each else "linear_attention" for each in source.layers_with("attn_q.weight")
        ],
        "linear_num_key_heads": delta.num_groups,
        "linear_num_value_heads": delta.num_heads,
        "linear_key_head_dim": delta.d_state,
        "linear_value_head_dim": delta.head_dim,
        "linear_conv_kernel_dim": meta.integer("ssm.conv_kernel"),
        "intermediate_size": meta.largest("feed_forward_length", 0) or None,
        "num_experts": source.size("ffn_gate_exps.weight") if mixed else 0,
        "rope_parameters": rope_of(meta) | {"partial_rotary_factor": rotated},
    }
    if mixed:
        dense = [i for i, each in enumerate(source.layers_with("ffn_gate_exps.weight")) if not each]
        config |= {
            "num_experts_per_tok": meta.largest("expert_used_count"),
            "moe_intermediate_size": source.size("ffn_gate_exps.weight", 1),
            "shared_expert_intermediate_size": source.size("ffn_gate_shexp.weight"),
            "mlp_only_layers": dense,
        }
    layer = {
        "input_layernorm.weight": of("attn_norm.weight", by=less_one),
        "post_attention_layernorm.weight": of("post_attention_norm.weight", by=less_one),
        **attention(),
        **{f"self_attn.{name}_norm.weight": of(f"attn_{name}_norm.weight", by=less_one) for name in ("q", "k")},
        **projections,
        "linear_attn.norm.weight": of("ssm_norm.weight"),
        **gated_mlp("mlp."),
        "mlp.gate.weight": of("ffn_gate_inp.weight"),
        "mlp.shared_expert_gate.weight": of("ffn_gate_inp_shexp.weight", by=one_row),
        **{f"mlp.shared_expert.{name}_proj.weight": of(f"ffn_{name}_shexp.weight") for name in ("gate", "up", "down")},
        "mlp.experts.gate_up_proj": of("ffn_gate_exps.weight", "ffn_up_exps.weight", by=rows_joined),
        "mlp.experts.down_proj": of("ffn_down_exps.weight"),
    }
    return config, Names(
        "model.layers.", top("model.norm") | {"model.norm.weight": of("output_norm.weight", by=less_one)}, layer
    )


def qwen3_next(source: Source) -> tuple[Fields, Names]:
    delta = Delta.of(source.meta)
    projections = {
        "linear_attn.in_proj_qkvz.weight": of("attn_qkv.weight", "attn_gate.weight", by=delta.by_group),
        "linear_attn.in_proj_ba.weight": of("ssm_ba.weight"),
        "linear_attn.conv1d.weight": of("ssm_conv1d.weight", by=depthwise),
        "linear_attn.dt_bias": of("ssm_dt.bias"),
        "linear_attn.A_log": of("ssm_a", by=flat_log_of_minus),
        "linear_attn.out_proj.weight": of("ssm_out.weight"),
    }
    return _qwen_next(source, "qwen3_next", projections)


def qwen3_5(source: Source) -> tuple[Fields, Names]:
    delta = Delta.of(source.meta)
    projections = {
        "linear_attn.in_proj_qkv.weight": of("attn_qkv.weight", by=delta.values_of_channels),
        "linear_attn.in_proj_z.weight": of("attn_gate.weight", by=delta.values),
        "linear_attn.in_proj_b.weight": of("ssm_beta.weight", by=delta.heads),
        "linear_attn.in_proj_a.weight": of("ssm_alpha.weight", by=delta.heads),
        "linear_attn.conv1d.weight": of("ssm_conv1d.weight", by=lambda t: depthwise(delta.values_of_channels(t))),
        "linear_attn.dt_bias": of("ssm_dt.bias", by=delta.heads),
        "linear_attn.A_log": of("ssm_a", by=lambda t: delta.heads(flat_log_of_minus(t))),
        "linear_attn.out_proj.weight": of("ssm_out.weight", by=delta.columns),
    }
    mixed = source.any_with("ffn_gate_exps.weight")
    return _qwen_next(source, "qwen3_5_moe_text" if mixed else "qwen3_5_text", projections)


FAMILIES: Mapping[str, Family] = {
    "falcon-h1": falcon_h1,
    "granite": _granite,
    "granitehybrid": granite_hybrid,
    "granitemoe": _granite,
    "jamba": jamba,
    "lfm2": lfm2,
    "lfm2moe": lfm2,
    "llama": llama,
    "mamba": mamba,
    "mamba2": mamba_2,
    "nemotron_h": nemotron_h,
    "nemotron_h_moe": nemotron_h,
    "qwen3": qwen3,
    "qwen35": qwen3_5,
    "qwen35moe": qwen3_5,
    "qwen3next": qwen3_next,
}


def family_of(arch: str) -> Family:
    """Raises UnsupportedModel for what we have no architecture for."""
    if arch not in FAMILIES:
        raise UnsupportedModel(f"general.architecture is {arch!r}, supported in GGUF files: {', '.join(FAMILIES)}")
    return FAMILIES[arch]
