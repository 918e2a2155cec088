"""The engine on its thread: streams, aborts, a full queue, draining, and a model that fails."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest
from torch import Tensor

from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.engine.async_engine import END_S, AsyncEngine, Stream
from hybrid_cache.engine.engine import MOST_FAILURES, Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import EngineStopped, Overloaded, RequestError, RequestFailed
from hybrid_cache.request import PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.stats import EngineStats
from hybrid_cache.tokens import Prompt
from tests.fakes import SumModel, sum_model_answer, tokens_of


def request(name: str, length: int = 100, max_tokens: int = 5, n: int = 1) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    return Request(name, Prompt(tokens_of(length, length)), sampling, n=n)


@asynccontextmanager
async def running(model: SumModel | None = None, **config: int) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(model or SumModel(), EngineConfig(**{"budget_bytes": 1 << 20, **config}))
    engine.start()
    try:
        yield engine
    finally:
        await engine.stop(0)


async def tokens(stream: Stream) -> list[int]:
    return [o.token async for o in stream if isinstance(o, TokenOutput) and o.token is not None]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


def test_streams_of_many_requests_end_with_their_own_answers() -> None:
    async def main() -> None:
        async with running() as engine:
            requests = [request(str(i), 50 + i) for i in range(8)]
            answers = await asyncio.gather(*(tokens(engine.submit(r)) for r in requests))
            assert answers == [sum_model_answer(r.prompt.tokens, 5) for r in requests]

    asyncio.run(main())


def test_a_prompt_output_comes_first() -> None:
    async def main() -> None:
        async with running() as engine:
            outputs = [o async for o in engine.submit(request("a"))]
            assert outputs[0] == PromptOutput(cached_tokens=0, written_tokens=64)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_reader_that_goes_away_frees_everything(how: str) -> None:
    async def main() -> None:
        async with running() as engine:
            stream = engine.submit(request("a", max_tokens=3000, n=2))
            await anext(stream)
            if how == "close":
                await stream.aclose()
            else:
                task = asyncio.create_task(drain(stream))
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await until(lambda: engine.stats().running == 0 and engine.stats().cache.working_bytes == 0)
            assert engine.stats().cache.nodes == 1  # its finished prefix stays

    asyncio.run(main())


async def drain(stream: Stream) -> None:
    async for _ in stream:
        pass


def test_bad_requests_and_a_full_queue_are_refused_at_once() -> None:
    async def main() -> None:
        async with running(max_waiting=1, max_running=1) as engine:
            with pytest.raises(RequestError):
                engine.submit(request("a", length=0))
            first = engine.submit(request("b", max_tokens=3000))
            await anext(first)
            engine.submit(request("c"))
            with pytest.raises(Overloaded, match="1 requests wait, limit 1"):
                engine.submit(request("d"))
            with pytest.raises(RequestError, match="'b' is in use"):
                engine.submit(request("b"))

    asyncio.run(main())


def test_draining_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async def main() -> None:
        async with running() as engine:
            stream = engine.submit(request("a", max_tokens=50))
            stopping = asyncio.create_task(engine.stop(10))
            await asyncio.sleep(0)
            with pytest.raises(EngineStopped, match="draining"):
                engine.submit(request("b"))
            assert await tokens(stream) == sum_model_answer(stream.request.prompt.tokens, 50)
            await stopping
            assert not engine.alive

    asyncio.run(main())


def test_a_grace_period_that_runs_out_ends_the_streams_with_an_error() -> None:
    async def main() -> None:
        async with running() as engine:
            stream = engine.submit(request("a", max_tokens=3900))
            await anext(stream)
            await engine.stop(0)
            with pytest.raises(EngineStopped):
                await drain(stream)

    asyncio.run(main())


class FailingModel(SumModel):
    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        raise FloatingPointError("bad luck")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_fails_ends_all_streams_and_the_engine_says_so() -> None:
    async def main() -> None:
        async with running(FailingModel()) as engine:
            for i in range(MOST_FAILURES):
                assert engine.alive
                with pytest.raises(RequestFailed):
                    await drain(engine.submit(request(f"a{i}")))
            await until(lambda: engine.failed)
            assert not engine.hung
            with pytest.raises(EngineStopped, match="PassFailed: FloatingPointError: bad luck"):
                engine.submit(request("b"))

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_request_that_comes_while_the_engine_fails_does_not_wait_for_ever() -> None:
    """It fails between the look at it and the moment at which it would know the stream."""

    class Breaking(Engine):
        def step(self) -> Outputs:
            raise FloatingPointError("bad luck")

    async def main() -> None:
        engine = AsyncEngine(SumModel(), EngineConfig(budget_bytes=1 << 20))
        check = engine._engine.check_request
        engine._engine.__class__ = Breaking
        engine.start()

        def check_slowly(asked: Request) -> None:
            check(asked)
            engine.abort("nobody")
            engine._thread.join()

        engine._engine.check_request = check_slowly  # type: ignore[method-assign]
        with pytest.raises(EngineStopped):
            async with asyncio.timeout(5):
                await drain(engine.submit(request("a")))

    asyncio.run(main())


class StuckModel(SumModel):
    """Waits in each step while its gate is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        assert self.gate.wait(30)
        return super().forward(batch, cache)


