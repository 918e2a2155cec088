"""What a process had cached is found by the next one, with the same bits; whatever is in doubt is computed."""

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_cache.cache.disk.index import NAME, Index
from hybrid_cache.cache.policies.base import Worth
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.loading import embedded_path, load
from hybrid_cache.request import PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.storage.folder import Folder
from hybrid_cache.tokens import Prompt, TokenArray
from tests.engine.test_engine import answers, make_request
from tests.fakes import PageSumModel, SumModel, sum_model_answer, tokens_of

MODELS = {"hybrid": SumModel, "attention": PageSumModel}
FLUSH_S = 30.0


def new_engine(folder: Path, kind: str = "hybrid", **config: object) -> Engine:
    options = {"budget_bytes": 1 << 20, "disk": folder, "disk_bytes": 1 << 24} | config
    return Engine(MODELS[kind](), EngineConfig(**options))  # type: ignore[arg-type]


def ask(engine: Engine, name: str, tokens: TokenArray, num: int = 3) -> int:
    """-> cached tokens. The answer must be the right one."""
    engine.submit(make_request(name, tokens, num))
    outputs = engine.run_until_idle()
    assert answers(outputs, name) == sum_model_answer(tokens, num)
    return cached(outputs)


def cached(outputs: Outputs) -> int:
    (prompt,) = (o for _, o in outputs if isinstance(o, PromptOutput))
    return prompt.cached_tokens


