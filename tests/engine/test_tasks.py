"""Tasks in the engine: who goes first, what is kept for those who wait for a tool, and that nobody waits for ever."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from hybrid_cache.cache.policies.registry import policy_names
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine import tasks
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.engine.tasks import LEAST_OVERDUE_S
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import CacheMode, FinishReason, PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.scheduling.base import Job, Load, Pause
from hybrid_cache.scheduling.learned import MOST_LATER, Learned
from hybrid_cache.scheduling.outlook import NEW_TOKENS, OUTPUT_TOKENS
from hybrid_cache.scheduling.pauses import FORGOTTEN_AFTER_S, MOST_ALIKE
from hybrid_cache.scheduling.published import FCFS
from hybrid_cache.scheduling.registry import ORDERS
from hybrid_cache.stats import PauseStats
from hybrid_cache.tokens import Boundary, BoundaryKind, Prompt, TokenArray
from tests.fakes import SumModel, sum_model_answer, tokens_of

LONG = "40"


class Ticking:
    """A clock that is a hundredth of a second later each time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


def new_engine(slots: int = 8, pages: int = 40, clock: Callable[[], float] | None = None, **config: object) -> Engine:
    model = SumModel()
    budget_bytes = slots * (model.cache_spec.slot_bytes + 64) + pages * model.cache_spec.page_bytes
    settings = EngineConfig(budget_bytes, **config)  # type: ignore[arg-type]
    return Engine(model, settings, clock=clock or Ticking())


def ask(engine: Engine, name: str, tokens: TokenArray, max_tokens: int = 3, **fields: object) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    request = Request(name, Prompt(tokens), sampling, **fields)  # type: ignore[arg-type]
    engine.submit(request)
    return request


def said(outputs: Outputs, name: str) -> list[int | None]:
    return [o.token for each, o in outputs if each == name and isinstance(o, TokenOutput)]


def cached(outputs: Outputs, name: str) -> int:
    (found,) = (o.cached_tokens for each, o in outputs if each == name and isinstance(o, PromptOutput))
    return found


def begun(outputs: Outputs) -> list[str]:
    """Requests in the order of their first tokens."""
    return list(dict.fromkeys(name for name, o in outputs if isinstance(o, TokenOutput)))


def longer(tokens: TokenArray, answer: list[int], seed: int, extra: int = 30) -> TokenArray:
    return np.concatenate([tokens, np.asarray(answer, np.int32), tokens_of(seed, extra)])


@pytest.mark.parametrize("order", ORDERS)
def test_everybody_is_served_when_those_who_return_hold_all_memory_and_a_large_prompt_waits(order: str) -> None:
    """Were returned contexts pins, and the first in the queue too large beside them, nothing would ever move."""
    engine = new_engine(slots=8, pages=34, order=order)
    prompts = {f"task {i}": tokens_of(i, 8 * TILE + 10) for i in range(4)}
    for name, tokens in prompts.items():
        ask(engine, name, tokens, session=name)
    outputs = engine.run_until_idle()
    for name in prompts:
        engine.pause(name, "tool", 5.0)
    ask(engine, "runs", tokens_of(50, 100), 40)
    outputs += engine.step()
    ask(engine, "large", tokens_of(51, 28 * TILE), 5)
    asked = {}
    for i, (name, tokens) in enumerate(prompts.items()):
        asked[f"{name} again"] = longer(tokens, sum_model_answer(tokens, 3), 60 + i)
        ask(engine, f"{name} again", asked[f"{name} again"], session=name)
    for _ in range(600):
        outputs += engine.step()
        engine.check()
        if engine.idle:
            break
    assert engine.idle
    assert said(outputs, "large") == sum_model_answer(tokens_of(51, 28 * TILE), 5)
    for name, tokens in asked.items():
        assert said(outputs, name) == sum_model_answer(tokens, 3)


