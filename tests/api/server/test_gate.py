"""What requests may take of the server before any work is done for them."""

import asyncio

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_cache.api.server.gate import Bound
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import Overloaded, OverShare
from tests.api.server.test_service import ASKED, GatedModel, in_process, new_app, new_engine, run

TEXTS = "/v1/completions"


def test_one_key_alone_may_have_half_and_two_a_third_each() -> None:
    bound = Bound("things", 90, by_tenant=True)
    taken = {"a": 0, "b": 0}
    for _ in range(90):
        for tenant in taken:
            try:
                bound.take(tenant, 1)
                taken[tenant] += 1
            except OverShare:
                pass
    assert taken == {"a": 30, "b": 30}
    alone = Bound("things", 90, by_tenant=True)
    for _ in range(45):
        alone.take("a", 1)
    with pytest.raises(OverShare, match="45 things here, and of 90 only 45"):
        alone.take("a", 1)


def test_without_keys_there_is_the_bound_of_all() -> None:
    bound = Bound("things", 3, by_tenant=False)
    bound.take("", 3)
    with pytest.raises(Overloaded, match="3 things here, limit 3") as error:
        bound.take("", 1)
    assert not isinstance(error.value, OverShare)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 9)), max_size=60))
def test_the_bound_holds_and_a_newcomer_finds_room_beside_one_other(asked: list[tuple[str, int]]) -> None:
    bound, held = Bound("things", 40, by_tenant=True), list[tuple[str, int]]()
    for tenant, amount in asked:
        try:
            bound.take(tenant, amount)
            held.append((tenant, amount))
        except Overloaded:
            pass
        assert bound.total == sum(amount for _, amount in held) <= 40
        if len({tenant for tenant, _ in held}) == 1:
            bound.take("new", 1)
            bound.give_back("new", 1)
    for tenant, amount in held:
        bound.give_back(tenant, amount)
    assert bound.total == 0


def test_a_key_over_its_share_is_429_while_another_is_served(sum_text: TextModel) -> None:
    async def test() -> None:
        model = GatedModel()
        engine = new_engine(model, max_running=2, max_waiting=6)
        async with in_process(new_app(engine, sum_text, api_keys=("alice", "bob"))) as client:

            def ask(key: str) -> "asyncio.Task[httpx.Response]":
                return asyncio.create_task(client.post(TEXTS, json=ASKED, headers={"x-api-key": key}))

            flood = [ask("alice") for _ in range(10)]
            await asyncio.to_thread(model.reached.wait, 10)
            await asyncio.sleep(0.05)
            refused = [task.result() for task in flood if task.done()]
            assert [reply.status_code for reply in refused] == [429] * 6
            assert refused[0].headers["retry-after"] == "1"
            assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
            other = ask("bob")
            await asyncio.sleep(0.05)
            metrics = (await client.get("/metrics")).text
            assert "hybrid_cache_requests_open 5.0" in metrics
            assert 'hybrid_cache_requests_refused_total{kind="over_share"} 6.0' in metrics
            model.gate.set()
            assert (await other).status_code == 200
            assert sorted(r.status_code for r in await asyncio.gather(*flood)) == [200] * 4 + [429] * 6
            assert "hybrid_cache_requests_open 0.0" in (await client.get("/metrics")).text

    run(test)


def test_prompts_and_bytes_of_a_request_are_counted(sum_text: TextModel) -> None:
    async def test() -> None:
        model = GatedModel()
        engine = new_engine(model, max_running=2, max_waiting=6)
        async with in_process(new_app(engine, sum_text, max_body_bytes=4096)) as client:
            many = {**ASKED, "prompt": [ASKED["prompt"]] * 6}
            first = asyncio.create_task(client.post(TEXTS, json=many))
            await asyncio.to_thread(model.reached.wait, 10)
            await asyncio.sleep(0.05)
            refused = await client.post(TEXTS, json=many)
            assert refused.status_code == 503
            assert "limit 8" in refused.json()["error"]["message"]
            model.gate.set()
            assert (await first).status_code == 200
            assert (await client.post(TEXTS, json=many)).status_code == 200
            assert "hybrid_cache_request_body_bytes 0.0" in (await client.get("/metrics")).text

    run(test)


def test_one_request_may_take_all_and_a_second_one_of_its_key_may_not() -> None:
    bound = Bound("things", 12, by_tenant=True)
    bound.take("a", 1)
    bound.take("a", 11, held=1)
    assert bound.total == 12
    bound.give_back("a", 4)
    with pytest.raises(OverShare, match="8 things here, and of 12 only 4"):
        bound.take("a", 1)


def test_more_prompts_than_ever_fit_are_refused_for_good(sum_text: TextModel) -> None:
    async def test() -> None:
        app = new_app(new_engine(max_running=2, max_waiting=6), sum_text, api_keys=("alice", "bob"))
        async with in_process(app) as client:
            for number, status in ((6, 200), (7, 400)):
                asked = {"prompt": ["x"] * number, "max_tokens": 1}
                reply = await client.post(TEXTS, json=asked, headers={"x-api-key": "alice"})
                assert reply.status_code == status
            error = reply.json()["error"]
            assert (error["message"], error["param"]) == ("7 prompts in one request, at most 6 can wait here", "prompt")
            assert "hybrid_cache_requests_open 0.0" in (await client.get("/metrics")).text

    run(test)
