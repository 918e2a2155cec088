"""Bamba, Falcon-H1, Nemotron-H and Mamba-2: spellings of published files, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.models.blocks.feed_forward import SigmoidRouter
from tests.models import checkpoints
from tests.models.driver import Driver

OPS = dispatch.select("torch")
FIRST = {case.family: case for case in reversed(checkpoints.CASES)}
EXPERTS = next(case for case in checkpoints.CASES if "experts in a narrow space" in case.name)


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of the family's first checkpoint, or of a given case."""

    def make(case):
        return shutil.copytree(folders(FIRST.get(case, case)), tmp_path / "model")

    return make


def logits(folder):
    driver = Driver(loading.load(folder, ops=OPS))
    return driver.logits(driver.prefill(list(range(3, 80)))[1])


def rename(folder, old, new):
    path = folder / "model.safetensors"
    weights = {name.replace(old, new): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def test_nemotron_layers_are_read_from_a_pattern_of_letters(copy):
    folder = copy(EXPERTS)
    before = logits(folder)
    checkpoints.edit_config(folder, layers_block_type=None, hybrid_override_pattern="ME*E", num_hidden_layers=4)
    assert torch.equal(logits(folder), before)


def test_nemotron_layers_are_read_by_their_older_names(copy):
    folder = copy(EXPERTS)
    before = logits(folder)
    checkpoints.edit_config(folder, layers_block_type=["mamba", "moe", "attention", "moe"])
    assert torch.equal(logits(folder), before)


def test_nemotron_weights_may_begin_with_model_and_hold_layers_that_guess_further_tokens(copy):
    folder = copy(EXPERTS)
    before = logits(folder)
    rename(folder, "backbone.", "model.")
    path = folder / "model.safetensors"
    save_file({**load_file(path), "mtp.layers.0.norm.weight": torch.ones(3)}, path, metadata={"format": "pt"})
    assert torch.equal(logits(folder), before)


def test_the_embedding_of_mamba2_has_an_older_name(copy):
    folder = copy("Mamba2")
    before = logits(folder)
    rename(folder, "backbone.embeddings.", "backbone.embedding.")
    assert torch.equal(logits(folder), before)


def test_bamba_turns_half_of_each_head_where_the_config_says_nothing(copy):
    folder = copy("Bamba")
    before = logits(folder)
    assert json.loads((folder / "config.json").read_text())["rope_parameters"]["partial_rotary_factor"] == 0.5
    checkpoints.edit_config(folder, rope_parameters=None, rope_theta=10000.0)
    assert torch.equal(logits(folder), before)
    checkpoints.edit_config(folder, partial_rotary_factor=1.0)
    assert not torch.equal(logits(folder), before)


REFUSED = {
    "letter of an unknown layer": (
        "NemotronH",
        {"layers_block_type": None, "hybrid_override_pattern": "M-*X-"},
        UnsupportedModel,
        "hybrid_override_pattern contains 'X', supported: M, \\*, -, E",
    ),
    "no layers": (
        "NemotronH",
        {"layers_block_type": None},
        ModelError,
        "hybrid_override_pattern is missing",
    ),
    "layers that do not count up": (
        "NemotronH",
        {"num_hidden_layers": 7},
        ModelError,
        "num_hidden_layers is 7, but 5 layers are listed",
    ),
    "nothing that mixes": ("NemotronH", {"layers_block_type": ["mlp"] * 5}, ModelError, "no layer is of Mamba-2"),
    "activation of an MLP": (
        "NemotronH",
        {"mlp_hidden_act": "gelu"},
        UnsupportedModel,
        "mlp_hidden_act is 'gelu', supported: 'relu2', 'silu'",
    ),
    "activation of a mixer": (
        "NemotronH",
        {"mamba_hidden_act": "relu"},
        UnsupportedModel,
        "mamba_hidden_act is 'relu', supported: 'silu'",
    ),
    "biases in attention": ("NemotronH", {"attention_bias": True}, UnsupportedModel, "attention_bias is True"),
    "a window": ("NemotronH", {"sliding_window": 64}, UnsupportedModel, "sliding_window is 64"),
    "too many groups of experts": (
        EXPERTS,
        {"topk_group": 3},
        ModelError,
        "topk_group is 3, expected at most 2",
    ),
    "groups that do not fit the experts": (
        EXPERTS,
        {"n_group": 3},
        ModelError,
        "n_group is 3, expected a divisor of 8",
    ),
    "groups of one expert": (EXPERTS, {"n_group": 8}, ModelError, "n_group is 8, expected"),
    "more experts than the groups hold": (
        EXPERTS,
        {"num_experts_per_tok": 5},
        ModelError,
        "num_experts_per_tok is 5, expected at most 4",
    ),
    "multipliers that are too few": (
        "FalconH1",
        {"ssm_multipliers": [1.0, 2.0]},
        ModelError,
        "ssm_multipliers is \\[1.0, 2.0\\], expected a list of 5 numbers",
    ),
    "heads that are too wide": (
        "FalconH1",
        {"mamba_d_head": 64},
        ModelError,
        "6 heads of 64 do not make 120 channels",
    ),
    "activation of Falcon": ("FalconH1", {"hidden_act": "gelu"}, UnsupportedModel, "hidden_act is 'gelu'"),
    "activation of Bamba": ("Bamba", {"hidden_act": "gelu"}, UnsupportedModel, "hidden_act is 'gelu'"),
    "attention where there is no layer": (
        "Bamba",
        {"attn_layer_indices": [1, 9]},
        ModelError,
        "attn_layer_indices contains 9, expected less than 4",
    ),
    "more than a head to turn": (
        "Bamba",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}},
        ModelError,
        "partial_rotary_factor is 1.5, expected",
    ),
    "activation of Mamba-2": ("Mamba2", {"hidden_act": "gelu"}, UnsupportedModel, "hidden_act is 'gelu'"),
    "heads that do not fill Mamba-2": ("Mamba2", {"expand": 3}, ModelError, "6 heads of 32 do not make 288 channels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_is_refused_with_its_field_and_value(copy, name):
    case, changes, kind, message = REFUSED[name]
    folder = copy(case)
    checkpoints.edit_config(folder, **changes)
    with pytest.raises(kind, match=message):
        loading.load(folder, ops=OPS)


def test_only_experts_of_the_best_groups_are_chosen():
    # Sums of the two best: 0.9, 1.3, 1.2. The single best expert is in none of the two best groups.
    scores = torch.tensor([[0.88, 0.02, 0.01, 0.6, 0.1, 0.7, 0.55, 0.65, 0.2]])
    router = SigmoidRouter(None, eps=None, scale=2.0, num_groups=3, top_groups=2)
    ids, shares = router(scores.logit(), 3)
    assert ids.tolist() == [[5, 7, 3]]
    torch.testing.assert_close(shares, torch.tensor([[1.4, 1.3, 1.2]]))
