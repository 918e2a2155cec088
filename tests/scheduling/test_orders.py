"""What orders decide, on loads that a reader can work out."""

import math
import random
from dataclasses import replace

import pytest

from hybrid_cache.errors import ConfigError
from hybrid_cache.scheduling.base import Job, Load, Order, Pause, Task
from hybrid_cache.scheduling.learned import MOST_LATER, Learned, machine_s
from hybrid_cache.scheduling.published import FCFS, LAMPS, SJF, VLLM, InferCept, ProgressTTL
from hybrid_cache.scheduling.registry import ORDERS, make_order
from hybrid_cache.spec import PrefillCost


def load_of(**fields: float) -> Load:
    """1 ms a token of prefill, 1 kB a token and 100 kB a state, in 10 MB of which 2 MB run."""
    load = Load(10_000_000, 1000.0, 100_000, PrefillCost(1.0, 0.0), **fields)  # type: ignore[arg-type]
    load.running_bytes, load.s_per_flop, load.step_s, load.row_s = 2_000_000, 1e-3, 0.02, 0.001
    return load


def pause_of(num_tokens: int, tool: str = "search", **fields: object) -> Pause:
    pause = Pause(task=Task(0.0, "", ""), tool=tool, **fields)  # type: ignore[arg-type]
    pause.num_tokens = num_tokens

    class Node:
        pass

    node = Node()
    node.num_tokens = num_tokens  # type: ignore[attr-defined]
    pause.at = node  # type: ignore[assignment]
    return pause


def job(num_tokens: int, cached: int = 0, arrival_s: float = 0.0, calls: int = 0, submitted_s: float = 0.0) -> Job:
    return Job(Task(arrival_s, "", "", calls), submitted_s, num_tokens, cached, 100)


def knows(load: Load, *seconds: float) -> Load:
    for each in seconds:
        load.tools.add("", "search", each)
    return load


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_a_context_is_spared_while_waiting_wastes_less_than_computing_it_again(weight: float) -> None:
    """m(1000) = 1.1 MB, computed in 1 s: 1 s * (0.55 + 2) MB = 2.55 MB s."""
    bound_s = weight * 2.55 / 1.1
    for times, kept in ((bound_s * 0.98, True), (bound_s * 1.02, False)):
        order, load = Learned(weight), knows(load_of(), *[times] * 40)
        assert order.keeps(pause_of(1000), load) is kept


def test_what_has_gone_is_not_kept() -> None:
    order, load, pause = Learned(), knows(load_of(), *[0.1] * 40), pause_of(1000)
    assert order.keeps(pause, load)
    pause.at = None
    assert not order.keeps(pause, load)


@pytest.mark.parametrize(("host_bytes_per_s", "seconds"), [(0.0, 1.0), (11e6, 0.1), (0.5e6, 1.0)])
def test_what_has_left_is_computed_again_or_comes_from_a_second_tier(host_bytes_per_s: float, seconds: float) -> None:
    assert load_of(host_bytes_per_s=host_bytes_per_s).again_s(1000) == pytest.approx(seconds)


def test_a_hint_is_believed_until_it_is_wrong() -> None:
    order, load = Learned(1.0), knows(load_of(), *[100.0] * 40)
    pause = pause_of(1000, hint_s=2.0)
    assert order.keeps(pause, load)
    load.now = 2.5
    assert load.time_left(pause) == pytest.approx(97.5)
    assert not order.keeps(pause, load)


def test_without_times_a_pause_is_ten_seconds() -> None:
    assert load_of().time_left(pause_of(1000)) == 10.0


def test_tasks_go_by_arrival_while_nobody_waits() -> None:
    order, load = Learned(), load_of()
    long, short = job(5000, arrival_s=1.0), job(10, arrival_s=2.0)
    for each in (long, short):
        order.came(each, load)
    assert order.key(long, load) < order.key(short, load)


def of_kind(kind: str, num_tokens: int, **fields: float) -> Job:
    each = job(num_tokens, **fields)  # type: ignore[arg-type]
    each.task.kind = kind
    return each


def after(load: Load, **seconds: float) -> Load:
    """Tasks of these kinds have ended, all with the same guess, that took so long."""
    for kind, each in seconds.items():
        for _ in range(200):
            load.outlook.guessed("", kind, 1.0)
            load.outlook.took("", kind, 1.0, each)
    return load


def test_kinds_that_take_less_go_first_once_there_is_a_wait() -> None:
    order, load = Learned(), after(load_of(wait_s=50.0), slow=20.0, quick=1.0)
    slow, quick = of_kind("slow", 100, arrival_s=1.0), of_kind("quick", 100, arrival_s=20.0)
    for each in (slow, quick):
        order.came(each, load)
    assert order.turns(load)
    assert order.key(quick, load) < order.key(slow, load)


def test_longer_prompts_go_later_where_that_has_said_something() -> None:
    rng = random.Random(0)
    for holds in (True, False):
        order, load = Learned(), load_of(wait_s=50.0)
        for _ in range(300):
            each = job(rng.randrange(100, 5000))
            order.came(each, load)
            guess = each.task.guess_s
            assert guess is not None
            load.outlook.took("", "", guess, guess if holds else rng.uniform(1, 5))
        assert order.turns(load)
        long, short = job(5000, arrival_s=1.0), job(100, arrival_s=30.0)
        for each in (long, short):
            order.came(each, load)
        assert (order.key(short, load) < order.key(long, load)) is holds


