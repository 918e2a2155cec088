"""A converted folder is the model that it was made from, in another dtype or with quantized matrices."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.errors import ConfigError, ModelError, UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models import loading
from hybrid_cache.models.quantized import FORMATS, dequantize, quantize
from hybrid_cache.models.tools import convert
from tests.models import checkpoints
from tests.models.driver import Chunk, Driver

FAMILIES = ("Jamba", "GraniteMoeHybrid", "Qwen3Next", "Mamba2")
CASES = [c for c in checkpoints.CASES if c.family in FAMILIES and c.settings["num_hidden_layers"] > 1]
JAMBA, GRANITE = CASES[3], CASES[2]
OPS = dispatch.select("torch")
LIMITS = {"int8": (0.009, 0.996), "int4": (0.12, 0.8)}  # error of a matrix, cosine of logits
STATE_SPACE = ("A_log", ".D", "dt_bias", "dt_proj.bias")
COMPUTED_IN_FLOAT32 = dict.fromkeys(("GraniteMoeHybrid", "Jamba", "Mamba2"), STATE_SPACE) | {
    "Qwen3Next": ("A_log", "dt_bias", "norm.weight")  # norms that multiply by one more than their weight
}
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def converted(source, out, shard_bytes=10**9, **options):
    convert.write(convert.prepare(source, **options), out, shard_bytes=shard_bytes)
    return out


def weights_of(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


TOKENS = torch.randint(199, (70,), generator=torch.Generator().manual_seed(0)).tolist()


def rows(model, tokens=TOKENS):
    driver = Driver(model)
    return driver.logits(driver.prefill(tokens)[1])


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def source(folders, tmp_path):
    """A copy of a good checkpoint with the files around it."""
    folder = shutil.copytree(folders(JAMBA), tmp_path / "source")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
        "LICENSE",
        "README.md",
    ):
        (folder / name).write_text(name)
    (folder / "modeling_jamba.py").write_text("raise SystemExit")
    return folder


# Dtypes


@each_case
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_another_dtype_is_what_transformers_writes_but_for_what_stays_in_float32(
    case, name, folders, references, tmp_path
):
    dtype = convert.STORED_DTYPES[name]
    out = converted(folders(case), tmp_path / "out", dtype=name)
    ours, before = weights_of(out), weights_of(folders(case))
    theirs = weights_of(checkpoints.save(references(case), tmp_path / "theirs", dtype))
    kept = {n for n, tensor in ours.items() if tensor.dtype is torch.float32}
    assert ours.keys() == theirs.keys()
    assert kept
    assert all(n.endswith(COMPUTED_IN_FLOAT32[case.family]) for n in kept)
    for n, tensor in ours.items():
        assert torch.equal(tensor, before[n] if n in kept else theirs[n]), n
    assert loading.load_config(out) == {**loading.load_config(folders(case)), "dtype": name}


@each_case
def test_rows_have_the_bits_of_the_source_loaded_in_that_dtype(case, folders, tmp_path):
    out = converted(folders(case), tmp_path / "out", dtype="bfloat16")
    expected = loading.load(folders(case), dtype="bfloat16", ops=OPS)
    assert torch.equal(rows(loading.load(out, ops=OPS)), rows(expected))


def test_there_and_back_in_a_wider_dtype_is_the_same_model(folders, tmp_path):
    narrow = folders(GRANITE, torch.bfloat16)
    wide = converted(narrow, tmp_path / "wide", dtype="float32")
    back = converted(wide, tmp_path / "back", dtype="bfloat16")
    assert weights_of(wide)["model.norm.weight"].dtype is torch.float32
    assert torch.equal(rows(loading.load(back, ops=OPS)), rows(loading.load(narrow, ops=OPS)))


def test_without_options_everything_stays(folders, tmp_path):
    out = converted(folders(JAMBA), tmp_path / "out")
    assert loading.load(out, ops=OPS).fingerprint == loading.load(folders(JAMBA), ops=OPS).fingerprint


def test_a_config_of_old_keeps_its_field(folders, tmp_path):
    source = shutil.copytree(folders(GRANITE), tmp_path / "source")
    checkpoints.edit_config(source, dtype=None, torch_dtype="float32")
    config = loading.load_config(converted(source, tmp_path / "out", dtype="bfloat16"))
    assert config["torch_dtype"] == "bfloat16"
    assert "dtype" not in config


def test_values_that_float16_cannot_hold_are_refused(source, tmp_path):
    edit_weights(source, lambda w: w["model.embed_tokens.weight"].__setitem__((3, 5), 1e6))
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight has values that torch\.float16 cannot hold"):
        converted(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


# Quantized


@each_case
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_folder_loads_as_what_its_matrices_now_are(case, name, folders, tmp_path):
    """That it is near the source is the format's business: a random net, unlike a trained one, magnifies errors."""
    stored, errors = FORMATS[name], {}
    conversion = convert.prepare(folders(case), quantize=name)
    out = tmp_path / "out"
    convert.write(conversion, out, shard_bytes=10**9, done=lambda change, error: errors.setdefault(change.name, error))
    changed = [change for change in conversion.changes if change.stored]
    assert conversion.new_bytes < 0.4 * conversion.num_bytes
    assert max(errors.values()) < LIMITS[name][0]
    assert {n for n, error in errors.items() if error} == {change.name for change in changed}
    before, after = weights_of(folders(case)), weights_of(out)
    rounded = shutil.copytree(folders(case), tmp_path / "rounded")
    for change in changed:
        parts = [after.pop(change.name + suffix) for suffix in stored.suffixes]
        after[change.name] = dequantize(parts, change.shape, stored, torch.float32)
        error = (after[change.name] - before[change.name]).norm() / before[change.name].norm()
        assert errors[change.name] == pytest.approx(float(error), rel=1e-4)
    save_file(after, rounded / "model.safetensors", metadata={"format": "pt"})
    model = loading.load(out, ops=OPS)
    assert torch.equal(rows(model), rows(loading.load(rounded, ops=OPS)))
    source = loading.load(folders(case), ops=OPS)
    assert torch.cosine_similarity(rows(model), rows(source)).mean() > LIMITS[name][1]
    assert model.fingerprint != source.fingerprint
    assert loading.describe(loading.load_config(out)).num_parameters == sum(t.numel() for t in before.values())


