"""Turns that have ended in a call: which prompt goes on from which, what is learned of it, and what is forgotten."""

from typing import Any

import numpy as np
import pytest

from hybrid_cache.cache.claims import Claims
from hybrid_cache.cache.keys import Keys, keys_of
from hybrid_cache.cache.tree import Checkpoint, CheckpointKind, Node
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.scheduling.base import Load, Pause, Task
from hybrid_cache.scheduling.pauses import FORGOTTEN_AFTER_S, Pauses
from hybrid_cache.scheduling.published import FCFS
from hybrid_cache.spec import PrefillCost
from tests.fakes import tokens_of

ANSWER = 3  # tokens


class Noting(FCFS):
    """Spares all that it is asked about, and notes what it is told of."""

    def __init__(self) -> None:
        self.told: list[str | None] = []

    def paused(self, pause: Pause, load: Load) -> None:
        self.told.append(pause.tool)

    def keeps(self, pause: Pause, load: Load) -> bool:
        return True


class Turns:
    """Pauses of one scheduler, and turns with prompts of one text."""

    def __init__(self, host_bytes_per_s: float = 0.0) -> None:
        self.load = Load(10_000_000, 1000.0, 100_000, PrefillCost(1.0, 0.0), host_bytes_per_s)
        self.order, self.claims = Noting(), Claims(stateless=False)
        self.pauses = Pauses(self.claims, self.order, self.load)

    def end(self, name: str, keys: Keys, session: str = "", tool: str | None = "look", tip: Node | None = None) -> Task:
        """A turn ends, in a call if a tool is given."""
        task = Task(self.load.now, "", "", num_calls=1)
        self.pauses.ended(name, task, session, keys, keys.num_tokens, tip, ANSWER)
        if tool is not None:
            assert self.pauses.called(name, tool, None)
        return task

    def resumed(self, keys: Keys, session: str = "", **more: Any) -> Pause | None:
        return self.pauses.resumed("", session, keys, **more)


def prompt(num_tokens: int, seed: int = 1) -> Keys:
    return keys_of("", tokens_of(seed, num_tokens))


def node_of(keys: Keys, num_pages: int, *, kept: bool) -> Node:
    """The last of so many nodes, with or without a state."""
    node = Node("", None, b"", 0, 0, 0.0)
    for n in range(num_pages):
        parent = node
        node = parent.children[keys.pages[n]] = Node(
            "", parent, keys.pages[n], (n + 1) * TILE, n, 0.0, keys.names[n + 1]
        )
    if kept:
        node.checkpoint = Checkpoint(node, 0, CheckpointKind.MESSAGE_END)
    return node


def test_a_call_that_is_told_of_twice_is_one_pause_and_the_order_hears_both() -> None:
    turns = Turns()
    turns.end("a", prompt(100), tool=None)
    assert turns.pauses.stats.num_paused == 0
    assert turns.pauses.called("a", "", None)
    assert turns.pauses.called("a", "look", 3.0)
    assert turns.pauses.stats.num_paused == 1
    assert turns.order.told == ["", "look"]


def test_a_call_of_a_request_that_nobody_knows_is_no_pause() -> None:
    turns = Turns()
    assert not turns.pauses.called("a", "look", None)
    assert turns.pauses.stats.num_paused == len(turns.pauses) == 0


def test_a_longer_prompt_goes_on_and_the_same_one_begins_a_task() -> None:
    turns = Turns()
    task = turns.end("a", prompt(2 * TILE))
    assert turns.resumed(prompt(2 * TILE)) is None
    pause = turns.resumed(prompt(2 * TILE + 1))
    assert pause is not None
    assert pause.task is task
    assert turns.resumed(prompt(2 * TILE + 1)) is None, "who comes second begins a task"


def test_a_prompt_goes_on_from_the_longest_turn_that_it_begins_with() -> None:
    turns = Turns()
    turns.end("short", prompt(2 * TILE))
    task = turns.end("long", prompt(4 * TILE))
    pause = turns.resumed(prompt(6 * TILE))
    assert pause is not None
    assert pause.task is task


