"""Costs against what transformers really multiplies, bytes against what the cache really allocates."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.models import loading
from hybrid_cache.models.shapes import (
    AttentionShape,
    GatedDeltaShape,
    KimiDeltaShape,
    LatentAttentionShape,
    LinearAttentionShape,
    LinearShape,
    Mamba1Shape,
    Mamba2Shape,
    MLPShape,
    MoEShape,
    RgLruShape,
    SharedMoEShape,
    ShortConvShape,
)
from hybrid_cache.models.tools.presets import PRESETS, model_shape, preset
from hybrid_cache.models.tools.published import CONFIGS
from hybrid_cache.spec import AttentionSpec, PrefillCost, StateSpec
from tests.cache.at_once import HybridCache
from tests.models import checkpoints
from tests.models.case import Case
from tests.models.cases.granitemoehybrid import GRANITE

NUM_TOKENS = 2 * TILE
MATRICES, CONVOLUTIONS, BATCHED = ("mm", "addmm"), ("convolution",), ("bmm",)


def shape_of(case):
    config = getattr(transformers, case.config_class)(**case.settings)
    return loading.describe(json.loads(config.to_json_string())).shape


def parts(shape, kind):
    return [layer for layer in shape.layers if isinstance(layer, kind)]


def conv_flops(mixer):
    return mixer.cost.per_token - replace(mixer, conv_width=0).cost.per_token


def scan_flops(mixer):
    return mixer.cost.per_token - mixer.weight_flops - conv_flops(mixer)


@pytest.fixture(scope="module")
def count():
    """FLOPs that torch sees in a prefill of NUM_TOKENS by transformers' own model: (case, module, operations).

    `module` is the last part of a module's name, or how the name of its class ends.
    """
    counted = {}

    def get(case, module, operations):
        if case not in counted:
            counted[case] = count_flops(checkpoints.reference(case))
        found, classes = counted[case]
        names = [n for n in found if n.rpartition(".")[2] == module or classes.get(n, "").endswith(module)]
        return sum(flops for name in names for op, flops in found[name].items() if str(op).split(".")[1] in operations)

    return get


def count_flops(model):
    model.set_attn_implementation("eager")  # the counter does not see into the fused ones
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(3, 3 + NUM_TOKENS)[None], use_cache=False)
    classes = {f"{type(model).__name__}.{name}": type(module).__name__ for name, module in model.named_modules()}
    return counter.get_flop_counts(), classes


# Costs


def test_weight_flops_are_exactly_the_products_with_matrices_that_transformers_does(case, count):
    shape = shape_of(case)
    weights = sum(layer.weight_flops for layer in shape.layers)
    seen = count(case, "Global", MATRICES) + count(case, "rg_lru", ("baddbmm",))
    if case.family == "Zamba":  # the heads' projections come in batches, as the products with C do
        scan = sum(map(scan_flops, parts(shape, Mamba1Shape)))
        seen += count(case, "mamba", BATCHED) - NUM_TOKENS * scan * 2 / 7
    assert seen == NUM_TOKENS * (weights + shape.head_flops)  # it computes the logits of all rows


def test_the_head_is_one_product_for_each_row_of_logits(case, count):
    assert count(case, "lm_head", MATRICES) == NUM_TOKENS * shape_of(case).head_flops


def test_attention_costs_the_causal_half_of_the_square_that_transformers_computes(case, count):
    if parts(shape_of(case), LatentAttentionShape):
        pytest.skip("it multiplies keys and values that it makes of the latent rows")
    linear = count(case, "LightningAttention", BATCHED) + count(case, "DeltaAttention", BATCHED)
    square = count(case, "Attention", BATCHED) - linear
    layers = parts(shape_of(case), AttentionShape)
    assert (square > 0) == bool(layers)
    mixing = sum(layer.cost.flops(0, NUM_TOKENS) - NUM_TOKENS * layer.weight_flops for layer in layers)
    causal = NUM_TOKENS * (NUM_TOKENS + 1) / 2  # pairs, with the diagonal
    assert mixing == square * causal / NUM_TOKENS**2


def test_a_convolution_costs_its_width_for_each_channel(case, count):
    mixers = [layer for layer in shape_of(case).layers if hasattr(layer, "conv_width")]
    padded = (NUM_TOKENS + mixer.conv_width - 1 for mixer in mixers)  # transformers pads both ends and cuts one
    expected = sum(rows * conv_flops(mixer) for rows, mixer in zip(padded, mixers, strict=True))
    assert count(case, "Global", CONVOLUTIONS) == expected


def test_a_mamba2_scan_costs_what_transformers_multiplies_in_tiles_of_the_same_size(count):
    """With a group for each head, because its plain version repeats C.B for each head of a group."""
    settings = {**GRANITE, "mamba_chunk_size": TILE, "mamba_n_groups": 6}
    case = Case("granite in our tiles", "GraniteMoeHybrid", settings)
    mixers = parts(shape_of(case), Mamba2Shape)
    scan = sum(map(scan_flops, mixers))
    # From tile to tile it multiplies all states with a square matrix of decays; a running state needs no such product.
    num_states = NUM_TOKENS // TILE + 1
    between = sum(2 * m.inner * m.d_state * num_states**2 for m in mixers)
    assert count(case, "mamba", BATCHED) == NUM_TOKENS * scan + between


def test_of_a_mamba1_scan_torch_sees_the_products_with_c_two_of_seven_flops(count):
    case = next(c for c in checkpoints.CASES if c.family == "Jamba")
    scan = sum(map(scan_flops, parts(shape_of(case), Mamba1Shape)))
    assert count(case, "mamba", BATCHED) == NUM_TOKENS * scan * 2 / 7


def test_the_cost_of_a_range_is_the_sum_over_its_tokens():
    cost = PrefillCost(100.0, 3.0)
    assert cost.flops(7, 12) == sum(100 + 3 * p for p in range(7, 12))
    assert cost.flops(0, 7) + cost.flops(7, 12) == cost.flops(0, 12)


def test_the_kinds_of_layers_by_hand():
    assert LinearShape(10, 7).cost == PrefillCost(140, 0)
    assert MLPShape(10, 7).cost == PrefillCost(3 * 140, 0)
    assert MLPShape(10, 7, gated=False).cost == PrefillCost(2 * 140, 0)
    assert MoEShape(10, 7, num_experts=6, num_active=2).cost == PrefillCost(2 * 10 * 6 + 2 * 3 * 140, 0)
    attention = AttentionShape(10, 12, num_heads=4, num_kv_heads=2, head_dim=5, dtype=torch.bfloat16)
    assert attention.cost == PrefillCost(2 * 10 * (20 + 2 * 10) + 2 * 20 * 12 + 4 * 20, 4 * 20)
    assert attention.cache == AttentionSpec(2, 5, torch.bfloat16)
    mamba = Mamba1Shape(hidden=10, inner=30, d_state=4, dt_rank=3, conv_width=2, dtype=torch.bfloat16)
    assert mamba.cost.per_token == 2 * (10 * 60 + 30 * 11 + 3 * 30 + 30 * 10) + 2 * 2 * 30 + 7 * 30 * 4
    assert mamba.cache == StateSpec((1, 30), (30, 4), torch.bfloat16, (30,))
    lru = RgLruShape(hidden=10, width=30, num_blocks=3, conv_width=2, dtype=torch.bfloat16)
    assert lru.cost.per_token == 2 * (10 * 60 + 3 * 10 * 20 + 30 * 10) + 2 * 2 * 30 + 2 * 30
    assert lru.cache == StateSpec((1, 30), (30,), torch.bfloat16, (30,))
    lightning = LinearAttentionShape(hidden=10, num_heads=3, head_dim=4, dtype=torch.bfloat16)
    assert lightning.cost.per_token == 2 * (10 * 48 + 12 * 10) + 3 * (2 * 64 * 4 + 2 * 64 * 4 + 2 * 2 * 4 * 4)
    assert lightning.cache == StateSpec((0, 0), (3, 4, 4), torch.bfloat16, (3,))
    gated = AttentionShape(10, 12, num_heads=4, num_kv_heads=2, head_dim=5, dtype=torch.bfloat16, gate=3)
    assert gated.cost.per_token - attention.cost.per_token == 2 * 10 * 4 * 3
    experts, mlp = MoEShape(10, 7, num_experts=6, num_active=2), MLPShape(10, 7)
    assert SharedMoEShape(experts, mlp, gated=True).weight_flops == experts.weight_flops + mlp.weight_flops + 2 * 10
    conv = ShortConvShape(hidden=10, conv_width=3, dtype=torch.bfloat16)
    assert conv.cost.per_token == 2 * (10 * 30 + 10 * 10) + 2 * 3 * 10
    assert (conv.cache, conv.cache.state_bytes) == (StateSpec((2, 10), (0,), torch.bfloat16), 0)
    latent = LatentAttentionShape(
        10, 4, own_dim=3, shared_dim=2, value_dim=6, kv_rank=7, q_rank=8, dtype=torch.bfloat16
    )
    products = 10 * 8 + 8 * 20 + 10 * 9 + 7 * 4 * 9 + 24 * 10
    assert latent.cost == PrefillCost(2 * products + 4 * 4 * 9, 4 * 4 * 9)
    assert latent.cache == AttentionSpec(1, 9, torch.bfloat16)


def test_what_delta_nets_multiply_by_hand():
    """In a tile of 64 rows, beside the matrices and the convolution: for each head, see `_delta_of_products`."""
    tile, across = 2 * 64 * 64, 2 * 64 * 5 * 4  # multiplied with a width; rows times a state of 5 by 4
    gated = GatedDeltaShape(10, num_heads=6, num_groups=2, head_dim=5, d_state=4, conv_width=3, dtype=torch.bfloat16)
    assert gated.weight_flops == 2 * (10 * (8 + 8 + 30 + 30 + 12) + 30 * 10)
    inside = 2 * 2 * tile * 4 + 6 * (tile * 5 + tile / 2 * 5)  # q.k and k.k of a group; values, triangular system
    assert 64 * scan_flops(gated) == inside + 6 * 3 * across
    assert gated.cache == StateSpec((2, 46), (6, 5, 4), torch.bfloat16, (6, 4, 4))
    kimi = KimiDeltaShape(10, num_heads=6, head_dim=5, conv_width=3, dtype=torch.bfloat16, gate_rank=4)
    assert kimi.weight_flops == 2 * (10 * (90 + 6 + 8) + 2 * 4 * 30 + 30 * 10)
    assert 64 * scan_flops(kimi) == 6 * (3 * tile * 5 + tile / 2 * 5) + 6 * 3 * (2 * 64 * 5 * 5)
    assert kimi.cache == StateSpec((2, 90), (6, 5, 5), torch.bfloat16, (6, 5, 5))


# Bytes


def check_bytes(shape, model):
    """Every byte that a page or a slot takes: its own tensors, and nothing that the shape does not know."""
    spec = shape.cache_spec
    assert spec == model.cache_spec
    assert shape.prefill_cost == model.prefill_cost
    geometry = Geometry.of(spec, 1 << 24)
    tensors = HybridCache(model.cache_spec, model.prefill_cost, 1 << 24).tensors
    page_bytes = slot_bytes = 0
    for entry in tensors:
        if isinstance(entry, KVTensors):
            kind, halves = Kind.PAGE, (entry.k, entry.v)
            page_bytes += sum(half[0].nbytes for half in halves)
        else:
            kind, halves = Kind.SLOT, (entry.conv, entry.state)
            slot_bytes += sum(-(-half[0].nbytes // 64) * 64 for half in halves)
        assert all(half.stride(0) * half.element_size() == geometry.stride_bytes(kind) for half in halves)
    assert (page_bytes, slot_bytes) == (spec.page_bytes, spec.slot_bytes)


def test_bytes_are_those_that_the_cache_allocates_for_the_loaded_model(case, folders):
    model = loading.load(folders(case), ops=dispatch.select("torch"))
    check_bytes(model_shape(str(folders(case))), model)


def test_bytes_are_those_that_the_cache_allocates_for_the_embedded_model():
    check_bytes(preset("embedded"), loading.load(loading.embedded_path(), ops=dispatch.select("torch")))


def test_transformers_keeps_the_same_keys_and_states(case, references, monkeypatch):
    spec = shape_of(case).cache_spec
    if not spec.kv_bytes_per_token:  # it would ask a layer of attention how long the text in its cache is: nothing yet
        monkeypatch.setattr(transformers.Cache, "get_seq_length", lambda *_, **__: 0)
        monkeypatch.setattr(transformers.Cache, "get_mask_sizes", lambda _, length, *__: (length, 0))
    with torch.no_grad():
        tokens = torch.arange(3, 3 + NUM_TOKENS)[None]
        outputs = references(case)(tokens, use_cache=True)
    cache = outputs.get("cache_params", outputs.get("past_key_values"))
    if cache is None:
        pytest.skip("it keeps its cache to itself")
    rows = [kept for layer in cache.layers for kept in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    found = sum(kept.nbytes / kept.shape[-2] for kept in rows if kept is not None)  # of a window, it keeps the tokens
    twice = sum(layer.cache.bytes_per_token for layer in parts(shape_of(case), LatentAttentionShape)) / 2
    assert found == spec.kv_bytes_per_token - twice  # it keeps a latent row once
    found = [s for layer in cache.layers for s in getattr(layer, "recurrent_states", {}).values()]
    states = [s.numel() for s in found if s is not None]
    states += [s.numel() for s in getattr(cache, "linear_cache", []) if len(s)]
    kept = [s.state_bytes for s in spec.layers if isinstance(s, StateSpec) and s.state_bytes]
    assert [4 * n for n in states] == kept


# Presets


@pytest.mark.parametrize(("name", "active"), [("jamba-1.5-mini", 12e9), ("granite-4-h-small", 9e9)])
def test_experts_that_are_not_chosen_cost_nothing(name, active):
    shape = preset(name)
    assert (shape.prefill_cost.per_token + shape.head_flops) / 2 == pytest.approx(active, rel=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_priced(name):
    shape = preset(name)
    assert shape.name == name
    assert model_shape(name) == shape
    assert shape.prefill_cost.per_token > shape.head_flops > 0
    assert shape.cache_spec.slot_bytes + shape.cache_spec.kv_bytes_per_token > 0


def test_the_as_published_preset_has_the_formulas_of_the_paper():
    shape = preset("nvidia-hybrid-7b-as-published")
    assert shape.cache_spec.kv_bytes_per_token == 65_536
    assert shape.cache_spec.slot_bytes == 26_787_840 == 24 * 1_116_160
    D, N = 4096, 128
    for L in (1, 1000, 32_768):
        attention = 8 * L * D**2 + 4 * L**2 * D
        mamba = 12 * L * D**2 + 16 * L * D * N + 10 * L * D
        assert shape.prefill_cost.flops(0, L) == 4 * attention + 24 * mamba + 28 * 16 * L * D**2


def test_the_paper_and_the_true_shapes_agree_on_the_work_but_not_on_the_bytes():
    true, published = preset("nvidia-hybrid-7b"), preset("nvidia-hybrid-7b-as-published")
    assert true.prefill_cost.per_token == pytest.approx(published.prefill_cost.per_token, rel=0.02)
    assert true.cache_spec.slot_bytes > 3.8 * published.cache_spec.slot_bytes
    assert true.cache_spec.kv_bytes_per_token * 4 == published.cache_spec.kv_bytes_per_token


def test_the_embedded_preset_is_what_its_config_says():
    info = loading.describe(loading.load_config(loading.embedded_path()))
    shape = preset("embedded")
    assert shape.layers == info.shape.layers
    assert shape.cache_spec == info.cache_spec
    assert shape.prefill_cost == info.prefill_cost
    assert shape.vocab_size == info.vocab_size
    assert shape.dtype == info.dtype


# Names


def test_a_folder_and_its_config_file_are_the_same_model(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["granite-4-h-tiny"]))
    shape = model_shape(str(folder))
    assert shape == model_shape(str(folder / "config.json"))
    assert shape.name == "tiny"
    assert shape.layers == preset("granite-4-h-tiny").layers


@pytest.mark.parametrize("get", [preset, model_shape])
def test_an_unknown_name_is_refused_in_one_line_with_the_choices(get):
    with pytest.raises(ModelError, match="'gpt-2' is") as refused:
        get("gpt-2")
    assert "nvidia-hybrid-7b, " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_architecture_is_refused_in_one_line_with_the_choices(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedModel, match=r"'gpt2'.*granitemoehybrid.*presets: nvidia-hybrid-7b, ") as refused:
        model_shape(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_config_without_sizes_is_refused_with_its_place(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "jamba"}')
    with pytest.raises(ModelError, match=rf"{tmp_path}.*missing"):
        model_shape(str(tmp_path))
