"""Agents on a real server: exact sharing has the bits of each by itself, and a fault in them ends the command."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.server import launch
from hybrid_cache.api.server.launch import Loaded, LoadOptions
from hybrid_cache.api.server.serving import Variant
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.bench.common.random_model import SMALL
from hybrid_cache.bench.variants import doubling
from hybrid_cache.bench.variants.doubling import Texts
from hybrid_cache.bench.variants.live import Player
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.transfer import projected
from tests.api.server.test_sharing import OTHER, profile_of
from tests.api.server.test_variants import HALF, moved
from tests.api.servers import new_app, over_the_wire

PLAY = ["bench", "pipeline", "--agent", "embedded", "--agent", HALF, "--agent", OTHER, "--sentences", "20"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("live")
    half, other = moved(folder / HALF), moved(folder / OTHER, layers=0)
    return launch.load(LoadOptions(variants={HALF: str(half), OTHER: str(other)}))


@pytest.fixture
def url(loaded: Loaded) -> Iterator[str]:
    text = TextModel.load(loaded.path)
    models = {each.name: each.model for each in loaded.variants}
    engine = AsyncEngine(
        loaded.model, EngineConfig(budget_bytes=64 << 20), variants=models, profiles=[profile_of(loaded)]
    )
    served = [Variant(each.name, str(each.path), text, each.adapter) for each in loaded.variants]
    app = new_app(engine, text, served, served_names=("embedded",), model_path=str(Path(loaded.path)))
    with over_the_wire(app) as address:
        yield address


def test_agents_are_played_by_themselves_and_together(url: str) -> None:
    done = CliRunner().invoke(cli.app, [*PLAY, "--url", url, "--pipelines", "3", "--max-loss", "0.01"])
    assert done.exit_code == 0, done.output
    rows = [re.split(r"\s*[│┃]\s*", line.strip()) for line in done.output.splitlines()]
    bits = {row[1]: row[5] for row in rows if len(row) == 8 and row[5].endswith("/9")}
    assert (bits["each by itself"], bits["exact sharing"]) == ("9/9", "9/9")
    received = {
        tuple(row[1:3]): int(row[5].replace(",", ""))
        for row in rows
        if len(row) == 8 and row[4].isdecimal() and row[3] != "prompt"
    }
    assert received[HALF, "exact sharing"] > 64
    assert received[HALF, "each by itself"] == received[OTHER, "exact sharing"] == 0


def test_other_bits_are_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    play = Player.play
    monkeypatch.setattr(
        Player, "play", lambda self, seed, salts, max_loss: play(self, seed + len(set(salts)), salts, None)
    )
    done = CliRunner().invoke(cli.app, [*PLAY, "--url", url, "--pipelines", "1"])
    assert done.exit_code != 0
    assert "answers differ in their bits" in str(done.exception)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (["--agent", "nobody"], "nobody"),
        (["--url", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_played_is_said(url: str, more: list[str], said: str) -> None:
    done = CliRunner().invoke(cli.app, [*PLAY, "--url", url, "--pipelines", "1", *more])
    assert done.exit_code == 2
    assert said in done.output
    alone = CliRunner().invoke(cli.app, ["bench", "pipeline", "--agent", "embedded"])
    assert alone.exit_code == 2
    assert "1 agents" in alone.output


def test_writing_twice_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doubling, "MID_GRANITE", SMALL["granite"])
    texts = Texts(select(), 200, 10, 1)
    timed = texts.time("project all", projected(len(texts.base.layers), range(len(texts.base.layers))), 1)
    assert timed.sender > 0
    assert timed.read_s > 0