def test_a_turn_that_called_nothing_ends_its_task() -> None:
    turns = Turns()
    turns.end("a", prompt(100), tool=None)
    assert turns.resumed(prompt(150)) is None
    assert len(turns.pauses) == 0
    assert turns.pauses.stats.num_resumed == 0


def test_a_named_session_goes_on_from_its_own_turn_only() -> None:
    turns = Turns()
    turns.end("a", prompt(100), session="a")
    assert turns.resumed(prompt(150), session="b") is None
    assert turns.resumed(prompt(150), session="a") is not None


def test_an_edited_history_finds_its_task_by_the_session_but_nothing_of_it_in_the_cache() -> None:
    turns = Turns()
    task = turns.end("a", prompt(3 * TILE), session="s", tip=node_of(prompt(3 * TILE), 3, kept=True))
    for other in ({}, {"answers": False}, {"answers": True, "kind": "other tools"}):
        assert turns.resumed(prompt(3 * TILE, seed=2), session="s", **other) is None
        assert turns.pauses.stats.num_paused == 1
    pause = turns.resumed(prompt(3 * TILE, seed=2), session="s", answers=True)
    assert pause is not None
    assert pause.task is task
    assert pause.num_resumed == 0
    assert turns.pauses.stats.num_resident == 0


@pytest.mark.parametrize("length", [TILE - 1, 2 * TILE])
def test_where_nobody_knows_whether_a_result_comes_it_is_the_first_page_that_says(length: int) -> None:
    turns = Turns()
    task = turns.end("a", prompt(3 * TILE), session="s")
    other = turns.end("b", prompt(40), session="t")
    edited = keys_of("", np.concatenate([tokens_of(1, TILE), tokens_of(9, length)]))
    assert turns.resumed(prompt(length, seed=2), session="s") is None
    pause = turns.resumed(edited, session="s")
    assert pause is not None
    assert pause.task is task
    pause = turns.resumed(prompt(30, seed=5), session="t")
    assert pause is not None
    assert pause.task is other, "both are shorter than a page"


def test_a_session_that_is_named_from_the_second_request_on_goes_on() -> None:
    turns = Turns()
    turns.end("theirs", prompt(100), session="other")
    task = turns.end("ours", prompt(100))
    pause = turns.resumed(prompt(150), session="s")
    assert pause is not None
    assert pause.task is task
    assert turns.resumed(prompt(150), session="s") is None


def test_its_own_turn_goes_before_one_of_nobody() -> None:
    turns = Turns()
    turns.end("nobody's", prompt(100))
    task = turns.end("named", prompt(100), session="s")
    pause = turns.resumed(prompt(150), session="s")
    assert pause is not None
    assert pause.task is task


def test_an_id_is_that_of_the_newest_request() -> None:
    turns = Turns()
    turns.end("a", prompt(100))
    turns.pauses.begins("a")
    assert not turns.pauses.called("a", "other", 77.0)
    turns.pauses.over("a")
    assert turns.pauses.stats.num_paused == 1
    assert turns.resumed(prompt(150)) is not None


def test_of_two_calls_of_one_session_nobody_knows_which_was_edited() -> None:
    turns = Turns()
    for seed in (1, 2):
        turns.end(f"{seed}", prompt(100, seed), session="s")
    assert turns.resumed(prompt(100, seed=3), session="s", answers=True) is None
    assert len(turns.pauses) == 2


def test_what_was_computed_of_an_answer_is_what_its_task_returns_to() -> None:
    turns = Turns()
    keys = prompt(4 * TILE + 5)
    turns.end("a", prompt(2 * TILE), tip=node_of(keys, 2, kept=True))
    computed = node_of(keys, 4, kept=True)
    turns.pauses.computed("a", "", keys, computed)
    assert len(list(turns.claims.on(computed.checkpoint))) == 1  # type: ignore[arg-type]
    pause = turns.resumed(prompt(6 * TILE))
    assert pause is not None
    assert (pause.num_resumed, pause.num_tokens) == (4 * TILE, 4 * TILE)


