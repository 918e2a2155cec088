"""`cache verify`, `pack` and `unpack`: what another folder takes in is found there, and nothing that is damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hybrid_cache.api.cli.main import main
from hybrid_cache.cache.disk.index import NAME
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.storage import packs
from hybrid_cache.storage.folder import Folder
from tests.engine.test_disk_tier import CONVERSATION, NEXT_TURN, ask, end, flip, new_engine
from tests.fakes import tokens_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two conversations."""
    engine = new_engine(tmp_path / "disk")
    ask(engine, "first", CONVERSATION)
    ask(engine, "other", tokens_of(8, 200))
    end(engine)
    return tmp_path / "disk"


def state_of(folder: Path, num_tokens: int) -> str:
    """The name of the state after so many tokens."""
    with packs.opened(folder) as found:
        (name,) = {e.facts.name.hex() for e in found.index.all() if e.facts.label and e.facts.num_tokens == num_tokens}
    return name


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """-> status, stdout, stderr."""
    with pytest.raises(SystemExit) as left:
        main(["cache", *map(str, words)])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def test_a_prefix_goes_from_folder_to_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, file, other = state_of(folder, 10 * TILE), tmp_path / "prefix.pack", tmp_path / "other"
    status, out, _ = run(capsys, "pack", folder, name[:12], file, "--json")
    assert (status, json.loads(out)["tokens"]) == (0, 10 * TILE)
    for new in (True, False):
        status, out, _ = run(capsys, "unpack", file, other, "--json")
        assert status == 0
        assert (json.loads(out)["new"] > 0) is new
    engine = new_engine(other)
    assert ask(engine, "next", NEXT_TURN) == 10 * TILE
    assert ask(engine, "not in it", np.concatenate([tokens_of(8, 200), tokens_of(1, 9)])) == 0
    end(engine)


def test_a_running_server_takes_it_in(folder: Path, tmp_path: Path) -> None:
    clock = iter(np.arange(0, 1e6, 0.5))
    packs.pack(folder, state_of(folder, 10 * TILE), tmp_path / "prefix")
    engine = new_engine(tmp_path / "other")
    engine._disk._clock = lambda: float(next(clock))  # type: ignore[union-attr]
    packs.unpack(tmp_path / "prefix", tmp_path / "other", 1 << 24)
    ask(engine, "else", tokens_of(9, 20))
    assert engine.flush(30)
    assert ask(engine, "next", NEXT_TURN) == 10 * TILE
    end(engine)


def test_files_are_safetensors(folder: Path) -> None:
    for path in (folder / "entries").iterdir():
        with safe_open(path, "numpy") as file:
            assert file.metadata()["format"] == "hybrid-cache-1"
            (name,) = file.keys()
            assert file.get_tensor(name).dtype == np.uint8


def test_verify_counts_what_is_not_what_it_was(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "verify", folder, "--json")
    before = json.loads(out)
    assert (status, before["bad"]) == (0, {})
    flip(sorted((folder / "entries").iterdir())[-1], 8 * 3000)
    assert run(capsys, "verify", folder)[0] == 1
    status, out, _ = run(capsys, "verify", folder, "--drop", "--json")
    assert (status, json.loads(out)["bad"], json.loads(out)["dropped"]) == (1, {"checksum": 1}, 1)
    status, out, _ = run(capsys, "verify", folder, "--json")
    assert (status, json.loads(out)["num_entries"]) == (0, before["num_entries"] - 1)


@pytest.mark.parametrize("words", [("verify", "DIR"), ("pack", "DIR", "abcd", "FILE"), ("unpack", "FILE", "DIR")])
def test_what_is_not_there_is_said_in_a_line(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"DIR": tmp_path / "none", "FILE": tmp_path / "nothing"}
    status, out, err = run(capsys, *(places.get(word, word) for word in words))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_a_name_that_is_not_one_states_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("", "ffffffffffff"):
        assert "must be one" in run(capsys, "pack", folder, name, tmp_path / "x")[2]


def test_a_damaged_pack_leaves_the_folder_as_it_was(folder: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "prefix", tmp_path / "other"
    packs.pack(folder, state_of(folder, 10 * TILE), file)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    tensors, told = load_file(file), json.loads(metadata["entries"])
    wrong = [
        (tensors, metadata | {"format": "x"}),
        ({}, metadata),
        ({**tensors, "0": tensors["0"] ^ 1}, metadata),
        ({**tensors, "0": tensors["0"].view(np.int8)}, metadata),
        (tensors, metadata | {"entries": "[]"}),
        (tensors, metadata | {"entries": "no json"}),
        *((tensors, metadata | {"entries": json.dumps([told[0] | change, *told[1:]])}) for change in CHANGES),
    ]
    for number, (some, about) in enumerate(wrong):
        save_file(some, tmp_path / f"{number}", about)
        with pytest.raises(packs.ConfigError, match="pack of a cache"):
            packs.unpack(tmp_path / f"{number}", other, 1 << 24)
    assert not (other / NAME).exists()


CHANGES = [
    {"kind": "else"},
    {"name": "00"},
    {"name": "zz"},
    {"pages": "0011"},
    {"first": -1},
    {"value": "nan"},
    {"value": 1e400},
    {"num_tokens": 0},
    {"digest": "00" * 32},
]


def test_a_pack_that_lies_about_sizes_gives_no_wrong_token(folder: Path, tmp_path: Path) -> None:
    """Its checksums are right, and the sizes are none that this model has."""
    file = tmp_path / "prefix"
    packs.pack(folder, state_of(folder, 10 * TILE), file)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    told = json.loads(metadata["entries"])
    cut = {name: np.ascontiguousarray(data[:-64]) for name, data in load_file(file).items()}
    for number, each in enumerate(told):
        each["digest"] = packs.digest_of(cut[f"{number}"]).hex()
    save_file(cut, file, metadata | {"entries": json.dumps(told)})
    packs.unpack(file, tmp_path / "other", 1 << 24)
    engine = new_engine(tmp_path / "other")
    assert ask(engine, "next", NEXT_TURN) == 0
    end(engine)


def test_no_room_for_a_pack_is_said(folder: Path, tmp_path: Path) -> None:
    packs.pack(folder, state_of(folder, 10 * TILE), tmp_path / "prefix")
    with pytest.raises(packs.ConfigError, match="has no room"):
        packs.unpack(tmp_path / "prefix", tmp_path / "other", 1 << 18)


def test_a_copy_of_a_folder_is_as_good(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    Folder(tmp_path / "copy", 1 << 24).close()
    engine = new_engine(tmp_path / "copy")
    assert ask(engine, "next", NEXT_TURN) == 10 * TILE
    end(engine)