def end(engine: Engine) -> None:
    assert engine.flush(FLUSH_S)
    engine.check()
    engine.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a process that had one conversation, and ended well."""
    engine = new_engine(tmp_path / "disk")
    ask(engine, "first", CONVERSATION)
    end(engine)
    return tmp_path / "disk"


CONVERSATION = tokens_of(1, 10 * TILE + 5)
NEXT_TURN = np.concatenate([CONVERSATION, tokens_of(2, 40)])


@pytest.mark.parametrize("kind", MODELS)
def test_the_next_process_goes_on_with_a_conversation(kind: str, tmp_path: Path) -> None:
    engine = new_engine(tmp_path, kind)
    assert ask(engine, "first", CONVERSATION) == 0
    end(engine)
    engine = new_engine(tmp_path, kind)
    assert ask(engine, "next", NEXT_TURN) == 10 * TILE
    assert engine.stats().cache.disk is not None
    end(engine)
    engine = new_engine(tmp_path, kind)
    assert ask(engine, "again", NEXT_TURN) == len(NEXT_TURN), "the end of its prompt was kept"
    engine.check()
    end(engine)


def test_what_had_to_leave_memory_comes_back(tmp_path: Path) -> None:
    engine = new_engine(tmp_path, budget_bytes=4 * (SumModel().cache_spec.slot_bytes + 64) + (12 << 10))
    prompts = [tokens_of(i, 6 * TILE + 5) for i in range(8)]
    for i, tokens in enumerate(prompts):
        ask(engine, f"first {i}", tokens)
        assert engine.flush(FLUSH_S)
    found = [ask(engine, f"next {i}", np.concatenate([tokens, tokens_of(50, 9)])) for i, tokens in enumerate(prompts)]
    assert found == [6 * TILE] * 8
    end(engine)


def test_two_prompts_that_begin_alike_wait_for_one_load(folder: Path) -> None:
    engine = new_engine(folder)
    for i in range(3):
        engine.submit(make_request(f"{i}", np.concatenate([CONVERSATION, tokens_of(10 + i, 30)]), 2))
    outputs = engine.run_until_idle()
    assert [o.cached_tokens for _, o in outputs if isinstance(o, PromptOutput)] == [10 * TILE] * 3
    assert engine.stats().cache.disk.loads == {"loaded": 1}  # type: ignore[union-attr]
    end(engine)


def test_another_namespace_finds_nothing(folder: Path) -> None:
    engine = new_engine(folder)
    engine.submit(make_request("other", NEXT_TURN, 2, namespace="other"))
    assert cached(engine.run_until_idle()) == 0
    end(engine)


def test_what_is_dropped_does_not_come_back(folder: Path) -> None:
    engine = new_engine(folder)
    engine.cache.drop()
    assert ask(engine, "next", NEXT_TURN) == 0
    engine.cache.drop()
    end(engine)
    assert list((folder / "entries").iterdir()) == []


def test_another_order_of_bits_is_another_identity(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_cache.engine.identity.kernels_of", lambda ops: "others")
    engine = new_engine(folder)
    assert ask(engine, "next", NEXT_TURN) == 0
    assert engine.stats().cache.disk.refused == {}  # type: ignore[union-attr]
    end(engine)
    monkeypatch.undo()
    engine = new_engine(folder)
    assert ask(engine, "next", NEXT_TURN) == 10 * TILE, "both lie side by side"
    end(engine)


# Doubt


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "entries").iterdir())


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_link(path: Path) -> None:
    path.symlink_to(path.rename(path.with_suffix(".away")))


DAMAGE: dict[str, Callable[[Path, int], None]] = {
    "a bit": flip,
    "cut off": lambda path, at: path.write_bytes(path.read_bytes()[: at // 8 % path.stat().st_size]),
    "longer": lambda path, at: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path, at: path.write_bytes(b""),
    "gone": lambda path, at: path.unlink(),
    "a folder": lambda path, at: put_folder(path),
    "a link": lambda path, at: put_link(path),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_a_miss(folder: Path, how: str, seed: int) -> None:
    rng = random.Random(f"{how} {seed}")
    for path in files_of(folder):
        DAMAGE[how](path, rng.randrange(1 << 40))
    engine = new_engine(folder)
    assert ask(engine, "next", NEXT_TURN) == 0
    assert sum(engine.stats().cache.disk.refused.values()) == 1  # type: ignore[union-attr]
    end(engine)
    engine = new_engine(folder)
    assert ask(engine, "again", NEXT_TURN) > 0, "it was written anew"
    end(engine)


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_index_is_a_miss_or_is_said(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    size = (folder / NAME).stat().st_size
    for _ in range(10):
        flip(folder / NAME, rng.randrange(100 * 8, 8 * size))
    try:
        engine = new_engine(folder)
    except ConfigError:  # anything else fails
        return
    ask(engine, "next", NEXT_TURN)
    ask(engine, "else", tokens_of(6, 200))
    assert engine.flush(FLUSH_S)
    engine.check()
    engine.close()


def test_two_files_that_changed_places_are_a_miss(folder: Path) -> None:
    first, second = files_of(folder)[:2]
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    engine = new_engine(folder)
    assert ask(engine, "next", NEXT_TURN) == 0
    end(engine)


def test_files_of_others_stay_and_disturb_nobody(folder: Path) -> None:
    others = [folder / "README", folder / "entries" / "note.txt", folder / "writers" / "x.tmp"]
    for path in others:
        path.write_text("mine")
    engine = new_engine(folder)
    assert ask(engine, "next", NEXT_TURN) == 10 * TILE
    end(engine)
    assert all(path.read_text() == "mine" for path in others)


@pytest.mark.parametrize("data", [b"no database", b"\0" * 100, b"SQLite format 3\0" + b"\1" * 500])
def test_an_index_that_is_none_is_said(tmp_path: Path, data: bytes) -> None:
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(ConfigError, match=r"cannot be used as an index of a cache"):
        new_engine(tmp_path)


def test_an_index_of_another_version_is_said(folder: Path) -> None:
    index = Index(folder, 1 << 24, "x")
    index._db.execute("PRAGMA user_version = 7")
    index.close()
    with pytest.raises(ConfigError, match="version 7, this one reads version 2"):
        new_engine(folder)


def test_a_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used for a cache"):
        new_engine(tmp_path / "file")


def test_too_small_a_budget_is_said() -> None:
    with pytest.raises(ConfigError, match=r"disk_bytes is 7, must be at least 1048576"):
        EngineConfig(disk_bytes=7)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_a_disk_that_takes_nothing_fails_no_request(
    tmp_path: Path, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*args: object) -> None:
        raise error

    engine = new_engine(tmp_path)
    monkeypatch.setattr(Folder, "write", write)
    assert ask(engine, "first", CONVERSATION) == 0
    assert engine.flush(FLUSH_S)
    disk = engine.stats().cache.disk
    assert disk is not None
    assert set(disk.not_saved) == {{28: "enospc", 30: "erofs"}[error.errno], "needs"}  # type: ignore[index]
    assert disk.entries == 0
    assert files_of(tmp_path) == []
    monkeypatch.undo()
    assert ask(engine, "second", tokens_of(5, 300)) == 0, "the disk takes something again"
    end(engine)
    engine = new_engine(tmp_path)
    assert ask(engine, "again", np.concatenate([tokens_of(5, 300), tokens_of(6, 9)])) == 4 * TILE
    end(engine)


def bytes_in(folder: Path) -> int:
    """That its files take from the disk; of folders, nobody asks. Files may go while they are counted."""
    num_bytes = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            num_bytes += 0 if path.is_dir() else 512 * path.stat().st_blocks
    return num_bytes


@pytest.mark.parametrize("disk_bytes", [1 << 20, 3 << 19])
def test_the_budget_is_never_exceeded(tmp_path: Path, disk_bytes: int) -> None:
    engine = new_engine(tmp_path, disk_bytes=disk_bytes)
    for i in range(250):
        ask(engine, f"{i}", tokens_of(i, 10 * TILE + 3))
        if i % 20 == 0:
            assert engine.flush(FLUSH_S)
            assert bytes_in(tmp_path) <= disk_bytes
    assert engine.stats().cache.disk.used_bytes > disk_bytes // 2  # type: ignore[union-attr]
    end(engine)
    assert bytes_in(tmp_path) <= disk_bytes


def test_two_processes_find_what_the_other_has_written(tmp_path: Path) -> None:
    clock = iter(np.arange(0, 1e6, 0.5))
    first, second = (Engine(SumModel(), config_of(tmp_path), clock=lambda: float(next(clock))) for _ in range(2))
    ask(first, "first", CONVERSATION)
    assert first.flush(FLUSH_S)
    ask(second, "other", tokens_of(9, 100))  # by now it has heard of it
    assert second.flush(FLUSH_S)
    assert ask(second, "next", NEXT_TURN) == 10 * TILE
    second.cache.drop()
    assert second.flush(FLUSH_S)
    first.cache.drop()
    assert ask(first, "again", NEXT_TURN) == 0
    end(first)
    end(second)


def config_of(folder: Path) -> EngineConfig:
    return EngineConfig(1 << 20, disk=folder, disk_bytes=1 << 24)


def test_a_load_that_takes_too_long_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, read = Gate(), Folder.read
    monkeypatch.setattr(Folder, "read", lambda *args: (release.wait(), read(*args))[1])
    monkeypatch.setattr("hybrid_cache.cache.disk.loading.PATIENCE_S", 0.1)
    engine = new_engine(folder)
    assert ask(engine, "next", NEXT_TURN) == 0
    release.open()
    assert engine.stats().cache.disk.loads == {"late": 1}  # type: ignore[union-attr]
    end(engine)


def test_others_are_served_while_one_waits_for_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, read = Gate(), Folder.read
    monkeypatch.setattr(Folder, "read", lambda *args: (gate.wait(), read(*args))[1])
    engine = new_engine(folder)
    engine.submit(make_request("waits", NEXT_TURN, 2))
    engine.submit(make_request("goes", tokens_of(7, 200), 2))
    outputs: Outputs = []
    while len(answers(outputs, "goes")) < 2:
        outputs += engine.step()
    assert answers(outputs, "waits") == []
    gate.open()
    outputs += engine.run_until_idle()
    assert answers(outputs, "waits") == sum_model_answer(NEXT_TURN, 2)
    assert engine.stats().cache.disk.loads == {"loaded": 1}  # type: ignore[union-attr]
    end(engine)


class Gate:
    """Shut until it is opened."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def open(self) -> None:
        self._event.set()

    def wait(self) -> bool:
        return self._event.wait(30)