def test_what_was_computed_of_several_that_said_the_same_belongs_to_none() -> None:
    turns = Turns()
    keys = prompt(4 * TILE + 5)
    for name in ("a", "b"):
        turns.end(name, prompt(2 * TILE))
    computed = node_of(keys, 4, kept=True)
    turns.pauses.computed("", "", keys, computed)
    assert list(turns.claims.on(computed.checkpoint)) == []  # type: ignore[arg-type]


def test_how_long_a_call_took_is_learned_of_its_tool_and_of_the_turn_that_made_it() -> None:
    turns = Turns()
    turns.end("a", prompt(100))
    turns.load.now = 2.0
    assert turns.resumed(prompt(150)) is not None
    assert turns.load.tools.times("", "look") == [2.0]
    habits = turns.load.outlook.of("", "")
    assert habits.pause_s(0) == pytest.approx((10.0 + 2.0) / 2)
    assert habits.pause_s(1) == 10.0


def test_what_is_spared_is_what_a_call_or_a_returned_request_counts_on() -> None:
    turns = Turns()
    assert turns.pauses.keeps(Pause(tool="look"))
    assert not turns.pauses.keeps(Pause())
    assert turns.pauses.keeps(Pause(returned=True))
    assert turns.claims.keeps == turns.pauses.keeps


@pytest.mark.parametrize(("host_bytes_per_s", "kept"), [(0.0, True), (20e9, False)])
def test_what_a_running_turn_started_from_is_spared_where_nothing_else_has_it(
    host_bytes_per_s: float, kept: bool
) -> None:
    assert Turns(host_bytes_per_s).pauses.keeps(Pause(running=True)) is kept


def test_what_nobody_returns_to_is_forgotten_after_its_time_and_not_before() -> None:
    turns = Turns()
    for number, began_s in enumerate((0.0, 1.0)):
        turns.load.now = began_s
        turns.end(f"{number}", prompt(100, number))
    turns.load.now = FORGOTTEN_AFTER_S - 0.5
    turns.pauses.forget_old()
    assert len(turns.pauses) == 2
    turns.load.now += 1.0
    turns.pauses.forget_old()
    assert len(turns.pauses) == 1
    assert turns.pauses.stats.num_forgotten == 1
    assert turns.resumed(prompt(150, 0)) is None
    assert turns.resumed(prompt(150, 1)) is not None


def test_of_too_many_pauses_those_that_began_first_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_cache.scheduling.pauses.MOST_PAUSES", 3)
    turns = Turns()
    for number in range(5):
        turns.end(f"{number}", prompt(100, number))
    turns.pauses.forget_old()
    assert len(turns.pauses) == 3
    assert [turns.resumed(prompt(150, number)) is not None for number in range(5)] == [False, False, True, True, True]


def test_a_later_turn_of_the_same_name_outlives_the_earlier_one() -> None:
    turns = Turns()
    turns.end("a", prompt(100, 1))
    turns.load.now = 10.0
    turns.end("a", prompt(100, 2), tool=None)
    turns.load.now = FORGOTTEN_AFTER_S + 5
    turns.pauses.forget_old()
    assert len(turns.pauses) == 1
    assert turns.pauses.called("a", "look", None)


def test_a_task_that_has_ended_leaves_nothing() -> None:
    turns = Turns()
    node = node_of(prompt(100), 1, kept=True)
    turns.end("a", prompt(100), session="s", tip=node)
    assert list(turns.claims.on(node.checkpoint))  # type: ignore[arg-type]
    turns.pauses.over("a")
    assert not list(turns.claims.on(node.checkpoint))  # type: ignore[arg-type]
    assert len(turns.pauses) == turns.pauses.stats.num_paused == 0
    assert turns.resumed(prompt(150), session="s") is None
    assert not turns.pauses.called("a", "look", None)
