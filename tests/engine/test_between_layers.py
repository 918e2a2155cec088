"""Short prompts that come while a pass is under way are computed between its layers, and nobody's bits change."""

import asyncio
import threading
from dataclasses import replace

import pytest
from torch import Tensor

from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.engine.scheduler import Step
from hybrid_cache.engine.shares import Shares
from hybrid_cache.engine.turns import MOST_PASSED_OVER
from hybrid_cache.errors import Overloaded
from hybrid_cache.request import Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from tests.engine.test_engine import answers, make_request
from tests.fakes import SumModel, sum_model_answer, tokens_of


class Busy:
    """An engine to which requests come at the first pause of its next pass, or behind it if it has none."""

    def __init__(self, model: SumModel | None = None, **config: object) -> None:
        options = {"budget_bytes": 1 << 24, "max_tiles": 16, "order": "fcfs", **config}
        self.engine = Engine(model or SumModel(), EngineConfig(**options))  # type: ignore[arg-type]
        self.engine.between_layers = self._between_layers
        self.engine.watch = self._watch
        self.steps: list[Step] = []
        self.between: Outputs = []
        self._to_come: list[Request] = []

    def step(self, *requests: Request) -> Outputs:
        """These come between two layers -> what arose from the pass; `between` holds what arose inside it."""
        self.between, self._to_come = [], list(requests)
        outputs = self.engine.step()
        self._submit()
        return outputs

    def _watch(self, step: Step) -> None:
        self.steps.append(step)

    def _between_layers(self) -> None:
        if self._to_come:
            self._submit()
            self.between += self.engine.step_between()

    def _submit(self) -> None:
        while self._to_come:
            self.engine.submit(self._to_come.pop(0))


def of_tenant(tenant: str, request: Request) -> Request:
    return replace(request, tenant=tenant)


def long_prompt(num_tokens: int = 1000) -> Request:
    return make_request("long", tokens_of(0, num_tokens), 3)


def short(number: int, num_tokens: int = 50, max_tokens: int = 3) -> Request:
    return make_request(str(number), tokens_of(number, num_tokens), max_tokens)


def test_a_short_prompt_gets_its_first_token_before_the_pass_ends() -> None:
    busy = Busy()
    busy.engine.submit(long_prompt())
    outputs = busy.step(short(1))
    assert answers(busy.between, "1") == sum_model_answer(tokens_of(1, 50), 3)[:1]
    assert not answers(outputs, "1")
    outputs += busy.engine.run_until_idle()
    assert busy.between[-1:]
    assert answers(busy.between + outputs, "1") == sum_model_answer(tokens_of(1, 50), 3)
    assert answers(outputs, "long") == sum_model_answer(tokens_of(0, 1000), 3)
    busy.engine.check()
    assert busy.engine.stats().cache.working_bytes == 0


def test_together_they_take_no_more_than_the_pass() -> None:
    busy = Busy(max_tiles=2)
    busy.engine.submit(long_prompt())
    busy.step(short(1, 200), short(2, 60), short(3, 64), short(4, 40))
    assert [name for name, output in busy.between if isinstance(output, TokenOutput)] == ["2", "3"]
    outputs = busy.engine.run_until_idle()
    for number, length in ((1, 200), (4, 40)):
        assert answers(outputs, str(number)) == sum_model_answer(tokens_of(number, length), 3)
    busy.engine.check()


def test_nor_more_tiles_than_a_step_may_have() -> None:
    """A tile deep in a prompt has the FLOPs of many at the beginning of one."""
    busy = Busy(max_tiles=2)
    busy.engine.submit(long_prompt(4000))
    while busy.engine._scheduler._running == [] or busy.engine._scheduler._running[0].prefill.computed < 3700:
        busy.engine.step()
    busy.step(short(1, 300), short(2, 100), short(3, 40))
    assert [name for name, output in busy.between if isinstance(output, TokenOutput)] == ["2"]
    busy.engine.run_until_idle()
    busy.engine.check()