# Any mixture


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 600), st.integers(0, 5)), min_size=1, max_size=20),
    st.sampled_from([*MODELS]),
)
def test_prefixes_of_few_texts_over_restarts(asked: list[tuple[int, int, int]], kind: str) -> None:
    with TemporaryDirectory() as folder:
        engine = new_engine(Path(folder), kind, budget_bytes=1 << 16, disk_bytes=1 << 20)
        for number, (text, length, after) in enumerate(asked):
            ask(engine, str(number), tokens_of(text, length), 2)
            engine.check()
            if after == 1:
                engine.cache.drop()
            if after == 0:
                end(engine)
                engine = new_engine(Path(folder), kind, budget_bytes=1 << 16, disk_bytes=1 << 20)
        end(engine)


# Real models


@pytest.fixture(params=["float32", "bfloat16"])
def engines(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[], Engine], Engine]:
    """What makes an engine with a disk and the checking mode, and one without any cache."""
    model = load(embedded_path(), dtype=request.param, ops=select("auto"))
    config = EngineConfig(1 << 28, disk=tmp_path, verify=True)
    return lambda: Engine(model, config), Engine(model, EngineConfig(1 << 28, prefix_cache=False))


def test_of_a_real_model_what_comes_back_gives_the_bits_of_a_run_without_cache(
    engines: tuple[Callable[[], Engine], Engine],
) -> None:
    make, cold = engines
    rng = np.random.default_rng(5)
    text = rng.integers(0, 4000, 700).astype(np.int32)
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=20)
    for length in (300, 300, 420, 700):
        warm, found = make(), []
        for engine in (warm, cold):
            engine.submit(Request(f"{length}", Prompt(text[:length]), sampling))
            outputs = engine.run_until_idle()
            found.append([o for _, o in outputs if isinstance(o, TokenOutput)])
            if engine is warm:
                num_cached = cached(outputs)
        assert found[0] == found[1]
        end(warm)
    assert num_cached == 384


