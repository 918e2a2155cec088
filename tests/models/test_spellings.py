"""Short convolutions and delta nets: published configs mean what transformers 5 writes; what we cannot is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from tests.models import checkpoints

OPS = dispatch.select("torch")


def case_of(family, number=0):
    return [case for case in checkpoints.CASES if case.family == family][number]


def respelled(config, removed, added):
    return {name: value for name, value in config.items() if name not in removed} | added


SAME = {
    "lfm2 by numbers of layers": ("Lfm2", 0, ["layer_types"], {"full_attn_idxs": [1, 3]}),
    "lfm2 by the width of blocks": ("Lfm2", 1, ["intermediate_size"], {"block_ff_dim": 80}),
    "lfm2 by its own word for tying": ("Lfm2", 1, ["tie_word_embeddings"], {"tie_embedding": True}),
    "lfm2 with the base beside": ("Lfm2", 1, ["rope_parameters"], {"rope_theta": 5000.0}),
    "qwen3 next by an interval": ("Qwen3Next", 1, ["layer_types"], {"full_attention_interval": 4}),
    "qwen3 next with positions beside": (
        "Qwen3Next",
        0,
        ["rope_parameters"],
        {"rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    ),
    "kimi linear by two lists": (
        "KimiLinear",
        0,
        ["layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"],
        {
            "linear_attn_config": {
                "full_attn_layers": [2],
                "kda_layers": [1, 3],
                "head_dim": 16,
                "num_heads": 3,
                "short_conv_kernel_size": 4,
            },
            "first_k_dense_replace": 1,
        },
    ),
    "bailing hybrid by groups of layers": (
        "BailingHybrid",
        1,
        ["layer_types", "mlp_layer_types", "linear_head_dim", "linear_num_heads", "linear_conv_kernel_dim"],
        {"head_dim": 10},
    ),
}


@pytest.mark.parametrize(("family", "number", "removed", "added"), SAME.values(), ids=SAME)
def test_a_published_spelling_is_the_same_model(folders, tmp_path, family, number, removed, added):
    folder = folders(case_of(family, number))
    config = loading.load_config(folder)
    assert all(name in config for name in removed)
    published = tmp_path / "published"
    published.mkdir()
    (published / "model.safetensors").symlink_to(folder / "model.safetensors")
    (published / "config.json").write_text(json.dumps(respelled(config, removed, added)))
    one, other = loading.load(folder, ops=OPS), loading.load(published, ops=OPS)
    assert one.shape.layers == other.shape.layers


REFUSED = {
    "unknown layers": (
        "Lfm2",
        {"layer_types": ["conv", "mamba", "conv", "conv"]},
        UnsupportedModel,
        "layer_types contains 'mamba', supported: conv, full_attention",
    ),
    "layers that are no number": (
        "Lfm2",
        {"layer_types": None, "full_attn_idxs": [-1]},
        ModelError,
        r"full_attn_idxs is \[-1\], expected a list of whole numbers",
    ),
    "a convolution of one row": ("Lfm2", {"conv_L_cache": 1}, ModelError, "conv_L_cache is 1, expected .* at least 2"),
    "positions of one kind only": (
        "Lfm3",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        ModelError,
        "rope_parameters.sliding_attention is None, expected an object",
    ),
    "unknown activation": ("Qwen3Next", {"hidden_act": "gelu"}, UnsupportedModel, "hidden_act is 'gelu'"),
    "heads that do not fit": ("Qwen3Next", {"linear_num_key_heads": 4}, ModelError, "linear_num_key_heads is 4, exp"),
    "a text config that is none": ("Qwen3_5", {"text_config": 3}, ModelError, "text_config is 3, expected an object"),
    "keys that are turned": ("KimiLinear", {"mla_use_nope": False}, UnsupportedModel, "mla_use_nope is False"),
    "a layer in no list": (
        "KimiLinear",
        {"linear_attn_config": {"full_attn_layers": [2], "kda_layers": [1]}},
        ModelError,
        "expected each number from 1 to 3 once",
    ),
    "another choice of experts": (
        "KimiLinear",
        {"moe_router_activation_func": "softmax"},
        UnsupportedModel,
        "moe_router_activation_func is 'softmax', supported: 'sigmoid'",
    ),
    "decay that grows": ("BailingHybrid", {"kda_lower_bound": 1.0}, ModelError, "kda_lower_bound is 1.0, expected a"),
    "stretched positions": (
        "BailingHybrid",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        UnsupportedModel,
        "rope_type is 'yarn', supported: 'default'",
    ),
}


@pytest.mark.parametrize(("family", "changes", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(folders, family, changes, error, message):
    config = loading.load_config(folders(case_of(family)))
    with pytest.raises(error, match=message) as raised:
        loading.describe(config | changes)
    assert type(raised.value) is error


def test_weights_that_guess_ahead_are_left_out(folders, tmp_path):
    for family, name in (("Qwen3Next", "mtp.fc.weight"), ("BailingHybrid", "model.layers.3.eh_proj.weight")):
        folder = folders(case_of(family))
        more = tmp_path / family
        more.mkdir()
        (more / "config.json").symlink_to(folder / "config.json")
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {name: torch.ones(2)}, more / "model.safetensors", metadata={"format": "pt"})
        assert loading.load(more, ops=OPS).fingerprint == loading.load(folder, ops=OPS).fingerprint


def test_a_convolution_in_three_tensors_may_be_cut_anywhere_but_not_short(folders, tmp_path):
    """transformers 5 cuts OLMo hybrid's in thirds; published, each is as long as what it runs over."""
    folder = folders(case_of("OlmoHybrid"))
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    weights = load_file(folder / "model.safetensors")
    names = [f"model.layers.0.linear_attn.{x}_conv1d.weight" for x in "qkv"]
    joined = torch.cat([weights[name] for name in names])
    published = dict(zip(names, (x.clone() for x in joined.split([32, 32, 80])), strict=True))
    save_file(weights | published, tmp_path / "model.safetensors", metadata={"format": "pt"})
    one, other = (loading.load(f, ops=OPS) for f in (folder, tmp_path))
    assert torch.equal(*(model._stack.layers[0].mixer._conv_weight for model in (one, other)))
    save_file(weights | {names[2]: torch.ones(3, 1, 4)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"q_conv1d.weight, .* rows, expected 144"):
        loading.load(tmp_path, ops=OPS)
