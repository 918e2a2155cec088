"""`cache ls`, `show` and `drop` on a folder: the conversations that memory had, what a server finds after a drop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid_cache.cache.inventory import Inventory
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.storage.contents import Contents
from hybrid_cache.storage.packs import opened
from tests.engine.test_disk_tier import MODELS, ask, end, flip, new_engine
from tests.engine.test_engine import make_request
from tests.fakes import tokens_of
from tests.storage.test_packs import run

SYSTEM = tokens_of(1, 4 * TILE)
TALK = np.concatenate([SYSTEM, tokens_of(2, 3 * TILE + 5)])
LATER = np.concatenate([TALK, tokens_of(3, 2 * TILE + 7)])
OTHER = np.concatenate([SYSTEM, tokens_of(4, 2 * TILE + 9)])
ALONE = tokens_of(5, 200)
SHORT = tokens_of(6, 20)
RED = "0123456789abcdef:red"


def talk(engine: Engine) -> None:
    for number, tokens in enumerate((SYSTEM, TALK, LATER, OTHER, ALONE, SHORT)):
        ask(engine, f"{number}", tokens)


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    status, out, err = run(capsys, *words, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_has_the_conversations_of_memory(kind: str, tmp_path: Path) -> None:
    engine = new_engine(tmp_path, kind)
    talk(engine)
    assert engine.flush(30)
    inventory = Inventory(engine.cache, lambda namespace: True)
    with opened(tmp_path) as folder:
        contents = Contents(folder, lambda namespace: True)
        there = {each.end.entry.facts.name for each in contents.conversations()}
        assert there == {each.end.name for each in inventory.conversations()}
        for name in there:
            whole, known = contents.find(name.hex()), inventory.find(name.hex())
            assert whole is not None
            assert known is not None
            assert {s.name for s in known.states} <= {s.entry.facts.name for s in whole.states}
            assert not any(contents.why_not(file) for file in whole.files)
    end(engine)


def test_it_is_listed_shown_and_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = new_engine(tmp_path)
    talk(engine)
    assert engine.flush(30)
    listed = told(capsys, "ls", tmp_path)
    assert listed["total"] == 4
    later = next(each for each in listed["data"] if each["tokens"] == len(LATER))
    shown = told(capsys, "show", tmp_path, later["name"][:12])
    assert [each["wrong"] for each in shown["files"]] == [None] * len(shown["files"])
    assert shown["states"][-1]["tokens"] == shown["tokens"] == len(LATER)
    size = sum(path.stat().st_blocks * 512 for path in (tmp_path / "entries").iterdir())
    freed = told(capsys, "drop", tmp_path, later["name"])["freed_bytes"]
    assert freed == later["bytes"] > 0
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "entries").iterdir()) == size - freed
    assert told(capsys, "ls", tmp_path)["total"] == 3
    end(engine)
    engine = new_engine(tmp_path)
    assert ask(engine, "again", OTHER) == len(OTHER)
    assert ask(engine, "gone", LATER) == 4 * TILE, "what others need stays"
    end(engine)


def test_a_server_that_uses_the_folder_computes_what_was_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = new_engine(tmp_path)
    talk(engine)
    end(engine)
    engine = new_engine(tmp_path)
    assert told(capsys, "drop", tmp_path, "--all")["freed_bytes"] > 0
    assert ask(engine, "gone", LATER) == 0
    assert engine.stats().cache.disk.refused == {"gone": 1}  # type: ignore[union-attr]
    end(engine)


def test_names_and_salts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = new_engine(tmp_path)
    engine.submit(make_request("red", ALONE, 2, namespace=RED))
    engine.run_until_idle()
    ask(engine, "other", ALONE)
    end(engine)
    assert told(capsys, "ls", tmp_path)["total"] == 2
    (red,) = told(capsys, "ls", tmp_path, "--salt", "red")["data"]
    assert red["namespace"] == "0123456789abcdef:red"
    assert told(capsys, "ls", tmp_path, "--api-key", "somebody's")["total"] == 0


def test_a_wrong_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = new_engine(tmp_path)
    ask(engine, "one", ALONE)
    end(engine)
    (only,) = told(capsys, "ls", tmp_path)["data"]
    flip(next((tmp_path / "entries").iterdir()), -1)
    files = told(capsys, "show", tmp_path, only["name"])["files"]
    assert [each["wrong"] for each in files].count("checksum") == 1
    assert "wrong: checksum" in run(capsys, "show", tmp_path, only["name"])[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("ls", "{path}/nothing"), "is no folder of a disk tier"),
        (("show", "{path}", "ffff"), "no conversation in"),
        (("show", "{path}", "ffff", "more"), "3 arguments"),
        (("drop", "{path}"), "is no name of a conversation"),
        (("drop", "{path}", "abcd", "--all"), "either the name"),
        (("drop", "{path}", "ffff"), "no conversation in"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end(new_engine(tmp_path))
    status, out, err = run(capsys, *(word.format(path=tmp_path) for word in words))
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert said in err


def test_foreign_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"something else" * 1000)
    status, _, err = run(capsys, "ls", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot be used as an index" in err
