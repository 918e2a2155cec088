"""Which file a path means, its parts, its fingerprint, and files that are not what they should be."""

import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable

import gguf
import pytest
import torch
from gguf import GGUFReader
from typer.testing import CliRunner

from hybrid_cache.api.cli import early
from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli.model_info import examine
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import deltas, loading
from hybrid_cache.models.folders import find_gguf
from hybrid_cache.models.gguf import header
from hybrid_cache.models.gguf.file import GgufFile, read_model, title_of
from hybrid_cache.models.tools import convert
from tests.models.driver import Driver
from tests.models.gguf.conftest import VOCABULARY
from tests.models.gguf.writer import add_tensor, add_value, write

TOKENS = [5, 6, 7, 290, 11, 12]


def logits(path, **options) -> torch.Tensor:
    driver = Driver(loading.load(path, ops=dispatch.select(), **options))
    return driver.logits(driver.prefill(TOKENS)[1])


def matrices_in(kind: str) -> Callable[[str, torch.Tensor], str]:
    def kind_of(name: str, tensor: torch.Tensor) -> str:
        return kind if tensor.dim() == 2 and not name.startswith("blk.0.ssm_") else "F32"

    return kind_of


def split(file, folder, num_parts: int, **more: object):
    """A file in parts, as llama.cpp's gguf-split makes them -> the parts' paths."""
    reader = GGUFReader(file)
    parts = [folder / f"big-{i + 1:05}-of-{num_parts:05}.gguf" for i in range(num_parts)]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "granitehybrid")
        for name, field in reader.fields.items() if number == 0 else ():
            if not name.startswith(("GGUF.", "general.architecture")):
                add_value(writer, name, field.contents())
        for name, value in (("no", number), ("count", num_parts), ("tensors.count", len(reader.tensors))):
            add_value(writer, f"split.{name}", value)
        for tensor in reader.tensors[number::num_parts]:
            add_tensor(writer, tensor.name, torch.from_numpy(tensor.data.copy()), "F32")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def test_the_header_is_what_the_package_reads(small):
    found, expected = header.read_header(small), GGUFReader(small)
    assert {n: v for n, v in found.values.items()} == {
        name: field.contents() for name, field in expected.fields.items() if not name.startswith("GGUF.")
    }
    assert {n: (i.shape, i.kind, i.start) for n, i in found.tensors.items()} == {
        t.name: (tuple(map(int, reversed(t.shape))), int(t.tensor_type), int(t.data_offset)) for t in expected.tensors
    }


def test_any_part_of_a_file_in_parts_means_all_of_them(small, tmp_path):
    parts = split(small, tmp_path, 3)
    for part in (parts[0], parts[2], tmp_path):
        assert torch.equal(logits(part), logits(small))
    assert title_of(parts[1]) == "big"


def test_a_part_that_is_not_there_is_named(small, tmp_path):
    parts = split(small, tmp_path, 3)
    parts[1].unlink()
    with pytest.raises(ModelError, match=r"these are not there: big-00002-of-00003\.gguf"):
        loading.load_config(parts[2])


def test_a_folder_means_the_one_file_in_it(small, tmp_path):
    shutil.copyfile(small, tmp_path / "one.gguf")
    assert find_gguf(tmp_path) == tmp_path / "one.gguf"
    assert torch.equal(logits(tmp_path), logits(small))


def test_a_folder_with_several_files_names_them(small, tmp_path):
    for name in ("one", "two"):
        shutil.copyfile(small, tmp_path / f"{name}.gguf")
    with pytest.raises(ModelError, match=r"several GGUF files, name one of them: one\.gguf, two\.gguf"):
        loading.load_config(tmp_path)


