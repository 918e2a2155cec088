"""Whose turn it is: short prompts behind long ones, tenants who ask for much, and steps that are bounded by time."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.pace import FIRST_TILES, Pace
from hybrid_cache.engine.scheduler import Step
from hybrid_cache.engine.shares import Shares
from hybrid_cache.engine.turns import MOST_PASSED_OVER
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import Request
from hybrid_cache.spec import PrefillCost
from tests.engine.test_engine import answers, make_request
from tests.fakes import SumModel, sum_model_answer, tokens_of


def engine_of(**config: object) -> tuple[Engine, SumModel]:
    model = SumModel()
    return Engine(model, EngineConfig(budget_bytes=1 << 24, **config)), model  # type: ignore[arg-type]


def of_tenant(tenant: str, request: Request) -> Request:
    return replace(request, tenant=tenant)


def test_a_short_prompt_does_not_wait_for_a_long_one_nor_share_a_step_with_it() -> None:
    engine, model = engine_of(max_tiles=8)
    engine.submit(make_request("long", tokens_of(0, 4000), 1))
    engine.step()
    engine.submit(make_request("short", tokens_of(1, 50), 1))
    rows = model.rows_computed
    outputs = engine.step()
    assert answers(outputs, "short") == sum_model_answer(tokens_of(1, 50), 1)
    assert model.rows_computed - rows == 50
    outputs = engine.run_until_idle()
    assert answers(outputs, "long") == sum_model_answer(tokens_of(0, 4000), 1)
    engine.check()


def test_prompts_that_end_in_a_step_share_it() -> None:
    engine, model = engine_of(max_tiles=8)
    for i in range(4):
        engine.submit(make_request(str(i), tokens_of(i, 100), 1))
    engine.step()
    assert model.rows_computed == 400


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    """One comes with each step."""
    engine, _ = engine_of(max_tiles=4)
    engine.submit(make_request("long", tokens_of(0, 1000), 1))
    ended = None
    for step in range(200):
        engine.submit(make_request(f"short {step}", tokens_of(step + 1, 60), 1))
        if answers(engine.step(), "long"):
            ended = step
            break
    assert ended is not None
    assert ended <= 4 * (MOST_PASSED_OVER + 1) + 4  # 16 tiles, four at a time


def test_nor_by_so_many_that_each_of_them_waits_as_long() -> None:
    engine, _ = engine_of(max_tiles=2)
    engine.submit(make_request("long", tokens_of(0, 1000), 1))
    for i in range(60):
        engine.submit(make_request(f"first {i}", tokens_of(1000 + i, 60), 1))
    for step in range(100):
        for i in range(2):
            engine.submit(make_request(f"short {step} {i}", tokens_of(10 * step + i, 60), 1))
        if answers(engine.step(), "long"):
            break
    else:
        pytest.fail("it was not answered")


@pytest.mark.parametrize("max_running", [4, 32])
def test_a_tenant_who_floods_does_not_keep_another_waiting(max_running: int) -> None:
    engine, _ = engine_of(max_tiles=4, max_running=max_running)
    for i in range(16):
        engine.submit(of_tenant("a", make_request(f"a{i}", tokens_of(i, 600), 30)))
    for _ in range(12):
        engine.step()
    engine.submit(of_tenant("b", make_request("b", tokens_of(99, 600), 1)))
    found = [answers(engine.step(), "b") for _ in range(8)]  # 10 tiles, four a step, and each other one may be a's
    assert [each for each in found if each] == [sum_model_answer(tokens_of(99, 600), 1)]
    outputs = engine.run_until_idle()
    assert all(len(answers(outputs, f"a{i}")) <= 30 for i in range(16))
    engine.check()


def test_a_short_prompt_waits_for_few_of_many_long_ones() -> None:
    engine, _ = engine_of(max_tiles=4)
    for i in range(14):
        engine.submit(make_request(f"long {i}", tokens_of(i, 1500), 1))
    for _ in range(30):
        engine.step()
    engine.submit(make_request("short", tokens_of(99, 50), 1))
    found = [answers(engine.step(), "short") for _ in range(4)]
    assert [each for each in found if each] == [sum_model_answer(tokens_of(99, 50), 1)]


@pytest.mark.parametrize("name", ["0", "z"])
def test_a_tenant_is_not_starved_by_ever_new_ones(name: str) -> None:
    engine, _ = engine_of(max_tiles=4)
    engine.submit(of_tenant(name, make_request("long", tokens_of(0, 1000), 1)))
    for step in range(80):
        engine.submit(of_tenant(f"new {step}", make_request(f"short {step}", tokens_of(step + 1, 50), 1)))
        if answers(engine.step(), "long"):
            break
    else:
        pytest.fail("it was not answered")


def test_who_gives_way_in_the_step_in_which_its_kept_prompt_was_found() -> None:
    """A tenant's whole prompt is kept; another tenant takes the place that it just got."""
    engine, _ = engine_of(max_running=2)
    tokens = tokens_of(0, 100)
    engine.submit(make_request("first", tokens, 3))
    engine.run_until_idle()
    for name, tenant in (("a1", "a"), ("a2", "a"), ("b", "b")):
        engine.submit(of_tenant(tenant, make_request(name, tokens, 6)))
    outputs = engine.run_until_idle()
    for name in ("a1", "a2", "b"):
        assert answers(outputs, name) == sum_model_answer(tokens, 6)
    engine.check()