def test_a_newcomer_waits_rather_than_evict_what_a_paused_task_will_return_to() -> None:
    found = {}
    for order in ("fcfs", "learned"):
        engine = new_engine(slots=6, pages=30, order=order, policy="lru")
        for i in range(30):  # what the order learns: tools of that name are quick
            ask(engine, f"quick {i}", tokens_of(500 + i, 70), 2, session=f"quick {i}")
            engine.run_until_idle()
            engine.pause(f"quick {i}", "tool")
            ask(engine, f"answered {i}", longer(tokens_of(500 + i, 70), [1], 900 + i), 2, session=f"quick {i}")
            engine.run_until_idle()
            engine.end_task(f"answered {i}")
        tokens = tokens_of(1, 10 * TILE)
        ask(engine, "task", tokens, session="task")
        ask(engine, "runs", tokens_of(2, 60), 60)
        outputs: Outputs = []
        while engine.is_open("task"):
            outputs += engine.step()
        engine.pause("task", "tool")
        for i in range(3):
            ask(engine, f"new {i}", tokens_of(10 + i, 8 * TILE), 2)
        for _ in range(6):
            outputs += engine.step()
        again = longer(tokens, sum_model_answer(tokens, 3), 3)
        ask(engine, "again", again, session="task")
        outputs += engine.run_until_idle()
        engine.check()
        found[order] = cached(outputs, "again")
        assert said(outputs, "again") == sum_model_answer(again, 3)
    assert found["learned"] >= 10 * TILE > found["fcfs"]


class Keeping(Learned):
    """Reserves and spares all it is asked about."""

    def reserves(self, job: Job, load: Load) -> bool:
        return True

    def keeps(self, pause: Pause, load: Load) -> bool:
        return True


@pytest.mark.parametrize("policy", policy_names())
def test_a_turn_is_reserved_for_under_any_policy_that_keeps_states(policy: str) -> None:
    model = SumModel()
    budget_bytes = 5 * (model.cache_spec.slot_bytes + 64) + 12 * model.cache_spec.page_bytes
    engine = Engine(model, EngineConfig(budget_bytes, policy=policy), clock=Ticking(), order=Keeping())
    for i in range(12):
        tokens = tokens_of(i % 4, 3 * TILE + 5)
        ask(engine, f"{i}", tokens, 3, session=f"s{i % 4}")
        if i % 3 == 2:
            outputs = engine.run_until_idle()
            assert said(outputs, f"{i}") == sum_model_answer(tokens, 3)
            engine.check()
    stats = engine.stats().cache
    assert (stats.checkpoints > 0) is (policy != "none")


@pytest.mark.parametrize("extra", [2, 20, TILE + 20])
@pytest.mark.parametrize(("slots", "pages"), [(3, 10), (3, 16), (3, 40)])
@pytest.mark.parametrize("together", [False, True])
def test_what_a_turn_started_from_is_kept_for_the_next(extra: int, slots: int, pages: int, together: bool) -> None:
    """Also if the turn adds no tile, so that both start from the same state."""
    model = SumModel()
    budget_bytes = slots * (model.cache_spec.slot_bytes + 64) + pages * model.cache_spec.page_bytes
    engine = Engine(model, EngineConfig(budget_bytes, policy="lru"), clock=Ticking(), order=Keeping())
    first = tokens_of(1, 4 * TILE + 5)
    ask(engine, "first", first, session="s")
    outputs = engine.run_until_idle()
    engine.pause("first", "tool")
    second = longer(first, sum_model_answer(first, 3), 2, extra)
    ask(engine, "second", second, 40, session="s")
    if not together:
        outputs += engine.step()
    for i in range(3):
        ask(engine, f"new {i}", tokens_of(10 + i, 3 * TILE), 2)
    while engine.is_open("second"):
        outputs += engine.step()
    third = longer(second, sum_model_answer(second, 40), 3)
    request = Request("third", Prompt(third), SamplingParams(temperature=0, max_tokens=3), session="s")
    assert cached(outputs, "second") == 4 * TILE
    assert engine.cached_tokens(request) >= len(second) // TILE * TILE
    engine.pause("second", "tool")
    engine.submit(request)
    outputs += engine.run_until_idle()
    engine.check()
    assert said(outputs, "third") == sum_model_answer(third, 3)
    for i in range(3):
        assert said(outputs, f"new {i}") == sum_model_answer(tokens_of(10 + i, 3 * TILE), 2)


