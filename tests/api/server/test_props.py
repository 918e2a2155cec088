"""What a server says of its settings, and of who is in it: to each key its own requests, to an operator all."""

import asyncio
from typing import Any

import httpx
import pytest

from hybrid_cache import __version__
from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import GatedModel, in_process, new_app, new_engine, until_free

KEYS = ("alice", "bob", "root")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


async def slots(client: httpx.AsyncClient, key: str = "", **params: Any) -> dict[str, Any]:
    reply = await client.get("/slots", headers=bearer(key), params=params)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


async def until_total(client: httpx.AsyncClient, total: int, key: str = "") -> dict[str, Any]:
    for _ in range(500):
        found = await slots(client, key)
        if found["total"] == total:
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(found)


def test_props_name_models_limits_and_the_template(sum_text: TextModel) -> None:
    async def test() -> None:
        app = new_app(new_engine(max_running=3, max_waiting=5), sum_text, special_tokens_in_content=True)
        async with in_process(app) as client:
            props = (await client.get("/props")).json()
            assert (props["version"], props["max_running"], props["max_waiting"]) == (__version__, 3, 5)
            assert (props["budget_bytes"], props["exact"], props["backend"]) == (4 << 20, True, "fake")
            assert props["special_tokens_in_content"] is True
            (model,) = props["models"]
            assert (model["id"], model["aliases"], model["context"]) == ("sum", ["sum-alias"], 4096)
            assert (model["tool_format"], model["thinks"]) == ("hermes", False)
            assert "<|im_start|>" in model["chat_template"]
            assert model["special_tokens"]["eos_token"] == "<|im_end|>"

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("path", ["/props", "/slots"])
def test_who_has_no_key_is_told_nothing(sum_text: TextModel, path: str) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(), sum_text, api_keys=KEYS)) as client:
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers=bearer("alice"))).status_code == 200

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_slot_follows_its_request(sum_text: TextModel) -> None:
    """Between the steps of a model that computes one step at a time."""

    async def test() -> None:
        model = GatedModel()
        engine = new_engine(model, max_running=1)
        async with in_process(new_app(engine, sum_text)) as client:
            model.gate.set()
            await client.post("/v1/completions", json={"prompt": [5] * 200, "max_tokens": 1})
            assert await slots(client) == {"data": [], "total": 0, "max_running": 1, "max_waiting": 256}
            seen: dict[str, dict[str, Any]] = {}
            body = {"prompt": [5] * 240, "max_tokens": 3000, "ignore_eos": True}
            first = asyncio.ensure_future(client.post("/v1/completions", json=body, headers={"x-request-id": "first"}))
            while "first" not in seen or seen["first"]["generated_tokens"] < 5:
                seen |= {each["request_id"]: each for each in (await slots(client))["data"]}
                await asyncio.sleep(0.001)
            second = asyncio.ensure_future(
                client.post("/v1/completions", json={"prompt": [6] * 70}, headers={"x-request-id": "second"})
            )
            while "second" not in seen:
                seen |= {each["request_id"]: each for each in (await slots(client))["data"]}
                await asyncio.sleep(0.001)
            one, two = seen["first"], seen["second"]
            assert (one["state"], one["prompt_tokens"], one["computed_tokens"]) == ("decoding", 240, 240)
            assert (one["cached_tokens"], one["model"], one["choice"]) == (192, "sum", 0)
            assert one["id"].startswith("first.")
            assert (two["state"], two["prompt_tokens"], two["computed_tokens"]) == ("waiting", 70, 0)
            assert (two["cached_tokens"], two["generated_tokens"]) == (None, 0)
            assert 0 <= two["age_s"] < one["age_s"] + 30
            first.cancel()
            await asyncio.gather(first, second, return_exceptions=True)
            await until_free(engine)
            assert (await until_total(client, 0))["data"] == []

    asyncio.run(asyncio.wait_for(test(), 60))


def test_each_key_sees_its_own_requests_and_an_operator_all(sum_text: TextModel) -> None:
    async def test() -> None:
        engine = new_engine(max_running=2)
        app = new_app(engine, sum_text, api_keys=KEYS, operator_keys=("root",), shared_cache=True)
        async with in_process(app) as client:
            body = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "n": 1}
            running = [
                asyncio.ensure_future(client.post("/v1/completions", json=body, headers=bearer(key)))
                for key in ("alice", "bob", "alice")
            ]
            everything = await until_total(client, 3, "root")
            alice, bob = await slots(client, "alice"), await slots(client, "bob")
            assert (alice["total"], bob["total"]) == (2, 1)
            ids = {each["id"] for each in everything["data"]}
            assert {each["id"] for each in (*alice["data"], *bob["data"])} == ids
            assert len((await slots(client, "root", limit=1))["data"]) == 1
            for each in running:
                each.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await until_free(engine)

    asyncio.run(asyncio.wait_for(test(), 60))


def test_without_keys_a_salt_is_what_one_needs_to_know(sum_text: TextModel) -> None:
    async def test() -> None:
        engine = new_engine()
        async with in_process(new_app(engine, sum_text)) as client:
            body = {"prompt": "a", "max_tokens": 3000, "ignore_eos": True, "cache_salt": "mine"}
            running = asyncio.ensure_future(client.post("/v1/completions", json=body))
            for _ in range(500):
                if (await slots(client, cache_salt="mine"))["total"]:
                    break
                await asyncio.sleep(0.01)
            else:
                raise AssertionError("it is not shown")
            assert (await slots(client))["total"] == (await slots(client, cache_salt="other"))["total"] == 0
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await until_free(engine)

    asyncio.run(asyncio.wait_for(test(), 60))
