"""What publishing costs is measured on an engine that publishes and evicts."""

import pytest

from hybrid_cache.bench.engine.events import measure


@pytest.mark.slow
def test_publishing_costs_little_of_a_busy_engine() -> None:
    """The threads' own part, which other work on the machine does not disturb. The aim is 1 %."""
    costs = measure(None, pairs=3, talks=4, budget_bytes=24 << 20, threads=1, states=False, seed=0)
    assert all(each.blocks > 20 for each in costs)
    assert 0 < min(each.share for each in costs) < 0.02
