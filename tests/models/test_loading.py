"""A model folder is either loaded whole or refused in one line that names what is wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import folders, loading, registry
from tests.models import checkpoints
from tests.models.driver import Driver

GRANITE, ROPE_GRANITE, MOE_GRANITE, *_ = (c for c in checkpoints.CASES if c.family == "GraniteMoeHybrid")
ZAMBA, *_ = (c for c in checkpoints.CASES if c.family == "Zamba2")
JAMBA, *_ = (c for c in checkpoints.CASES if c.family == "Jamba")
OPS = dispatch.select("torch")


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of a good checkpoint, to be damaged."""
    return shutil.copytree(folders(ROPE_GRANITE), tmp_path / "model")


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def shard(references, folder):
    return checkpoints.save(references(ROPE_GRANITE), folder, max_shard_size="100KB")


def logits(model):
    driver = Driver(model)
    return driver.logits(driver.prefill(list(range(3, 80)))[1])


def fingerprint(folder, dtype="auto"):
    return loading.load(folder, dtype=dtype, ops=OPS).fingerprint


# What is read


def test_a_sharded_checkpoint_is_the_same_model_as_a_single_file(folder, references, tmp_path):
    sharded = shard(references, tmp_path / "sharded")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = loading.load(folder, ops=OPS), loading.load(sharded, ops=OPS)
    assert one.fingerprint == many.fingerprint
    assert torch.equal(logits(one), logits(many))


def test_published_spellings_are_the_same_model_as_those_of_transformers_5(folder):
    before = fingerprint(folder)
    config = loading.load_config(folder)
    assert config["layer_types"][0] == "linear_attention"
    assert config["time_step_limit"] == [0.05, 0.4]
    checkpoints.edit_config(
        folder,
        layer_types=None,
        layers_block_type=["mamba", "attention", "mamba", "mamba"],
        rope_parameters=None,
        rope_theta=5000.0,
    )
    assert fingerprint(folder) == before


def test_infinity_is_read_in_both_spellings(folder):
    checkpoints.edit_config(folder, time_step_limit=[0.0, float("inf")])
    before = fingerprint(folder)
    checkpoints.edit_config(folder, time_step_limit=[0.0, {"__float__": "Infinity"}])
    assert fingerprint(folder) == before


