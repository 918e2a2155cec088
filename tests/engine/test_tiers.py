"""Memory, host memory and a disk side by side; a disk that is slow, full, read-only or taken away."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_cache.cache.disk.loading import Loading
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.census import census
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.loading import embedded_path, load
from hybrid_cache.request import PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.storage.folder import Folder
from hybrid_cache.tokens import Prompt
from tests.engine.test_disk_tier import (
    CONVERSATION,
    FLUSH_S,
    MODELS,
    NEXT_TURN,
    Gate,
    ask,
    bytes_in,
    end,
    folder,
    new_engine,
)
from tests.engine.test_engine import answers, make_request
from tests.engine.test_host_tier import room_for
from tests.fakes import sum_model_answer, tokens_of

__all__ = ["folder"]
HOST_BYTES, DISK_BYTES = 96 << 10, 3 << 19


def all_tiers(path: Path, kind: str = "hybrid", **config: object) -> Engine:
    budget_bytes = room_for(MODELS[kind](), 6, 24)
    return new_engine(path, kind, budget_bytes=budget_bytes, host_bytes=HOST_BYTES, disk_bytes=DISK_BYTES, **config)


def check(engine: Engine, path: Path) -> None:
    """Books, memory, and the budget of each tier."""
    engine.check()
    stats = engine.stats().cache
    assert stats.budget_bytes - stats.free_bytes <= engine.cache.budget_bytes
    assert stats.host_bytes <= HOST_BYTES
    assert bytes_in(path) <= DISK_BYTES


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 700), st.integers(0, 9)), min_size=1, max_size=25),
    st.sampled_from([*MODELS]),
)
def test_no_tier_exceeds_its_budget_and_all_answers_are_right(asked: list[tuple[int, int, int]], kind: str) -> None:
    with TemporaryDirectory() as place:
        path = Path(place)
        engine = all_tiers(path, kind)
        for number, (text, length, after) in enumerate(asked):
            ask(engine, str(number), tokens_of(text, length), 2)
            check(engine, path)
            if after == 1:
                engine.cache.drop()
            if after == 2:
                engine.submit(make_request("left", tokens_of(text, length), 2))
                engine.step()
                engine.abort("left")
            if after == 0:
                end(engine)
                engine = all_tiers(path, kind)
        end(engine)


@pytest.mark.parametrize("kind", MODELS)
def test_what_had_to_leave_comes_back_from_either_tier(kind: str, tmp_path: Path) -> None:
    engine, texts = all_tiers(tmp_path, kind, policy="lru"), [tokens_of(i, 6 * TILE + 5) for i in range(16)]
    for i, tokens in enumerate(texts):
        ask(engine, f"first {i}", tokens)
        assert engine.flush(FLUSH_S)
    before = engine.stats().cache
    assert before.host_stores > 0
    found = [ask(engine, f"{i}", np.concatenate([tokens, tokens_of(60, 9)])) for i, tokens in enumerate(texts)]
    assert found == [6 * TILE] * 16
    stats = engine.stats().cache
    assert stats.disk is not None
    assert stats.host_loads + stats.disk.loads.get("loaded", 0) > 0
    late = np.concatenate([texts[-1], tokens_of(61, 9)])
    engine.close(0.0)
    engine = all_tiers(tmp_path, kind, policy="lru")
    assert ask(engine, "late", late) == 6 * TILE
    check(engine, tmp_path)
    end(engine)


def test_of_a_real_model_the_bits_are_those_of_a_run_without_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tenth of the texts finds its beginning in host memory or on the disk, also where computing is faster."""
    monkeypatch.setattr(Loading, "seconds", lambda *_: 0.0)
    monkeypatch.setattr("hybrid_cache.cache.disk.loading.LEAST_PATIENCE_S", 600.0)
    model = load(embedded_path(), dtype="bfloat16", ops=select("auto"))
    sizes = {"host_bytes": 3 << 20, "disk": tmp_path, "disk_bytes": 64 << 20}
    warm = Engine(model, EngineConfig(5 << 20, verify=True, policy="lru", **sizes))
    cold = Engine(model, EngineConfig(1 << 28, prefix_cache=False))
    rng = np.random.default_rng(4)
    texts = [rng.integers(3, 4000, 400).astype(np.int32) for _ in range(8)]
    sampling, num_cached = SamplingParams(temperature=0, max_tokens=3, logprobs=20), 0
    for number, (length, text) in enumerate((length, text) for length in (300, 400) for text in texts):
        said = []
        for engine in (warm, cold):
            engine.submit(Request(f"{number}", Prompt(text[:length]), sampling))
            outputs = engine.run_until_idle()
            said.append([o for _, o in outputs if isinstance(o, TokenOutput)])
            num_cached += sum(o.cached_tokens for _, o in outputs if isinstance(o, PromptOutput))
        assert said[0] == said[1]
        assert warm.flush(FLUSH_S)
    stats = warm.stats().cache
    assert stats.disk is not None
    assert num_cached == 8 * 256
    assert stats.host_loads > 0 or stats.disk.loads["loaded"] > 0
    end(warm)


# A slow disk


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    read = Folder.read
    monkeypatch.setattr(Folder, "read", lambda *args: (time.sleep(seconds), read(*args))[1])


