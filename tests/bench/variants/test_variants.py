"""The benchmark of models that share a base: what it compares, and that more sharing never serves fewer pipelines."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.bench.variants import command, pipeline, speed
from hybrid_cache.bench.variants.pipeline import Load, Pipelines, Sharing
from hybrid_cache.bench.variants.quality import CONTROLS, best, contenders, outcomes
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.models import loading
from hybrid_cache.models.tools.pairs import Pair
from hybrid_cache.models.training.paired import dialogues
from hybrid_cache.transfer import projected, upper

SHORT = Load(3, num_context=512, num_question=16, num_answer=4, num_pipelines=6)


@pytest.fixture(scope="module")
def pair() -> Pair:
    path, ops = loading.embedded_path(), select()
    receiver = loading.load(path, ops=ops, adapter="embedded-choreo")
    return Pair(loading.load(path, ops=ops), receiver, [*dialogues(path, 6, 1)])


def test_contenders_are_compared_at_equal_cost(pair: Pair) -> None:
    transfers = [transfer for _, transfer in contenders(pair, 1)]
    num = len(pair.receiver.layers)
    assert {upper(num, num), projected(num, range(num))} <= {*transfers}
    *_, found = outcomes(pair, 1)
    everything = next(each for each in found if each.name == "take all")
    assert everything.plan.flops == 0
    assert everything.measured.kl > 0
    for budget in (1 / 24, 1 / 2):
        ours, group = best(found, budget, groups=False), best(found, budget, groups=True)
        assert ours is not None
        assert group is not None
        assert max(ours.plan.flops, group.plan.flops) <= budget
        assert group.is_group
        assert ours.is_set
    assert best(found, 1e-6, groups=True) is None


def took(sharing: Sharing) -> float:
    return sum(Pipelines(SHORT, sharing).run(1000.0))


def test_pipelines_that_share_more_take_less_time() -> None:
    layers = 20
    everything, nothing = projected(layers, range(layers)), upper(layers, layers)
    assert len([*Pipelines(SHORT, Sharing("")).run(1000.0)]) == SHORT.num_pipelines
    own, bands, made = took(Sharing("")), took(Sharing("", first=layers // 2)), took(Sharing("", everything))
    taken, double = took(Sharing("", nothing)), took(Sharing("", everything, twice=True))
    assert own > 1.2 * bands
    assert own > 1.2 * made
    assert made > taken
    assert own > 1.2 * double > 1.1 * taken, "the first agent pays for the others"
    assert own == pytest.approx(took(Sharing("", cached=False)), rel=0.05), "no agent reads a context twice"


def test_throughput_is_higher_where_more_is_shared() -> None:
    alone = pipeline.alone_s(SHORT)
    assert 0.5 * 3 * 512 / 605 < alone < 2 * 3 * 512 / 605, "three prefills of the context, and little else"
    layers = 20
    own, taken = pipeline.compare(SHORT, [Sharing("own"), Sharing("taken", upper(layers, layers))], lambda: None)
    assert taken[1] > 1.5 * own[1]
    assert pipeline.in_time(SHORT, Sharing(""), own[1], 3 * alone)
    assert not pipeline.in_time(SHORT, Sharing(""), 8 * own[1], 3 * alone)


def test_the_command_writes_what_it_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "AGENTS", (2,))
    monkeypatch.setattr(pipeline, "Load", lambda agents, seed: Load(agents, 128, 8, 2, 2, seed=seed))
    out, plot = tmp_path / "found.json", tmp_path / "layers.png"
    line = f"bench variants --examples 4 --no-speed --json {out} --plot {plot} --pair embedded:embedded+embedded-choreo"
    result = CliRunner().invoke(cli.app, line.split())
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["quality"][0]["contenders"][0]["num_examples"] <= 4
    assert set(found["quality"][0]["controls"]) == {"recompute all", *CONTROLS}
    assert len(found["quality"][0]["taken alone"]) == 6
    assert set(found["pipelines"][0]["per second"]) >= {"take all", "project all", "recompute all"}
    assert plot.stat().st_size > 5_000
    assert speed.LOSS == pipeline.LOSS
