"""Folders that are broken on purpose, a file at a time: each is refused in one clear line, and fast."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli import model_info
from hybrid_cache.api.server.launch import LoadOptions, inexact_reasons, load
from hybrid_cache.api.text.defaults import load_defaults
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import ModelError
from hybrid_cache.models import adapters, loading
from tests.models import hostile
from tests.models.hostile import CONFIG, GENERATION, INDEX, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS

MAX_SECONDS = 3.0  # of processor time
PROGRAM = (sys.executable, "-c", "from hybrid_cache.api.cli.main import main; main()")
Change = Callable[[Path], None]


def fields(name: str, **changes: object) -> Change:
    return lambda folder: hostile.edit(folder / name, **changes)


def text(name: str, content: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_text(content)

    return change


def becomes(name: str, what: str) -> Change:
    return lambda folder: hostile.replace_file(folder / name, what)


def of_size(name: str, size: int) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return change


def step(part: str, kind: str, **settings: object) -> Change:
    """A part of the tokenizer that is three times the same step."""
    inside = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[part]
    return fields(TOKENIZER, **{part: {"type": "Sequence", inside: [{"type": kind, **settings}] * 3}})


def model_field(**changes: object) -> Change:
    def change(folder: Path) -> None:
        values = hostile.read(folder / TOKENIZER)
        hostile.write(folder / TOKENIZER, values | {"model": values["model"] | changes})  # type: ignore[operator]

    return change


def added_token(content: str) -> Change:
    def change(folder: Path) -> None:
        values = hostile.read(folder / TOKENIZER)
        tokens = values["added_tokens"]
        assert isinstance(tokens, list)
        new = {**tokens[0], "id": 4095, "content": content}
        hostile.write(folder / TOKENIZER, values | {"added_tokens": [*tokens, new]})

    return change


def indexed(weight_map: object) -> Change:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        hostile.write(folder / INDEX, {"weight_map": weight_map})

    return change


def weight(name: str, value: float) -> Change:
    """One number of one tensor."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        tensors[name] = tensors[name].to(torch.float32)
        tensors[name].view(-1)[3] = value
        save_file(tensors, folder / WEIGHTS)

    return change


def converted(name: str, what: str) -> Change:
    def change(folder: Path) -> None:
        (folder / TOKENIZER).unlink()
        hostile.replace_file(folder / name, what)

    return change