@pytest.mark.parametrize(
    ("stored", "asked", "computed"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float32),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_rows_have_the_dtype_asked_for_or_that_of_the_file(references, tmp_path, stored, asked, computed):
    folder = checkpoints.save(references(GRANITE), tmp_path, stored)
    model = loading.load(folder, dtype=asked, ops=OPS)
    assert model.cache_spec.hidden_dtype == computed
    assert Driver(model).prefill([1, 2, 3])[1].dtype == computed


def test_rotary_frequencies_in_the_file_are_left_out(folder):
    before = fingerprint(folder)
    edit_weights(folder, lambda w: w.update({"model.rotary_emb.inv_freq": torch.ones(8)}))
    assert fingerprint(folder) == before


def test_a_tied_checkpoint_that_has_a_head_uses_it(references, tmp_path):
    folder = checkpoints.save(references(GRANITE), tmp_path)
    before = logits(loading.load(folder, ops=OPS))
    edit_weights(folder, lambda w: w.update({"lm_head.weight": 2 * w["model.embed_tokens.weight"]}))
    torch.testing.assert_close(logits(loading.load(folder, ops=OPS)), 2 * before)


def test_the_model_does_not_keep_the_file_open(folder):
    model = loading.load(folder, ops=OPS)
    before = logits(model)
    (folder / "model.safetensors").write_bytes(b"gone")
    assert torch.equal(logits(model), before)


# What is refused


def drop_config(folder):
    (folder / "config.json").unlink()


def break_config(folder):
    (folder / "config.json").write_text("{")


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def truncate_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def set_config(**changes):
    return lambda folder: checkpoints.edit_config(folder, **changes)


def set_weights(edit):
    return lambda folder: edit_weights(folder, edit)


def spoil(value):
    def edit(weights):
        weights["model.layers.1.self_attn.v_proj.weight"][3, 5] = value

    return set_weights(edit)


NORM = "model.layers.2.input_layernorm.weight"
MATRIX = "model.layers.1.self_attn.v_proj.weight"
REFUSED = {
    "no config": (drop_config, ModelError, "config.json is not there"),
    "config is not JSON": (break_config, ModelError, "config.json cannot be read: "),
    "unknown model_type": (
        set_config(model_type="mystery"),
        UnsupportedModel,
        "model_type 'mystery' is not supported; supported: bailing_hybrid, bamba, ",
    ),
    "model_type of a helper module": (set_config(model_type="blocks"), UnsupportedModel, "model_type 'blocks' is not"),
    "no model_type": (set_config(model_type=None), UnsupportedModel, "model_type None is not supported"),
    "missing field": (set_config(hidden_size=None), ModelError, "config.json: hidden_size is missing"),
    "field of the wrong type": (
        set_config(hidden_size="96"),
        ModelError,
        "config.json: hidden_size is '96', expected a whole number of at least 1",
    ),
    "unknown activation": (
        set_config(hidden_act="relu"),
        UnsupportedModel,
        "config.json: hidden_act is 'relu', supported: 'silu'",
    ),
    "unknown positions": (
        set_config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        UnsupportedModel,
        "config.json: rope_parameters.rope_type is 'longrope', supported: 'default', 'dynamic', 'linear', 'llama3', ",
    ),
    "positions without their settings": (
        set_config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        ModelError,
        "config.json: rope_parameters.factor is missing",
    ),
    "unknown layer kind": (
        set_config(layer_types=["mamba", "convolution", "mamba", "mamba"]),
        UnsupportedModel,
        "config.json: layer_types contains 'convolution', supported: mamba, ",
    ),
    "wrong number of layer kinds": (
        set_config(layer_types=["mamba"]),
        ModelError,
        "config.json: layer_types is ['mamba'], expected a list of 4 layer kinds",
    ),
    "heads that do not fit": (
        set_config(num_key_value_heads=4),
        ModelError,
        "config.json: num_key_value_heads is 4, expected a divisor of 6",
    ),
    "quantized, nobody says how": (
        set_config(quantization_config={"bits": 4}),
        UnsupportedModel,
        "config.json: quantization_config.quant_method is None, supported: auto-round, awq, compressed-tensors, fbgemm",
    ),
    "quantized by us, but not like this": (
        set_config(quantization_config={"quant_method": "hybrid-cache", "bits": 3, "group_size": 128}),
        UnsupportedModel,
        "config.json: quantization_config has {'bits': 3, 'group_size': 128}, supported: {'bits': 8, ",
    ),
    "quantized, in a field of old": (
        set_config(compression_config={"quant_method": "sparseml"}),
        UnsupportedModel,
        "config.json: compression_config.quant_method is 'sparseml', supported: auto-round, awq, compressed-tensors, ",
    ),
    "quantized inside of text_config": (
        set_config(text_config={"quantization_config": {"quant_method": "mxfp4"}}),
        UnsupportedModel,
        "config.json: text_config.quantization_config.quant_method is 'mxfp4', supported: auto-round, awq, ",
    ),
    "quantized, not an object": (
        set_config(quantization_config="int8"),
        UnsupportedModel,
        "config.json: quantization_config is 'int8', expected an object with a quant_method",
    ),
    "weights that GPTQ packed": (
        set_weights(lambda w: w.update({MATRIX: w[MATRIX].to(torch.int32)})),
        UnsupportedModel,
        f"weight {MATRIX} is I32, supported: F32, BF16, F16",
    ),
    "weights in eight bits": (
        set_weights(lambda w: w.update({MATRIX: w[MATRIX].to(torch.float8_e4m3fn)})),
        UnsupportedModel,
        f"weight {MATRIX} is F8_E4M3, supported: F32, BF16, F16",
    ),
    "one layer more than weights": (
        set_config(num_hidden_layers=5, layer_types=["mamba", "attention", "mamba", "mamba", "mamba"]),
        ModelError,
        "missing weight: model.layers.4.mamba.in_proj.weight [486, 96]; there are weights for 4 layers, config.json: "
        "num_hidden_layers is larger",
    ),
    "one layer less than weights": (
        set_config(num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"]),
        ModelError,
        "unexpected weights: model.layers.3.",
    ),
    "pickled weights": (only_pickle, UnsupportedModel, "only safetensors weights are read, found pytorch_model.bin"),
    "no weights": (no_weights, ModelError, "neither model.safetensors nor model.safetensors.index.json is there"),
    "truncated weights": (truncate, ModelError, "model.safetensors is not a complete safetensors file: "),
    "truncated header": (truncate_header, ModelError, "model.safetensors is not a complete safetensors file: "),
    "empty weights": (empty, ModelError, "model.safetensors is not a complete safetensors file: "),
    "missing weight": (set_weights(lambda w: w.pop(NORM)), ModelError, f"missing weight: {NORM} [96]"),
    "unexpected weight": (
        set_weights(lambda w: w.update({"model.extra.weight": torch.ones(2)})),
        ModelError,
        "unexpected weights: model.extra.weight",
    ),
    "wrong shape": (
        set_weights(lambda w: w.update({NORM: torch.ones(95)})),
        ModelError,
        f"weight {NORM} has shape [95], expected [96]",
    ),
    "wrong type": (
        set_weights(lambda w: w.update({NORM: torch.ones(96, dtype=torch.int8)})),
        UnsupportedModel,
        f"weight {NORM} is I8, supported: F32, BF16, F16",
    ),
    "not a number": (
        spoil(float("nan")),
        ModelError,
        "weight model.layers.1.self_attn.v_proj.weight contains values that are not finite",
    ),
    "infinity": (
        spoil(float("-inf")),
        ModelError,
        "weight model.layers.1.self_attn.v_proj.weight contains values that are not finite",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=re.escape(f"{folder}: {message}")) as raised:
        loading.load(folder, ops=OPS)
    assert type(raised.value) is error
    assert "\n" not in str(raised.value)


OTHERS = ("bitsandbytes", "mxfp4", "torchao", "hqq", "eetq", "quanto", "aqlm", "vptq", "higgs", "spqr", "bitnet")


@pytest.mark.parametrize("method", OTHERS)
def test_refuses_weights_that_others_quantized_and_names_how(folder, method):
    checkpoints.edit_config(folder, quantization_config={"quant_method": method, "bits": 8, "group_size": None})
    with pytest.raises(
        UnsupportedModel, match=rf"config\.json: quantization_config\.quant_method is '{method}', .*serve "
    ):
        loading.load(folder, ops=OPS)


def test_left_over_layers_are_blamed_on_the_config(folder):
    checkpoints.edit_config(folder, num_hidden_layers=3, layer_types=["mamba", "attention", "mamba"])
    with pytest.raises(
        ModelError, match=r"and \d+ more; there are weights for 4 layers, config\.json: num_hidden_layers"
    ):
        loading.load(folder, ops=OPS)


def test_refuses_a_missing_shard_and_names_it(references, tmp_path):
    folder = shard(references, tmp_path)
    missing = sorted(folder.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(ModelError, match=f"shard {missing.name} is listed in model.safetensors.index.json but is not"):
        loading.load(folder, ops=OPS)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "model.bin"])
def test_refuses_an_index_that_leads_out_of_the_folder_or_to_other_formats(references, tmp_path, name):
    folder = shard(references, tmp_path)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(ModelError, match=f"names '{re.escape(name)}', expected a safetensors file beside it"):
        loading.load(folder, ops=OPS)


def test_refuses_an_unknown_dtype(folder):
    with pytest.raises(ModelError, match="dtype 'int4' is not supported; supported: auto, float32, bfloat16"):
        loading.load(folder, dtype="int4", ops=OPS)


# Fingerprints


def test_loading_again_gives_the_same_fingerprint(folder):
    assert fingerprint(folder) == fingerprint(folder)


def nudge(weights):
    weights["model.layers.3.mamba.D"][2] += 1e-6


@pytest.mark.parametrize(
    "change",
    [set_weights(nudge), set_config(attention_multiplier=0.26), set_config(rms_norm_eps=1e-5)],
    ids=["one weight", "a multiplier", "the epsilon"],
)
def test_the_fingerprint_changes_with(folder, change):
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) != before


def test_the_fingerprint_changes_with_the_dtype(folder):
    assert fingerprint(folder, "float32") != fingerprint(folder, "bfloat16")


def test_the_fingerprint_does_not_change_with_fields_that_nobody_reads(folder):
    before = fingerprint(folder)
    checkpoints.edit_config(folder, transformers_version="4.57.0", use_cache=False, initializer_range=0.5)
    assert fingerprint(folder) == before


# Facts without weights


def num_saved(model):
    """Values in its file: parameters and buffers, tied ones once, without those that we compute ourselves."""
    saved = {name: t for name, t in model.state_dict().items() if not name.endswith(("_decay", "slope_rate"))}
    return sum(t.numel() for t in {t.data_ptr(): t for t in saved.values()}.values())


def test_describe_agrees_with_the_loaded_model(case, folders, references):
    model = loading.load(folders(case), ops=OPS)
    info = loading.describe(loading.load_config(folders(case)))
    if "weights of its own" not in case.name:  # whether weights are shared is seen in the file, not in the config
        assert info.num_parameters == num_saved(references(case))
    assert info.prefill_cost == model.prefill_cost
    assert info.kv_bytes_per_token == model.cache_spec.kv_bytes_per_token
    assert info.checkpoint_bytes == model.cache_spec.slot_bytes
    assert info.dtype == model.cache_spec.hidden_dtype
    assert (info.vocab_size, info.max_length) == (model.vocab_size, model.max_length)
    assert sum(info.layers.values()) == len(model.cache_spec.layers)


def test_a_shared_block_has_kv_rows_of_its_own_at_each_use(folders):
    info = loading.describe(loading.load_config(folders(ZAMBA)))
    assert info.layers == {"Mamba-2": 6, "attention": 4}
    assert info.kv_bytes_per_token == 4 * 2 * 192 * 4  # uses, K and V, twice the hidden size, float32


def test_prefill_cost_is_two_flops_per_weight_and_what_mixes_tokens(folders):
    """Counted by hand for the dense granite: 3 Mamba-2 layers, 1 attention layer, 4 MLPs."""
    inner, state, heads, channels = 192, 24, 6, 192 + 2 * 24
    mlp = 2 * 96 * (2 * 112) + 2 * 112 * 96
    attention = 2 * 96 * (96 + 2 * 32) + 2 * 96 * 96 + 4 * 96
    mamba = 2 * 96 * (inner + channels + heads) + 2 * inner * 96
    scan = 2 * 4 * channels + 4 * inner * state + 2 * 64 * (state + inner)
    cost = loading.describe(loading.load_config(folders(GRANITE))).prefill_cost
    assert cost.per_token == 4 * mlp + attention + 3 * (mamba + scan)
    assert cost.per_token_per_position == 4 * 96


def test_only_chosen_experts_cost_anything(folders):
    config = loading.load_config(folders(MOE_GRANITE))
    more = loading.describe({**config, "num_experts_per_tok": 4}).prefill_cost.per_token
    assert more - loading.describe(config).prefill_cost.per_token == 4 * 6 * 96 * 80
    wider = loading.describe({**config, "num_local_experts": 50}).prefill_cost.per_token
    assert wider - loading.describe(config).prefill_cost.per_token == 4 * 2 * 96 * 45  # the router


# Names of models


def test_every_architecture_is_a_file_with_build():
    tested = {path.stem for path in (Path(__file__).parent / "cases").glob("*.py")}
    assert tested <= set(registry.supported())


def test_a_local_folder_resolves_to_itself(tmp_path):
    assert folders.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/no/such/folder", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(name):
    with pytest.raises(ModelError, match=f"^{re.escape(name)} is not a local folder$"):
        folders.resolve(name)


def test_the_embedded_model_lies_beside_the_code():
    assert loading.embedded_path().parent.name == "models"