def test_a_tenant_for_whom_more_was_computed_waits_for_the_end() -> None:
    busy = Busy(max_tiles=4)
    busy.engine.submit(of_tenant("a", make_request("a", tokens_of(50, 3000), 1)))
    busy.engine.submit(of_tenant("b", make_request("b", tokens_of(51, 3000), 1)))
    busy.step(of_tenant("b", short(10, 200, 1)))
    assert answers(busy.between, "10")
    busy.engine._scheduler._shares.charge("b", 10_000)
    busy.step(of_tenant("b", short(11, 200, 1)))
    assert not busy.between
    busy.step(of_tenant("a", short(12, 150, 1)), of_tenant("new", short(13, 20, 1)))
    assert [name for name, output in busy.between if isinstance(output, TokenOutput)] == ["13", "12"]
    busy.engine.run_until_idle()
    busy.engine.check()


def test_a_whole_prompt_that_is_kept_gives_its_token_at_once() -> None:
    busy = Busy()
    busy.engine.submit(short(1))
    busy.engine.run_until_idle()
    rows = busy.engine.model.rows_computed  # type: ignore[attr-defined]
    busy.engine.submit(long_prompt(128))
    busy.step(replace(short(1), id="again"))
    assert answers(busy.between, "again") == sum_model_answer(tokens_of(1, 50), 3)[:1]
    assert busy.engine.model.rows_computed - rows == 128  # type: ignore[attr-defined]
    busy.engine.run_until_idle()
    busy.engine.check()


def test_the_end_of_a_prompt_between_layers_is_kept_with_its_own_row() -> None:
    busy = Busy()
    busy.engine.submit(long_prompt(128))
    busy.step(short(1))
    busy.engine.run_until_idle()
    for name, request in (("1", short(1)), ("long", long_prompt(128))):
        busy.engine.submit(replace(request, id="again"))
        outputs = busy.engine.run_until_idle()
        assert answers(outputs, "again") == sum_model_answer(request.prompt.tokens, 3), name
    busy.engine.check()


def test_choices_fork_between_layers() -> None:
    busy = Busy()
    busy.engine.submit(long_prompt())
    outputs = busy.step(replace(short(1), n=3))
    outputs = busy.between + outputs + busy.engine.run_until_idle()
    for index in range(3):
        assert answers(outputs, "1", index) == sum_model_answer(tokens_of(1, 50), 3)
    busy.engine.check()


def test_nothing_is_taken_from_the_sequences_of_the_pass() -> None:
    """All places are taken, half of them by sequences that wait for their turn: one of these gives way."""
    busy = Busy(max_running=2, max_tiles=4)
    busy.engine.submit(of_tenant("a", make_request("a1", tokens_of(0, 900), 3)))
    busy.engine.submit(of_tenant("a", make_request("a2", tokens_of(1, 800), 3)))
    outputs = busy.step(of_tenant("b", short(2)))
    assert [s.request.id for s in busy.steps[0].sequences] == ["a2"]
    assert answers(busy.between, "2")
    assert busy.engine.stats().num_preemptions == 1
    outputs += busy.step(of_tenant("c", short(3)))
    outputs = outputs + busy.engine.run_until_idle() + busy.between
    assert answers(outputs, "a1") == sum_model_answer(tokens_of(0, 900), 3)
    assert answers(outputs, "a2") == sum_model_answer(tokens_of(1, 800), 3)
    busy.engine.check()


def test_nor_where_only_they_could_give_way() -> None:
    busy = Busy(max_running=2)
    for number in (1, 2):
        busy.engine.submit(of_tenant("a", short(number, 300)))
    outputs = busy.step(of_tenant("b", short(3)))
    assert not busy.between
    assert busy.engine.stats().num_preemptions == 0
    outputs += busy.engine.run_until_idle()
    for number, length in ((1, 300), (2, 300), (3, 50)):
        assert answers(outputs, str(number)) == sum_model_answer(tokens_of(number, length), 3)
    busy.engine.check()