def test_a_state_that_is_computed_again_is_what_the_task_returns_to() -> None:
    """Its pages were there all the time, so that the prompt is in the tree as far as they go from the beginning."""
    engine = new_engine(slots=10, pages=60, order="learned")
    engine = Engine(SumModel(), EngineConfig(engine.cache.budget_bytes), clock=Ticking(), order=Keeping())
    stem = tokens_of(1, 10 * TILE)
    ask(engine, "before", np.concatenate([stem, tokens_of(2, 200)]), 2)
    engine.run_until_idle()
    for node in engine.cache.tree.nodes():
        if node.num_tokens == len(stem) and node.checkpoint is not None:
            engine.cache.pool.evict(node.checkpoint)
    ask(engine, "runs", np.concatenate([stem, tokens_of(3, 30)]), 30)
    for _ in range(5):
        engine.step()
    (sequence,) = engine._scheduler.sequences()
    assert sequence.claim is not None
    assert sequence.claim.num_resumed == len(stem)


@pytest.mark.parametrize("order", ["learned", "infercept", "lamps-unbounded", "continuum"])
def test_a_task_that_returns_at_once_for_ever_keeps_nobody_out(order: str) -> None:
    clock = Ticking()
    engine = new_engine(slots=20, pages=200, clock=clock, max_running=1, order=order)
    tokens = tokens_of(1, 100)
    ask(engine, "endless 0", tokens, session="endless")
    ask(engine, "waits", tokens_of(2, 70))
    begun = clock.now
    for turn in range(200):
        outputs: Outputs = []
        while engine.is_open(f"endless {turn}"):
            outputs += engine.step()
            if said(outputs, "waits"):
                assert clock.now - begun > LEAST_OVERDUE_S
                return
        engine.pause(f"endless {turn}", "tool", 0.001)
        tokens = longer(tokens, said(outputs, f"endless {turn}"), 3, 2)  # type: ignore[arg-type]
        ask(engine, f"endless {turn + 1}", tokens, session="endless")
        clock.now += 1.0
    raise AssertionError("it still waits")


@pytest.mark.parametrize("num_waiting", [1, 4])
def test_nor_does_it_make_those_who_come_later_wait_longer(num_waiting: int) -> None:
    """However many were kept out before, and by agents whose tools take no time."""
    clock = Ticking()
    engine = new_engine(slots=20, pages=200, clock=clock, max_running=2)
    tokens, begun, waits = {f"agent{i} 0": tokens_of(i, 100) for i in range(4)}, dict[str, float](), list[float]()
    for name, prompt in tokens.items():
        ask(engine, name, prompt, session=name.split()[0])
    for number in range(1000):
        clock.now += 1.0
        outputs = engine.step()
        for name in {name for name, _ in outputs}:
            if name in begun and said(outputs, name):
                waits.append(clock.now - begun.pop(name))
            if name not in tokens or engine.is_open(name):
                continue
            agent, turn = name.split()
            engine.pause(name, "fast")
            prompt = tokens.pop(name)
            prompt = longer(prompt, [5], 3, 2) if len(prompt) < 600 else prompt[:100]
            tokens[f"{agent} {int(turn) + 1}"] = prompt
            ask(engine, f"{agent} {int(turn) + 1}", prompt, session=agent)
        while len(begun) < num_waiting and number > 5:
            name = f"waits {number} {len(begun)}"
            begun[name] = clock.now
            ask(engine, name, tokens_of(1000 + number, 20), 2)
    assert len(waits) > 8
    assert max(waits) < 1.5 * num_waiting * LEAST_OVERDUE_S, waits


@pytest.mark.parametrize("start_s", [0.0, 1e6])
def test_the_present_wait_is_of_those_who_wait(start_s: float) -> None:
    """Not how long the machine was up or idle before."""
    clock = Ticking()
    clock.now = start_s
    engine = new_engine(slots=20, pages=100, clock=clock, max_running=1)
    for i in range(5):
        ask(engine, f"alone {i}", tokens_of(i, 100))
        engine.run_until_idle()
        clock.now += 3600
    begun = clock.now
    for i in range(20):
        ask(engine, f"waits {i}", tokens_of(100 + i, 100))
    for _ in range(20):
        engine.step()
    assert 0 < engine._scheduler.tasks.load.wait_s < 20 * (clock.now - begun)


def test_a_task_that_returns_goes_before_those_who_came_after_it() -> None:
    engine = new_engine(slots=20, pages=100, max_running=1)
    first = tokens_of(1, 3 * TILE)
    ask(engine, "first", first, session="s")
    outputs = engine.run_until_idle()
    engine.pause("first", "tool")
    for i in range(4):
        ask(engine, f"other {i}", tokens_of(10 + i, 200), 3)
    ask(engine, "second", longer(first, sum_model_answer(first, 3), 2), session="s")
    outputs += engine.run_until_idle()
    assert begun(outputs)[:2] == ["first", "second"]
    assert cached(outputs, "second") == 3 * TILE


