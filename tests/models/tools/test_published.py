"""Presets of published models against the numbers that were published with them, and against sums by hand."""

import json
from time import process_time

import pytest
import torch
import transformers

from hybrid_cache.models import loading
from hybrid_cache.models.shapes import (
    Advance,
    AttentionShape,
    GatedDeltaShape,
    LinearAttentionShape,
    Mamba1Shape,
    Mamba2Shape,
    MLPShape,
    ModelShape,
    RgLruShape,
    ShortConvShape,
    ways_to_compose,
)
from hybrid_cache.models.tools.presets import preset
from hybrid_cache.models.tools.published import CONFIGS

# Parameters, from model cards, papers, the sizes of the files on the hub and what llama.cpp counts in them. Of qwen3.5
# and qwen3-next they are those of the text model, without the layers that guess several tokens ahead.
PARAMETERS = {
    "jamba-1.5-mini": 51.57e9,
    "jamba-reasoning-3b": 3.03e9,
    "zamba-7b": 7.23e9,
    "zamba2-1.2b": 1.215e9,
    "zamba2-2.7b": 2.66e9,
    "zamba2-7b": 7.36e9,
    "granite-4-h-350m": 340e6,
    "granite-4-h-1b": 1.46e9,
    "granite-4-h-micro": 3.19e9,
    "granite-4-h-tiny": 6.94e9,
    "granite-4-h-small": 32.2e9,
    "bamba-9b": 9.78e9,
    "falcon-h1-0.5b": 521e6,
    "falcon-h1-1.5b": 1.55e9,
    "falcon-h1-1.5b-deep": 1.55e9,
    "falcon-h1-3b": 3.15e9,
    "falcon-h1-7b": 7.59e9,
    "falcon-h1-34b": 33.6e9,
    "nemotron-h-8b": 8.10e9,
    "nemotron-nano-9b-v2": 8.89e9,
    "nemotron-3-nano-30b-a3b": 31.6e9,
    "lfm2-350m": 354e6,
    "lfm2-700m": 742e6,
    "lfm2-1.2b": 1.17e9,
    "lfm2-2.6b": 2.57e9,
    "lfm2-8b-a1b": 8.34e9,
    "qwen3-next-80b-a3b": 79.67e9,
    "qwen3.5-4b": 4.21e9,
    "qwen3.5-35b-a3b": 34.66e9,
    "olmo-hybrid-7b": 7.43e9,
    "kimi-linear-48b-a3b": 49.12e9,
    "mamba-2.8b": 2.77e9,
    "mamba2-2.7b": 2.70e9,
    "falcon-mamba-7b": 7.27e9,
    "recurrentgemma-2b": 2.68e9,
    "recurrentgemma-9b": 8.58e9,
    "llama-3.1-8b": 8.03e9,
    "qwen3-8b": 8.19e9,
}
BF16, F32 = 2, 4  # bytes
BYTES = {
    # KV of a token, and a checkpoint: layers * (window * channels * 2 + state * 4)
    "nvidia-hybrid-7b": (4 * 2 * 8 * 128 * BF16, 24 * (3 * (8192 + 2048) * BF16 + 8192 * 128 * F32)),
    "jamba-1.5-mini": (4 * 2 * 8 * 128 * BF16, 28 * (3 * 8192 * BF16 + 8192 * 16 * F32)),
    "jamba-reasoning-3b": (2 * 2 * 1 * 128 * BF16, 26 * (3 * 5120 * BF16 + 5120 * 16 * F32)),
    "zamba2-7b": (13 * 2 * 32 * 224 * BF16, 81 * (3 * (7168 + 256) * BF16 + 7168 * 64 * F32)),
    "granite-4-h-tiny": (4 * 2 * 4 * 128 * BF16, 36 * (3 * (3072 + 256) * BF16 + 3072 * 128 * F32)),
    "granite-4-h-small": (4 * 2 * 8 * 128 * BF16, 36 * (3 * (8192 + 256) * BF16 + 8192 * 128 * F32)),
    "nemotron-h-8b": (4 * 2 * 8 * 128 * BF16, 24 * (3 * (8192 + 2048) * BF16 + 8192 * 128 * F32)),
    "bamba-9b": (3 * 2 * 8 * 128 * BF16, 29 * (3 * (8192 + 256) * BF16 + 8192 * 128 * F32)),
    "falcon-h1-7b": (44 * 2 * 2 * 128 * BF16, 44 * (3 * (3072 + 512) * BF16 + 3072 * 256 * F32)),
    "falcon-h1-34b": (72 * 2 * 4 * 128 * BF16, 72 * (3 * (4096 + 1024) * BF16 + 4096 * 256 * F32)),
    "lfm2-1.2b": (6 * 2 * 8 * 64 * BF16, 10 * 2 * 2048 * BF16),
    "qwen3-next-80b-a3b": (12 * 2 * 2 * 256 * BF16, 36 * (3 * (2 * 2048 + 4096) * BF16 + 32 * 128 * 128 * F32)),
    "recurrentgemma-2b": (8 * 2 * 1 * 256 * BF16, 18 * (3 * 2560 * BF16 + 2560 * F32)),
    "kimi-linear-48b-a3b": (7 * 2 * (512 + 64) * BF16, 20 * (3 * 3 * 4096 * BF16 + 32 * 128 * 128 * F32)),
    "mamba-2.8b": (0, 64 * (3 * 5120 * F32 + 5120 * 16 * F32)),
    "llama-3.1-8b": (32 * 2 * 8 * 128 * BF16, 0),
}


