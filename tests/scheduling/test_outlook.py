"""What is expected of a task by what came of others: by hand, and where guesses are right, wrong and worth nothing."""

import random

import pytest

from hybrid_cache.scheduling.outlook import (
    DISTINCT_CALLS,
    FEW,
    MEMORY,
    MOST_KINDS,
    NEW_TOKENS,
    OUTPUT_TOKENS,
    SIZES,
    Mean,
    Outlook,
    Sizes,
)


def learned(truth_of, seed: int = 0, num: int = 400) -> Sizes:  # type: ignore[no-untyped-def]
    """Sizes after tasks about which 1 to 9 seconds were guessed."""
    rng, sizes = random.Random(seed), Sizes()
    for _ in range(num):
        guess = rng.uniform(1, 9)
        sizes.guessed.add(guess)
        sizes.ended(guess, truth_of(guess, rng))
    return sizes


def test_nothing_is_known_at_first_and_all_are_of_one_size() -> None:
    sizes = Sizes()
    for guess in (2.0, 4.0):
        sizes.guessed.add(guess)
    assert sizes.expected(2.0) == sizes.expected(4.0) == 3.0


def test_guesses_that_hold_are_believed() -> None:
    sizes = learned(lambda guess, rng: guess)
    assert sizes.expected(8.0) == pytest.approx(8.0, rel=0.1)
    assert sizes.expected(2.0) == pytest.approx(2.0, rel=0.2)


def test_guesses_that_say_nothing_change_nothing() -> None:
    sizes = learned(lambda guess, rng: rng.uniform(10, 20))
    assert sizes.expected(8.0) == pytest.approx(sizes.expected(2.0), rel=0.1)
    assert sizes.expected(5.0) == pytest.approx(15.0, rel=0.1)


def test_guesses_that_say_the_contrary_are_not_turned_round() -> None:
    sizes = learned(lambda guess, rng: 10 - guess)
    assert sizes.expected(8.0) == sizes.expected(2.0)


def test_a_guess_never_counts_for_more_than_it_is() -> None:
    sizes = learned(lambda guess, rng: 5 * guess)
    assert sizes.expected(8.0) - sizes.expected(2.0) <= 6.0


def test_the_mean_counts_for_more_than_guesses_while_few_are_known() -> None:
    sizes = learned(lambda guess, rng: guess, num=FEW)
    few, many = (s.expected(8.0) - s.expected(2.0) for s in (sizes, learned(lambda guess, rng: guess)))
    assert few == pytest.approx(many / 2, rel=0.1)


def test_what_was_true_long_ago_is_forgotten() -> None:
    sizes = learned(lambda guess, rng: guess)
    for _ in range(5 * SIZES):
        sizes.guessed.add(5.0)
        sizes.ended(5.0, 100.0)
    assert sizes.expected(5.0) == pytest.approx(100.0, rel=0.1)


def test_kinds_and_tenants_have_sizes_of_their_own() -> None:
    outlook = Outlook()
    for _ in range(200):
        outlook.guessed("a", "large", 1.0)
        outlook.took("a", "large", 1.0, 50.0)
        outlook.guessed("a", "small", 1.0)
        outlook.took("a", "small", 1.0, 0.5)
    assert outlook.size("a", "large", 1.0) == pytest.approx(2.0, rel=0.1)
    assert outlook.size("a", "small", 1.0) < 0.1


def test_tasks_of_the_only_kind_are_of_size_one() -> None:
    outlook, rng = Outlook(), random.Random(0)
    for _ in range(30):
        guess = rng.uniform(1, 9)
        outlook.guessed("a", "k", guess)
        assert outlook.size("a", "k", 5.0) == pytest.approx(1.0, abs=1.0)
        outlook.took("a", "k", guess, 100.0)
        assert outlook.size("a", "k", guess) == pytest.approx(1.0, abs=0.01)


def test_a_pause_is_expected_to_take_as_long_as_those_before_in_the_same_place() -> None:
    outlook = Outlook()
    for _ in range(300):
        outlook.returned("", "k", 0, 0.1)
        outlook.returned("", "k", 1, 30.0)
    habits = outlook.of("", "k")
    assert habits.pause_s(0) == pytest.approx(0.1, abs=0.1)
    assert habits.pause_s(1) == pytest.approx(30.0, rel=0.05)


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
