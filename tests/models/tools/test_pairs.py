"""What is lost between two models: nothing between equal ones, and more the less is made again."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.models import folders, loading
from hybrid_cache.models.tools.pairs import Example, Pair
from hybrid_cache.models.tools.plans import FEW_LAYERS, candidates, group, groups, neighbours, search
from hybrid_cache.models.training.paired import dialogues
from hybrid_cache.profile import load_profile
from hybrid_cache.transfer import Transfer, Way, projected, upper

PATH = loading.embedded_path()


@pytest.fixture(scope="module")
def base() -> HybridModel:
    return loading.load(PATH, ops=select())


@pytest.fixture(scope="module")
def choreo() -> HybridModel:
    return loading.load(PATH, ops=select(), adapter="embedded-choreo")


def last(steps):
    *_, found = steps
    return found


def test_equal_models_lose_nothing_whatever_is_shared(base: HybridModel) -> None:
    pair = Pair(base, base, [*dialogues(PATH, 4, 1)])
    num = len(base.layers)
    ways = [
        upper(num, num),
        projected(num, range(num)),
        group(num, 1, 3),
        Transfer((Way.RECOMPUTE,) * 2 + (Way.PROJECT,) * 4),
    ]
    for measured in last(pair.measure(ways, range(4))):
        assert measured.kl == 0
        assert measured.agreement == 1
    assert [each.kl for each in last(pair.measure_layers(range(4)))] == [0] * num
    own, zeroed, blind = last(pair.measure_alone(range(4)))
    assert own.kl == 0
    assert zeroed.kl > 0.05 > blind.kl > 0, "the embedded model reads its states"
    assert zeroed.right < 1


def test_a_receiver_is_compared_with_what_is_asked_for(base: HybridModel, choreo: HybridModel) -> None:
    examples, taken = [*dialogues(PATH, 4, 3)], upper(6, 6)

    def measured(sender: HybridModel, receiver: HybridModel, reference: HybridModel | None = None):
        return last(Pair(sender, receiver, examples, reference).measure_beside_controls(taken, range(4)))

    for own, received, zeroed in (measured(base, choreo), measured(base, choreo, choreo)):
        assert own.kl == 0
        assert 0 < received.kl < zeroed.kl
    moved, other, _ = measured(base, choreo, base)
    assert moved.kl > 1e-5
    assert other.by_kind == received.by_kind, "the same answers"
    assert other.kl != received.kl
    assert measured(base, base, choreo)[1].kl == measured(base, base, choreo)[0].kl, "its own entries are the sender's"


def test_a_model_that_needs_its_attention_is_lost_without_it() -> None:
    path = folders.resolve("recall")
    recall = loading.load(path, ops=select())
    pair = Pair(recall, recall, [*dialogues(PATH, 8, 1, path)])
    assert {each.kind for each in pair.examples} == {"recall", "last"}, "counting was not learned"
    own, zeroed, blind = last(pair.measure_alone(range(8)))
    assert own.by_kind["recall"] == 1
    assert zeroed.by_kind["recall"] > 0.5
    assert blind.by_kind["recall"] < 0.5, "of codes beyond the shared part"
    assert zeroed.by_kind["last"] < own.by_kind["last"]


def test_what_is_lost_lies_where_the_study_found_it(base: HybridModel, choreo: HybridModel) -> None:
    pair = Pair(base, choreo, [*dialogues(PATH, 12, 3)])
    alone = [each.kl for each in last(pair.measure_layers(range(12)))]
    assert alone.index(max(alone)) == 2, "the first state-space layer above attention"
    num = len(base.layers)
    everything, one, whole = (
        each.kl for each in last(pair.measure([upper(num, num), projected(num, [2]), group(num, 0, 3)], range(12)))
    )
    assert max(whole, one) < everything / 2
    assert pair.plan(upper(num, num), alone_measured(pair)).flops == 0
    assert pair.plan(projected(num, [2]), alone_measured(pair)).input_bytes == base.cache_spec.input_bytes


def alone_measured(pair: Pair):
    return last(pair.measure_layers(range(1)))[0]


def test_what_two_models_have_in_common_is_shared_without_loss(base: HybridModel) -> None:
    path = folders.resolve("embedded-half")
    pair = Pair(base, loading.load(path, ops=select()), [*dialogues(PATH, 6, 1, path)])
    assert pair.common == 3
    band, everything = last(pair.measure([upper(6, 3), upper(6, 6)], range(6)))
    assert band.kl == 0
    assert everything.kl > 0
    assert {each.kind for each in pair.examples} == {"recall", "last", "count", "order"}


def test_an_activated_adapter_has_nothing_to_profile() -> None:
    result = CliRunner().invoke(cli.app, ["variants", "profile", "embedded", "embedded+embedded-polite"])
    assert result.exit_code != 0
    assert "embedded+embedded-polite reads what comes before its invocation as its base does" in str(result.exception)


def test_a_search_finds_a_frontier(base: HybridModel, choreo: HybridModel) -> None:
    pair, told = Pair(base, choreo, [*dialogues(PATH, 5, 2)]), []
    found = search(pair, lambda what, done, total: told.append((what, done, total)))
    assert len({what for what, *_ in told}) == 5
    assert all(done <= total for _, done, total in told)
    losses, costs = [plan.loss for plan in found.plans], [plan.flops for plan in found.plans]
    assert costs == sorted(costs)
    assert losses == sorted(losses, reverse=True)
    own, zeroed, _ = found.controls
    assert own.kl == 0
    assert zeroed.kl > max(each.kl for each in found.measured.values())
    assert found.num_searched == 1
    assert {each.num_examples for each in (own, *found.measured.values())} == {len(pair.examples) - 1}
    assert {*found.random} < {*found.measured}


def test_large_models_try_few_groups(base: HybridModel) -> None:
    assert len(groups(6, [0.0] * 6)) == 20
    many = groups(40, [float(i == 7) for i in range(40)])
    assert len(many) < 80
    assert all(first <= 7 <= last for first, last in many if first)
    assert FEW_LAYERS < 40
    assert candidates(base.layers, [0.0] * 6)[0] == upper(6, 6)


def test_what_is_like_a_good_plan_differs_in_one_layer() -> None:
    near = [each.letters for each in neighbours(Transfer((Way.RECOMPUTE, Way.RECOMPUTE, Way.TAKE, Way.PROJECT)))]
    assert near == ["rrpp", "rrtt"]


def test_contexts_without_a_whole_tile_are_left_out(base: HybridModel) -> None:
    short = Example(np.arange(5, 60).astype(np.int32), 50, 3)
    pair = Pair(base, base, [short, *dialogues(PATH, 2, 1)])
    assert len(pair.examples) == 2
    assert all(each is not short for each in pair.examples)


def test_the_command_writes_a_profile_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out, plot = tmp_path / "p.json", tmp_path / "p.png"
    line = f"variants profile embedded embedded+embedded-choreo --examples 4 --out {out} --plot {plot}"
    result = CliRunner().invoke(cli.app, line.split())
    assert result.exit_code == 0, result.output
    assert all(note in result.output for note in ("drawn", "group", "own", "no states", "blind"))
    assert len(load_profile(out).plans) > 1
    assert plot.stat().st_size > 10_000


def test_a_text_of_the_users_is_cut_into_examples(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("The lamp is red now. Ben put three coins into the box. " * 400)
    lines.write_text("\n".join(json.dumps({"context": "The lamp is red. " * 30, "answer": "Red."}) for _ in range(20)))
    begin = "variants profile embedded embedded-style --examples 20 --context 64 --answer 4"
    for data in (text, lines):
        result = CliRunner().invoke(cli.app, [*begin.split(), "--data", str(data), "--out", str(tmp_path / "p.json")])
        assert result.exit_code == 0, result.output
        num, chosen_on = (20, 5) if data is text else (16, 4)
        said = load_profile(tmp_path / "p.json").data
        assert said == f"{num} of {data.name}; chosen on {chosen_on} others"
    for content, says in (("short", "needs at least 20 examples"), ('{"context": 1}', "line 1 is not")):
        path = tmp_path / ("b.txt" if content == "short" else "b.jsonl")
        path.write_text(content)
        result = CliRunner().invoke(cli.app, [*begin.split(), "--data", str(path), "--out", str(tmp_path / "p.json")])
        assert result.exit_code != 0
        assert says in str(result.exception) + result.output