# What the policy has learned


def test_the_next_process_knows_what_the_policy_has_learned(tmp_path: Path) -> None:
    engine = new_engine(tmp_path)
    for i in range(40):
        text = tokens_of(i % 5, 200)
        ask(engine, f"{i}", np.concatenate([text, tokens_of(i, 3 * i)]))
    policy = engine.cache.pool.policy
    assert isinstance(policy, Learned)
    end(engine)
    engine = new_engine(tmp_path)
    found = engine.cache.pool.policy
    assert isinstance(found, Learned)
    places, known = policy._memory._places, found._memory._places
    assert list(known) == list(places)
    assert [place.features for place in known.values()] == [place.features for place in places.values()]
    assert np.array_equal(found._model._w, policy._model._w)
    assert found._model._w.any()
    ours, theirs = (each._model._lives[0] for each in (found, policy))
    assert ours.count == theirs.count > 0
    assert np.allclose(np.diff(ours.start[: ours.count]), np.diff(theirs.start[: theirs.count]))
    assert (np.isinf(ours.end) == np.isinf(theirs.end)).all()
    end(engine)


@pytest.mark.parametrize("data", [b"", b"12345678", bytes(100), b"12345678" + bytes(50)])
def test_what_was_learned_and_makes_no_sense_is_not_used(folder: Path, data: bytes) -> None:
    engine = new_engine(folder)
    engine.close()
    index = Index(folder, 1 << 24, "x")
    names = [row[0] for row in index._db.execute("SELECT name FROM fact WHERE name LIKE 'of %'")]
    assert len(names) == 1
    index._db.execute("UPDATE fact SET value = ? WHERE name = ?", (data, names[0]))
    index.close()
    engine = new_engine(folder)
    assert ask(engine, "next", NEXT_TURN) == 10 * TILE
    end(engine)


def test_a_policy_with_other_features_takes_nothing_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_cache.cache.policies.places.SIZES", {"kind": 7, "role": 1})
    policy = Learned()
    policy.open(lambda kept: Worth(1.0, 1), lambda: 5.0)
    data = policy.remembered()
    monkeypatch.undo()
    other = Learned()
    other.open(lambda kept: Worth(1.0, 1), lambda: 5.0)
    with pytest.raises(ValueError, match="features"):
        other.recall(data, 0.0)