def test_a_full_cache_takes_nothing_from_the_pass() -> None:
    busy = Busy(budget_bytes=60_000, max_tiles=4)
    for round_number in range(12):
        busy.engine.submit(make_request("long", tokens_of(round_number, 400), 5))
        found: Outputs = []
        number = 100 * round_number
        while busy.engine.has_work:
            number += 1
            found += busy.step(*[short(number, 30 + number % 40)][: number % 100 < 6])
            found += busy.between
        assert answers(found, "long") == sum_model_answer(tokens_of(round_number, 400), 5)
        for each in range(100 * round_number + 1, 100 * round_number + 6):
            assert answers(found, str(each)) == sum_model_answer(tokens_of(each, 30 + each % 40), 3)
        busy.engine.check()
    assert busy.engine.stats().cache.num_evictions > 0


POISON = 77


class Fragile(SumModel):
    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = super().forward(batch, cache)
        if POISON in batch.token_ids.tolist():
            raise ZeroDivisionError("a bug")
        return hidden


def without_poison(seed: int, length: int) -> list[int]:
    tokens = tokens_of(seed, length)
    while POISON in tokens or POISON in sum_model_answer(tokens, 3):
        seed += 1000
        tokens = tokens_of(seed, length)
    return tokens


@pytest.mark.parametrize("aborted", [False, True])
def test_a_step_between_layers_that_fails_ends_one_request(aborted: bool) -> None:
    busy = Busy(Fragile(), max_tiles=8)
    good, other, bad = without_poison(0, 700), without_poison(1, 200), without_poison(2, 40)
    bad[-1] = POISON
    busy.engine.submit(make_request("beginning", other[:150], 1))  # so that the other goes on from its state
    busy.engine.run_until_idle()
    busy.engine.submit(make_request("good", good, 3))
    outputs = busy.step(make_request("bad", bad, 3), make_request("other", other, 3))
    assert not busy.between
    assert busy.engine.stats().failures == 1
    if aborted:
        busy.engine.abort("bad")
    outputs += busy.engine.run_until_idle()
    assert busy.engine.stats().failures == 1 or not aborted
    assert [type(o).__name__ for name, o in outputs if name == "bad"] == ["FailedOutput"] * (not aborted)
    assert answers(outputs, "good") == sum_model_answer(good, 3)
    assert answers(outputs, "other") == sum_model_answer(other, 3)
    busy.engine.check()


class Choosy(SumModel):
    """Fails to choose, once it is told to."""

    fails = False

    def logits(self, hidden: Tensor) -> Tensor:
        if self.fails:
            self.fails = False
            raise ZeroDivisionError("a bug")
        return super().logits(hidden)


@pytest.mark.parametrize("n", [1, 3])
def test_choices_that_fail_between_layers_begin_again_with_their_forks(n: int) -> None:
    model = Choosy()
    busy = Busy(model)
    busy.engine.submit(long_prompt())
    model.fails = True
    outputs = busy.step(replace(short(1), n=n))
    assert busy.engine.stats().failures == 1
    outputs = busy.between + outputs + busy.engine.run_until_idle()
    for index in range(n):
        assert answers(outputs, "1", index) == sum_model_answer(tokens_of(1, 50), 3)
    assert answers(outputs, "long") == sum_model_answer(tokens_of(0, 1000), 3)
    busy.engine.check()


def test_a_pass_that_fails_leaves_those_between_its_layers_with_their_answers() -> None:
    busy = Busy(Fragile(), max_tiles=8)
    good, bad = without_poison(1, 40), without_poison(0, 300)
    bad[-1] = POISON
    busy.engine.submit(make_request("bad", bad, 3))
    outputs = busy.step(make_request("good", good, 3))
    outputs = busy.between + outputs
    assert answers(outputs, "good") == sum_model_answer(good, 3)[:1]
    outputs += busy.engine.run_until_idle()
    assert answers(outputs, "good") == sum_model_answer(good, 3)
    assert [type(o).__name__ for name, o in outputs if name == "bad"][-1] == "FailedOutput"
    busy.engine.check()


def test_outside_of_a_pass_nothing_is_between_layers() -> None:
    engine = Engine(SumModel(), EngineConfig(budget_bytes=1 << 22))
    engine.submit(short(1))
    assert engine.step_between() == []
    assert answers(engine.run_until_idle(), "1") == sum_model_answer(tokens_of(1, 50), 3)


