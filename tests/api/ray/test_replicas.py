"""Real servers behind an ingress: conversations go on where they were, and what one holds is what it says."""

import asyncio
from typing import Any

import httpx
import pytest

from hybrid_cache.api.ray.call import REPLICA
from hybrid_cache.api.ray.chain import chain_of
from hybrid_cache.api.ray.holdings import MOST_ENTRIES, entries_of
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.engine.async_engine import AsyncEngine
from tests.api.ray.local import SECRET, Local, run, servers
from tests.api.servers import until_free

Messages = list[dict[str, str]]


def opening(name: str, *, system: str = "") -> Messages:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": f"{name} " * 20}]


async def turn(client: httpx.AsyncClient, messages: Messages, text: str = "", **more: Any) -> tuple[str, int]:
    """-> which replica answered, and its cached tokens; the answer is added to the messages, and what is said next."""
    body = {"model": "sum", "messages": messages, "max_tokens": 8, "ignore_eos": True, **more}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    reply = answer.json()
    messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"] or ""})
    messages.append({"role": "user", "content": text or "And what else is there? " * 4})
    return answer.headers[REPLICA], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


async def settled(engines: dict[str, AsyncEngine]) -> None:
    for engine in engines.values():
        await until_free(engine)
        while engine.stats().committing:
            await asyncio.sleep(0.01)


def held(local: Local, mark: str, messages: Messages, **more: Any) -> list[int]:
    """Tokens under each key of a conversation that a replica says it can resume."""
    said = local.said(mark)["digest"]
    assert isinstance(said, bytes)
    known = entries_of(said)
    chain = chain_of({"model": "sum", "messages": messages, **more}, "", SECRET)
    return [known.get(key, 0) for key in chain.keys]


@pytest.mark.parametrize("system", ["", "You look into all boxes. " * 10])
def test_each_turn_goes_where_the_one_before_it_went(sum_text: TextModel, system: str) -> None:
    async def test() -> None:
        async with servers(sum_text, number=3) as (local, engines), local.client() as client:
            talks = [opening(f"box {i}", system=system) for i in range(9)]
            first = [(await turn(client, talk))[0] for talk in talks]
            assert len(set(first)) == 3
            for _ in range(3):
                await settled(engines)
                local.fleet = type(local.fleet)()  # all that it knows is what they say
                for talk, mark in zip(talks, first, strict=True):
                    found, cached = await turn(client, talk)
                    assert found == mark
                    assert cached >= 64

    run(test)


def test_short_messages_are_known_by_the_answer_behind_them(sum_text: TextModel) -> None:
    """No page ends inside any of them."""

    async def test() -> None:
        async with servers(sum_text) as (local, engines), local.client() as client:
            talk: Messages = [{"role": "user", "content": "Hi"}]
            mark, _ = await turn(client, talk, "go on", max_tokens=150)
            await settled(engines)
            assert held(local, mark, talk)[0] >= 128  # more than the end of the prompt, which is less than a page

    run(test)


def test_what_is_dropped_is_not_said_any_more(sum_text: TextModel) -> None:
    async def test() -> None:
        async with servers(sum_text) as (local, engines), local.client() as client:
            talk = opening("box")
            mark, _ = await turn(client, talk)
            other = next(each for each in engines if each != mark)
            await settled(engines)
            assert max(held(local, mark, talk)) >= 64
            assert max(held(local, other, talk)) == 0
            assert (await client.delete("/cache/conversations", headers={REPLICA: mark})).status_code == 200
            assert max(held(local, mark, talk)) == 0

    run(test)


def test_what_is_said_is_what_the_next_turn_finds(sum_text: TextModel) -> None:
    async def test() -> None:
        async with servers(sum_text, number=1) as (local, engines), local.client() as client:
            talk = opening("box", system="You look into all boxes. " * 10)
            for _ in range(4):
                before = max(held(local, "r0", talk))
                _, cached = await turn(client, talk)
                assert 0 <= before - cached <= 64  # the answer may be read in other tokens than it was written in
                await settled(engines)

    run(test)


def test_equal_prompts_of_other_salts_are_strangers(sum_text: TextModel) -> None:
    async def test() -> None:
        async with servers(sum_text) as (local, engines), local.client() as client:
            talk = opening("box")
            mark, _ = await turn(client, list(talk), cache_salt="one")
            await settled(engines)
            assert max(held(local, mark, talk)) == 0
            marks = {(await turn(client, opening("box"), cache_salt=f"salt {i}"))[0] for i in range(12)}
            assert len(marks) == 2

    run(test)


def test_a_digest_is_bounded_and_small(sum_text: TextModel) -> None:
    async def test() -> None:
        async with servers(sum_text) as (local, engines), local.client() as client:
            for i in range(40):
                await turn(client, opening(f"box {i}"))
            await settled(engines)
            for mark in engines:
                digest = local.said(mark)["digest"]
                assert isinstance(digest, bytes)
                assert 0 < len(digest) <= 8 * MOST_ENTRIES

    run(test)


def test_a_stored_response_is_gone_on_from_where_it_is(sum_text: TextModel) -> None:
    async def test() -> None:
        async with servers(sum_text, number=3) as (local, _), local.client() as client:
            for i in range(6):
                first = await client.post("/v1/responses", json={"input": f"box {i}", "max_output_tokens": 4})
                name = first.json()["id"]
                local.fleet = type(local.fleet)() if i % 2 else local.fleet  # as another ingress, which was not told
                again = await client.post(
                    "/v1/responses", json={"input": "more", "previous_response_id": name, "max_output_tokens": 4}
                )
                assert again.status_code == 200, again.text
                assert again.headers[REPLICA] == first.headers[REPLICA]
                assert (await client.get(f"/v1/responses/{name}")).json()["id"] == name
            gone = await client.get("/v1/responses/resp_" + "0" * 32)
            assert gone.status_code == 404

    run(test)
