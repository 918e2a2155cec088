"""An adapter is merged into the weights it names, or refused in one line; nothing cached crosses between adapters."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_cache.cache.keys import keys_of
from hybrid_cache.cache.tree import PrefixTree
from hybrid_cache.engine.selfcheck import check_model
from hybrid_cache.engine.sequence import new_prefill
from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import adapters, loading
from hybrid_cache.models.adapters import LoraConfig
from hybrid_cache.models.shelf import Shelf
from hybrid_cache.request import Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from tests.models import checkpoints
from tests.models.driver import Driver
from tests.models.tools.test_convert import converted

FIRST = {case.family: case for case in checkpoints.FIRST_CASES}
GRANITE = FIRST["GraniteMoeHybrid"]
OPS = dispatch.select("torch")
RANK = 3


def matrices(folder):
    """Weights of linear layers, by name."""
    weights = load_file(folder / "model.safetensors")
    return {n: w for n, w in weights.items() if w.dim() == 2 and "_proj" in n and n.endswith(".weight")}


def random_factors(weights, seed=0, size=0.1):
    torch.manual_seed(seed)
    tensors = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = size * torch.randn(RANK, weight.shape[1])
        tensors[f"{module}.lora_B.weight"] = size * torch.randn(weight.shape[0], RANK)
    return tensors


def adapter_for(folder, path, tensors=None, **settings):
    """Writes an adapter for the linear layers of a model folder."""
    tensors = random_factors(matrices(folder)) if tensors is None else tensors
    values = {"rank": RANK, "alpha": 6.0, "targets": ("in_proj",), **settings}
    adapters.save(path, LoraConfig(**values), tensors)
    return path


def by_hand(folder, out, tensors, scale):
    """A folder whose weights were changed by hand, with arithmetic in float64."""
    weights = load_file(folder / "model.safetensors")
    for name in matrices(folder):
        A, B = (tensors[f"{name.removesuffix('.weight')}.lora_{x}.weight"].double() for x in "AB")
        weights[name] = (weights[name].double() + scale * B @ A).float()
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def logits(model):
    driver = Driver(model)
    return driver.logits(driver.prefill(list(range(3, 80)))[1])


def edit_config(path, **changes):
    file = path / adapters.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", ["GraniteMoeHybrid", "Jamba", "Qwen3Next"])
@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 6.0 / RANK**0.5)])
def test_a_model_with_an_adapter_is_the_model_whose_weights_were_changed_by_hand(
    family, rslora, scale, folders, tmp_path
):
    folder = folders(FIRST[family])
    tensors = random_factors(matrices(folder))
    path = adapter_for(folder, tmp_path / "adapter", tensors, rslora=rslora)
    merged = loading.load(folder, ops=OPS, adapter=path)
    expected = loading.load(by_hand(folder, tmp_path / "hand", tensors, scale), ops=OPS)
    # Both round W + scale B A to float32, one from float64: an ulp of the weights.
    torch.testing.assert_close(logits(merged), logits(expected), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(logits(merged), logits(loading.load(folder, ops=OPS)), atol=1e-2)


def test_an_adapter_of_zeros_changes_no_bit(folders, tmp_path):
    folder = folders(GRANITE)
    path = adapter_for(folder, tmp_path, random_factors(matrices(folder), size=0.0))
    assert torch.equal(logits(loading.load(folder, ops=OPS, adapter=path)), logits(loading.load(folder, ops=OPS)))


def test_modules_that_were_saved_whole_replace_those_of_the_base(folders, tmp_path):
    folder = folders(GRANITE)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("conv1d.bias"))
    path = adapter_for(folder, tmp_path / "adapter", {name: weights[name] + 1}, saved=("conv1d",))
    read = adapters.load(path)
    assert set(read.weights) == {name}
    assert torch.equal(read.merged(name, weights[name]), weights[name] + 1)
    assert loading.load(folder, ops=OPS, adapter=path).fingerprint != loading.load(folder, ops=OPS).fingerprint


def test_quantized_weights_are_unpacked_before_they_are_changed(folders, tmp_path):
    folder = converted(folders(GRANITE), tmp_path / "int8", quantize="int8")
    tensors = random_factors(matrices(folders(GRANITE)))
    path = adapter_for(folder, tmp_path / "adapter", tensors)
    full = logits(loading.load(folders(GRANITE), ops=OPS, adapter=path))
    assert torch.cosine_similarity(logits(loading.load(folder, ops=OPS, adapter=path)), full).min() > 0.99


def test_what_is_written_is_what_is_read(folders, tmp_path):
    tensors = random_factors(matrices(folders(GRANITE)))
    path = adapter_for(folders(GRANITE), tmp_path, tensors, base="somewhere/model", dropout=0.1)
    read = adapters.load(path)
    assert (read.name, read.config.base, read.config.rank, read.config.scale) == (
        tmp_path.name,
        "somewhere/model",
        3,
        2,
    )
    assert read.num_parameters == sum(t.numel() for t in tensors.values())
    for name, (A, B) in read.factors.items():
        assert torch.equal(A, tensors[f"{name.removesuffix('.weight')}.lora_A.weight"])
        assert torch.equal(B, tensors[f"{name.removesuffix('.weight')}.lora_B.weight"])


def test_the_adapter_that_ships_fits_the_embedded_model():
    base = loading.load(loading.embedded_path(), ops=OPS)
    model = loading.load(loading.embedded_path(), ops=OPS, adapter="embedded-choreo")
    assert model.fingerprint != base.fingerprint
    assert adapters.load("embedded-choreo").name == "embedded-choreo"


# Beside the model


@pytest.mark.parametrize("case", checkpoints.FIRST_CASES, ids=str)
def test_products_beside_the_model_are_those_of_merged_weights_or_refused(case, folders, tmp_path):
    """Up to rounding: W x + B (A x) in place of (W + B A) x."""
    folder = folders(case)
    path = adapter_for(folder, tmp_path / "adapter")
    merged = loading.load(folder, ops=OPS, adapter=path)
    if case.family in NOT_ALL:
        with pytest.raises(UnsupportedModel, match="which is no product that it can stand beside: merge it"):
            loading.load(folder, ops=OPS, adapter=path, merges=False)
        return
    beside = loading.load(folder, ops=OPS, adapter=path, merges=False)
    assert beside.fingerprint not in (merged.fingerprint, loading.load(folder, ops=OPS).fingerprint)
    torch.testing.assert_close(logits(beside), logits(merged), atol=2e-3, rtol=2e-3)


# Some of their matrices are experts', or are taken apart before they are packed.
NOT_ALL = ("Zamba", "Qwen3Next", "Qwen3_5Moe", "KimiLinear", "Jamba", "BailingHybrid")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", dispatch.exact_backends())
def test_rows_beside_others_have_the_bits_that_they_have_alone(backend, dtype, folders, tmp_path):
    ops, path = dispatch.select(backend), adapter_for(folders(GRANITE), tmp_path / "adapter")
    model = loading.load(folders(GRANITE), ops=ops, dtype=dtype, adapter=path, merges=False)
    assert check_model(model) == []


def test_matrices_of_the_base_are_stored_once_however_many_adapters_stand_beside_it(folders, tmp_path):
    shelf, folder = Shelf(), folders(GRANITE)
    models = [loading.load(folder, ops=OPS, shelf=shelf)]
    for seed in range(3):
        tensors = random_factors(matrices(folder), seed=seed)
        path = adapter_for(folder, tmp_path / f"{seed}", tensors)
        shelf.begin()
        models.append(loading.load(folder, ops=OPS, adapter=path, merges=False, shelf=shelf))
        new = shelf.num_bytes - shelf.num_shared_bytes
        assert new <= 4 * sum(8 / RANK * t.numel() * 4 for t in tensors.values()), "factors, filled up with zeros"
    assert len({model.fingerprint for model in models}) == 4


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda A, B: (A[:, :-1], B), "changes"),
        (lambda A, B: (A, B[:-1]), "changes"),
    ],
)
def test_factors_that_do_not_fit_are_refused_beside_the_model_too(change, why, folders, tmp_path):
    folder = folders(GRANITE)
    tensors = random_factors(matrices(folder))
    module = next(iter(tensors)).removesuffix(".lora_A.weight")
    names = [f"{module}.lora_{x}.weight" for x in "AB"]
    for name, factor in zip(names, change(*(tensors[name] for name in names)), strict=True):
        tensors[name] = factor.contiguous()
    path = adapter_for(folder, tmp_path / "adapter", tensors)
    for merges in (True, False):
        with pytest.raises(ModelError, match=why):
            loading.load(folder, ops=OPS, adapter=path, merges=merges)


def test_modules_that_were_saved_whole_are_replaced_beside_the_model(folders, tmp_path):
    folder = folders(GRANITE)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if n.endswith("conv1d.bias"))
    path = adapter_for(folder, tmp_path / "adapter", {name: weights[name] + 1}, saved=("conv1d",))
    beside, merged = (loading.load(folder, ops=OPS, adapter=path, merges=merges) for merges in (False, True))
    assert torch.equal(logits(beside), logits(merged))


@pytest.mark.parametrize("merges", [True, False])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_square_factors_are_told_apart(factor, merges, folders, tmp_path):
    """A and B have one shape where the rank is that of the matrix."""
    folder = folders(GRANITE)
    name, weight = next((n, w) for n, w in matrices(folder).items() if w.shape[0] == w.shape[1])
    tensors = {f"{name.removesuffix('.weight')}.lora_{x}.weight": 0.1 * torch.randn(*weight.shape) for x in "AB"}
    changed = {n: t + 0.1 if f"lora_{factor}" in n else t for n, t in tensors.items()}
    prints = set()
    for number, each in enumerate((tensors, changed)):
        path = adapter_for(folder, tmp_path / f"{number}", each, rank=weight.shape[0])
        prints.add(loading.load(folder, ops=OPS, adapter=path, merges=merges).fingerprint)
    assert len(prints) == 2


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_adapter_stands_beside_quantized_weights(kind, folders, tmp_path):
    folder = converted(folders(GRANITE), tmp_path / kind, quantize=kind)
    path = adapter_for(folders(GRANITE), tmp_path / "adapter")
    beside, merged = (loading.load(folder, ops=OPS, adapter=path, merges=merges) for merges in (False, True))
    torch.testing.assert_close(logits(beside), logits(merged), atol=2e-3, rtol=2e-3)


# Nothing cached crosses


def fingerprints(folder, tmp_path):
    """Of the base, of an adapter, of one with another value, and of one with another alpha."""
    tensors = random_factors(matrices(folder))
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(changed.values()))[0, 0] += 1e-3
    paths = [
        adapter_for(folder, tmp_path / "one", tensors),
        adapter_for(folder, tmp_path / "other", changed),
        adapter_for(folder, tmp_path / "alpha", tensors, alpha=7.0),
    ]
    return [loading.load(folder, ops=OPS, adapter=path).fingerprint for path in (None, *paths)]


def test_the_fingerprint_follows_the_content_of_the_adapter_and_not_its_place(folders, tmp_path):
    folder = folders(GRANITE)
    assert len(set(fingerprints(folder, tmp_path))) == 4
    copy = adapter_for(folder, tmp_path / "copy")
    assert loading.load(folder, ops=OPS, adapter=copy).fingerprint == fingerprints(folder, tmp_path)[1]


def test_no_entry_of_the_base_is_matched_by_the_adapted_model_nor_the_other_way_round(folders, tmp_path):
    prompt = Prompt(np.arange(128, dtype=np.int32), ())
    request = Request("r", prompt, SamplingParams())
    spaces = [new_prefill(request, f, enabled=True).namespace for f in fingerprints(folders(GRANITE), tmp_path)]
    pages = keys_of("", prompt.tokens).pages
    for own in spaces:
        tree = PrefixTree()
        node = tree.root(own)
        for number, page in enumerate(pages):
            node = tree.insert(node, page, b"", number, 0.0)
        assert [len(tree.walk(space, pages)) for space in spaces] == [len(pages) * (s == own) for s in spaces]


# What is refused


@pytest.fixture
def good(folders, tmp_path):
    return adapter_for(folders(GRANITE), tmp_path / "good")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', supported: LORA"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"in_proj": 8}}, "rank_pattern is {'in_proj': 8}"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(good, folders, changes, says):
    edit_config(good, **changes)
    with pytest.raises(UnsupportedModel, match=says):
        loading.load(folders(GRANITE), ops=OPS, adapter=good)


@pytest.mark.parametrize("rank", [0, "8", None])
def test_a_rank_that_is_none_is_refused(good, rank):
    edit_config(good, r=rank)
    with pytest.raises(ModelError, match="r is"):
        adapters.load(good)


def edit_tensors(path, edit):
    tensors = load_file(path / adapters.WEIGHTS)
    edit(tensors, next(name for name in sorted(tensors) if name.endswith("in_proj.lora_A.weight")))
    save_file(tensors, path / adapters.WEIGHTS)


def without_factor(tensors, name):
    del tensors[name]


def with_nan(tensors, name):
    tensors[name][0, 0] = float("nan")


def with_unknown_target(tensors, name):
    tensors[name.replace("in_proj", "up_proj")] = tensors[name].clone()
    tensors[name.replace("in_proj", "up_proj").replace("lora_A", "lora_B")] = torch.ones(4, RANK)


def with_more_inputs(tensors, name):
    tensors[name] = torch.ones(RANK, tensors[name].shape[1] + 1)


def with_another_rank(tensors, name):
    tensors[name] = torch.ones(RANK + 1, tensors[name].shape[1])


def with_embedding_factors(tensors, name):
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(RANK, 4)


def with_another_prefix(tensors, name):
    tensors["model.x.weight"] = torch.ones(1)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (without_factor, "missing factor: .*in_proj.lora_A.weight"),
        (with_nan, "not finite"),
        (with_unknown_target, "changes weights that are not there: .*up_proj.weight"),
        (with_more_inputs, r"in_proj.weight changes \[\d+, \d+\], but the base has \[\d+, \d+\]"),
        (with_another_rank, r"expected \[3, inputs\]"),
        (with_embedding_factors, "lora_embedding_A is neither"),
        (with_another_prefix, "does not begin with base_model.model."),
    ],
)
def test_a_broken_adapter_is_refused_with_the_tensor_that_is_wrong(good, folders, edit, says):
    edit_tensors(good, edit)
    with pytest.raises(ModelError, match=says):
        loading.load(folders(GRANITE), ops=OPS, adapter=good)


def test_factors_for_what_is_no_matrix_are_refused(folders, tmp_path):
    weights = load_file(folders(GRANITE) / "model.safetensors")
    conv = next({n: w} for n, w in weights.items() if n.endswith("conv1d.weight"))
    path = adapter_for(folders(GRANITE), tmp_path, random_factors({n: w.flatten(1) for n, w in conv.items()}))
    with pytest.raises(UnsupportedModel, match="no matrix"):
        loading.load(folders(GRANITE), ops=OPS, adapter=path)


def test_an_adapter_that_is_not_there_is_named_with_those_that_ship():
    with pytest.raises(
        ModelError, match=r"nowhere: neither a folder nor one that ships \(embedded-choreo, embedded-polite\)"
    ):
        adapters.load("nowhere")


def test_a_folder_without_weights_is_refused(good):
    (good / adapters.WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"adapter_model.safetensors cannot be read"):
        adapters.load(good)
