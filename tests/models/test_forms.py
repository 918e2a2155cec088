"""The forms that real checkpoints have: names of weights and files, adapters of another class, stretched contexts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_cache.api.cli.model_info import examine
from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import adapters, loading
from hybrid_cache.models.adapters import LoraConfig
from hybrid_cache.models.names import Names
from tests.models import checkpoints
from tests.models.driver import Driver

OPS = dispatch.select("torch")
FIRST = {case.family: case for case in checkpoints.FIRST_CASES}
GRANITE = FIRST["GraniteMoeHybrid"]
QWEN = FIRST["Qwen3_5"]
TOKENS = list(range(3, 80))


def served(folder, **options):
    driver = Driver(loading.load(folder, ops=OPS, **options))
    return driver.logits(driver.prefill(TOKENS)[1])


def renamed(folder, out, rename, **config):
    """A copy whose weights have other names, and whose config.json is another."""
    shutil.copytree(folder, out)
    path = out / "model.safetensors"
    weights = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    if config:
        (out / "config.json").write_text(json.dumps(config))
    return out


# Names of weights

PREFIXES = {
    "transformers 5": lambda n: n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n,
    "transformers 4 and MLX": lambda n: f"language_model.{n}",
    "a part by itself": lambda n: n.removeprefix("model."),
    "a text model": lambda n: f"text_model.{n}",
}


@pytest.mark.parametrize("rename", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("case", [QWEN, GRANITE], ids=["qwen3_5", "granite"])
def test_a_text_model_is_found_under_any_prefix(rename, case, folders, tmp_path):
    folder = folders(case)
    other = renamed(folder, tmp_path / "model", rename)
    assert torch.equal(served(other), served(folder))


def with_eyes(folder, out):
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    outer = {"model_type": "qwen3_5", "text_config": config, "tie_word_embeddings": False}
    return renamed(folder, out, PREFIXES["transformers 4 and MLX"], **outer)


def test_towers_beside_a_text_model_are_left_out(folders, tmp_path):
    other = with_eyes(folders(QWEN), tmp_path / "model")
    path = other / "model.safetensors"
    towers = {name: torch.ones(2) for name in ("vision_tower.patch.weight", "model.visual.blocks.0.weight")}
    save_file(load_file(path) | towers, path, metadata={"format": "pt"})
    assert torch.equal(served(other), served(folders(QWEN)))
    save_file(load_file(path) | {"model.ears.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"unexpected weights: model\.ears\.weight"):
        loading.load(other, ops=OPS)


def test_layers_that_are_missing_are_counted_under_any_prefix(folders, tmp_path):
    other = renamed(folders(GRANITE), tmp_path / "model", PREFIXES["transformers 4 and MLX"])
    checkpoints.edit_config(other, num_hidden_layers=5, layer_types=["mamba", "attention", "mamba", "mamba", "mamba"])
    with pytest.raises(ModelError, match=r"there are weights for 4 layers, config.json: num_hidden_layers is larger"):
        loading.load(other, ops=OPS)


def test_a_name_under_two_prefixes_is_not_guessed():
    names = Names(["model.a.norm.weight", "language_model.model.a.norm.weight", "model.b.weight"])
    assert names.find("model.language_model.a.norm.weight") == "model.language_model.a.norm.weight"
    assert names.find("model.a.norm.weight") == "model.a.norm.weight"
    assert names.find("language_model.b.weight") == "model.b.weight"


def test_convolutions_as_mlx_writes_them_are_refused_by_name(folders, tmp_path):
    folder = shutil.copytree(folders(QWEN), tmp_path / "model")
    path = folder / "model.safetensors"
    weights = load_file(path)
    turned = {n: w.movedim(2, 1).contiguous() if "conv1d.weight" in n else w for n, w in weights.items()}
    save_file(turned, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"conv1d\.weight has shape .*, as MLX writes it, which is not read"):
        loading.load(folder, ops=OPS)


# Adapters


def lora(folder, path, rename=lambda name: name):
    """On a projection and the head of the text class."""
    torch.manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    names = [next(n for n in weights if n.endswith("q_proj.weight")), "lm_head.weight"]
    tensors = {}
    for name in (name for name in names if name in weights):
        out, width = weights[name].shape
        module = rename(name).removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(4, width)
        tensors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(out, 4)
    adapters.save(path, LoraConfig(rank=4, alpha=8.0, targets=("q_proj",)), tensors)
    return path


@pytest.mark.parametrize("merges", [True, False], ids=["merged", "beside"])
def test_an_adapter_of_the_text_class_goes_with_the_multimodal_checkpoint_and_back(merges, folders, tmp_path):
    text = folders(QWEN)
    both = with_eyes(text, tmp_path / "eyes")
    plain = lora(text, tmp_path / "plain")
    inside = lora(text, tmp_path / "inside", PREFIXES["transformers 5"])
    expected = served(text, adapter=plain, merges=merges)
    assert not torch.allclose(expected, served(text), atol=1e-2)
    for folder, adapter in ((both, plain), (both, inside), (text, inside)):
        assert torch.equal(served(folder, adapter=adapter, merges=merges), expected)


def test_an_adapter_with_one_weight_under_two_names_is_refused(folders, tmp_path):
    text = folders(QWEN)
    tensors = {}
    for number, rename in enumerate((lambda n: n, PREFIXES["transformers 5"])):
        lora(text, tmp_path / str(number), rename)
        tensors |= load_file(tmp_path / str(number) / adapters.WEIGHTS)
    save_file(tensors, tmp_path / "0" / adapters.WEIGHTS)
    with pytest.raises(ModelError, match="adapter 0 changes a weight under two names"):
        loading.load(text, ops=OPS, adapter=tmp_path / "0")


# Files


def in_shards(references, folder):
    checkpoints.save(references(GRANITE), folder, max_shard_size="100KB")
    return folder


def test_files_beside_the_index_are_not_read(references, folders, tmp_path):
    folder = in_shards(references, tmp_path / "model")
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    save_file({"model.extra.weight": torch.ones(2)}, folder / "model-99999-of-99999.safetensors")
    assert torch.equal(served(folder), served(folders(GRANITE)))


def test_a_weight_in_two_shards_is_not_overwritten(references, tmp_path):
    folder = in_shards(references, tmp_path / "model")
    first, second = sorted(folder.glob("model-0000[12]-of-*"))
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: load_file(first)[name]}, second, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"weight {name} is in two files, one of them {second.name}"):
        loading.load(folder, ops=OPS)


def test_all_shards_are_enough_without_an_index(references, folders, tmp_path):
    folder = in_shards(references, tmp_path / "model")
    (folder / "model.safetensors.index.json").unlink()
    assert torch.equal(served(folder), served(folders(GRANITE)))
    next(folder.glob("model-00002-of-*")).unlink()
    with pytest.raises(ModelError, match=r"index\.json is not there, and model-00001-of-.* are not all shards"):
        loading.load(folder, ops=OPS)


def test_files_of_another_layout_are_named(folders, tmp_path):
    folder = shutil.copytree(folders(GRANITE), tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(ModelError, match=r"neither model.safetensors nor .* is there, found consolidated.safetensors$"):
        loading.load(folder, ops=OPS)
    (folder / "consolidated.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"only safetensors weights are read, found pytorch_model.bin"):
        loading.load(folder, ops=OPS)


def test_a_byte_order_mark_is_no_part_of_a_config(folders, tmp_path):
    folder = shutil.copytree(folders(GRANITE), tmp_path / "model")
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert torch.equal(served(folder), served(folders(GRANITE)))


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("nested", [False, True], ids=["outside", "in text_config"])
def test_the_type_of_rows_is_named_in_either_field(field, nested, folders):
    config = loading.load_config(folders(QWEN)) | {"dtype": None, field: "bfloat16"}
    config = {"model_type": "qwen3_5", "text_config": config} if nested else config
    assert loading.describe(config).dtype is torch.bfloat16
    inner = config["text_config"] if nested else config
    assert loading.describe(config | {field: None, "text_config": {**inner, field: "float32"}}).dtype is torch.float32


# Contexts

ROPE_GRANITE = next(case for case in checkpoints.CASES if case.name.startswith("granite with rotary positions"))
STRETCHED = {
    "yarn as trained": (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        4096,
        "yarn: 4 x 1,024",
    ),
    "yarn of a longer one": (
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        1024,
        "yarn: 4 x 128",
    ),
    "linear": ({"type": "linear", "factor": 8.0}, 8192, "linear: 8 x 1,024"),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        1024,
        None,
    ),
    "dynamic": ({"type": "dynamic", "factor": 2.0}, 1024, "dynamic: not stretched beyond, factor 2 unused"),
}


@pytest.mark.parametrize(("scaling", "length", "said"), STRETCHED.values(), ids=STRETCHED)
def test_the_length_of_a_stretched_context_is_computed_and_said(scaling, length, said, folders, tmp_path):
    folder = shutil.copytree(folders(ROPE_GRANITE), tmp_path / "model")
    checkpoints.edit_config(folder, rope_parameters=None, rope_theta=5000.0, rope_scaling=scaling)
    assert loading.load(folder, ops=OPS).max_length == length
    facts = examine(folder, 1 << 30).facts
    assert (facts.max_length, facts.stretched) == (length, said)


def test_positions_beyond_the_trained_length_are_those_of_transformers(references, folders, tmp_path):
    """77 tokens, trained on 16."""
    model = references(ROPE_GRANITE)
    folder = shutil.copytree(folders(ROPE_GRANITE), tmp_path / "model")
    scaling = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16, "rope_theta": 5000.0}
    checkpoints.edit_config(folder, rope_parameters=scaling, max_position_embeddings=256)
    other = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        expected = other(torch.tensor([TOKENS]), use_cache=False).logits[0]
    torch.testing.assert_close(served(folder), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(served(folder), served(folders(ROPE_GRANITE)), atol=1e-2)


def test_positions_that_change_with_the_length_of_a_text_are_refused_by_name(folders, tmp_path):
    folder = shutil.copytree(folders(ROPE_GRANITE), tmp_path / "model")
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 128}
    checkpoints.edit_config(folder, rope_parameters={"rope_type": "longrope", "rope_theta": 5000.0, **factors})
    with pytest.raises(UnsupportedModel, match="rope_type is 'longrope', supported: "):
        loading.load(folder, ops=OPS)
