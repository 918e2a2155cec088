"""Means of what is to come of a task, by what came of others of its kind."""

import pytest

from hybrid_cache.scheduling.outlook import DISTINCT_CALLS, MEMORY, MOST_KINDS, NEW_TOKENS, OUTPUT_TOKENS, Mean, Outlook


def test_a_guess_counts_as_one_value() -> None:
    mean = Mean(10.0)
    for value in (20.0, 60.0):
        mean.add(value)
    assert mean.value == pytest.approx(30.0)


def test_a_mean_follows_what_has_changed_however_much_came_before() -> None:
    mean = Mean(10.0)
    for value in [10.0] * 100 * MEMORY + [20.0] * 3 * MEMORY:
        mean.add(value)
    assert mean.value == pytest.approx(20.0, rel=0.05)


def test_calls_that_are_left_fall_from_one_to_the_next_and_the_last_turn_makes_none() -> None:
    outlook = Outlook()
    for _ in range(20 * MEMORY):
        outlook.ended("", "", 3)
    habits = outlook.of("", "")
    assert [habits.calls_left(call) for call in range(3)] == pytest.approx([2.0, 1.0, 0.0], abs=0.01)
    assert [habits.calls(call) for call in range(3)] == pytest.approx([1.0, 1.0, 0.0], abs=0.01)


def test_late_calls_count_as_one() -> None:
    outlook = Outlook()
    outlook.answered("", "", 5 * DISTINCT_CALLS, 100)
    habits = outlook.of("", "")
    assert habits.answer(DISTINCT_CALLS - 1) == habits.answer(DISTINCT_CALLS + 3) == (OUTPUT_TOKENS + 100) / 2
    assert habits.answer(DISTINCT_CALLS - 2) == OUTPUT_TOKENS


def test_kinds_of_two_tenants_are_two() -> None:
    outlook = Outlook()
    outlook.grown("a", "kind", 1000)
    assert outlook.of("a", "kind").new.value == (NEW_TOKENS + 1000) / 2
    assert outlook.of("b", "kind").new.value == NEW_TOKENS


def test_of_too_many_kinds_the_one_heard_of_longest_ago_is_forgotten() -> None:
    outlook = Outlook()
    outlook.grown("", "often", 1000)
    for number in range(MOST_KINDS):
        outlook.grown("", f"kind {number}", 1000)
        outlook.grown("", "often", 1000)
    assert outlook.of("", "often").new.value > 900
    assert outlook.of("", "kind 0").new.value == NEW_TOKENS
    assert outlook.of("", f"kind {MOST_KINDS - 1}").new.value > NEW_TOKENS