def three_digits(number):
    return f"{number:.2e}"


def test_every_configuration_is_compared_with_a_published_number():
    assert CONFIGS.keys() == PARAMETERS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_its_published_configurations_have_shapes(name):
    """Without weights, at once, and with the published number of parameters, to three digits."""
    start = process_time()
    info = loading.describe(CONFIGS[name])
    assert process_time() - start < 5
    assert three_digits(info.num_parameters) == three_digits(PARAMETERS[name])
    assert sum(info.layers.values()) == len(info.cache_spec.layers) > 0
    assert preset(name).cache_spec == info.cache_spec


@pytest.mark.parametrize("name", BYTES)
def test_a_token_and_a_checkpoint_take_the_bytes_of_a_sum_by_hand(name):
    spec = preset(name).cache_spec
    assert (spec.kv_bytes_per_token, spec.slot_bytes) == BYTES[name]


def test_a_preset_without_a_config_has_about_the_published_size():
    """Norms and other vectors are not in the shapes: a thousandth less."""
    shape = preset("nvidia-hybrid-7b")
    num_parameters = sum(layer.weight_flops for layer in shape.layers) / 2 + shape.head_flops  # head and embedding
    assert num_parameters == pytest.approx(8.66e9, rel=2e-3)


# Layers by kind, and what can be done with what they keep


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("jamba-1.5-mini", {"Mamba-1": 28, "attention": 4}),
        ("falcon-h1-7b", {"Mamba-2": 44, "attention": 44}),
        ("lfm2-1.2b", {"short convolution": 10, "attention": 6}),
        ("olmo-hybrid-7b", {"gated delta net": 24, "attention": 8}),
        ("recurrentgemma-2b", {"RG-LRU": 18, "attention, window 2048": 8}),
        ("mamba-2.8b", {"Mamba-1": 64}),
        ("qwen3-8b", {"attention": 36}),
    ],
)
def test_layers_are_counted_by_kind(name, layers):
    assert loading.describe(CONFIGS[name]).layers == layers


BFLOAT16 = torch.bfloat16
ATTENTION = AttentionShape(8, 8, num_heads=2, num_kv_heads=1, head_dim=4, dtype=BFLOAT16)
MAMBA1 = Mamba1Shape(8, inner=16, d_state=4, dt_rank=2, conv_width=4, dtype=BFLOAT16)
MAMBA2 = Mamba2Shape(8, num_heads=2, head_dim=8, d_state=4, num_groups=1, conv_width=4, dtype=BFLOAT16)
LIGHTNING = LinearAttentionShape(8, num_heads=2, head_dim=4, dtype=BFLOAT16)
RG_LRU = RgLruShape(8, width=8, num_blocks=2, conv_width=4, dtype=BFLOAT16)
SHORT_CONV = ShortConvShape(8, conv_width=3, dtype=BFLOAT16)
GATED_DELTA = GatedDeltaShape(8, num_heads=2, num_groups=1, head_dim=4, d_state=4, conv_width=4, dtype=BFLOAT16)


@pytest.mark.parametrize(
    ("layer", "advance"),
    [
        (ATTENTION, Advance.ROWS),
        (MAMBA1, Advance.ELEMENTWISE),
        (MAMBA2, Advance.ELEMENTWISE),
        (LIGHTNING, Advance.ELEMENTWISE),
        (RG_LRU, Advance.ELEMENTWISE),
        (SHORT_CONV, Advance.WINDOW),
        (GATED_DELTA, Advance.MATRIX),
        (MLPShape(8, 16), None),
    ],
)
def test_each_part_says_how_what_it_keeps_advances(layer, advance):
    assert layer.advance is advance
    assert (layer.cache is None) == (advance is None)


class Unknown:
    """Keeps a state and does not say how it advances."""

    kind, advance = "unknown", None
    cost, cache = MAMBA1.cost, MAMBA1.cache


def test_every_architecture_names_what_it_keeps_and_says_how_it_advances(case):
    config = getattr(transformers, case.config_class)(**case.settings)
    shape = loading.describe(json.loads(config.to_json_string())).shape
    kept = [layer for layer in shape.layers if layer.cache is not None]
    assert all(layer.kind and layer.advance is not None for layer in kept)
    assert "composed" in ways_to_compose(shape)


@pytest.mark.parametrize(
    ("layers", "ways"),
    [
        ((ATTENTION,), ("relocated", "composed")),
        ((MAMBA1,), ("composed",)),
        ((MAMBA2, ATTENTION), ("composed",)),
        ((LIGHTNING, ATTENTION), ("composed",)),
        ((RG_LRU, ATTENTION), ("composed",)),
        ((SHORT_CONV, ATTENTION), ("composed",)),
        ((GATED_DELTA, ATTENTION), ("composed",)),
        ((Unknown(), ATTENTION), ()),
        ((), ()),
    ],
)
def test_what_layers_keep_can_be_put_together_if_each_says_how(layers, ways):
    shape = ModelShape("made up", (*layers, MLPShape(8, 16)), hidden_size=8, vocab_size=10, dtype=BFLOAT16)
    assert ways_to_compose(shape) == ways