def test_a_task_whose_history_was_edited_keeps_its_place_by_its_session_only() -> None:
    engine = new_engine(slots=20, pages=100, max_running=1)
    for session in ("named", ""):
        ask(engine, f"first {session}", tokens_of(1, 200), session=session)
        engine.run_until_idle()
        engine.pause(f"first {session}", "tool")
    for i in range(3):
        ask(engine, f"other {i}", tokens_of(10 + i, 200), 3)
    ask(engine, "edited, without a name", tokens_of(4, 200))
    ask(engine, "edited", np.concatenate([tokens_of(1, TILE), tokens_of(3, 136)]), session="named")
    outputs = engine.run_until_idle()
    order = begun(outputs)
    assert order.index("edited") < order.index("other 0")
    assert order.index("edited, without a name") > order.index("other 0")


def test_conversations_that_share_their_beginning_are_different_tasks() -> None:
    """Their full pages are the same, what was said behind them is not."""
    engine = new_engine(slots=20, pages=100)
    system = tokens_of(1, 2 * TILE)
    a, b = (np.concatenate([system, tokens_of(seed, 20)]) for seed in (2, 3))
    for name, tokens in (("a", a), ("b", b)):
        ask(engine, name, tokens)
    engine.run_until_idle()
    engine.pause("a", "tool a")
    engine.pause("b", "tool b")
    ask(engine, "c", np.concatenate([system, tokens_of(4, 25)]))
    assert engine.stats().pauses.num_paused == 2, "nobody has come back"
    ask(engine, "b again", longer(b, sum_model_answer(b, 3), 5))
    assert engine.stats().pauses.num_paused == 1
    engine.run_until_idle()
    ask(engine, "a again", longer(a, sum_model_answer(a, 3), 6))
    assert engine.stats().pauses.num_paused == 0
    engine.run_until_idle()
    engine.check()


def lamps_engine_with_one_that_runs() -> tuple[Engine, Ticking]:
    """Of those who wait the shortest goes first, until they have waited for a minute."""
    clock = Ticking()
    engine = new_engine(slots=20, pages=100, max_running=1, order="lamps", clock=clock)
    ask(engine, "runs", tokens_of(1, 100), 3)
    engine.step()
    return engine, clock


def test_those_who_are_late_go_first_in_the_order_in_which_they_came() -> None:
    engine, clock = lamps_engine_with_one_that_runs()
    engine._scheduler.tasks._between_s = 10.0  # nobody is overdue
    for i in range(3):
        ask(engine, f"long {i}", tokens_of(10 + i, 600 - 100 * i))
    clock.now += 61
    for i in range(3):
        ask(engine, f"short {i}", tokens_of(20 + i, 40 + 10 * i))
    names = ["long 0", "long 1", "long 2", "short 0", "short 1", "short 2"]
    assert [name for name in begun(engine.run_until_idle()) if name != "runs"] == names


@pytest.mark.parametrize("gone", [False, True])
def test_a_task_that_returns_goes_first_while_the_cache_has_what_it_returns_to(gone: bool) -> None:
    engine, _ = lamps_engine_with_one_that_runs()
    engine.run_until_idle()
    tokens = tokens_of(2, 600)
    ask(engine, "task", tokens, session="s")
    engine.run_until_idle()
    engine.pause("task", "tool")
    if gone:
        engine.cache.drop()
    ask(engine, "runs", tokens_of(1, 100), 30)
    engine.step()
    ask(engine, "short", tokens_of(3, 40))
    ask(engine, "again", longer(tokens, sum_model_answer(tokens, 3), 4), session="s")
    outputs = engine.run_until_idle()
    assert begun(outputs)[1:] == (["short", "again"] if gone else ["again", "short"])
    assert cached(outputs, "again") == (0 if gone else 9 * TILE)


def test_an_order_that_goes_by_requests_lets_nobody_overtake_who_returns() -> None:
    engine = new_engine(slots=20, pages=100, max_running=1, order="vllm")
    tokens = tokens_of(1, 200)
    ask(engine, "task", tokens, session="s")
    engine.run_until_idle()
    engine.pause("task", "tool")
    for i in range(2):
        ask(engine, f"other {i}", tokens_of(10 + i, 200))
    ask(engine, "again", longer(tokens, sum_model_answer(tokens, 3), 2), session="s")
    assert begun(engine.run_until_idle()) == ["other 0", "other 1", "again"]