E = {"pattern": {"String": "e"}, "content": "e" * 1000}
FOLDERS: dict[str, tuple[Change, str]] = {
    "config nested": (text(CONFIG, "[" * 100_000), "config.json cannot be read: it is nested too deeply"),
    "config nested inside": (text(CONFIG, '{"a":' * 100_000), "nested too deeply"),
    "config a FIFO": (becomes(CONFIG, "fifo"), "config.json is not a regular file"),
    "config a device": (becomes(CONFIG, "/dev/zero"), "config.json is not a regular file"),
    "config a link to itself": (becomes(CONFIG, CONFIG), "config.json cannot be read"),
    "config too large": (of_size(CONFIG, 1 << 40), "config.json has 1099511627776 bytes, at most 4194304"),
    "a number of 401 digits": (fields(CONFIG, hidden_size=10**400), "a number has 401 digits, at most 40"),
    "NaN": (fields(CONFIG, rms_norm_eps=float("nan")), "NaN is not a finite number"),
    "1e999": (fields(CONFIG, rms_norm_eps=hostile.TOO_LARGE), "1e999 is not a finite number"),
    "a surrogate": (fields(CONFIG, model_type=hostile.SURROGATE), "surrogates not allowed"),
    "infinity": (fields(CONFIG, logits_scaling=float("inf")), "logits_scaling is inf, expected a number between"),
    "layers": (fields(CONFIG, num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected at most 1024"),
    "context": (
        fields(CONFIG, max_position_embeddings=2**63),
        "max_position_embeddings is 9223372036854775808, expected at most 2147483647",
    ),
    "vocabulary": (fields(CONFIG, vocab_size=10**12), "vocab_size is 1000000000000, expected at most 16777216"),
    "width": (fields(CONFIG, hidden_size=10**30), "hidden_size is 10000000000"),
    "width beside weights": (fields(CONFIG, hidden_size=2**20, mamba_expand=2**20), "do not make 1099511627776"),
    "divided by zero": (fields(CONFIG, logits_scaling=0), "computes values that are not finite"),
    "index nested": (lambda f: (indexed({})(f), text(INDEX, "[" * 100_000)(f))[0], "nested too deeply"),
    "index empty": (indexed({}), "is not a weight index: weight_map is {}"),
    "index of numbers": (indexed({"a": 1, "b": "c"}), "names 1, expected a safetensors file"),
    "index that leaves the folder": (indexed({"a": "../x.safetensors"}), "names '../x.safetensors'"),
    "index to a FIFO": (
        lambda f: (indexed({"a": "x.safetensors"})(f), becomes("x.safetensors", "fifo")(f))[0],
        "shard x.safetensors is listed",
    ),
    "weights a FIFO": (becomes(WEIGHTS, "fifo"), "neither model.safetensors nor"),
    "a weight that is not a number": (weight("model.layers.1.self_attn.q_proj.weight", float("nan")), "not finite"),
    "a weight too large for its type": (weight("model.layers.1.self_attn.q_proj.weight", 3.4e38), "not finite"),
    "weights that overflow": (weight("model.layers.0.mamba.A_log", 1e30), "computes values that are not finite"),
    "a tokenizer that explodes": (step("normalizer", "Replace", **E), "normalizer makes up to 1000000000 characters"),
    "by expressions": (step("normalizer", "Replace", pattern={"Regex": "e"}, content="e" * 9), "up to 1000 characters"),
    "by prefixes": (step("normalizer", "Prepend", prepend="e" * 99), "makes up to 1000000 characters"),
    "by bytes": (
        fields(TOKENIZER, pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 40}),
        "pre_tokenizer makes up to",
    ),
    "by a decoder": (step("decoder", "Replace", **E), "decoder makes up to 1000000000 characters"),
    "by a table": (
        step("normalizer", "Precompiled", precompiled_charsmap="AAAAAA" + "QUFB" * 100 + "QQ=="),
        "normalizer makes up to",
    ),
    "an empty pattern": (step("normalizer", "Replace", pattern={"String": ""}, content="e"), "an empty pattern"),
    "a pattern that finds nothing": (
        fields(TOKENIZER, normalizer={"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}),
        "cannot read a short text",
    ),
    "a long prefix": (model_field(continuing_subword_prefix="x" * 10**6), "continuing_subword_prefix has 1000000"),
    "a long token": (added_token("x" * 10**6), "a token has 1000000 characters, at most 4096"),
    "tokens by chance": (model_field(dropout=0.5), "dropout is 0.5"),
    "token ids": (model_field(vocab={"a": 2**31}, merges=[]), "config.json: vocab_size is 4096"),
    "tokenizer nested": (text(TOKENIZER, "[" * 100_000), "tokenizer.json cannot be read: it is nested too deeply"),
    "tokenizer a FIFO": (becomes(TOKENIZER, "fifo"), "tokenizer.json is not a regular file"),
    "tokenizer too large": (of_size(TOKENIZER, 1 << 40), "tokenizer.json has 1099511627776 bytes, at most 67108864"),
    "tokenizer settings a FIFO": (becomes(TOKENIZER_CONFIG, "fifo"), "tokenizer_config.json is not a regular file"),
    "tokenizer.model a FIFO": (converted("tokenizer.model", "fifo"), "tokenizer.model is not a file of at most"),
    "vocab.json a device": (converted("vocab.json", "/dev/zero"), "vocab.json is not a file of at most"),
    "template a FIFO": (becomes(TEMPLATE, "fifo"), "chat_template.jinja is not a regular file"),
    "template too large": (of_size(TEMPLATE, 1 << 21), "chat_template.jinja has 2097152 bytes, at most 1048576"),
    "template in the settings": (
        fields(TOKENIZER_CONFIG, chat_template=[{"name": "tool_use", "template": "x" * (1 << 21)}]),
        "chat template 'tool_use' has 2097152 characters",
    ),
}
GENERATION_VALUES = {
    "temperature": [(-5, "temperature is -5.0, must be in [0.0, 100.0]"), (float("inf"), "inf"), ("hot", "'hot'")],
    "top_p": [(0, "top_p is 0.0, must be in (0.0, 1.0]"), (1.1, "1.1"), (float("nan"), "NaN")],
    "top_k": [(hostile.TOO_LARGE, "1e999"), (2**31, "2147483648"), (1.5, "must be a whole number"), (-2, "-2")],
    "min_p": [(2, "min_p is 2.0")],
    "repetition_penalty": [(0, "repetition_penalty is 0.0, must be in (0.0, 100.0]")],
    "max_new_tokens": [(0, "max_new_tokens is 0"), (2**63, "[1, 2147483647]")],
    "max_length": [(-1, "max_length is -1")],
    "min_new_tokens": [(65, "min_new_tokens is 65, must be in [0, 64]")],
    "stop_strings": [("", "a stop string has 0 characters"), (["x"] * 17, "17 stop strings"), (5, "must be a string")],
    "eos_token_id": [("x", "eos_token_id is 'x'"), ([1] * 257, "at most 256 tokens"), ([[1]], "must be a token")],
}
FOLDERS |= {
    f"{name} {value if len(str(value)) < 20 else 'long'}": (fields(GENERATION, **{name: value}), words)
    for name, values in GENERATION_VALUES.items()
    for value, words in values
}
ADAPTERS: dict[str, tuple[Change, str]] = {
    "NaN": (fields(adapters.CONFIG, lora_alpha=float("nan")), "NaN is not a finite number"),
    "infinity": (
        fields(adapters.CONFIG, lora_alpha=float("inf")),
        "lora_alpha is inf, must be a number in (0, 1048576]",
    ),
    "1e38": (fields(adapters.CONFIG, lora_alpha=1e38), "lora_alpha is 1e+38, must be"),
    "401 digits": (fields(adapters.CONFIG, lora_alpha=10**400), "a number has 401 digits"),
    "negative": (fields(adapters.CONFIG, lora_alpha=-1), "lora_alpha is -1, must be"),
    "true": (fields(adapters.CONFIG, lora_alpha=True), "lora_alpha is True, must be"),
    "rank 0": (fields(adapters.CONFIG, r=0), "r is 0, must be"),
    "a large rank": (fields(adapters.CONFIG, r=10**9), "r is 1000000000, must be"),
    "nested": (text(adapters.CONFIG, "[" * 100_000), "nested too deeply"),
    "a FIFO": (becomes(adapters.CONFIG, "fifo"), "adapter_config.json is not a regular file"),
    "weights a FIFO": (becomes(adapters.WEIGHTS, "fifo"), "adapter_model.safetensors cannot be read"),
    "weights a device": (becomes(adapters.WEIGHTS, "/dev/zero"), "adapter_model.safetensors cannot be read"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return hostile.copy_of_the_embedded(tmp_path / "model")


def start(folder: Path | None, adapter: Path | None = None) -> None:
    """What `serve` does before it listens."""
    loaded = load(LoadOptions(None if folder is None else str(folder), adapter=str(adapter) if adapter else None))
    TextModel.load(loaded.path)
    inexact_reasons(loaded)


def refusal(folder: Path | None, adapter: Path | None = None) -> str:
    began = time.process_time()
    with pytest.raises(ModelError) as error:
        start(folder, adapter)
    assert time.process_time() - began < MAX_SECONDS
    return str(error.value)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_refused_by_name(name: str, folder: Path) -> None:
    change, words = FOLDERS[name]
    change(folder)
    said = refusal(folder)
    assert words in said
    assert str(folder) in said or "finite from" in said
    assert "\n" not in said
    assert len(said) < 1000


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_hostile_adapter_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, words = ADAPTERS[name]
    change(hostile.shipped_adapter(tmp_path / "adapter"))
    said = refusal(None, tmp_path / "adapter")
    assert words in said
    assert str(tmp_path) in said


def test_an_adapter_whose_merged_weights_overflow_is_refused(tmp_path: Path) -> None:
    adapter = hostile.shipped_adapter(tmp_path / "adapter")
    tensors = {name: tensor * 1e22 for name, tensor in load_file(adapter / adapters.WEIGHTS).items()}
    save_file(tensors, adapter / adapters.WEIGHTS)
    assert "with adapter adapter, weight" in (said := refusal(None, adapter))
    assert "not finite" in said


def test_links_to_regular_files_are_fine(folder: Path, tmp_path: Path) -> None:
    """So a hub's cache is made."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION, TEMPLATE):
        (folder / name).rename(blobs / name)
        (folder / name).symlink_to(blobs / name)
    start(folder)


def test_fields_that_are_not_honoured_are_named(folder: Path) -> None:
    asked = {"num_beams": 4, "typical_p": 0.9, "no_repeat_ngram_size": 3, "bad_words_ids": [[3]], "new\x1b[2J": 1}
    neutral = {"length_penalty": 1.0, "guidance_scale": None, "early_stopping": False, "suppress_tokens": []}
    bookkeeping = {"_from_model_config": True, "transformers_version": "5.0", "use_cache": True}
    hostile.edit(folder / GENERATION, **asked, **neutral, **bookkeeping)
    ignored = load_defaults(folder).ignored
    assert {field.split("=")[0] for field in ignored} == {*list(asked)[:4], r"'new\x1b[2J'"}
    assert "num_beams=4" in ignored
    report = model_info.examine(folder, 1 << 30)
    assert report.ignored == ignored
    assert "do_sample=False" in report.honoured
    assert "max_new_tokens=64" in report.honoured


def run(*command: str, seconds: float = 60) -> "subprocess.CompletedProcess[str]":
    """A command of ours in 8 GiB of address space."""
    bounded = ("sh", "-c", f'ulimit -v {8 << 20} && exec "$@"', "sh")  # a fork of a large process may find no memory
    return subprocess.run(
        [*bounded, *PROGRAM, *command],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=os.environ | {"RUST_BACKTRACE": "0"},
    )


COMMANDS = [
    ("layers", ("model", "info")),
    ("config a device", ("serve", "--port", "0")),
    ("config nested", ("model", "info")),
    ("a tokenizer that explodes", ("serve", "--port", "0")),
    ("temperature -5", ("model", "info")),
]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_a_command_says_one_line(
    name: str, command: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = FOLDERS[name]
    change(folder)
    with pytest.raises(SystemExit) as end:
        cli.main([*command, str(folder)])
    assert end.value.code == 2
    assert said_once(words, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "command"),
    [("layers", ("serve", "--port", "0")), *(pytest.param(*case, marks=pytest.mark.slow) for case in COMMANDS)],
)
def test_a_process_ends_with_2_in_little_memory(name: str, command: tuple[str, ...], folder: Path) -> None:
    change, words = FOLDERS[name]
    change(folder)
    done = run(*command, str(folder))
    assert done.returncode == 2
    assert said_once(words, done.stderr)
    assert not done.stdout


def said_once(words: str, stderr: str) -> bool:
    return words in stderr and len(stderr.strip().splitlines()) == 1 and "Traceback" not in stderr


def test_a_name_in_a_file_writes_nothing_to_the_terminal_but_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / WEIGHTS).unlink()
    tensors = load_file(loading.embedded_path() / WEIGHTS)
    save_file(tensors | {"model\x1b[2J\x07": torch.zeros(3)}, folder / WEIGHTS)
    with pytest.raises(SystemExit):
        cli.main(["serve", "--port", "0", str(folder)])
    said = capsys.readouterr().err
    assert "unexpected weights: model\ufffd[2J\ufffd" in said