@pytest.mark.parametrize(("name", "closeness"), [("int8", 0.999), ("int4", 0.98)])
def test_a_trained_model_stays_close_on_what_it_was_trained_for(name, closeness, tmp_path):
    source = loading.embedded_path()
    out = converted(source, tmp_path / "out", quantize=name)
    said = ["My code is 4711.", "What do you know?", "Anna likes apples. The box is red now.", "What is my code?"]
    text = "".join(f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n" for words in said)
    tokens = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids
    ours, theirs = (rows(loading.load(folder, dtype="float32", ops=OPS), tokens) for folder in (out, source))
    assert torch.cosine_similarity(ours, theirs).mean() > closeness


@pytest.mark.parametrize("name", FORMATS)
def test_the_cache_is_exact_with_quantized_weights(name, folders, tmp_path):
    driver = Driver(loading.load(converted(folders(GRANITE), tmp_path / "out", quantize=name), ops=OPS))
    prompt = list(range(3, 3 + 2 * TILE + 9))
    whole, slot = driver.sequence(prompt), driver.slot()
    expected = driver.step([Chunk(whole, len(prompt), {1: slot})])[0]
    resumed = driver.resume(whole, TILE, slot, prompt)
    other = driver.sequence(list(range(90)))
    assert torch.equal(driver.step([Chunk(other, 90), Chunk(resumed, len(prompt) - TILE)])[1], expected[TILE:])


def test_what_is_quantized_and_what_is_not(folders, tmp_path):
    """Embedding and head in 8 bits only; no vector, no convolution, nothing that is computed in float32."""
    conversions = {name: convert.prepare(folders(JAMBA), quantize=name) for name in FORMATS}
    names = {name: {c.name for c in conversion.changes if c.stored} for name, conversion in conversions.items()}
    assert names["int8"] - names["int4"] == {"model.embed_tokens.weight", "lm_head.weight"}
    assert names["int4"] < names["int8"]
    assert not [n for n in names["int8"] if n.endswith(("A_log", "conv1d.weight", "bias", "norm.weight"))]
    experts = [c for c in convert.prepare(folders(GRANITE), quantize="int4").changes if len(c.shape) == 3 and c.stored]
    assert experts
    assert all(c.parts[1].shape == (*c.shape[:2], 1) for c in experts)


def test_rows_of_a_bfloat16_model_stay_bfloat16(folders, tmp_path):
    out = converted(folders(GRANITE, torch.bfloat16), tmp_path / "out", quantize="int8")
    assert loading.load(out, ops=OPS).cache_spec.hidden_dtype is torch.bfloat16
    assert loading.load(out, dtype="float32", ops=OPS).cache_spec.hidden_dtype is torch.float32


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(3, 1), (1, 128), (5, 129), (2, 3, 257), (33, 2048)])
def test_a_matrix_comes_back_within_half_a_step(name, shape):
    stored = FORMATS[name]
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    matrix.view(-1, shape[-1])[0] = 0.0
    parts = quantize(matrix, stored)
    assert [tuple(p.shape) for p in parts] == list(stored.shapes(shape))
    back = dequantize(parts, shape, stored, torch.float32)
    scale = parts[1][..., None] if name == "int8" else parts[1].repeat_interleave(128, -1)[..., : shape[-1]]
    assert ((back - matrix).abs() <= 0.5001 * scale).all()
    assert not back.view(-1, shape[-1])[0].any()
    assert torch.equal(dequantize(parts, shape, stored, torch.bfloat16), back.bfloat16())


