"""Rotary frequencies against those that transformers computes, from either spelling of a config."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hybrid_cache.errors import ModelError
from hybrid_cache.models.blocks.attention import rotary_frequencies
from hybrid_cache.models.config import Config

SIZE = 40
LENGTHS = {"max_position_embeddings": 8192, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024}
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 1024},
    "yarn": YARN,
    "yarn with a scale": {**YARN, "attention_factor": 1.3},
    "yarn with two scales": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn with another ramp": {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn that stretches all": {**YARN, "original_max_position_embeddings": 4},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_frequencies_are_those_of_transformers(settings, theta):
    nested = {**settings, "rope_theta": theta}
    expected = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=SIZE, max_position_embeddings=8192, rope_parameters=dict(nested))
    )
    nested_config = Config({"max_position_embeddings": 8192, "rope_parameters": nested})
    scaling = {"type" if name == "rope_type" else name: value for name, value in settings.items()}
    published = Config({"max_position_embeddings": 8192, "rope_theta": theta, "rope_scaling": scaling})
    for config in (nested_config, published):
        frequencies, scale = rotary_frequencies(config.rope(), SIZE)
        torch.testing.assert_close(frequencies, expected.inv_freq, rtol=1e-6, atol=0)
        assert scale == pytest.approx(expected.attention_scaling)
    assert nested_config.used == published.used


def test_a_config_without_a_word_has_plain_positions():
    frequencies, scale = rotary_frequencies(Config({}).rope(), SIZE)
    torch.testing.assert_close(frequencies, 1e4 ** -(torch.arange(0, SIZE, 2) / SIZE))
    assert scale == 1.0


def test_all_that_changes_frequencies_is_part_of_the_fingerprint():
    config = Config({"rope_parameters": KINDS["llama3"]})
    rotary_frequencies(config.rope(), SIZE)
    assert {f"rope_parameters.{name}" for name in KINDS["llama3"]} < set(config.used)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "longrope"}, "rope_parameters.rope_type is 'longrope', supported: 'default', 'dynamic', 'lin"),
        ({"rope_type": "linear", "factor": 0}, "rope_parameters.factor is 0.0, expected a positive number"),
        ({"rope_type": "linear"}, "rope_parameters.factor is missing"),
        ({**LLAMA3, **LENGTHS, "high_freq_factor": 1.0}, "high_freq_factor is 1.0, expected more than"),
        ({"rope_theta": -1.0}, "rope_parameters.rope_theta is -1.0, expected a positive number"),
        ([1], "rope_parameters is .1., expected an object"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ModelError, match=message):
        rotary_frequencies(Config({"rope_parameters": settings}).rope(), SIZE)