class Turning(FCFS):
    """The last who came goes first, once it is told to turn."""

    turned = False

    def turns(self, load: Load) -> bool:
        return self.turned

    def key(self, job: Job, load: Load) -> float:
        return -job.submitted_s if self.turned else job.submitted_s


def test_when_the_order_turns_all_who_wait_are_placed_again() -> None:
    model, order = SumModel(), Turning()
    engine = Engine(model, EngineConfig(1 << 20, max_running=1), clock=Ticking(), order=order)
    for i in range(4):
        ask(engine, f"{i}", tokens_of(i, 100))
    outputs = engine.step()
    order.turned = True
    outputs += engine.run_until_idle()
    assert begun(outputs) == ["0", "3", "2", "1"]


def test_a_wait_is_as_long_as_it_took_those_before_to_begin() -> None:
    now = [1000.0]
    engine = new_engine(slots=20, pages=100, max_running=1, clock=lambda: now[0])
    tasks = engine._scheduler.tasks
    for i in range(250):
        ask(engine, f"{i}", tokens_of(i, 10), 1)
    while tasks.waiting.num_tasks > 10:
        now[0] += 2.0
        engine.step()
    tasks.look()
    assert tasks.load.wait_s == pytest.approx(10 * 2.0, rel=0.05)


def test_a_request_that_had_to_give_way_and_calls_of_a_task_are_no_tasks_that_begin() -> None:
    now = [1000.0]
    engine = new_engine(slots=20, pages=100, clock=lambda: now[0])
    scheduler = engine._scheduler
    ask(engine, "task", tokens_of(1, 200), session="s")
    engine.step()
    began_s = scheduler.tasks._since_s
    assert began_s == now[0]
    now[0] += 50
    (sequence,) = scheduler.sequences()
    scheduler._preempt(sequence)
    engine.run_until_idle()
    engine.pause("task", "tool")
    ask(engine, "again", longer(tokens_of(1, 200), sum_model_answer(tokens_of(1, 200), 3), 2), session="s")
    engine.run_until_idle()
    assert scheduler.tasks._since_s == began_s
    ask(engine, "other", tokens_of(3, 200))
    engine.run_until_idle()
    assert scheduler.tasks._since_s == now[0]


def test_what_a_call_has_added_and_how_many_a_task_made_is_learned() -> None:
    engine = new_engine(slots=20, pages=100)
    outlook = engine._scheduler.tasks.load.outlook
    tokens = tokens_of(1, 200)
    for number in range(3):
        ask(engine, f"{number}", tokens, session="s", kind="agent")
        engine.run_until_idle()
        engine.pause(f"{number}", "tool")
        tokens = longer(tokens, sum_model_answer(tokens, 3), 10 + number)
    habits = outlook.of("", "agent")
    assert habits.new.value == pytest.approx((NEW_TOKENS + 30 + 30) / 3)
    assert [habits.answer(call) for call in range(4)] == [(OUTPUT_TOKENS + 3) / 2] * 3 + [OUTPUT_TOKENS]
    engine.end_task("2")
    assert [habits.calls_left(call) for call in range(4)] == [1.0, 0.5, 0.0, 0.0]


def test_what_a_preempted_request_has_computed_is_spared_until_it_runs_again() -> None:
    engine = new_engine(slots=20, pages=100)
    tasks = engine._scheduler.tasks
    ask(engine, "a", tokens_of(1, 200), 5)
    engine.step()
    (sequence,) = engine._scheduler.sequences()
    engine._scheduler._preempt(sequence)
    claim = sequence.claim
    assert claim is not None
    assert claim.num_resumed == 3 * TILE
    assert tasks.pauses.keeps(claim)
    ended = engine.run_until_idle()
    assert said(ended, "a")
    assert claim.at is None
    engine.check()


def test_nothing_is_spared_for_a_request_that_returned_and_was_aborted() -> None:
    engine = new_engine(slots=20, pages=100, max_running=1)
    tokens = tokens_of(1, 200)
    ask(engine, "task", tokens, session="s")
    engine.run_until_idle()
    engine.pause("task", "tool")
    ask(engine, "runs", tokens_of(2, 100), 10)
    engine.step()
    ask(engine, "again", longer(tokens, sum_model_answer(tokens, 3), 3), session="s")
    (claim,) = [s.claim for s in engine._scheduler.sequences() if s.request.id == "again"]
    assert claim is not None
    assert claim.num_resumed == 3 * TILE
    engine.abort("again")
    assert claim.at is None
    engine.run_until_idle()
    engine.check()


