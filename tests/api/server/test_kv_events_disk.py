"""Events of a server with a disk: an index that reads only them knows what each prompt finds in memory or there."""

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hybrid_cache.api.server.kv_events.disk import Disk
from hybrid_cache.api.server.kv_events.wire import Origin, event_of, sized
from hybrid_cache.cache.disk.loading import Loading
from hybrid_cache.cache.journal import Journal
from hybrid_cache.cache.resumable import Change, Resumable
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.storage.contents import Contents
from hybrid_cache.storage.packs import opened
from hybrid_cache.tokens import TokenArray
from tests.api.server.shadow import Shadow
from tests.engine.test_disk_tier import FLUSH_S, MODELS, ask, end, new_engine
from tests.fakes import tokens_of

BUDGETS = {"hybrid": 3 << 15, "attention": 3 << 13}  # that are soon full


class Router:
    """A reader of all groups, and one of pages alone."""

    def __init__(self, engine: Engine, kind: str, folder: Path) -> None:
        self._grouped = kind == "hybrid"
        self._journal = Journal(lambda: None)
        self._readers = [self._reader(engine, folder, states=states) for states in (self._grouped, False)]
        engine.cache.pool.watch(self._journal)

    def _reader(self, engine: Engine, folder: Path, *, states: bool) -> tuple[Resumable, Disk, Shadow]:
        disk = Disk(folder, lambda: engine.disk_identities)
        disk.open(lambda namespace: True, states=states, stateless=not self._grouped)
        return Resumable(states=states), disk, Shadow()

    def hear(self) -> None:
        """All that has changed until now."""
        notes = self._journal.take(1 << 20)
        for resumable, disk, shadow in self._readers:
            self._read(shadow, resumable.read(notes))
            self._read(shadow, disk.changes())
            while disk.more:
                self._read(shadow, disk.changes())

    def _read(self, shadow: Shadow, changes: Iterator[Change]) -> None:
        events = [event_of(change, lambda _: Origin(), grouped=self._grouped) for change in sized(changes)]
        shadow.read(msgspec.msgpack.decode(msgspec.msgpack.encode(events)))

    def cached_tokens(self, tokens: TokenArray) -> int:
        return self._readers[0][2].cached_tokens(tokens)

    def pages(self, tokens: TokenArray) -> int:
        """As a router counts that reads pages alone."""
        return len(self._readers[1][2].pages_of(tokens))

    def media(self) -> set[str]:
        return {medium for _, _, shadow in self._readers for medium, _, _ in shadow.media}

    def close(self) -> None:
        for _, disk, _ in self._readers:
            disk.close()


@pytest.fixture(autouse=True)
def _loads_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loading, "seconds", lambda *_: 0.0)
    monkeypatch.setattr("hybrid_cache.cache.disk.loading.LEAST_PATIENCE_S", 600.0)


def prompts(rng: random.Random) -> Iterator[TokenArray]:
    """Turns of conversations that have a beginning in common, repeats, and prompts that branch off."""
    talks = [tokens_of(1, rng.choice([64, 100, 192]))]
    while True:
        before = rng.choice(talks)
        more = tokens_of(rng.randrange(1 << 20), rng.choice([1, 30, 64, 130, 200]))
        kept = before if rng.random() < 0.7 else before[: rng.randrange(1, len(before) + 1)]
        tokens = before if rng.random() < 0.15 else np.concatenate([kept, more])
        if len(tokens) < 900:
            talks.append(tokens)
            yield tokens
        if len(talks) > 12:
            talks.pop(rng.randrange(len(talks)))


@pytest.mark.parametrize("kind", MODELS)
def test_events_of_both_tiers_predict_what_every_prompt_finds(kind: str, tmp_path: Path) -> None:
    num_loaded = num_evicted = 0
    for seed in range(2):
        rng = random.Random(seed)
        options = {"budget_bytes": BUDGETS[kind], "disk_bytes": rng.choice([1 << 20, 1 << 24])}
        engine = new_engine(tmp_path / f"{seed}", kind, **options)
        router, talks = Router(engine, kind, tmp_path / f"{seed}"), prompts(rng)
        for number in range(30):
            if rng.random() < 0.08:
                router.close()
                end(engine)
                engine = new_engine(tmp_path / f"{seed}", kind, **options)
                router = Router(engine, kind, tmp_path / f"{seed}")
            assert engine.flush(FLUSH_S)
            before = engine.stats().cache
            router.hear()
            tokens = next(talks)
            expected = router.cached_tokens(tokens)
            assert expected <= router.pages(tokens) * TILE or expected == len(tokens)
            there = ask(engine, f"{number}", tokens)
            assert there == expected or (kind == "attention" and there == len(tokens)), (seed, number)
            after = engine.stats().cache
            num_evicted += sum(after.evictions.values()) - sum(before.evictions.values())
            num_loaded += after.disk.loads.get("loaded", 0) - before.disk.loads.get("loaded", 0)  # type: ignore[union-attr]
        router.close()
        end(engine)
    assert num_loaded > 5
    assert num_evicted > 10


def test_a_restart_tells_what_is_on_the_disk_and_a_drop_takes_it_back(tmp_path: Path) -> None:
    engine, talk = new_engine(tmp_path), tokens_of(1, 5 * TILE + 9)
    ask(engine, "first", talk)
    end(engine)
    engine = new_engine(tmp_path)
    router = Router(engine, "hybrid", tmp_path)
    router.hear()
    assert (router.media(), router.cached_tokens(talk), router.pages(talk)) == ({"STORAGE"}, len(talk), 5)
    with opened(tmp_path) as folder:
        Contents(folder, lambda namespace: True).drop_all()
    router.hear()
    assert (router.media(), router.cached_tokens(talk)) == (set(), 0)
    router.close()
    end(engine)


def test_what_another_process_writes_is_told(tmp_path: Path) -> None:
    engines, talk = [new_engine(tmp_path) for _ in range(2)], tokens_of(1, 5 * TILE + 9)
    router = Router(engines[0], "hybrid", tmp_path)
    router.hear()
    ask(engines[1], "theirs", talk)
    assert engines[1].flush(FLUSH_S)
    router.hear()
    assert (router.media(), router.pages(talk)) == ({"STORAGE"}, 5)
    router.close()
    for engine in engines:
        end(engine)