def test_a_canonical_pass_is_left_alone() -> None:
    """A turn that ends may drop the oldest one that waits."""
    busy = Busy()
    busy.engine.submit(make_request("first", tokens_of(0, 100), 60))
    while not busy.engine.idle:
        busy.engine.step()
    assert busy.engine.has_work
    outputs = busy.step(short(1)) + busy.engine.run_until_idle()
    assert not busy.between
    assert answers(outputs, "1") == sum_model_answer(tokens_of(1, 50), 3)
    assert busy.engine.stats().failures == 0
    busy.engine.check()


class Slow(SumModel):
    """A pass with many rows waits at its first pause for a while, unless something comes."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way, self.end = threading.Event(), threading.Event()

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        if len(batch.token_ids) < 200:
            return super().forward(batch, cache)
        self.under_way.set()
        while not self.end.wait(0.001):
            batch.pause()
        return super().forward(batch, cache)


def test_a_client_is_answered_while_another_ones_pass_goes_on() -> None:
    async def main() -> None:
        model = Slow()
        engine = AsyncEngine(model, EngineConfig(budget_bytes=1 << 22))
        engine.start()
        try:
            sampling = SamplingParams(temperature=0, max_tokens=1)
            slow = engine.submit(Request("long", Prompt(tokens_of(0, 600)), sampling))
            await asyncio.to_thread(model.under_way.wait, 10)
            async with asyncio.timeout(10):
                for name in ("x", "y"):
                    stream = engine.submit(Request(name, Prompt(tokens_of(1, 50)), sampling))
                    found = [o.token async for o in stream if isinstance(o, TokenOutput)]
                    assert found == sum_model_answer(tokens_of(1, 50), 1)
            aborted = engine.submit(Request("z", Prompt(tokens_of(2, 50)), replace(sampling, max_tokens=500)))
            await anext(aborted)
            await aborted.aclose()  # it waits for the end of the pass
            assert not model.end.is_set()
            model.end.set()
            assert [o.token async for o in slow if isinstance(o, TokenOutput)] == sum_model_answer(tokens_of(0, 600), 1)
        finally:
            model.end.set()
            await engine.stop(1)
        assert not engine.failed

    asyncio.run(main())


def test_who_came_between_layers_counts_as_waiting() -> None:
    async def main() -> None:
        model = Slow()
        engine = AsyncEngine(model, EngineConfig(budget_bytes=1 << 24, max_waiting=2))
        engine.start()
        try:
            sampling = SamplingParams(temperature=0, max_tokens=1)
            engine.submit(Request("long", Prompt(tokens_of(0, 600)), sampling))
            await asyncio.to_thread(model.under_way.wait, 10)
            for name in ("x", "y"):
                engine.submit(Request(name, Prompt(tokens_of(1, 700)), sampling))  # no shorter than the pass
            async with asyncio.timeout(10):
                while engine.stats().waiting < 2:
                    await asyncio.sleep(0.002)
            with pytest.raises(Overloaded):
                engine.submit(Request("z", Prompt(tokens_of(2, 700)), sampling))
        finally:
            model.end.set()
            await engine.stop(1)

    asyncio.run(main())


def test_of_equal_tenants_the_one_served_longest_ago_goes_first() -> None:
    shares = Shares()
    shares.enter("a")
    shares.take_turn("a")
    shares.enter("b")
    assert shares.turn("b") < shares.turn("a")
    shares.take_turn("b")
    shares.enter("c")
    assert shares.turn("a") < shares.turn("c") < shares.turn("b")
    shares.charge("a", 1)
    assert shares.turn("a") > shares.turn("b")


@pytest.mark.parametrize("tiles", [1, 4])
def test_short_prompts_of_which_there_is_no_end_do_not_starve_a_long_one(tiles: int) -> None:
    busy = Busy(max_tiles=tiles)
    busy.engine.submit(long_prompt(1024))
    steps = 0
    while not answers(busy.step(*(short(1000 * steps + i, 60, 1) for i in (1, 2))), "long"):
        steps += 1
        assert steps < (MOST_PASSED_OVER + 2) * 16 // tiles