@pytest.mark.parametrize("mode", [CacheMode.IMPLICIT, CacheMode.EXPLICIT])
def test_a_request_that_keeps_its_marks_only_reserves_nothing(mode: CacheMode) -> None:
    model, mark = SumModel(), Boundary(TILE, BoundaryKind.EXPLICIT)
    engine = Engine(model, EngineConfig(1 << 20), clock=Ticking(), order=Keeping())
    prompt, sampling = Prompt(tokens_of(1, 4 * TILE), (mark,)), SamplingParams(temperature=0, max_tokens=5)
    engine.submit(Request("a", prompt, sampling, cache_mode=mode))
    (sequence,) = engine._scheduler.sequences()
    engine.step()
    assert sequence.reserves is (mode is CacheMode.IMPLICIT)
    engine.run_until_idle()


def test_a_turn_that_its_stopper_ends_as_a_call_is_paused_at_once() -> None:
    engine = new_engine(slots=20, pages=100)
    calls = itertools.count()
    stopper = lambda: lambda token: FinishReason.TOOL_CALL if next(calls) == 4 else False  # noqa: E731
    ask(engine, "a", tokens_of(1, 200), 50, make_stopper=stopper)
    outputs = engine.run_until_idle()
    assert len(said(outputs, "a")) == 5
    assert [o.finish for _, o in outputs if isinstance(o, TokenOutput)][-1] is FinishReason.TOOL_CALL
    assert engine.stats().pauses.num_paused == 1


def test_nobody_waits_for_more_than_a_multiple_of_what_first_come_first_served_gives() -> None:
    """Short requests come faster than they can be served, and a long one among them, all of one tenant."""
    waits = {}
    for order in ("fcfs", "learned"):
        engine = new_engine(slots=6, pages=60, max_running=1, order=order, max_waiting=10_000)
        for i in range(60):  # what the order learns: those of the one kind take longer
            kind = "long" if i % 3 == 0 else "short"
            ask(engine, f"before {i}", tokens_of(1000 + i, 800 if kind == "long" else 20), 3, kind=kind)
            engine.run_until_idle()
            engine.end_task(f"before {i}")
        submitted, first = dict[str, int](), dict[str, int]()
        for step in itertools.count():
            if step % 2 == 0 and step < 300:
                name = str(step)
                kind = "long" if name == LONG else "short"
                ask(engine, name, tokens_of(step, 800 if name == LONG else 20), 3, kind=kind)
                submitted[name] = step
            for name, output in engine.step():
                if isinstance(output, TokenOutput):
                    first.setdefault(name, step)
            if step > 300 and engine.idle:
                break
        assert first.keys() == submitted.keys()
        waits[order] = {name: first[name] - submitted[name] for name in first}
    mean = np.mean(list(waits["fcfs"].values()))
    assert mean > 10
    assert waits["fcfs"][LONG] < waits["learned"][LONG] <= (1 + MOST_LATER) * mean
    assert max(waits["learned"].values()) <= (1 + MOST_LATER) * mean


@pytest.mark.parametrize("order", ["learned", "infercept", "fcfs"])
def test_pauses_that_nobody_ends_are_forgotten_and_their_memory_returns(order: str) -> None:
    clock = Ticking()
    engine = new_engine(order=order, clock=clock)
    for i in range(5):
        ask(engine, f"{i}", tokens_of(i, 300), session=f"{i}")
        engine.run_until_idle()
        engine.pause(f"{i}", "tool", 86_400)
    assert engine.stats().pauses.num_paused == 5
    clock.now += 3601
    ask(engine, "later", tokens_of(9, 30 * TILE), 2)
    outputs = engine.run_until_idle()
    assert said(outputs, "later") == sum_model_answer(tokens_of(9, 30 * TILE), 2)
    assert engine.stats().pauses.num_paused == 0
    assert engine.stats().pauses.num_forgotten == 5
    engine.check()


