"""A delta is the model of a folder with all tensors in it, and what does not fit is refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_cache.api.server import launch
from hybrid_cache.api.server.launch import LoadOptions
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import deltas, loading
from hybrid_cache.transfer import equal_layers
from tests.models.tools.test_convert import converted

OPS = dispatch.select("torch")
WEIGHTS = "model.safetensors"
CHANGED = ("model.layers.4.self_attn.q_proj.weight", "model.layers.5.mamba.A_log")
LOWEST = 4  # layer


def changed(base):
    weights = load_file(base / WEIGHTS)
    return {name: weights[name] + 0.25 for name in CHANGED}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder that is no other's, so that a test may change it."""
    return shutil.copytree(loading.embedded_path(), tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def delta(base, tmp_path):
    deltas.save(tmp_path / "delta", base, changed(base))
    return tmp_path / "delta"


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = shutil.copytree(base, tmp_path_factory.mktemp("models") / "whole")
    save_file(load_file(base / WEIGHTS) | changed(base), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def edit(folder, **values):
    path = folder / deltas.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write(folder, tensors):
    save_file(tensors, folder / deltas.WEIGHTS)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_delta_is_the_model_with_all_tensors_in_one_folder(delta, whole, base, dtype):
    ours, theirs = (loading.load(folder, ops=OPS, dtype=dtype) for folder in (delta, whole))
    assert ours.fingerprint == theirs.fingerprint
    assert ours.fingerprint != loading.load(base, ops=OPS, dtype=dtype).fingerprint


def test_the_layers_below_the_first_that_differs_are_those_of_the_base(delta, base):
    assert equal_layers(loading.load(base, ops=OPS).chain, loading.load(delta, ops=OPS).chain) == LOWEST


def test_config_tokenizer_and_template_are_those_of_the_base(delta, base):
    assert loading.load_config(delta) == loading.load_config(base)
    ours, theirs = TextModel.load(delta), TextModel.load(base)
    assert ours.tokenizer.as_json() == theirs.tokenizer.as_json()
    assert ours.chat_templates.keys() == theirs.chat_templates.keys() == {"default"}


def test_a_server_loads_a_delta_as_a_variant_or_by_itself(delta, base):
    loaded = launch.load(LoadOptions(model=str(base), variants={"other": str(delta)}))
    (variant,) = loaded.variants
    assert (variant.equal_layers, variant.text_path) == (LOWEST, delta)
    alone = launch.load(LoadOptions(model=str(delta)))
    assert alone.model.fingerprint == variant.model.fingerprint
    assert alone.info.num_parameters == loaded.info.num_parameters


def test_the_base_is_found_from_where_the_delta_lies(delta, base, tmp_path):
    assert deltas.base_of(delta) == base.resolve()
    (tmp_path / "link").symlink_to(delta)
    assert deltas.base_of(tmp_path / "link") == base.resolve()
    assert deltas.base_of(base) == base


def without_a_base(folder):
    edit(folder, base="../nowhere")


def with_a_base_that_is_no_name(folder):
    edit(folder, base=["embedded"])


def with_itself_as_base(folder):
    edit(folder, base=".")


def of_another_format(folder):
    edit(folder, format="xdelta3")


def without_a_digest(folder):
    edit(folder, unchanged="unknown")


def without_weights(folder):
    (folder / deltas.WEIGHTS).unlink()


def with_weights_cut_short(folder):
    (folder / deltas.WEIGHTS).write_bytes((folder / deltas.WEIGHTS).read_bytes()[:-9])


def with_an_unknown_tensor(folder):
    write(folder, load_file(folder / deltas.WEIGHTS) | {"model.layers.9.mamba.D": torch.ones(6)})


def with_another_shape(folder):
    write(folder, load_file(folder / deltas.WEIGHTS) | {CHANGED[0]: torch.ones(192, 96, dtype=torch.bfloat16)})


def with_another_dtype(folder):
    write(folder, {name: tensor.float() for name, tensor in load_file(folder / deltas.WEIGHTS).items()})


def with_one_tensor_less(folder):
    tensors = load_file(folder / deltas.WEIGHTS)
    del tensors[CHANGED[1]]
    write(folder, tensors)


def with_a_value_that_is_not_finite(folder):
    tensors = load_file(folder / deltas.WEIGHTS)
    tensors[CHANGED[0]][0, 0] = float("nan")
    write(folder, tensors)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_a_base, r"delta.json: base '../nowhere' is not there, looked for /.*/nowhere"),
        (with_a_base_that_is_no_name, r"delta.json: base is \['embedded'\], must be a model folder"),
        (with_itself_as_base, "base '.' is a delta itself"),
        (of_another_format, "format is 'xdelta3', supported: hybrid-cache-delta"),
        (without_a_digest, "unchanged is 'unknown', must be a digest of 32 hexadecimal digits"),
        (without_weights, "delta.safetensors is not a complete safetensors file"),
        (with_weights_cut_short, "delta.safetensors is not a complete safetensors file"),
        (with_an_unknown_tensor, "changes weight model.layers.9.mamba.D, which the base does not have"),
        (with_another_shape, r"q_proj.weight \[192, 96\] in BF16, but the base has \[192, 192\] in BF16"),
        (with_another_dtype, r"q_proj.weight \[192, 192\] in F32, but the base has \[192, 192\] in BF16"),
        (with_one_tensor_less, "delta.safetensors was made for another base"),
        (with_a_value_that_is_not_finite, "q_proj.weight contains values that are not finite"),
    ],
)
def test_a_broken_delta_is_refused_with_what_is_wrong(delta, spoil, says):
    spoil(delta)
    with pytest.raises(ModelError, match=says) as found:
        loading.load(delta, ops=OPS)
    assert "\n" not in str(found.value)


def test_a_base_that_was_trained_further_is_refused(base, tmp_path):
    other = shutil.copytree(base, tmp_path / "base")
    deltas.save(tmp_path / "delta", other, changed(other))
    weights = load_file(other / WEIGHTS)
    weights["model.norm.weight"] += 0.25
    save_file(weights, other / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"was made for another base: the rest of its weights is [0-9a-f]{32}, not"):
        loading.load(tmp_path / "delta", ops=OPS)


def test_what_does_not_fit_is_not_written_as_a_delta(base, tmp_path):
    with pytest.raises(ModelError, match=r"changes weight model\.head, which the base does not have"):
        deltas.save(tmp_path, base, {"model.head": torch.ones(3)})
    assert not (tmp_path / deltas.CONFIG).exists()


def test_a_converted_delta_is_a_whole_folder(delta, whole, tmp_path):
    assert load_file(converted(delta, tmp_path / "out") / WEIGHTS).keys() == load_file(whole / WEIGHTS).keys()
    loaded = [loading.load(folder, ops=OPS) for folder in (tmp_path / "out", whole)]
    assert loaded[0].fingerprint == loaded[1].fingerprint
    assert TextModel.load(tmp_path / "out").chat_templates.keys() == {"default"}


def test_quantized_weights_cannot_be_replaced(base, tmp_path):
    quantized = converted(base, tmp_path / "int8", quantize="int8")
    with pytest.raises(ModelError, match=r"but the base has .* in I8"):
        deltas.save(tmp_path / "delta", quantized, {CHANGED[0]: torch.ones(192, 192, dtype=torch.bfloat16)})


def test_an_unsupported_format_is_said_to_be_unsupported(delta):
    of_another_format(delta)
    with pytest.raises(UnsupportedModel):
        deltas.find(delta)
