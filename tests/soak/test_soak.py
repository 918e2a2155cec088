"""A few rounds of each script of this folder."""

from tests.soak import signals


def test_signals_at_random_moments_break_nothing() -> None:
    assert signals.run(rounds=2, seed=1) == []