def test_a_request_that_is_paused_while_it_waits_is_not_counted_any_more() -> None:
    engine = new_engine(slots=20, pages=100, max_running=1)
    ask(engine, "runs", tokens_of(1, 200), 20)
    engine.step()
    for i in range(3):
        ask(engine, f"waits {i}", tokens_of(10 + i, 100), 5)
        engine.pause(f"waits {i}", "tool")
    assert engine._scheduler.tasks.waiting.num_tasks == 0
    for i in range(3):
        engine.resume(f"waits {i}", [1, 2])
    outputs = engine.run_until_idle()
    assert said(outputs, "waits 1") == sum_model_answer([*tokens_of(11, 100).tolist(), 1, 2], 5)
    assert len(engine._scheduler.tasks.waiting) == engine._scheduler.tasks.waiting.num_tasks == 0


def test_those_who_leave_the_line_leave_nothing_in_it() -> None:
    for order in ("learned", "lamps"):
        engine = new_engine(slots=20, pages=100, max_running=1, order=order)
        ask(engine, "runs", tokens_of(1, 200), 2000)
        engine.step()
        for i in range(400):
            ask(engine, f"{i}", tokens_of(2, 100), 5)
            engine.abort(f"{i}")
        tasks = engine._scheduler.tasks
        assert sum(map(len, tasks.waiting._queues.values())) < 100
        assert len(tasks._impatient) <= 1


def test_patience_ends_when_it_ends() -> None:
    """4.02 + 60 - 4.02 is a little less than 60."""
    clock = Ticking()
    engine = new_engine(slots=20, pages=100, max_running=1, order="lamps", clock=clock)
    ask(engine, "runs", tokens_of(1, 200), 2000)
    engine.step()
    clock.now = 4.01
    ask(engine, "long", tokens_of(2, 2000), 5)
    (late,) = engine._scheduler.tasks.waiting
    clock.now = late.submitted_s + 60.0 - 0.01
    engine._scheduler.tasks.look()
    assert late in engine._scheduler.tasks._late


def test_sessions_of_two_tenants_are_two() -> None:
    engine = new_engine(slots=20, pages=100)
    tokens = tokens_of(1, 200)
    ask(engine, "a", tokens, session="s", tenant="a")
    engine.run_until_idle()
    engine.pause("a", "tool")
    ask(engine, "other", tokens_of(2, 200), session="s", tenant="b")
    ask(engine, "same beginning", longer(tokens, [1], 3), session="s", tenant="b")
    assert engine.stats().pauses.num_paused == 1
    ask(engine, "a again", longer(tokens, [1], 4), session="s", tenant="a")
    assert engine.stats().pauses.num_paused == 0
    engine.run_until_idle()


@pytest.mark.parametrize("kind", BoundaryKind)
def test_a_boundary_far_from_the_end_does_not_make_others_the_same_task(kind: BoundaryKind) -> None:
    engine = new_engine(slots=20, pages=100)
    system = tokens_of(1, 2 * TILE)
    prompt = Prompt(np.concatenate([system, tokens_of(2, 150)]), (Boundary(2 * TILE, kind),))
    engine.submit(Request("a", prompt, SamplingParams(temperature=0, max_tokens=3)))
    engine.run_until_idle()
    engine.pause("a", "tool")
    ask(engine, "b", np.concatenate([system, tokens_of(3, 300)]))
    assert engine.stats().pauses.num_paused == 1
    engine.run_until_idle()


def test_equal_prompts_with_other_answers_are_told_apart() -> None:
    engine = new_engine(slots=20, pages=100)
    tokens, answers = tokens_of(1, 200), {}
    for name, bias in (("a", {5: 100.0}), ("b", {6: 100.0})):
        sampling = SamplingParams(temperature=0, max_tokens=80, logit_bias=bias)
        engine.submit(Request(name, Prompt(tokens), sampling))
        outputs = engine.run_until_idle()
        answers[name] = [token for token in said(outputs, name) if token is not None]
        engine.pause(name, f"tool {name}")
    for name in ("b", "a"):
        ask(engine, f"{name} again", longer(tokens, answers[name], 9))
        (sequence,) = engine._scheduler.sequences()
        assert sequence.task is not None
        assert sequence.task.tool == f"tool {name}"
        engine.run_until_idle()


