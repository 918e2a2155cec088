"""A request finds a replica that can answer it, and its client hears of no other."""

import asyncio
import json
from collections.abc import AsyncGenerator
from itertools import count
from typing import Any

import httpx
import pytest
from starlette.types import Message

from hybrid_cache.api.ray.call import REPLICA, Call
from hybrid_cache.api.ray.ingress import BROKEN, Gone
from tests.api.ray.local import Answerer, Local, run

JSON, STREAM = b"application/json", b"text/event-stream"


def start(mark: str, status: int = 200, kind: bytes = JSON) -> Message:
    headers = [(REPLICA.encode(), mark.encode()), (b"content-type", kind), (b"x-request-id", b"again")]
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(text: str, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def answers(mark: str, status: int = 200, text: str = "{}") -> Answerer:
    async def answer(call: Call) -> AsyncGenerator[list[Message]]:
        yield [start(mark, status)]
        yield [body(text)]

    return answer


def goes(*before: Message) -> Answerer:
    """Dies after that much of its answer."""

    async def answer(call: Call) -> AsyncGenerator[list[Message]]:
        for message in before:
            yield [message]
        raise Gone

    return answer


NUMBERS = count()


async def ask(local: Local, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
    """A conversation that nobody knows."""
    messages = [{"role": "user", "content": f"Hello, {next(NUMBERS)}!"}]
    async with local.client() as client:
        return await client.post(path, json={"model": "m", "messages": messages, **more})


@pytest.mark.parametrize("before", [(), (start("a"),)])
def test_a_request_whose_replica_dies_before_it_has_said_anything_is_answered_by_another(before: Any) -> None:
    async def test() -> None:
        local = Local({"a": goes(*before), "b": answers("b")})
        for _ in range(10):
            answer = await ask(local)
            assert (answer.status_code, answer.headers[REPLICA]) == (200, "b")
        assert "a" in local.asked

    run(test)


@pytest.mark.parametrize(
    ("path", "begins"),
    [
        ("/v1/chat/completions", "data: "),
        ("/v1/messages", "event: error\ndata: "),
        ("/v1/responses", "event: error\ndata: "),
    ],
)
def test_a_stream_that_breaks_ends_with_an_error_of_its_dialect(path: str, begins: str) -> None:
    async def test() -> None:
        local = Local({"a": goes(start("a", kind=STREAM), body("data: 1\n\n", more=True))})
        answer = await ask(local, path)
        said, _, last = answer.text.partition("\n\n")
        assert said == "data: 1"
        assert last.startswith(begins)
        assert last.endswith("\n\n")
        event = json.loads(last.partition("data: ")[2])
        assert event.get("error", event)["message"] == BROKEN
        assert local.asked == ["a"]

    run(test)


def test_an_answer_of_which_half_was_sent_is_not_begun_again() -> None:
    async def test() -> None:
        local = Local({"a": goes(start("a"), body("{", more=True)), "b": goes(start("b"), body("{", more=True))})
        with pytest.raises(Gone):
            await ask(local)
        assert len(local.asked) == 1

    run(test)


def test_a_full_replica_loses_a_request_to_another() -> None:
    async def test() -> None:
        local = Local({"a": answers("a", 503), "b": answers("b")})
        for _ in range(10):
            assert (await ask(local)).status_code == 200
        assert "a" in local.asked

    run(test)


def test_where_all_are_full_the_client_is_told_so() -> None:
    async def test() -> None:
        local = Local({mark: answers(mark, 503, "full") for mark in "abc"})
        answer = await ask(local)
        assert (answer.status_code, answer.text) == (503, "full")
        assert sorted(local.asked) == ["a", "b", "c"]

    run(test)


def test_where_nobody_is_left_the_client_may_come_again() -> None:
    async def test() -> None:
        answer = await ask(Local({"a": goes()}))
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "server_unavailable"
        assert answer.headers["retry-after"]

    run(test)


def test_what_one_replica_has_is_asked_of_the_others_and_then_known() -> None:
    name = "resp_" + "0" * 32

    async def test() -> None:
        local = Local({"a": answers("a", 404), "b": answers("b"), "c": answers("c", 404)})
        for _ in range(6):
            assert (await ask(local, "/v1/responses", previous_response_id=name)).status_code == 200
        assert local.asked[-5:] == ["b"] * 5

    run(test)


def test_what_nobody_has_is_told_once_all_were_asked() -> None:
    async def test() -> None:
        local = Local({mark: answers(mark, 404, "unknown") for mark in "abc"})
        answer = await ask(local, previous_response_id="resp_" + "0" * 32)
        assert (answer.status_code, answer.text) == (404, "unknown")
        assert sorted(local.asked) == ["a", "b", "c"]
        async with local.client() as client:
            assert (await client.post("/v1/nothing", json=["no request"])).status_code == 404
        assert len(local.asked) == 4

    run(test)


def test_names_in_an_answer_lead_back_to_its_replica() -> None:
    names = {mark: "resp_" + mark * 32 for mark in "abc"}

    async def test() -> None:
        local = Local({mark: answers(mark, text=json.dumps({"id": name})) for mark, name in names.items()})
        for _ in range(20):
            await ask(local, "/v1/responses")
        for mark, name in names.items():
            for _ in range(3):
                async with local.client() as client:
                    assert (await client.get(f"/v1/responses/{name}")).headers[REPLICA] == mark
                assert (await ask(local, "/v1/responses", previous_response_id=name)).headers[REPLICA] == mark

    run(test)


def test_the_client_may_say_which_one() -> None:
    async def test() -> None:
        local = Local({mark: answers(mark) for mark in "abc"})
        async with local.client() as client:
            for mark in "abccba":
                answer = await client.get("/metrics", headers={REPLICA: mark})
                assert answer.headers[REPLICA] == mark
            assert len({(await client.get("/v1/models")).headers[REPLICA] for _ in range(9)}) == 1

    run(test)


def test_an_adapter_is_loaded_everywhere() -> None:
    async def test() -> None:
        local = Local({mark: answers(mark) for mark in "abc"})
        await ask(local)  # so that they are known
        local.asked.clear()
        assert (await ask(local, "/v1/load_lora_adapter")).status_code == 200
        assert sorted(local.asked) == ["a", "b", "c"]
        local.replicas["b"] = answers("b", 400, "no such folder")
        answer = await ask(local, "/v1/load_lora_adapter")
        assert (answer.status_code, answer.text) == (400, "no such folder")

    run(test)


def test_who_has_no_key_reaches_no_replica() -> None:
    async def test() -> None:
        local = Local({"a": answers("a")}, words=("--api-key", "secret-key"))
        assert (await ask(local)).status_code == 401
        assert local.asked == []
        async with local.client() as client:
            answer = await client.post("/v1/messages", json={}, headers={"x-api-key": "secret-key"})
        assert answer.status_code == 200

    run(test)


def test_it_answers_to_its_names_only_where_it_has_some() -> None:
    async def test() -> None:
        local = Local({"a": answers("a")}, words=("--allow-host", "chat.example"))
        async with local.client() as client:
            for host, status in (("chat.example", 200), ("127.0.0.1:8000", 200), ("evil.example", 421)):
                assert (await client.post("/v1/completions", json={}, headers={"host": host})).status_code == status

    run(test)


def test_a_body_that_is_too_large_reaches_no_replica() -> None:
    async def test() -> None:
        local = Local({"a": answers("a")}, words=("--max-body", "1KiB"))
        assert (await ask(local, user="u" * 2000)).status_code == 413
        assert local.asked == []

    run(test)


def test_a_client_that_goes_away_ends_its_call() -> None:
    began = asyncio.Event()

    async def waits(call: Call) -> AsyncGenerator[list[Message]]:
        yield [start("a", kind=STREAM), body("data: 1\n\n", more=True)]
        began.set()
        await asyncio.Event().wait()

    async def test() -> None:
        local = Local({"a": waits})
        going = asyncio.ensure_future(ask(local))
        await began.wait()
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)
        assert local.closed == ["a"]
        assert not local.fleet._flights

    run(test)


def test_the_request_id_is_not_said_twice() -> None:
    async def test() -> None:
        assert "x-request-id" not in (await ask(Local({"a": answers("a")}))).headers

    run(test)
