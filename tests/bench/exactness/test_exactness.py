"""The exactness benchmark finds nothing on an exact model, and does find what it is there to find."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.bench.exactness import command
from hybrid_cache.bench.exactness import run as rounds
from hybrid_cache.bench.exactness.models import by_name, named
from hybrid_cache.bench.exactness.report import Report, verdicts
from hybrid_cache.bench.exactness.run import compare
from hybrid_cache.cache.lease import Lease
from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.kernels.dispatch import select
from tests.fakes import SumModel

MET = (
    *(
        "asked for exact",
        "asked for composed",
        "labelled approximate",
        "refs",
        "order any",
        "n > 1",
        "salts",
        "of a variant",
        "of activated",
        "mode off",
    ),
    *("mode explicit", "penalties", "prompt logprobs", "stop tokens", "messages stored", "digests compared"),
    *("rows of approximate sequences", "preemptions", "evictions"),
)


def run(model: SumModel, requests_per_round: int = 3) -> Report:
    return compare(model, Report("fake", "float32", seed=1), 1, requests_per_round=requests_per_round)


@pytest.mark.parametrize(
    ("name", "num_requests", "more"),
    [pytest.param("small minimax", 30, rounds.MORE_ROUNDS, marks=pytest.mark.slow), ("small lfm2", 15, 0)],
)
def test_a_busy_engine_gives_the_bits_of_a_plain_one_whatever_is_asked(
    name: str, num_requests: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(rounds, "MORE_ROUNDS", more)
    model, *others = named(name).load("float32", select())
    assert len({each.fingerprint for each in (model, *others)}) == 6
    missing, untried = set(MET), None  # a round may by chance not meet one or the other
    for seed in range(7, 12):
        report = compare(model, Report(name, "float32", seed), 1, None, num_requests, variants=by_name(others))
        assert report.findings == []
        assert report.exact
        assert report.rows > 500
        assert report.answers > 10
        assert report.cached_tokens > 0
        missing = {met for met in missing if not report.mixed[met]}
        untried = {*report.untried} if untried is None else untried & {*report.untried}
        if not (missing or untried):
            break
    assert not missing
    assert not untried


class NeighbourModel(SumModel):
    """Lets the number of rows in the batch leak into the last bits of each logit."""

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        self.shift = 1e-6 * batch.layout.num_rows
        return super().forward(batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden) + self.shift


def test_a_row_that_depends_on_its_neighbours_is_found_and_can_be_computed_again() -> None:
    report = run(NeighbourModel())
    assert not report.exact
    assert report.differing_bits > 0
    lines = verdicts([report], "")
    assert any(line.startswith("NOT EXACT: fake float32 seed 1 round 1 r") for line in lines)
    assert any(line.startswith("again: ") and "--seed 1" in line for line in lines)


class ForgetfulModel(SumModel):
    """Gives another answer wherever a chunk starts from a state rather than from nothing."""

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        self.lost = bool((batch.layout.chunk_fresh == 0).any())
        return super().forward(batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        return logits.roll(1, dims=1) if self.lost else logits


def test_a_resumed_state_that_gives_another_answer_is_found() -> None:
    report = run(ForgetfulModel(), requests_per_round=8)
    assert report.differing_rows + report.unknown_rows > 0
    assert not report.exact


def test_a_write_to_somebody_elses_rows_is_reported_with_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "rows_to_fill", lambda lease, start, end: lease.rows(start, end) * 0)
    monkeypatch.setattr(SumModel, "forward", lambda model, batch, cache: _overwrite(batch, cache))
    report = run(SumModel(), requests_per_round=17)
    assert [f.request for f in report.findings][-1] == "the engine"
    assert "PublishedBytesChanged" in report.findings[-1].what
    assert report.findings[-1].round >= 1


def _overwrite(batch: ForwardBatch, cache: CacheTensors) -> Tensor:
    """Writes to the first page whatever is asked."""
    cache[0].k[0] += 1.0
    return torch.zeros(len(batch.output_rows), 2)


def test_tight_rounds_follow_until_a_run_has_met_what_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_few_requests() -> Report:
        return compare(SumModel(), Report("fake", "float32", seed=10), 1, requests_per_round=4)

    monkeypatch.setattr(rounds, "MORE_ROUNDS", 0)
    assert of_few_requests().untried
    monkeypatch.undo()
    report = of_few_requests()
    assert report.untried == ()
    assert report.exact
    assert report.rounds > 2


def test_a_run_that_preempts_nobody_says_that_it_proves_nothing() -> None:
    report = Report("some", "float32", 0, rows=10)
    report.mixed["evictions"] = 3
    assert report.exact
    assert report.untried == ("preemptions",)
    assert verdicts([report], "") == ["PROVES NOTHING: some float32 met no preemptions"]


def test_the_command_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "compare", partial(compare, requests_per_round=6))
    monkeypatch.setattr(command, "by_name", lambda variants: {})  # one model is enough
    file = tmp_path / "report.json"
    options = ["--rows", "1", "--dtype", "float32", "--threads", "1", "--json", str(file)]
    done = CliRunner().invoke(cli.app, ["bench", "exactness", "small lfm2", *options])
    assert done.exit_code == 0, done.output
    [report] = json.loads(file.read_text())
    assert report["exact"]
    assert report["mixed"]["preemptions"] > 0
    assert report["differing_rows"] == report["unknown_rows"] == 0
