"""A client that goes away frees what its request held, whole answer or stream; what was computed stays cached."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine

import httpx
import pytest
from starlette.types import Message

from hybrid_cache.api.server.responses import EventStream
from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import GatedModel, in_process, new_app, new_engine, over_the_wire, prompt_for, until_free

PROMPT = list(range(300, 500))


def run(test: Callable[[], Coroutine[object, object, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_client_that_goes_away_frees_its_request(sum_text: TextModel, stream: bool, prompts: int) -> None:
    async def test() -> None:
        model = GatedModel()
        engine = new_engine(model)
        with over_the_wire(new_app(engine, sum_text)) as url:
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                body = {
                    "prompt": [[*PROMPT, i] for i in range(prompts)],
                    "max_tokens": 3000,
                    "ignore_eos": True,
                    "stream": stream,
                    "n": 2,
                }
                going = asyncio.create_task(client.post("/v1/completions", json=body))
                await asyncio.to_thread(model.reached.wait, 10)  # the first step is under way
                going.cancel()
                await asyncio.gather(going, return_exceptions=True)
                await asyncio.sleep(0.2)  # for the server to see it
                steps = engine.stats().steps
                model.gate.set()
                await until_free(engine)
                assert engine.stats().steps <= steps + 2
                assert engine.stats().generated_tokens < 100

    run(test)


def test_a_stream_that_is_closed_half_way_stops_and_its_prompt_stays_cached(sum_text: TextModel) -> None:
    async def test() -> None:
        engine = new_engine()
        with over_the_wire(new_app(engine, sum_text)) as url:
            async with httpx.AsyncClient(base_url=url, timeout=30) as client:
                body = {"prompt": PROMPT, "max_tokens": 3000, "ignore_eos": True, "stream": True}
                async with client.stream("POST", "/v1/completions", json=body) as reply:
                    async for _ in reply.aiter_lines():
                        break
                await until_free(engine)
                assert engine.stats().generated_tokens < 2000
                again = (await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1})).json()
                assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(PROMPT)

    run(test)


def test_a_failure_while_queueing_aborts_the_prompts_queued_before(sum_text: TextModel) -> None:
    async def test() -> None:
        model = GatedModel()
        engine = new_engine(model, max_waiting=2, max_running=4)
        async with in_process(new_app(engine, sum_text)) as client:
            short = [asyncio.create_task(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}))]
            await asyncio.to_thread(model.reached.wait, 10)
            short.append(asyncio.create_task(client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})))
            await asyncio.sleep(0.05)  # one more can wait
            body = {"prompt": [prompt_for(i) for i in (300, 301)], "max_tokens": 500, "ignore_eos": True}
            assert (await client.post("/v1/completions", json=body)).status_code == 503
            model.gate.set()
            assert [(await reply).status_code for reply in short] == [200, 200]
            await until_free(engine)
            assert engine.stats().generated_tokens < 500

    run(test)


def test_a_silent_stream_is_kept_alive_with_comments() -> None:
    async def slow() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.25)
        yield b"data: x\n\n"

    closed = threading.Event()

    async def close() -> None:
        closed.set()

    async def test() -> None:
        sent: list[bytes] = []

        async def send(message: Message) -> None:
            sent.append(message.get("body", b""))

        async def receive() -> Message:
            await asyncio.sleep(10)
            raise AssertionError

        await EventStream(slow(), close, lambda problem: b"", keep_alive_s=0.1)({"type": "http"}, receive, send)
        assert sent == [b"", b": keep-alive\n\n", b": keep-alive\n\n", b"data: x\n\n", b""]
        assert closed.is_set()

    run(test)