def test_two_tenants_get_as_much_whoever_asks_for_more() -> None:
    """Until the one who asks for less has nothing left, both have about as many tokens computed."""
    engine, _ = engine_of(max_tiles=4, max_running=8)
    for i in range(30):
        engine.submit(of_tenant("a", make_request(f"a{i}", tokens_of(i, 500), 1)))
    for i in range(10):
        engine.submit(of_tenant("b", make_request(f"b{i}", tokens_of(100 + i, 500), 1)))
    done = {"a": 0, "b": 0}
    while done["b"] < 10:
        for name, _output in engine.step():
            done[name[0]] += 1
        assert abs(done["a"] - done["b"]) <= 6  # outputs, two a request; requests end whole
    assert done["a"] < 30


def test_what_is_computed_counts_for_the_tenant_who_asked() -> None:
    engine, _ = engine_of(max_tiles=4)
    shares, computed = engine._scheduler._shares, Counter[str]()
    for tenant, length in (("a", 1000), ("b", 900)):
        engine.submit(of_tenant(tenant, make_request(tenant, tokens_of(length, length), 1)))

    def count(step: Step) -> None:
        computed.update({c.sequence.request.tenant: c.end - c.start for c in step.chunks if c.sequence is not None})

    engine.watch = count
    while shares.num_present == 2 and engine._scheduler.num_waiting + engine.stats().running == 2:
        assert {tenant: shares.served(tenant) for tenant in computed} == computed
        engine.step()
    assert min(computed.values()) >= 800


def test_whoever_gives_way_is_answered_as_if_nothing_had_happened() -> None:
    """All tenants, in a budget so small that there are preemptions of both kinds."""
    rng = random.Random(0)
    engine = Engine(SumModel(), EngineConfig(budget_bytes=60_000, max_running=6, max_tiles=4))
    prompts = {f"{i}": tokens_of(i, rng.choice((20, 100, 300))) for i in range(40)}
    lengths = {name: rng.choice((1, 5, 40)) for name in prompts}
    outputs = []
    for name, tokens in prompts.items():
        engine.submit(of_tenant(rng.choice("abc"), make_request(name, tokens, lengths[name])))
        if rng.random() < 0.3:
            outputs += engine.step()
    outputs += engine.run_until_idle()
    for name, tokens in prompts.items():
        assert answers(outputs, name) == sum_model_answer(tokens, lengths[name])
    assert engine.stats().num_preemptions > 0
    engine.check()


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["enter", "leave", "charge"]), st.integers(1, 99))))
def test_a_newcomer_starts_from_the_lowest_counter(events: list[tuple[str, str, int]]) -> None:
    shares, present = Shares(), dict.fromkeys("abcde", 0)
    for tenant, event, amount in events:
        others = [shares.served(t) for t, n in present.items() if n]
        if event == "enter":
            before = shares.served(tenant)
            shares.enter(tenant)
            if not present[tenant]:
                assert shares.served(tenant) == max(before, min(others, default=0.0))
            present[tenant] += 1
        elif present[tenant] and event == "leave":
            shares.leave(tenant)
            present[tenant] -= 1
        elif present[tenant]:
            before = shares.served(tenant)
            shares.charge(tenant, amount)
            assert shares.served(tenant) == before + amount
        assert shares.num_present == sum(n > 0 for n in present.values())


def test_tenants_who_are_gone_are_forgotten() -> None:
    shares = Shares()
    shares.enter("stays")
    for i in range(20_000):
        shares.enter(str(i))
        shares.charge(str(i), i % 7)
        shares.leave(str(i))
        shares.charge("stays", 10)
    assert len(shares._served) < 5000


COST = PrefillCost(1.0, 0.001)


def test_a_step_takes_as_long_as_it_may() -> None:
    """At one FLOP a microsecond, of which later tokens take more."""
    pace = Pace(COST, 0.001)
    for start in (0, 640, 64000):
        pace.note(COST.flops(start, start + 640) * 1e-6, COST.flops(start, start + 640), 0)
    room = pace.room(decodes=False)
    most = room.tiles(0, 16)
    assert COST.flops(0, most * TILE) <= 1000 < COST.flops(0, (most + 1) * TILE)
    room.take(0, 5 * TILE)
    left = room.tiles(640, 16)
    assert COST.flops(640, 640 + left * TILE) <= 1000 - COST.flops(0, 5 * TILE) < COST.flops(640, 704 + left * TILE)
    assert pace.room(decodes=False).tiles(64000, 16) == 1  # the first one always
    assert room.tiles(64000, 16) == 0
    pace.note(0.0005, 0.0, 1)
    assert most > pace.room(decodes=True).tiles(0, 16) > 0
    assert pace.room(decodes=False).tiles(0, 3) == 3


def test_without_a_bound_there_is_none_and_without_a_rate_there_are_few_tiles() -> None:
    assert Pace(COST, None).room(decodes=True).tiles(10_000, 16) == 16
    assert Pace(COST, 1.0).room(decodes=True).tiles(0, 16) == FIRST_TILES


@pytest.mark.parametrize("max_step_ms", [0.0, -1.0, float("nan")])
def test_a_bound_that_nothing_keeps_is_refused(max_step_ms: float) -> None:
    with pytest.raises(ConfigError, match="must be more than 0"):
        EngineConfig(max_step_ms=max_step_ms)


def test_steps_that_are_bounded_give_the_same_answers() -> None:
    engine, _ = engine_of(max_tiles=16, max_step_ms=1.0)
    for i, length in enumerate((1000, 30, 500, 64, 700)):
        engine.submit(make_request(str(i), tokens_of(i, length), 9))
    outputs = engine.run_until_idle()
    for i, length in enumerate((1000, 30, 500, 64, 700)):
        assert answers(outputs, str(i)) == sum_model_answer(tokens_of(i, length), 9)
    engine.check()
