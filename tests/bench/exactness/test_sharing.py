"""Rows that go on from entries of another model, or of an activated adapter's base, are met, counted and compared."""

from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from hybrid_cache.bench.common.random_model import activated_by, random_adapter, random_model
from hybrid_cache.bench.exactness import run as rounds
from hybrid_cache.bench.exactness.mix import MIXED
from hybrid_cache.bench.exactness.models import INVOCATION, PURE, by_name
from hybrid_cache.bench.exactness.origins import Behind, Origins
from hybrid_cache.bench.exactness.report import Compared, Report, shared, verdicts
from hybrid_cache.bench.exactness.run import compare, kinds_of
from hybrid_cache.cache.keys import Mark
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.tree import Node
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.inputs import SentInputs
from hybrid_cache.engine import senders
from hybrid_cache.engine.prefills import Chunk
from hybrid_cache.engine.sequence import Prefill
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import PrefillCost
from hybrid_cache.transfer import Transfer, equal_layers, upper
from hybrid_cache.work import Rows

SHORT = replace(
    MIXED.sharing,
    messages=(64, 70, 90),
    longest=280,
    answers=(1, 3),
    budgets=(80,),
    arrivals=(-1,),
    in_turn=1.0,
    usual=30,
)
SEED = 4  # its twelve requests meet everything that is looked for
TINY = {**PURE["mamba2"], "num_hidden_layers": 3, "vocab_size": 97, "hidden_size": 64, "num_heads": 4, "state_size": 16}


@cache
def models() -> tuple[HybridModel, ...]:
    """A base, whose stream is float32 under weights in bfloat16, one that differs in layer 1, one that is invoked."""
    ops, dtype = select(), torch.bfloat16
    base, _ = random_model(TINY, ops, dtype, adaptable=True)
    other, _ = random_model(TINY, ops, dtype, other=1, first=1)
    return base, other, activated_by(base, random_adapter(base, 4, seed=1), INVOCATION)


def run(patch: pytest.MonkeyPatch) -> Report:
    torch.set_num_threads(1)
    patch.setattr(rounds, "MORE_ROUNDS", 0)
    base, other, _ = models()
    return compare(base, Report("tiny", "bfloat16", SEED), 1, None, 12, SHORT, by_name([other]))


def test_models_that_share_layers_give_the_bits_of_each_and_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(monkeypatch)
    assert report.exact, report.findings
    assert 0 < report.behind[Behind.RECEIVED].rows < report.rows
    assert report.received_tokens % TILE == 0 < report.received_tokens


def rounded(inputs: SentInputs, layer: int) -> Tensor:
    return READ(inputs, layer).bfloat16().float()


READ = SentInputs.__call__


def test_rows_of_a_layer_that_are_rounded_on_their_way_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SentInputs, "__call__", rounded)
    expect_wrong_behind_entries_from_another_model(run(monkeypatch))


def test_a_layer_that_is_taken_though_its_weights_differ_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "equal_layers", lambda one, other: (equal_layers(one, other) or 0) + 1)
    expect_wrong_behind_entries_from_another_model(run(monkeypatch))


def expect_wrong_behind_entries_from_another_model(report: Report) -> None:
    received = report.behind[Behind.RECEIVED]
    assert not report.exact
    assert received.differing_bits > 0
    assert received.differing_rows == report.differing_rows


def test_a_run_that_met_nothing_of_what_it_should_have_says_so() -> None:
    base, other, invoked = models()
    alone, others = [*kinds_of(base, {})], [*kinds_of(base, {"variant 0": other, "activated": invoked})]
    assert (alone, others) == ([], [*Behind])
    report = Report("some", "float32", 0, rows=10, needed=tuple(kind.value for kind in others))
    report.behind[Behind.INVOKED] = report.behind[Behind.FOUND] = Compared(rows=3)
    assert verdicts([report], "") == ["PROVES NOTHING: some float32 met no rows behind entries from another model"]
    assert shared([report]).row_count == 2
    assert report.as_json()["behind"] == {kind.value: asdict(report.behind[kind]) for kind in Behind}


def prefill_of(length: int, found: int = 0, mark: int | None = None) -> Prefill:
    tokens = np.arange(length, dtype=np.int32)
    prefill = Prefill("m/", tokens, publish=True, reuse=True, mark=None if mark is None else Mark(mark, "n/"))
    root = Node("m/", None, b"", 0, -1, 0.0)
    prefill.lease = Lease(prefill.keys, True, root, [], [], 0, found, None)
    return prefill


def test_what_was_taken_with_all_its_layers_was_received() -> None:
    origins, prefill = Origins(), prefill_of(200)
    origins.chunk(chunk(prefill, 128, 200))
    assert origins.received_tokens == 128
    assert behind(origins, prefill, 199) == {Behind.RECEIVED}


def chunk(prefill: Prefill, start: int, end: int, transfer: Transfer | None = None) -> Chunk:
    rows = Rows("m", prefill.tokens[start:end], start, 0, 0, (), (), transfer=transfer)
    return Chunk(prefill, None, rows, PrefillCost(0.0, 0.0))


def behind(origins: Origins, prefill: Prefill, position: int) -> set[Behind]:
    return set(origins.behind(prefill, position))


def test_what_was_received_counts_for_those_who_find_it_until_somebody_has_computed_it() -> None:
    origins, first = Origins(), prefill_of(200)
    origins.chunk(chunk(first, 0, 64))
    origins.chunk(chunk(first, 64, 128, upper(2, 1)))
    origins.chunk(chunk(first, 128, 200))
    assert origins.received_tokens == TILE
    assert [behind(origins, first, place) for place in (63, 128, 199)] == [set(), {Behind.RECEIVED}, {Behind.RECEIVED}]
    for found, expected in ((192, {Behind.RECEIVED}), (128, {Behind.RECEIVED}), (64, set())):
        later = prefill_of(250, found)
        origins.begins(later)
        assert behind(origins, later, found) == expected
    origins.chunk(chunk(prefill_of(130), 0, 128))
    again = prefill_of(140, 128)
    origins.begins(again)
    assert behind(origins, again, 128) == set()


def test_rows_behind_an_invocation_are_told_from_those_whose_base_has_read_nothing() -> None:
    origins = Origins()
    for found, mark, expected in (
        (0, 70, {Behind.INVOKED}),
        (64, 70, {Behind.INVOKED, Behind.FOUND}),
        (0, 0, set()),
    ):
        prefill = prefill_of(100, found, mark)
        origins.begins(prefill)
        assert behind(origins, prefill, 80) == expected
        assert behind(origins, prefill, 69) == set()