def test_a_step_that_hangs_is_seen_and_refuses_requests_until_it_ends() -> None:
    async def main() -> None:
        model = StuckModel()
        engine = AsyncEngine(model, EngineConfig(budget_bytes=1 << 20), hung_after_s=0.2)
        engine.start()
        await asyncio.sleep(0.3)
        assert not engine.hung  # it has nothing to do
        stream = engine.submit(request("a"))
        assert not engine.hung
        await until(lambda: engine.hung)
        assert engine.alive
        assert engine.stats().step_age_s > 0.2
        with pytest.raises(EngineStopped, match="hangs: a step has not ended for 0 s"):
            engine.submit(request("b"))
        model.gate.set()
        assert await tokens(stream) == sum_model_answer(stream.request.prompt.tokens, 5)
        await until(lambda: engine.stats().step_age_s == 0)
        assert await tokens(engine.submit(request("b"))) == sum_model_answer(stream.request.prompt.tokens, 5)
        await engine.stop(0)

    asyncio.run(main())


def test_stopping_does_not_wait_for_a_step_that_hangs() -> None:
    async def main() -> None:
        model = StuckModel()
        engine = AsyncEngine(model, EngineConfig(budget_bytes=1 << 20), hung_after_s=0.1)
        engine.start()
        stream = engine.submit(request("a"))
        await until(lambda: engine.hung)
        async with asyncio.timeout(END_S + 2):
            await engine.stop(30)
        assert not engine.stopped
        with pytest.raises(EngineStopped):
            await drain(stream)
        model.gate.set()
        await until(lambda: engine.stopped)

    asyncio.run(main())


def test_a_reader_whose_loop_has_ended_harms_nobody() -> None:
    engine = AsyncEngine(SumModel(), EngineConfig(budget_bytes=1 << 20))
    engine.start()

    async def ask() -> None:
        engine.submit(request("a", max_tokens=300))

    async def listen() -> list[int]:
        found = await tokens(engine.submit(request("b")))
        await engine.stop(10)
        return found

    asyncio.run(ask())
    assert len(asyncio.run(listen())) == 5
    assert not engine.failed


def test_a_stream_that_is_paused_gives_what_is_unread_and_goes_on_behind_the_tool() -> None:
    async def main() -> None:
        async with running() as engine:
            asked, tool = request("a", max_tokens=300), [5] * 40
            stream = engine.submit(asked)
            said = [(await anext(stream)) for _ in range(4)]
            said += await stream.pause("look", 2.0)
            before = [o.token for o in said if isinstance(o, TokenOutput) and o.token is not None]
            assert before == sum_model_answer(asked.prompt.tokens, len(before))
            assert 3 <= len(before) < 300
            await until(lambda: engine.stats().running == engine.stats().cache.working_bytes == 0)
            assert engine.stats().pauses.num_paused == 1
            rest = asyncio.create_task(collect(stream))
            await asyncio.sleep(0.01)
            assert not rest.done()
            await stream.resume(tool)
            first, *after = await rest
            assert isinstance(first, PromptOutput)
            prompt = [*asked.prompt.tokens, *before, *tool]
            assert [o.token for o in after if isinstance(o, TokenOutput)] == sum_model_answer(prompt, 300 - len(before))
            assert engine.stats().pauses.num_resumed == 1

    asyncio.run(main())


def test_whoever_is_told_an_answer_finds_in_the_statistics_what_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def taking_long(engine: Engine, stats: Callable[[Engine], EngineStats] = Engine.stats) -> EngineStats:
        time.sleep(0.05)
        return stats(engine)

    async def main() -> None:
        async with running() as engine:
            await tokens(engine.submit(request("a")))
            engine.pause("a", "look", 5.0)
            assert await engine.ask(lambda core: core.stats().pauses.num_paused) == 1
            assert engine.stats().pauses.num_paused == 1
            with pytest.raises(RequestError, match="'b' is not paused"):
                await engine.ask(lambda core: (core.end_task("a"), core.resume("b", [1])))
            assert engine.stats().pauses.num_paused == 0

    monkeypatch.setattr(Engine, "stats", taking_long)
    asyncio.run(main())


def test_an_id_is_free_as_soon_as_its_stream_is_closed() -> None:
    """What is left of the earlier request goes nowhere; so it is between the layers of a pass, too."""

    async def main() -> None:
        async with running() as engine:
            for number in range(60):
                first, second = request("a", 300 + number, max_tokens=300), request("a", 40 + number, max_tokens=6)
                stream = engine.submit(first)
                if number % 3:
                    await anext(stream)
                if number % 2:
                    await asyncio.sleep(0.002)
                await stream.aclose()
                async with asyncio.timeout(10):
                    assert await tokens(engine.submit(second)) == sum_model_answer(second.prompt.tokens, 6)
            await until(lambda: engine.stats().running == engine.stats().waiting == 0)
            await engine.ask(Engine.check)

    asyncio.run(main())


