"""How long tools take: the mean of what is left of those that took longer."""

import numpy as np
import pytest

from hybrid_cache.scheduling.tool_times import FEWEST_TIMES, LEAST_S, MOST_TIMES, MOST_TOOLS, UNKNOWN_S, ToolTimes


def times_of(*seconds: float, tool: str = "search", tenant: str = "") -> ToolTimes:
    tools = ToolTimes()
    for each in seconds:
        tools.add(tenant, tool, each)
    return tools


def test_what_is_left_is_the_mean_of_those_that_took_longer() -> None:
    tools = times_of(1, 2, 3, 10, 20)
    assert tools.left("", "search", 0.0) == pytest.approx(7.2)
    assert tools.left("", "search", 2.5) == pytest.approx((3 + 10 + 20) / 3 - 2.5)
    assert tools.left("", "search", 10.0) == pytest.approx(10.0)


def test_beyond_the_longest_as_much_is_left_as_has_passed() -> None:
    assert times_of(1, 2, 3, 4, 5).left("", "search", 300.0) == 300.0


def test_something_is_always_left() -> None:
    assert times_of(*[1e-5] * 9).left("", "search", 0.0) == LEAST_S


def test_a_tool_that_is_hardly_known_goes_by_all_tools_of_its_tenant() -> None:
    tools = times_of(*[2.0] * FEWEST_TIMES)
    tools.add("", "fetch", 50.0)
    assert tools.left("", "fetch", 0.0) == pytest.approx((FEWEST_TIMES * 2.0 + 50.0) / (FEWEST_TIMES + 1))
    assert tools.left("other tenant", "search", 0.0) == UNKNOWN_S


def test_only_the_latest_count() -> None:
    tools = times_of(*[100.0] * MOST_TIMES, *[1.0] * (MOST_TIMES + 16))
    assert tools.left("", "search", 0.0) == pytest.approx(1.0, rel=0.05)
    assert len(tools.times("", "search")) == MOST_TIMES


def test_tools_are_bounded() -> None:
    tools = ToolTimes()
    for number in range(3 * MOST_TOOLS):
        tools.add(str(number % 7), f"tool {number}", 1.0)
    assert len(tools) <= MOST_TOOLS


def test_a_tool_that_is_used_is_remembered_however_many_others_there_are() -> None:
    tools = times_of(50.0)
    for number in range(3 * MOST_TOOLS // 2):
        tools.add("", f"tool {number}", 1.0)
        if number % 1000 == 0:
            tools.add("", "search", 1.0)
    assert tools.times("", "search")[-1] == 50.0
    assert tools.times("", "tool 0") == []


def test_of_an_unknown_tool_as_much_is_left_as_has_passed() -> None:
    assert ToolTimes().left("", "search", 5.0) == UNKNOWN_S
    assert ToolTimes().left("", "search", 300.0) == 300.0


def test_heavy_tails_leave_more_the_longer_they_last() -> None:
    rng = np.random.default_rng(0)
    tools = times_of(*(rng.pareto(1.5, 400) + 1.0).tolist())
    left = [tools.left("", "search", elapsed) for elapsed in (0.0, 3.0, 10.0)]
    assert left == sorted(left)


def test_a_running_sum_is_the_mean_of_what_is_left_of_the_latest() -> None:
    """Against a count by hand; sums are renewed now and then, so the latest few may be missing."""
    rng = np.random.default_rng(1)
    seconds = rng.lognormal(1.0, 1.5, 600).tolist()
    tools = times_of(*seconds)
    for elapsed in (0.0, 1.0, 5.0, 20.0):
        longer = [s for s in seconds[-MOST_TIMES:] if s > elapsed]
        assert tools.left("", "search", elapsed) == pytest.approx(np.mean(longer) - elapsed, rel=0.25)
