"""Those who wait, in the order of their places, which may change while they do."""

from dataclasses import replace

import pytest

from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.line import Line, Rank
from hybrid_cache.engine.sequence import Sequence
from hybrid_cache.engine.shares import Shares
from hybrid_cache.scheduling.base import Task
from tests.engine.test_engine import make_request
from tests.fakes import SumModel, tokens_of

Places = dict[Sequence, tuple[Rank, float]]


@pytest.fixture
def sequences() -> list[Sequence]:
    """Four of one tenant, in the order in which they came."""
    engine = Engine(SumModel(), EngineConfig(1 << 20))
    for number in range(4):
        engine.submit(make_request(f"{number}", tokens_of(number, 100)))
    return list(engine._scheduler.tasks.waiting)


def line_of(places: Places) -> Line:
    line = Line(places.__getitem__)
    for sequence in places:
        line.add(sequence)
    return line


def order(line: Line) -> list[str]:
    """Who is taken out, by name."""
    return [sequence.request.id for sequence in line.in_turn((), Shares())]


def test_ranks_go_before_keys_and_keys_before_arrivals(sequences: list[Sequence]) -> None:
    keys = [(Rank.NEW, 1.0), (Rank.NEW, 1.0), (Rank.LATE, 9.0), (Rank.GAVE_WAY, 9.0)]
    line = line_of(dict(zip(reversed(sequences), reversed(keys), strict=True)))
    assert order(line) == ["3", "2", "0", "1"]
    assert len(line) == 0


def test_a_place_that_has_fallen_back_is_noticed_when_it_is_first(sequences: list[Sequence]) -> None:
    places: Places = {sequence: (Rank.HELD, number) for number, sequence in enumerate(sequences)}
    line = line_of(places)
    places[sequences[0]] = (Rank.NEW, 0.0)
    places[sequences[1]] = (Rank.HELD, 2.5)
    assert order(line) == ["2", "1", "3", "0"]


def test_a_place_further_ahead_holds_once_it_is_told_of(sequences: list[Sequence]) -> None:
    places: Places = {sequence: (Rank.NEW, number) for number, sequence in enumerate(sequences)}
    line = line_of(places)
    places[sequences[3]] = (Rank.LATE, 0.0)
    line.place_again(sequences[3:])
    assert order(line) == ["3", "0", "1", "2"]


def test_who_has_left_is_not_taken_and_may_come_back(sequences: list[Sequence]) -> None:
    places: Places = {sequence: (Rank.NEW, number) for number, sequence in enumerate(sequences)}
    line = line_of(places)
    line.remove(sequences[0])
    line.remove(sequences[2])
    places[sequences[2]] = (Rank.NEW, 9.0)
    line.add(sequences[2])
    assert len(line) == line.num_requests == 3
    assert order(line) == ["1", "3", "2"]


def test_only_those_count_as_new_tasks_that_have_made_no_call(sequences: list[Sequence]) -> None:
    for number, sequence in enumerate(sequences):
        sequence.task = Task(0.0, "", "", num_calls=number)
    sequences[3].index = 1
    line = line_of({sequence: (Rank.NEW, 0.0) for sequence in sequences})
    assert (line.num_requests, line.num_tasks) == (3, 1)
    assert sequences[0].task is not None
    sequences[0].task.num_calls = 1  # it ends while it waits
    line.remove(sequences[0])
    assert (line.num_requests, line.num_tasks) == (2, 0)


def test_tenants_who_wait_take_turns_with_those_who_run(sequences: list[Sequence]) -> None:
    for sequence in sequences[2:]:
        sequence.request = replace(sequence.request, tenant="other")
    runs = sequences.pop(0)
    shares = Shares()
    for tenant in ("", "other"):
        shares.enter(tenant)
    line = line_of({sequence: (Rank.NEW, 0.0) for sequence in sequences})
    assert next(line.in_turn((runs,), shares)).request.id == "2"
