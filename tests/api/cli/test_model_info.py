"""`model info` from bare configs."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from hybrid_cache.api.cli.model_info import (
    Facts,
    examine,
    examine_presets,
    print_list,
    print_table,
    to_json,
)
from hybrid_cache.api.server.budget import CONVERSATION_TOKENS
from hybrid_cache.errors import ConfigError, ModelError
from hybrid_cache.models.tools.presets import PRESETS

SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CONFIGS: dict[str, dict[str, object]] = {
    "jamba": {
        **SMALL,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 8,
    },
    "granitemoehybrid": {
        **SMALL,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 96,
        "intermediate_size": 96,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "position_embedding_type": "nope",
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
    },
    "zamba2": {
        **SMALL,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "adapter_rank": 8,
    },
}
BUDGET = 1 << 24


def folder(path: Path, config: Mapping[str, object]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def facts_of(path: Path | str | None) -> Facts:
    report = examine(path, BUDGET)
    assert report.supported, report.reason
    assert report.facts is not None
    return report.facts


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_bare_config_is_enough(model_type: str, tmp_path: Path) -> None:
    facts = facts_of(folder(tmp_path, {"model_type": model_type, "dtype": "bfloat16", **CONFIGS[model_type]}))
    assert facts.dtype == "bfloat16"
    assert set(facts.layers) == {"attention", "Mamba-1" if model_type == "jamba" else "Mamba-2"}
    assert facts.num_parameters is not None
    assert facts.num_parameters > 10_000
    assert facts.conversations_in_budget > 1


def test_the_numbers_are_those_of_a_hand_calculation(tmp_path: Path) -> None:
    facts = facts_of(folder(tmp_path, {"model_type": "granitemoehybrid", **CONFIGS["granitemoehybrid"]}))
    assert facts.layers == {"attention": 1, "Mamba-2": 2}
    kv = 2 * 2 * 16 * 4  # K and V, heads, head dimension, float32
    checkpoint = 2 * (3 * (128 + 2 * 16) * 4 + 4 * 32 * 16 * 4)  # layers, convolution window, state
    assert (facts.kv_bytes_per_token, facts.checkpoint_bytes) == (kv, checkpoint)
    assert facts.break_even_tokens is not None
    assert facts.break_even_tokens * kv > checkpoint >= (facts.break_even_tokens - 1) * kv
    room = BUDGET // facts.conversations_in_budget
    assert room >= CONVERSATION_TOKENS * kv + checkpoint


def test_the_embedded_model_is_supported() -> None:
    facts = facts_of(None)
    assert facts.max_length is not None
    assert facts.max_length >= 2048
    assert facts_of("embedded") == facts


def test_a_folder_its_config_file_and_their_text_are_the_same_model(tmp_path: Path) -> None:
    path = folder(tmp_path, {"model_type": "jamba", **CONFIGS["jamba"]})
    assert facts_of(path) == facts_of(path / "config.json") == facts_of(str(path))


def test_a_preset_needs_no_folder() -> None:
    facts = facts_of("llama-3.1-8b")
    assert facts.layers == {"attention": 32}
    assert facts.num_parameters == 8_030_261_248
    assert (facts.checkpoint_bytes, facts.break_even_tokens) == (0, None)  # no state: no length makes one smaller


def test_a_preset_that_is_only_a_shape_has_facts_all_the_same() -> None:
    report = examine("nvidia-hybrid-7b", BUDGET)
    assert not report.supported
    assert report.facts is not None
    assert report.facts.layers == {"Mamba-2": 24, "attention": 4}
    assert report.facts.num_parameters is None


def test_a_name_of_nothing_is_an_error_that_says_where_names_are() -> None:
    with pytest.raises(ModelError, match=r"'gpt-2' is no folder.*model list"):
        examine("gpt-2", BUDGET)


def test_an_unknown_architecture_is_reported_in_one_line(tmp_path: Path) -> None:
    report = examine(folder(tmp_path, {"model_type": "gpt2"}), BUDGET)
    assert not report.supported
    assert report.reason is not None
    assert "gpt2" in report.reason
    assert "\n" not in report.reason


def test_a_setting_that_is_not_supported_is_named(tmp_path: Path) -> None:
    config = {"model_type": "jamba", **CONFIGS["jamba"], "hidden_act": "tanh"}
    report = examine(folder(tmp_path, config), BUDGET)
    assert report.reason == "config.json: hidden_act is 'tanh', supported: 'silu'"


def test_quantized_weights_are_reported_as_not_supported(tmp_path: Path) -> None:
    config = {"model_type": "jamba", "quantization_config": {"bits": 4}}
    report = examine(folder(tmp_path, config), BUDGET)
    assert not report.supported
    assert "quantization_config" in str(report.reason)


def test_a_folder_without_a_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        examine(tmp_path, BUDGET)


def test_the_json_form_holds_the_same_facts(tmp_path: Path) -> None:
    report = examine(folder(tmp_path, {"model_type": "jamba", **CONFIGS["jamba"]}), BUDGET)
    values = json.loads(to_json(report))
    assert values["facts"]["kv_bytes_per_token"] == facts_of(tmp_path).kv_bytes_per_token


def test_the_table_names_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(examine(None, BUDGET))
    out = capsys.readouterr().out
    assert all(word in out for word in ("parameters", "KV", "checkpoint", "break-even", "conversations", "beside"))


def test_the_memory_of_a_server_is_weights_cache_and_what_is_beside_them() -> None:
    facts = facts_of("zamba2-1.2b")
    assert facts.weight_bytes == 2 * 1_215_064_704
    assert facts.beside_bytes is not None
    book, bodies, logits = 64 << 20, 160 << 20, 3 * 64 * 32_000 * 4
    assert book + bodies + logits < facts.beside_bytes < 2 << 30
    assert examine("zamba2-1.2b", 2 << 30).facts.conversations_in_budget == 7  # type: ignore[union-attr]
    shape_only = examine("nvidia-hybrid-7b", BUDGET).facts
    assert shape_only is not None
    assert shape_only.weight_bytes is shape_only.beside_bytes is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("recurrentgemma-2b", ["18 RG-LRU", "8 attention, window 2048", "2.68 G"]),
        ("mamba-2.8b", ["64 Mamba-1", "no KV"]),
        ("llama-3.1-8b", ["32 attention", "no state"]),
        ("nvidia-hybrid-7b", ["no: ", "24 Mamba-2", "6,235 tokens"]),
    ],
)
def test_the_table_of_a_preset_says_what_it_has_and_what_not(
    name: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(examine(name, BUDGET))
    out = capsys.readouterr().out
    assert [word for word in words if word not in out] == []


def test_the_list_has_a_line_for_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    reports = examine_presets(BUDGET)
    assert [report.path for report in reports] == list(PRESETS)
    print_list(reports)
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    values = {value["path"]: value for value in json.loads(to_json(reports))}
    assert values["bamba-9b"]["model_type"] == "bamba"
    assert values["bamba-9b"]["facts"]["kv_bytes_per_token"] == 3 * 2 * 8 * 128 * 2


def test_a_shorter_context_is_told_and_a_longer_one_refused() -> None:
    assert examine(None, 1 << 30, max_model_len=4096).facts.max_length == 4096  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"max_model_len is 99,999, must be from 256 to 32,768"):
        examine(None, 1 << 30, max_model_len=99_999)
