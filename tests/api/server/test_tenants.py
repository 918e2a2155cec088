"""Each API key is a tenant: nobody finds what was cached for another, unless the operator says so."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping

import httpx
import pytest

from hybrid_cache.api.server.tenants import tenant_of
from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import in_process, new_app, new_engine

PROMPT = "one two three four five six seven eight nine ten " * 20
KEYS = ("alice", "bob")


def run(test: Callable[[], Coroutine[object, object, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def cached(client: httpx.AsyncClient, headers: Mapping[str, str], **more: object) -> int:
    body = {"model": "sum", "prompt": PROMPT, "max_tokens": 1, **more}
    reply = await client.post("/v1/completions", json=body, headers=dict(headers))
    assert reply.status_code == 200, reply.text
    details = reply.json()["usage"]["prompt_tokens_details"]
    assert isinstance(details["cached_tokens"], int)
    return int(details["cached_tokens"])


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("shared", [False, True])
def test_what_one_key_has_cached_another_finds_only_if_all_share(sum_text: TextModel, shared: bool) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(), sum_text, api_keys=KEYS, shared_cache=shared)) as client:
            assert await cached(client, bearer("alice")) == 0
            assert await cached(client, bearer("alice")) > 0
            assert (await cached(client, bearer("bob")) > 0) is shared
            assert await cached(client, {"x-api-key": "alice"}) > 0

    run(test)


def test_a_salt_that_looks_like_another_tenant_finds_nothing(sum_text: TextModel) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(), sum_text, api_keys=KEYS)) as client:
            await cached(client, bearer("alice"), cache_salt="s")
            assert await cached(client, bearer("alice"), cache_salt="s") > 0
            alice = tenant_of("alice")
            for salt in ("s", alice, f"{alice}:s", f":{alice}:s", ""):
                assert await cached(client, bearer("bob"), cache_salt=salt) == 0
                assert await cached(client, bearer("alice"), cache_salt=salt) == 0 or salt == "s"

    run(test)


@pytest.mark.parametrize("headers", [{"x-api-key": "mallory"}, {"x-api-key": ""}, {"Authorization": "Bearer"}])
def test_an_unknown_key_is_nobodys(sum_text: TextModel, headers: dict[str, str]) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(), sum_text, api_keys=KEYS)) as client:
            reply = await client.post("/v1/completions", json={"model": "sum", "prompt": "x"}, headers=headers)
            assert reply.status_code == 401

    run(test)


def test_a_message_of_another_key_is_one_that_never_was(sum_text: TextModel) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(), sum_text, api_keys=KEYS)) as client:

            async def ask(key: str, message: Mapping[str, object]) -> httpx.Response:
                body = {"messages": [message], "max_tokens": 1, "choreography": {}}
                return await client.post("/v1/chat/completions", json=body, headers=bearer(key))

            first = await ask("alice", {"role": "user", "content": "The code is 42."})
            name = first.json()["choreography"]["messages"][0]
            assert (await ask("alice", {"ref": name})).status_code == 200
            refused, unknown = await ask("bob", {"ref": name}), await ask("bob", {"ref": "msg_0"})
            assert refused.status_code == unknown.status_code == 404
            assert refused.json()["error"]["code"] == unknown.json()["error"]["code"]

    run(test)


def test_either_header_carries_a_key_and_a_wrong_bearer_counts(sum_text: TextModel) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(), sum_text, api_keys=KEYS)) as client:
            for headers, status in (
                (bearer("bob"), 200),
                ({"x-api-key": "bob"}, 200),
                ({"X-API-Key": " bob "}, 200),
                ({**bearer("mallory"), "x-api-key": "bob"}, 401),
                ({"Authorization": "Basic Ym9i", "x-api-key": "bob"}, 200),
                ({"x-api-key": "alice,bob"}, 401),
                ({"api-key": "bob"}, 401),
            ):
                assert (await client.get("/v1/models", headers=headers)).status_code == status, headers

    run(test)


def test_tenants_are_told_apart_and_say_nothing_of_their_keys() -> None:
    assert len({tenant_of(key) for key in ("a", "b", "ab", "")}) == 4
    assert len(tenant_of("alice")) == 16
    assert "alice" not in tenant_of("alice")