@pytest.mark.parametrize("length", [100, 10])
def test_a_request_that_is_paused_while_it_waits_keeps_its_place(length: int) -> None:
    engine = new_engine(slots=20, pages=100, max_running=1, order="fcfs")
    ask(engine, "runs", tokens_of(1, 200), 10)
    engine.step()
    ask(engine, "paused", tokens_of(2, length), 3)
    engine.pause("paused", "tool")
    for i in range(2):
        ask(engine, f"later {i}", tokens_of(10 + i, 100), 3)
    engine.resume("paused", [1, 2, 3])
    assert begun(engine.run_until_idle())[1] == "paused"


def test_many_turns_behind_one_page_are_not_searched_one_by_one() -> None:
    engine = new_engine(slots=20, pages=100)
    system = tokens_of(1, 3 * TILE)
    for i in range(3 * MOST_ALIKE):
        ask(engine, f"{i}", np.concatenate([system, tokens_of(100 + i, 20)]), 1)
        engine.run_until_idle()
        engine.pause(f"{i}", "tool")
    assert max(map(len, engine._scheduler.tasks.pauses._by_name.values())) == MOST_ALIKE
    for i in range(3 * MOST_ALIKE):
        engine.end_task(f"{i}")
    assert not engine._scheduler.tasks.pauses._by_name
    engine.check()


def test_a_call_that_is_never_answered_is_forgotten_without_anybody_coming() -> None:
    clock = Ticking()
    engine = new_engine(slots=20, pages=100, clock=clock)
    ask(engine, "a", tokens_of(1, 200), session="s")
    engine.run_until_idle()
    engine.pause("a", "look")
    assert not engine.has_work
    assert 0 < engine.forgets_in_s <= FORGOTTEN_AFTER_S
    clock.now += FORGOTTEN_AFTER_S + 1
    assert engine.has_work
    engine.step()
    assert not engine.has_work
    assert engine.stats().pauses == PauseStats(num_forgotten=1)
    assert not engine.cache.claims._claims
    assert engine.forgets_in_s == math.inf


@pytest.mark.parametrize("mode", CacheMode)
def test_an_id_that_is_used_again_says_nothing_of_the_turn_before(mode: CacheMode) -> None:
    engine = new_engine(slots=20, pages=100)
    ask(engine, "a", tokens_of(1, 200), session="one")
    engine.run_until_idle()
    engine.pause("a", "look", 5.0)
    ask(engine, "a", tokens_of(2, 100), 50, session="two", cache_mode=mode)
    engine.step()
    engine.pause("a", "other", 77.0)
    engine.abort("a")
    (pause,) = engine._scheduler.tasks.pauses._turns
    assert (pause.tool, pause.hint_s) == ("look", 5.0)
    ask(engine, "b", longer(tokens_of(1, 200), [1], 3, 40), session="one")
    assert engine.stats().pauses == PauseStats(0, 1, 1, 0)


@pytest.mark.parametrize("roles", [("system", "user"), ("user",), ("system", "user", "assistant", "user")])
def test_what_a_session_asks_beside_its_task_leaves_it_alone(roles: tuple[str, ...]) -> None:
    engine = new_engine(slots=20, pages=100)
    ask(engine, "lead", tokens_of(1, 200), session="s", kind="tools")
    engine.run_until_idle()
    engine.pause("lead", "ask another agent")
    marks = tuple(Boundary(30 * (i + 1), role=role) for i, role in enumerate(roles))
    for kind in ("", "tools"):
        prompt = Prompt(tokens_of(2, 150), marks)
        engine.submit(Request(f"beside {kind}", prompt, SamplingParams(max_tokens=2), session="s", kind=kind))
        engine.run_until_idle()
    assert engine.stats().pauses == PauseStats(1, 0, 0, 0)
    ask(engine, "back", longer(tokens_of(1, 200), [1], 3, 40), session="s", kind="tools")
    assert engine.stats().pauses == PauseStats(0, 1, 1, 0)


@pytest.mark.parametrize(
    ("roles", "whether"),
    [
        ((), None),
        (("", ""), None),
        (("system", "user"), False),
        (("tool",), True),
        (("system", "user", "assistant", "tool"), True),
        (("user", "assistant", "tool", "tool", "user"), True),
        (("user", "assistant", "tool", "assistant", "user"), False),
        (("user", "assistant"), False),
    ],
)
def test_a_result_is_brought_behind_the_last_answer(roles: tuple[str, ...], whether: bool | None) -> None:
    marks = tuple(Boundary(10 * (i + 1), role=role) for i, role in enumerate(roles))
    assert tasks._answers(Prompt(tokens_of(1, 100), marks)) is whether