def test_a_task_keeps_its_place_while_it_goes_on() -> None:
    order, load = Learned(), after(load_of(wait_s=50.0), k=2.0)
    first = of_kind("k", 100, arrival_s=1.0)
    order.came(first, load)
    before = order.key(first, load)
    first.task.num_calls = 3
    later = replace(first, num_tokens=9000, num_cached=0)
    order.came(later, load)
    assert order.key(later, load) == before


def test_nobody_is_put_back_by_more_than_a_multiple_of_the_wait() -> None:
    order, load = Learned(), after(load_of(wait_s=50.0), huge=1e6)
    for _ in range(200):
        after(load, small=0.01)
    assert order.turns(load)
    huge = of_kind("huge", 1000, arrival_s=3.0)
    order.came(huge, load)
    assert order.key(huge, load) == 3.0 + MOST_LATER * 50.0


def test_keys_are_made_again_only_when_the_wait_has_changed() -> None:
    order, load = Learned(), load_of(wait_s=50.0)
    assert order.turns(load)
    load.wait_s = 55.0
    assert not order.turns(load)
    load.wait_s = 80.0
    assert order.turns(load)


def test_what_the_cache_has_is_not_to_be_done() -> None:
    assert machine_s(job(2000, 1900), load_of()) < machine_s(job(2000), load_of()) / 2


def test_calls_that_are_expected_count() -> None:
    load = load_of()
    before = machine_s(job(1000), load)
    for _ in range(50):
        load.outlook.ended("", "", 5)
    assert machine_s(job(1000), load) > before
    assert machine_s(job(1000, calls=4), load) == pytest.approx(before)


def test_a_state_is_reserved_where_a_call_is_likely_and_memory_scarce() -> None:
    load = knows(load_of(), *[0.1] * 40)
    load.running_bytes = 6_000_000
    assert not Learned().reserves(job(1000), load)
    for _ in range(50):
        load.outlook.ended("", "", 5)
    assert Learned().reserves(job(1000), load)
    assert not Learned().reserves(job(1000, calls=4), load)  # the last one, as a rule
    load.running_bytes = 4_000_000
    assert not Learned().reserves(job(1000), load)


def test_a_state_is_reserved_by_how_long_calls_of_that_kind_take() -> None:
    """Not by the tool that was called last: at the first turn there is none."""
    load = knows(load_of(), *[20.0] * 40)
    load.running_bytes = 6_000_000
    for kind, seconds in (("quick", 0.1), ("slow", 100.0)):
        for _ in range(50):
            load.outlook.ended("", kind, 5)
            load.outlook.returned("", kind, 0, seconds)
    assert Learned().reserves(replace(job(1000), task=Task(0.0, "", "quick")), load)
    assert not Learned().reserves(replace(job(1000), task=Task(0.0, "", "slow")), load)
    load.host_bytes_per_s = 20e9  # what leaves comes back: it need not stay
    assert Learned().reserves(replace(job(1000), task=Task(0.0, "", "slow")), load)


def test_infercept_takes_the_time_since_the_call_for_the_time_to_come() -> None:
    order, load = InferCept(), knows(load_of(), *[1000.0] * 40)
    assert order.keeps(pause_of(1000), load)
    load.now = 2.55 / 1.1 + 0.1
    assert not order.keeps(pause_of(1000), load)


def test_lamps_decides_once_at_the_call_and_ranks_by_memory_and_time() -> None:
    order, load = LAMPS(60.0), knows(load_of(), *[1.0] * 40)
    pause = pause_of(1000)
    order.paused(pause, load)
    load.now = 1e6
    assert order.keeps(pause, load)
    assert order.key(job(100), load) < order.key(job(1000), load)
    assert order.patience_s == 60.0
    assert LAMPS(math.inf).patience_s == math.inf


def test_ttl_ends_after_ten_seconds() -> None:
    order, load = ProgressTTL(), load_of()
    pause = pause_of(1000)
    order.paused(pause, load)
    assert order.keeps(pause, load)
    load.now = 10.1
    assert not order.keeps(pause, load)


def test_simple_orders() -> None:
    load = load_of()
    early, late = job(100, arrival_s=1.0, submitted_s=9.0), job(50, arrival_s=2.0, submitted_s=8.0)
    assert VLLM().key(late, load) < VLLM().key(early, load)
    assert FCFS().key(early, load) < FCFS().key(late, load)
    assert SJF().key(late, load) < SJF().key(early, load)
    assert not any(order.keeps(pause_of(10), load) for order in (VLLM(), FCFS(), SJF()))


@pytest.mark.parametrize("name", ORDERS)
def test_every_order_answers(name: str) -> None:
    order: Order = make_order(name)
    load = knows(load_of(wait_s=3.0), *[1.0, 2.0, 30.0] * 10)
    pause = pause_of(500)
    order.came(job(100), load)
    order.paused(pause, load)
    assert math.isfinite(order.key(job(100), load))
    assert order.keeps(pause, load) in (True, False)
    assert order.reserves(job(100), load) in (True, False)
    assert order.turns(load) in (True, False)


def test_an_unknown_order_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="unknown order 'lifo', must be one of learned, fcfs"):
        make_order("lifo")