def test_steps_of_others_take_what_they_took_while_one_waits_for_a_slow_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch, 1.0)
    engine = new_engine(folder)
    engine.submit(make_request("waits", NEXT_TURN, 2))
    engine.submit(make_request("goes", tokens_of(7, 200), 60))
    outputs, began_s = Outputs(), time.monotonic()
    while len(answers(outputs, "goes")) < 60:
        outputs += engine.step()
    assert time.monotonic() - began_s < 1.0, "a step waited for the disk"
    assert engine.stats().loading == 1
    assert [(each.request_id, each.state) for each in census(engine, lambda _: True, 0.0)] == [("waits", "loading")]
    outputs += engine.run_until_idle()
    assert answers(outputs, "waits") == sum_model_answer(NEXT_TURN, 2)
    told = {name: o for name, o in outputs if isinstance(o, PromptOutput)}
    assert (told["waits"].cached_tokens, told["waits"].loaded_tokens) == (10 * TILE, 10 * TILE)
    assert told["goes"].loaded_tokens == 0
    assert engine.stats().loading == 0
    end(engine)


@pytest.mark.parametrize("others", [0, 3])
def test_who_leaves_while_it_loads_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    gate, read = Gate(), Folder.read
    monkeypatch.setattr(Folder, "read", lambda *args: (gate.wait(), read(*args))[1])
    engine = new_engine(folder)
    for number in range(1 + others):
        engine.submit(make_request(f"{number}", NEXT_TURN, 2))
    engine.step()
    assert engine.stats().loading == 1 + others
    engine.abort("0")
    assert engine.stats().loading == others
    gate.open()
    outputs = engine.run_until_idle()
    assert all(answers(outputs, f"{number}") == sum_model_answer(NEXT_TURN, 2) for number in range(1, 1 + others))
    assert engine.flush(FLUSH_S)
    assert engine.stats().cache.disk.loads == {"loaded": 1}  # type: ignore[union-attr]
    end(engine)


def test_an_engine_ends_while_something_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, read = Gate(), Folder.read
    monkeypatch.setattr(Folder, "read", lambda *args: (gate.wait(), read(*args))[1])
    engine = new_engine(folder)
    engine.submit(make_request("waits", NEXT_TURN, 2))
    engine.step()
    began_s = time.monotonic()
    engine.close(0.2)
    assert time.monotonic() - began_s < 2.0
    gate.open()


def test_files_that_go_one_by_one_stop_nobody(folder: Path) -> None:
    """Statistics are read while the disk's own threads write and miss them."""
    engine, rng = new_engine(folder), random.Random(2)
    for number in range(30):
        ask(engine, f"{number}", tokens_of(number % 5, 300 + 3 * number))
        files = [*(folder / "entries").iterdir()]
        if files:
            rng.choice(files).unlink(missing_ok=True)
        assert engine.stats().cache.disk is not None
    end(engine)


# A disk that goes wrong under a running engine


def lose(path: Path, what: str) -> None:
    index = path / "index.sqlite"
    match what:
        case "folder":
            shutil.rmtree(path)
        case "entries":
            shutil.rmtree(path / "entries")
        case "index":
            for each in path.glob("index.sqlite*"):
                each.unlink()
        case "cut off":
            os.truncate(index, 5000)
        case "noise":
            index.write_bytes(random.Random(1).randbytes(40_000))


@pytest.mark.parametrize("what", ["folder", "entries", "index", "cut off", "noise"])
def test_what_is_taken_away_under_an_engine_fails_nobody_and_is_said_once(
    folder: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = new_engine(folder)
    lose(folder, what)
    ask(engine, "next", NEXT_TURN)
    for number in range(8):
        ask(engine, f"{number}", tokens_of(70 + number, 400))
    engine.flush(FLUSH_S)
    engine.check()
    engine.close()
    assert len(caplog.records) <= 1, [record.message for record in caplog.records]
    try:
        engine = new_engine(folder)
    except ConfigError as error:
        assert what in ("cut off", "noise")  # it names the index, and nothing is lost but a cache
        assert str(folder) in str(error)  # noqa: PT017
        return
    ask(engine, "again", NEXT_TURN)
    end(engine)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "mounted"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_file_system_that_is_really_full(mounted: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = new_engine(mounted)
    texts = [tokens_of(100 + i, 400) for i in range(160)]
    for number, tokens in enumerate(texts):
        ask(engine, f"{number}", tokens)
        engine.flush(FLUSH_S)
    disk = engine.stats().cache.disk
    assert disk is not None
    assert {*disk.not_saved} & {"enospc", "sqlite"}
    assert len(caplog.records) < 8
    engine.check()
    engine.close()
    engine = new_engine(mounted)
    assert [ask(engine, f"again {i}", np.concatenate([texts[i], tokens_of(9, 9)])) for i in (0, 5, 9)] == [384] * 3
    engine.close()


def test_a_read_only_file_system_is_said(mounted: Path) -> None:
    engine = new_engine(mounted)
    ask(engine, "first", CONVERSATION)
    end(engine)
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    with pytest.raises(ConfigError, match="cannot be used for a cache: Read-only file system"):
        new_engine(mounted)


def test_a_file_system_that_becomes_read_only(mounted: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = new_engine(mounted)
    ask(engine, "first", CONVERSATION)
    end(engine)
    engine = new_engine(mounted)
    subprocess.run(["mount", "--bind", mounted, mounted], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", mounted], check=True)
    try:
        assert ask(engine, "next", NEXT_TURN) == 10 * TILE, "what is there can be read"
        for number in range(5):
            ask(engine, f"{number}", tokens_of(70 + number, 400))
        engine.flush(FLUSH_S)
        assert engine.stats().cache.disk.not_saved["erofs"] > 0  # type: ignore[union-attr]
        engine.check()
        engine.close()
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)
    assert len(caplog.records) == 1