def test_a_folder_with_safetensors_weights_is_that_model(small, checkpoint, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(checkpoint, folder)
    shutil.copyfile(small, folder / "one.gguf")
    assert find_gguf(folder) is None


def test_so_is_a_folder_with_numbered_safetensors_and_no_index(small, checkpoint, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    shutil.copyfile(small, folder / "one.gguf")
    assert find_gguf(folder) is None
    assert torch.equal(logits(folder), logits(checkpoint))


def test_a_file_of_a_vision_tower_beside_it_is_left_out(small, tmp_path):
    shutil.copyfile(small, tmp_path / "one.gguf")
    shutil.copyfile(small, tmp_path / "mmproj-one.gguf")
    assert find_gguf(tmp_path) == tmp_path / "one.gguf"


def test_a_folder_of_a_file_is_known_by_it_whatever_else_it_has(small, tmp_path):
    """What is checked before torch is imported agrees with what is loaded then."""
    folder = tmp_path / "sp ace \u00fc"
    folder.mkdir()
    (folder / "m\u00f6del.gguf").symlink_to(small)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    assert early.find_model(str(folder)) == folder
    assert early.find_config(str(folder)) == str(folder)
    assert examine(str(folder), 1 << 30).supported
    assert torch.equal(logits(folder), logits(small))
    assert convert.prepare(folder).config["model_type"] == "granitemoehybrid"
    folder.joinpath("config.json").unlink()
    assert CliRunner().invoke(cli.app, ["model", "info", str(folder)]).exit_code == 0


def test_a_delta_may_have_a_folder_of_a_file_as_its_base(small, tmp_path):
    base, changed = tmp_path / "base", tmp_path / "changed"
    base.mkdir()
    shutil.copyfile(small, base / "one.gguf")
    name = "model.norm.weight"
    deltas.save(changed, base, {name: GgufFile(small).get_tensor(name) * 2})
    first, second = (loading.load(path, ops=dispatch.select()) for path in (base, changed))
    assert first.fingerprint != second.fingerprint
    assert first.chain[-1] == second.chain[-1]
    assert first.cache_spec.hidden_dtype == second.cache_spec.hidden_dtype
    assert TextModel.load(changed).tokenizer.as_json() == TextModel.load(base).tokenizer.as_json()
    assert convert.prepare(changed).changes


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"none\.gguf is not a local file"):
        loading.resolve(str(tmp_path / "none.gguf"))


def test_the_fingerprint_changes_with_a_bit_of_a_weight(small, tmp_path):
    info = read_model(small).tensors["blk.1.attn_v.weight"]
    changed = tmp_path / "changed.gguf"
    data = bytearray(small.read_bytes())
    data[info.start] ^= 1
    changed.write_bytes(data)
    load = loading.load
    same = tmp_path / "same.gguf"
    shutil.copyfile(small, same)
    prints = [load(path, ops=dispatch.select()).fingerprint for path in (small, same, changed)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q5_1"])
def test_a_converted_file_is_a_folder_with_the_same_logits(checkpoint, tmp_path, kind):
    file = write(checkpoint, tmp_path / "model.gguf", kinds=matrices_in(kind), **VOCABULARY)
    out = tmp_path / "folder"
    convert.write(convert.prepare(file), out, shard_bytes=1 << 30)
    assert torch.equal(logits(out), logits(file, weights="bf16"))
    assert loading.load_config(out)["dtype"] == ("bfloat16" if kind.startswith("Q") else kind.replace("F", "float"))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q8_0", 8), ("Q5_1", None)])
def test_blocks_that_are_whole_numbers_are_multiplied_as_they_are(checkpoint, tmp_path, caplog, kind, bits):
    file = write(checkpoint, tmp_path / "model.gguf", kinds=matrices_in(kind))
    with caplog.at_level("INFO", logger="hybrid_cache"):
        found = logits(file, dtype="bfloat16")
    assert ("matrices are multiplied as they are stored" in caplog.text) == (bits is not None)
    exact, rounded = logits(file, dtype="float32"), logits(file, dtype="bfloat16", weights="bf16")
    assert (found - exact).norm() <= 0.03 * exact.norm()
    assert torch.equal(found, rounded) == (bits is None)
    if bits == 8:  # in four bits they are rounded once more
        assert not torch.equal(logits(file, dtype="bfloat16", weights="int4"), found)


def test_weights_are_decoded_one_by_one(checkpoint, tmp_path, monkeypatch):
    """What is decoded at a time is one weight of the model, not the file."""
    file = write(checkpoint, tmp_path / "model.gguf", kinds=matrices_in("Q8_0"))
    sizes = []
    decode = gguf.quants.dequantize

    def noted(data, kind):
        decoded = decode(data, kind)
        sizes.append(decoded.size)
        return decoded

    monkeypatch.setattr(gguf.quants, "dequantize", noted)
    loading.load(file, ops=dispatch.select())
    largest = max(t.n_elements for t in GGUFReader(file).tensors)
    assert max(sizes) == largest < sum(sizes) / 3


def test_values_that_are_not_finite_are_named(checkpoint, tmp_path):
    file = write(checkpoint, tmp_path / "model.gguf", kinds=lambda name, t: "Q8_0" if "attn_v" in name else "F32")
    data = bytearray(file.read_bytes())
    start = read_model(file).tensors["blk.1.attn_v.weight"].start
    data[start : start + 2] = b"\x00\x7e"  # the first scale
    file.write_bytes(data)
    with pytest.raises(
        ModelError, match=r"weight model\.layers\.1\.self_attn\.v_proj\.weight contains values that are"
    ):
        loading.load(file, ops=dispatch.select())


def test_tensors_that_no_layer_takes_are_named(checkpoint, tmp_path):
    file = write(checkpoint, tmp_path / "model.gguf", more={"blk.0.attn_sinks.weight": torch.ones(4)})
    with pytest.raises(ModelError, match=r"unexpected weights: blk\.0\.attn_sinks\.weight"):
        loading.load(file, ops=dispatch.select())


def test_layers_that_predict_more_tokens_are_left_out(checkpoint, tmp_path):
    """As the converter writes them: behind all others, and counted among them."""
    file = write(checkpoint, tmp_path / "model.gguf")
    counted = write(
        checkpoint,
        tmp_path / "counted.gguf",
        more={"blk.2.nextn.eh_proj.weight": torch.ones(32, 64), "blk.2.attn_norm.weight": torch.ones(32)},
        granitehybrid__block_count=3,
        granitehybrid__nextn_predict_layers=1,
    )
    assert torch.equal(logits(counted), logits(file))


def test_an_architecture_that_is_not_ours_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "rwkv7")
    add_tensor(writer, "token_embd.weight", torch.ones(4, 32), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"general\.architecture is 'rwkv7', supported in GGUF files: falcon-h1"):
        loading.load_config(tmp_path / "model.gguf")


def cut(data: bytes, number: int) -> bytes:
    return data[: number * len(data) // 16]


def counts(**fields: int) -> bytes:
    values = {"version": 3, "tensors": 0, "values": 0} | fields
    return b"GGUF" + struct.pack("<IQQ", *values.values())


ADAPTER = (b"general.architecture", b"llama", b"general.type", b"adapter")
BROKEN = {
    "empty": (b"", "cannot be read"),
    "not GGUF": (b"GGML" + bytes(64), "does not begin with GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version is 50331648"),
    "version 1": (counts(version=1), "GGUF version is 1, supported: 2, 3"),
    "many tensors": (counts(tensors=1 << 60), f"has {1 << 60} tensors, at most"),
    "many values": (counts(values=1 << 60), f"has {1 << 60} values, at most"),
    "long name": (counts(values=1) + struct.pack("<Q", 1 << 40), f"has {1 << 40} bytes, at most"),
    "long array": (
        counts(values=1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 1 << 22),
        r"is cut: it ends at byte \d+, inside 'a'",
    ),
    "very long array": (counts(values=1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 1 << 62), "items in a, at most"),
    "array of arrays": (counts(values=1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1), "is an array of type 9"),
    "unknown type": (counts(values=1) + struct.pack("<Q1sI", 1, b"a", 77), "a has type 77"),
    "large tensor": (
        counts(tensors=1) + struct.pack("<Q1sIQQIQ", 1, b"t", 2, 1 << 62, 1 << 62, 0, 0),
        "tensor 't' has shape",
    ),
    "many dimensions": (counts(tensors=1) + struct.pack("<Q1sI", 1, b"t", 9), "has 9 dimensions, expected 1 to 4"),
    "tensor outside": (
        counts(tensors=1) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 32, 0, 1 << 50),
        r"is cut: it ends at byte \d+, inside tensor t",
    ),
    "tensor of an unknown type": (
        counts(tensors=1) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 32, 999, 0),
        "tensors of type 999 are unknown",
    ),
    "name of two lines": (counts(values=1) + struct.pack("<Q3s", 3, b"a\nb"), r"a name is 'a\\nb', expected printable"),
    "an adapter": (
        counts(values=2)
        + b"".join(
            struct.pack("<Q", len(s)) + s + (b"\x08\0\0\0" if i % 2 == 0 else b"") for i, s in enumerate(ADAPTER)
        ),
        "general.type is 'adapter', expected a model",
    ),
    "nothing inside": (counts(), "general.architecture is missing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_clear_error(tmp_path, name):
    data, words = BROKEN[name]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=words) as caught:
        loading.load_config(path)
    assert "\n" not in str(caught.value)
    assert "broken.gguf" in str(caught.value)


@pytest.mark.parametrize("number", range(1, 16))
def test_a_cut_file_is_one_clear_error(small, tmp_path, number):
    path = tmp_path / "cut.gguf"
    path.write_bytes(cut(small.read_bytes(), number))
    with pytest.raises(ModelError, match="is cut"):
        loading.load_config(path)


def test_a_file_that_ends_inside_its_last_tensor_is_cut(small, tmp_path):
    last = max(info.start for info in read_model(small).tensors.values())
    path = tmp_path / "cut.gguf"
    path.write_bytes(small.read_bytes()[: last + 4])
    with pytest.raises(ModelError, match=f"is cut: it ends at byte {last + 4}, inside tensor"):
        loading.load_config(path)


@pytest.mark.parametrize("seed", range(40))
def test_a_file_with_wrong_bytes_loads_or_is_one_clear_error(small, tmp_path, seed):
    """A few bytes of the header, at random; sizes among them, which must not be believed."""
    chance = random.Random(seed)
    data = bytearray(small.read_bytes())
    end = min(info.start for info in read_model(small).tensors.values())
    tail = data.index(b"blk.0.", 0, end)
    for _ in range(chance.choice((1, 2, 8))):
        place = chance.randrange(4, 1500) if chance.random() < 0.5 else chance.randrange(tail, end)
        data[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    path = tmp_path / "wrong.gguf"
    path.write_bytes(data)
    error = None
    try:
        loading.load(path, ops=dispatch.select())
    except ModelError as e:
        error = e
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "block_count",
        "embedding_length",
        "attention.head_count",
        "ssm.time_step_rank",
        "ssm.inner_size",
        "context_length",
    ],
)
@pytest.mark.parametrize("value", [0, 1, 7, 0xFFFFFFFF, "many", [1, 2], 0.5])
def test_a_size_that_is_wrong_is_one_clear_error(checkpoint, tmp_path, name, value):
    file = write(checkpoint, tmp_path / "model.gguf", **{f"granitehybrid__{name.replace('.', '__')}": value})
    if (name, value) in (("context_length", 1), ("context_length", 7)):
        assert loading.describe(loading.load_config(file)).max_length == value
        return
    with pytest.raises(ModelError) as caught:
        loading.load(file, ops=dispatch.select())
    assert "\n" not in str(caught.value)


def test_without_the_package_the_error_says_what_to_install(small):
    program = (
        "import sys; sys.modules['gguf'] = None\n"
        "from hybrid_cache.errors import ModelError\nfrom hybrid_cache.models import loading\n"
        f"try: loading.load_config({str(small)!r})\nexcept ModelError as e: print(e)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "GGUF files are read with the package gguf: pip install gguf" in said