def test_large_matrices_are_worked_on_in_blocks(monkeypatch):
    matrix = torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    whole = {name: quantize(matrix, stored) for name, stored in FORMATS.items()}
    monkeypatch.setattr("hybrid_cache.models.quantized.BLOCK", 1000)
    for name, stored in FORMATS.items():
        parts = quantize(matrix, stored)
        assert all(torch.equal(a, b) for a, b in zip(parts, whole[name], strict=True))


MATRIX = "model.layers.0.mamba.in_proj.weight"
DAMAGED = {
    "no scale": (lambda w: w.pop(f"{MATRIX}_scale"), f"missing weight: {MATRIX}_scale in F32"),
    "scale of another size": (
        lambda w: w.update({f"{MATRIX}_scale": torch.ones(3)}),
        rf"weight {MATRIX}_scale has shape \[3\], expected \[384\]",
    ),
    "scale that is not finite": (
        lambda w: w[f"{MATRIX}_scale"].fill_(torch.inf),
        f"weight {MATRIX}_scale contains values that are not finite",
    ),
    "codes of another size": (
        lambda w: w.update({MATRIX: w[MATRIX][:, :-1].contiguous()}),
        rf"weight {MATRIX} has shape \[384, 95\], expected \[384, 96\]",
    ),
    "codes of the other format": (
        lambda w: w.update({MATRIX: w[MATRIX].view(torch.uint8)}),
        f"weight {MATRIX} is U8, supported: F32, BF16, F16",
    ),
    "a scale of nothing": (
        lambda w: w.update({"model.norm.weight_scale": torch.ones(1)}),
        r"unexpected weights: model\.norm\.weight_scale",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_quantized_folders_are_refused(damage, message, folders, tmp_path):
    out = converted(folders(JAMBA), tmp_path / "out", quantize="int8")
    edit_weights(out, damage)
    with pytest.raises(ModelError, match=message):
        loading.load(out, ops=OPS)


def test_codes_without_a_word_in_the_config_are_refused(folders, tmp_path):
    out = converted(folders(JAMBA), tmp_path / "out", quantize="int8")
    checkpoints.edit_config(out, quantization_config=None)
    with pytest.raises(UnsupportedModel, match="is I8, supported: F32, BF16, F16"):
        loading.load(out, ops=OPS)


# Files


def test_what_a_server_needs_is_copied(source, tmp_path):
    out = converted(source, tmp_path / "out", dtype="bfloat16")
    names = {path.name for path in source.iterdir()} - {"modeling_jamba.py"}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_named_templates_are_copied(source, tmp_path):
    more = source / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("x")
    out = converted(source, tmp_path / "out", dtype="bfloat16")
    assert (out / more.name / "tool_use.jinja").read_text() == "x"


def test_weights_keep_the_names_that_the_source_has(source, tmp_path):
    path = source / "model.safetensors"
    weights = {f"language_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    out = converted(source, tmp_path / "out", dtype="bfloat16")
    assert weights_of(out).keys() == weights.keys()
    assert loading.load(out, ops=OPS).fingerprint


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int4"}], ids=str)
def test_shards_are_the_same_model_as_one_file(options, folders, tmp_path):
    one = converted(folders(JAMBA), tmp_path / "one", **options)
    many = converted(folders(JAMBA), tmp_path / "many", shard_bytes=150_000, **options)
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert loading.load(one, ops=OPS).fingerprint == loading.load(many, ops=OPS).fingerprint
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights_of(many).values())
    assert index["weight_map"].keys() == weights_of(one).keys()
    for name, file in index["weight_map"].items():
        with safe_open(many / file, framework="pt") as opened:
            assert name in opened.keys()  # noqa: SIM118  # not a dict


def test_a_sharded_source_is_read(references, folders, tmp_path):
    sharded = checkpoints.save(references(JAMBA), tmp_path / "sharded", max_shard_size="200KB")
    out = converted(sharded, tmp_path / "out")
    assert not (out / "model.safetensors.index.json").exists()
    assert loading.load(out, ops=OPS).fingerprint == loading.load(folders(JAMBA), ops=OPS).fingerprint


def test_weights_that_nobody_takes_are_left_out(source, tmp_path):
    edit_weights(source, lambda w: w.update({"model.layers.0.rotary_emb.inv_freq": torch.ones(4)}))
    conversion = convert.prepare(source)
    assert conversion.left_out == ("model.layers.0.rotary_emb.inv_freq",)
    convert.write(conversion, tmp_path / "out", shard_bytes=10**9)
    assert "model.layers.0.rotary_emb.inv_freq" not in weights_of(tmp_path / "out")


# What is refused, and what is left behind then: nothing


def spoil(folder):
    edit_weights(folder, lambda w: w["lm_head.weight"].__setitem__((3, 5), torch.nan))


REFUSED = {
    "activation": (lambda f: checkpoints.edit_config(f, hidden_act="relu"), "config.json: hidden_act is 'relu'"),
    "model_type": (lambda f: checkpoints.edit_config(f, model_type="gpt2"), "model_type 'gpt2' is not supported"),
    "pickles": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "only safetensors weights"),
    "missing weight": (lambda f: edit_weights(f, lambda w: w.pop("lm_head.weight")), "missing weight: lm_head.weight"),
    "unexpected weight": (lambda f: edit_weights(f, lambda w: w.update(x=torch.ones(1))), "unexpected weights: x"),
    "not a number": (spoil, "weight lm_head.weight contains values that are not finite"),
    "quantized before": (
        lambda f: checkpoints.edit_config(
            f, quantization_config={"quant_method": "hybrid-cache", "bits": 8, "group_size": None}
        ),
        "quantization_config is there, convert what it was made from",
    ),
    "quantized by others": (
        lambda f: checkpoints.edit_config(f, quantization_config={"quant_method": "awq"}),
        "quantization_config is there, convert what it was made from",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_a_source_that_cannot_be_served_is_refused_in_one_line(damage, message, source, tmp_path):
    damage(source)
    with pytest.raises(ModelError) as raised:
        converted(source, tmp_path / "out")
    assert str(raised.value).startswith(f"{source}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [source]


def test_a_missing_shard_is_refused(references, tmp_path):
    sharded = checkpoints.save(references(JAMBA), tmp_path / "sharded", max_shard_size="200KB")
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ModelError, match="is listed in"):
        converted(sharded, tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(28, "No space left on device")], ids=repr)
def test_what_breaks_off_leaves_nothing(error, source, tmp_path):
    def stop(change, _):
        if change.name == "lm_head.weight":
            raise error

    expected = ModelError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        convert.write(convert.prepare(source), tmp_path / "out", shard_bytes=100_000, done=stop)
    assert list(tmp_path.iterdir()) == [source]


def test_a_folder_that_is_there_is_never_touched(source, tmp_path):
    (tmp_path / "out").mkdir()
    for out in (source, tmp_path / "out"):
        before = sorted(out.iterdir())
        with pytest.raises(ModelError, match="is there already"):
            converted(source, out)
        assert sorted(out.iterdir()) == before
    with pytest.raises(ModelError, match="nowhere is not a folder"):
        converted(source, tmp_path / "nowhere" / "out")


def test_no_room_on_the_disk_is_seen_before(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ModelError, match="has room for 1"):
        converted(source, tmp_path / "out")


@pytest.mark.parametrize("options", [{"dtype": "int3"}, {"quantize": "int3"}], ids=str)
def test_unknown_options_are_refused(options, source):
    with pytest.raises(ConfigError, match="'int3' is not supported; supported: "):
        convert.prepare(source, **options)


# The command


def test_the_command_says_what_it_did(source, tmp_path):
    out = tmp_path / "out"
    line = ["model", "convert", str(source), str(out), "--dtype", "bfloat16", "--quantize", "int8", "--shard-size"]
    done = CliRunner().invoke(cli.app, [*line, "200KB"])
    assert done.exit_code == 0, done.output
    assert "model.layers.*.mamba.in_proj.weight" in done.stdout
    assert " MiB are now " in done.stdout
    assert Path(out / "model.safetensors.index.json").is_file()
    assert loading.load(out, ops=OPS).cache_spec.hidden_dtype is torch.bfloat16


def test_the_command_fails_in_one_line(source, tmp_path, capsys):
    for args, word in [
        ([str(source), str(source)], "is there already"),
        ([str(source), str(tmp_path / "out"), "--quantize", "int3"], "'int3'"),
        ([str(tmp_path / "none"), str(tmp_path / "out")], "not a local folder"),
    ]:
        with pytest.raises(SystemExit) as left:
            cli.main(["model", "convert", *args])
        lines = capsys.readouterr().err.strip().splitlines()
        assert left.value.code == 2
        assert len(lines) == 1
        assert word in lines[0]