async def collect(stream: Stream) -> list[object]:
    return [output async for output in stream]


def test_what_is_wrong_with_a_pause_reaches_its_caller_and_harms_nobody() -> None:
    async def main() -> None:
        async with running() as engine:
            several, ended, asked = request("several", n=2), request("ended"), request("a", max_tokens=300)
            stream = engine.submit(several)
            with pytest.raises(RequestError, match="has several choices"):
                await stream.pause("look")
            assert len(await tokens(stream)) == 10
            stream = engine.submit(ended)
            assert await tokens(stream) == sum_model_answer(ended.prompt.tokens, 5)
            with pytest.raises(RequestError, match="'ended' has ended"):
                await stream.pause("look")
            stream = engine.submit(asked)
            with pytest.raises(RequestError, match="'a' is not paused"):
                await stream.resume([1])
            with pytest.raises(RequestError, match="a tool time of -1 s"):
                await stream.pause("look", -1)
            await stream.pause("look")
            with pytest.raises(RequestError, match="the context holds"):
                await stream.resume([1] * 5000)
            for wrong in (None, 5, {1: 2}, {1}, iter([1])):
                with pytest.raises(RequestError, match="must be a sequence of integers"):
                    await stream.resume(wrong)  # type: ignore[arg-type]
            await stream.aclose()
            with pytest.raises(RequestError, match="has ended"):
                await stream.pause("look")
            await until(lambda: engine.stats().pauses.num_paused == 0)
            await engine.ask(Engine.check)

    asyncio.run(main())


def test_a_turn_that_is_said_to_have_called_is_known_to_the_next_request() -> None:
    async def main() -> None:
        async with running() as engine:
            asked, prompt = request("0", length=200), request("0", length=200).prompt.tokens.tolist()
            for step in range(3):
                answer = await tokens(engine.submit(asked))
                engine.pause("unknown", "look")
                engine.pause(str(step), "look", -1)  # no time: as if nobody had said it
                engine.pause(str(step), "look", 1.0)
                prompt += [*answer, *range(64)]
                asked = Request(str(step + 1), Prompt(np.asarray(prompt, np.int32)), asked.sampling)
            answer = await tokens(engine.submit(asked))
            assert answer == sum_model_answer(prompt, 5)
            engine.end_task("3")
            engine.end_task("unknown")
            await engine.ask(lambda engine: None)
            pauses = engine.stats().pauses
            assert (pauses.num_paused, pauses.num_resumed, pauses.num_resident) == (0, 3, 3)

    asyncio.run(main())


def test_one_that_is_open_is_not_stopped_by_what_is_said_of_ended_ones() -> None:
    async def main() -> None:
        async with running() as engine:
            stream = engine.submit(request("a", max_tokens=100))
            await anext(stream)
            engine.pause("a", "look")
            assert len(await tokens(stream)) == 100

    asyncio.run(main())


def test_what_is_said_of_a_turn_goes_before_a_request_that_comes_between_two_layers() -> None:
    """Both lie in the inbox while a long prompt is computed."""

    class Slow(SumModel):
        asks: Callable[[], None] | None = None

        def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
            asks, self.asks = self.asks, None
            if asks is not None:
                asks()
            return super().forward(batch, cache)

    async def main() -> None:
        model = Slow()
        async with running(model) as engine:
            first = request("first")
            said = await tokens(engine.submit(first))
            prompt = [*first.prompt.tokens.tolist(), *said, *range(30)]
            loop, begun = asyncio.get_running_loop(), asyncio.Event()
            gate = threading.Event()

            def asks() -> None:
                loop.call_soon_threadsafe(begun.set)
                assert gate.wait(10)

            model.asks = asks
            long = asyncio.create_task(tokens(engine.submit(request("long", 900))))
            await begun.wait()
            engine.pause("first", "look")
            second = engine.submit(Request("second", Prompt(np.asarray(prompt, np.int32)), first.sampling))
            gate.set()
            assert await tokens(second) == sum_model_answer(prompt, 5)
            await long
            assert engine.stats().pauses.num_resumed == 1

    asyncio.run(main())


def test_an_idle_engine_gives_up_what_nobody_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_cache.engine.interruptions.FORGOTTEN_AFTER_S", 0.2)

    async def main() -> None:
        async with running() as engine:
            stream = engine.submit(request("a", max_tokens=300))
            await stream.pause("look")
            with pytest.raises(RequestError, match="was paused for"):
                async with asyncio.timeout(5):
                    await tokens(stream)
            assert engine.stats().pauses.num_paused == 0

    asyncio.run(main())
