"""Keys, request ids, health, a full queue, draining, and a model that fails."""

import asyncio
from collections.abc import Callable, Coroutine

import httpx
import pytest
from torch import Tensor

from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.errors import OwnershipError
from tests.api.servers import GatedModel, events_of, in_process, new_app, new_engine, prompt_for, until_free
from tests.fakes import SumModel

ASKED = {"prompt": prompt_for(400), "max_tokens": 3}


def run(test: Callable[[], Coroutine[object, object, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_request_ids_are_echoed_or_made(client: httpx.Client) -> None:
    assert client.get("/health", headers={"x-request-id": "bench-1f_2"}).headers["x-request-id"] == "bench-1f_2"
    for bad in ("", "a b", "x" * 129, "é".encode()):
        made = client.get("/nowhere", headers={"x-request-id": bad}).headers["x-request-id"]
        assert len(made) == 32


def test_the_server_tells_about_itself(client: httpx.Client) -> None:
    health = client.get("/health").json()
    assert {k: health[k] for k in ("status", "exact", "inexact", "backend", "fallbacks", "model")} == {
        "status": "ok",
        "exact": True,
        "inexact": [],
        "backend": "fake",
        "fallbacks": {},
        "model": "sum",
    }
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/ping").status_code == 200
    assert client.get("/version").json()["version"]
    models = client.get("/v1/models").json()
    assert [m["id"] for m in models["data"]] == ["sum", "sum-alias"]
    assert models["data"][0]["root"] == "sum"  # a folder's name, not its place
    assert client.get("/v1/models/sum-alias").json()["max_model_len"] == 4096
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert "im_start" in info["chat_template"]


def test_health_says_why_the_cache_is_not_exact(sum_text: TextModel) -> None:
    async def test() -> None:
        reasons = ("fast mode", "linear 3 -> 4 in torch.bfloat16")
        async with in_process(new_app(new_engine(), sum_text, inexact=reasons)) as client:
            health = (await client.get("/health")).json()
            assert (health["exact"], health["inexact"]) == (False, list(reasons))
            assert 'exact="false"' in (await client.get("/metrics")).text

    run(test)


def test_finished_requests_are_counted(client: httpx.Client) -> None:
    assert client.post("/v1/completions", json=ASKED).status_code == 200
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    assert "hybrid_cache_" in reply.text


def test_keys_guard_everything_but_the_probes(sum_text: TextModel) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(), sum_text, api_keys=("first", "sécond"))) as client:
            for header in (None, "Bearer ", "Bearer wrong", "Basic first", "first", b"Bearer \xff"):
                headers = {} if header is None else {"Authorization": header}
                reply = await client.post("/v1/completions", json=ASKED, headers=headers)
                assert reply.status_code == 401
                assert reply.json()["error"]["code"] == "invalid_api_key"
                assert reply.headers["x-request-id"]
            for key in ("first", "sécond"):
                headers = {"Authorization": b"Bearer " + key.encode()}
                assert (await client.post("/v1/completions", json=ASKED, headers=headers)).status_code == 200
            for path in ("/v1/models", "/tokenizer_info", "/openapi.json", "/nowhere"):
                assert (await client.get(path)).status_code == 401
            for path in ("/health", "/ready", "/ping", "/version", "/metrics"):
                assert (await client.get(path)).status_code == 200

    run(test)


def test_a_full_queue_is_503_with_retry_after_and_recovers(sum_text: TextModel) -> None:
    async def test() -> None:
        model = GatedModel()
        engine = new_engine(model, max_running=1, max_waiting=1)
        async with in_process(new_app(engine, sum_text)) as client:
            first = asyncio.create_task(client.post("/v1/completions", json=ASKED))
            await asyncio.to_thread(model.reached.wait, 10)
            second = asyncio.create_task(client.post("/v1/completions", json=ASKED))
            await asyncio.sleep(0.05)
            for stream in (False, True):
                reply = await client.post("/v1/completions", json={**ASKED, "stream": stream})
                assert reply.status_code == 503
                assert reply.headers["retry-after"] == "1"
                assert reply.json()["error"]["code"] == "server_overloaded"
                assert "limit 2" in reply.json()["error"]["message"]
            model.gate.set()
            assert [(await task).status_code for task in (first, second)] == [200, 200]

    run(test)


def test_draining_finishes_what_runs_and_refuses_what_comes(sum_text: TextModel) -> None:
    async def test() -> None:
        model = GatedModel()
        engine = new_engine(model)
        async with in_process(new_app(engine, sum_text)) as client:
            running = asyncio.create_task(client.post("/v1/completions", json=ASKED))
            await asyncio.to_thread(model.reached.wait, 10)
            stopping = asyncio.create_task(engine.stop(10))
            await asyncio.sleep(0)
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/ready")).json() == {"status": "draining"}
            assert (await client.get("/health")).status_code == 200
            refused = await client.post("/v1/completions", json=ASKED)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            model.gate.set()
            assert (await running).json()["usage"]["completion_tokens"] == 3
            await stopping
            assert (await client.get("/health")).status_code == 503

    run(test)


class FailingModel(SumModel):
    """Finds at its tenth step that nothing can be relied on."""

    steps = 0

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        self.steps += 1
        if self.steps == 10:
            raise OwnershipError("secret place")
        return super().forward(batch, cache)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_is_told_to_every_client_and_probe(sum_text: TextModel, stream: bool) -> None:
    async def test() -> None:
        engine = new_engine(FailingModel())
        async with in_process(new_app(engine, sum_text)) as client:
            asked = {**ASKED, "max_tokens": 100, "ignore_eos": True, "stream": stream}
            reply = await client.post("/v1/completions", json=asked)
            if stream:
                assert reply.status_code == 200
                assert '"type":"server_unavailable"' in reply.text.split("\n\n")[-2]
                assert "[DONE]" not in reply.text
            else:
                assert reply.status_code == 503
            assert "secret" not in reply.text
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/ready")).json() == {"status": "failed"}
            assert (await client.post("/v1/completions", json=ASKED)).status_code == 503

    run(test)


def test_a_bug_of_ours_is_a_500_that_tells_nothing(sum_text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        engine = new_engine()
        async with in_process(new_app(engine, sum_text)) as client:
            monkeypatch.setattr(engine, "submit", lambda request: [][0])
            reply = await client.post("/v1/completions", json=ASKED, headers={"x-request-id": "me"})
            assert reply.status_code == 500
            assert reply.headers["x-request-id"] == "me"
            assert reply.headers["x-should-retry"] == "false"
            assert reply.json()["error"]["code"] == "internal_error"
            assert "IndexError" not in reply.text

    run(test)


def test_a_length_is_what_the_cache_can_hold_where_it_is_open_or_larger(sum_text: TextModel) -> None:
    async def test() -> None:
        engine = new_engine(budget_bytes=20_000)
        async with in_process(new_app(engine, sum_text)) as client:
            messages = [{"role": "user", "content": "Hi"}]
            asked = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
            reply = await client.post("/v1/chat/completions", json={**asked, "ignore_eos": True})
            total = events_of(reply.text)[-1]["usage"]["total_tokens"]
            assert 64 <= total < 4096
            named = await client.post("/v1/chat/completions", json={**asked, "ignore_eos": True, "max_tokens": 4000})
            assert events_of(named.text)[-1]["usage"]["total_tokens"] == total
            await until_free(engine)

    run(test)
