"""What is cached, asked over HTTP and on the command line: each client's own, and all of it for an operator."""

import asyncio
import json
import re
import threading
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import ConfigError, EngineStopped
from tests.api.servers import GatedModel, in_process, new_app, new_engine, over_the_wire

PATH = "/cache/conversations"
PROMPT = "The code of the rocket is 4711, and nobody else may know of it. " * 4
KEYS = ("alice", "bob", "root")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


async def complete(client: httpx.AsyncClient, key: str, prompt: str = PROMPT, **more: str) -> None:
    body = {"prompt": prompt, "max_tokens": 1, **more}
    reply = await client.post("/v1/completions", json=body, headers=bearer(key))
    assert reply.status_code == 200


async def listed(client: httpx.AsyncClient, key: str = "", **params: str) -> list[dict[str, Any]]:
    reply = await client.get(PATH, headers=bearer(key), params=params)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert found["total"] == len(found["data"])
    return list(found["data"])


def test_each_key_sees_and_drops_its_own_and_an_operator_all(sum_text: TextModel) -> None:
    async def test() -> None:
        app = new_app(new_engine(), sum_text, api_keys=KEYS, operator_keys=("root",))
        async with in_process(app) as client:
            await complete(client, "alice")
            await complete(client, "alice", cache_salt="red")
            await complete(client, "bob", "Something else that bob has said. " * 8)
            own, salted = await listed(client, "alice"), await listed(client, "alice", cache_salt="red")
            (theirs,) = await listed(client, "bob")
            assert (len(own), len(salted), len(await listed(client, "root"))) == (2, 1, 3)
            assert salted[0] in [{**each, "age_s": salted[0]["age_s"], "score": salted[0]["score"]} for each in own]
            names = {each["name"] for each in own}
            assert theirs["name"] not in names
            shown = (await client.get(f"{PATH}/{theirs['name'][:10]}", headers=bearer("bob"))).json()
            assert shown["text"].endswith("Something else that bob has said. ")
            assert shown["states"][-1]["tokens"] == shown["tokens"] == 272
            for method in ("GET", "DELETE"):
                hidden = await client.request(method, f"{PATH}/{theirs['name']}", headers=bearer("alice"))
                unknown = await client.request(method, f"{PATH}/{'0' * 32}", headers=bearer("alice"))
                assert hidden.status_code == unknown.status_code == 404
                assert hidden.text.replace(theirs["name"], "0" * 32) == unknown.text
            assert (await client.get(f"{PATH}/{theirs['name']}", headers=bearer("root"))).status_code == 200
            dropped = (await client.delete(PATH, headers=bearer("alice"))).json()
            assert dropped["freed_bytes"] > 0
            assert await listed(client, "alice") == []
            assert len(await listed(client, "root")) == 1
            assert (await client.delete(PATH, headers=bearer("alice"))).json() == {"freed_bytes": 0}

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_shared_cache_is_shown_to_an_operator_only(sum_text: TextModel) -> None:
    async def test() -> None:
        app = new_app(new_engine(), sum_text, api_keys=KEYS, operator_keys=("root",), shared_cache=True)
        async with in_process(app) as client:
            await complete(client, "alice")
            for method in ("GET", "DELETE"):
                reply = await client.request(method, PATH, headers=bearer("bob"))
                assert reply.status_code == 403
                assert "operator" in reply.json()["error"]["message"]
            assert len(await listed(client, "root")) == 1
            assert (await client.get(PATH)).status_code == 401

    asyncio.run(asyncio.wait_for(test(), 60))


def test_without_keys_a_salt_sees_its_own(sum_text: TextModel) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(), sum_text)) as client:
            await complete(client, "", cache_salt="red")
            assert await listed(client) == await listed(client, cache_salt="re") == []
            (own,) = await listed(client, cache_salt="red")
            assert own["namespace"] == "red"
            assert (await client.get(f"{PATH}/{own['name']}")).status_code == 404
            assert (await client.delete(PATH)).json() == {"freed_bytes": 0}
            assert (await client.delete(f"{PATH}/{own['name']}", params={"cache_salt": "red"})).status_code == 200
            assert await listed(client, cache_salt="red") == []

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize(
    ("path", "status"),
    [("/nonsense", 404), ("/abc", 404), ("/" + "a" * 33, 404), ("?limit=0", 400), ("?limit=2000", 400)],
)
def test_bad_names_and_limits_are_refused(client: httpx.Client, path: str, status: int) -> None:
    reply = client.get(PATH + path)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


def test_an_operators_key_is_one_of_the_keys() -> None:
    with pytest.raises(ConfigError, match="operator"):
        ServerSettings(("m",), "native", "m", operator_keys=("root",))


def test_a_dropped_conversation_is_computed_again_and_its_report_says_so(sum_text: TextModel) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(), sum_text)) as client:
            for name in ("", "/NAME"):
                await complete(client, "")
                kept = (await client.get(PATH)).json()["data"]
                await client.delete(PATH + name.replace("NAME", kept[0]["name"]))
                body = {"prompt": PROMPT, "max_tokens": 1, "cache_report": True}
                report = (await client.post("/v1/completions", json=body)).json()["cache_report"]
                assert (report["cached_tokens"], report["reason"]) == (0, "dropped")
                assert report["missed"][0]["why"] == "it was cached until someone dropped it"
                assert report["missed"][0]["loss"]["score"] is None
            metrics = (await client.get("/metrics")).text
            assert re.search(r'hybrid_cache_missed_tokens_total{[^}]*"dropped"} [^0]', metrics)
            assert "hybrid_cache_evictions_total{" not in metrics

    asyncio.run(asyncio.wait_for(test(), 60))


def test_questions_are_answered_between_steps_and_not_after_the_end() -> None:
    """By the thread of the engine; one that fails is the asker's, and an engine that has ended refuses."""

    async def test() -> None:
        model = GatedModel()
        engine = new_engine(model)
        with pytest.raises(EngineStopped):
            await engine.ask(lambda core: 0)
        engine.start()
        assert await engine.ask(lambda core: threading.current_thread().name) == "hybrid-cache-engine"
        with pytest.raises(ZeroDivisionError):
            await engine.ask(lambda core: 1 // 0)
        given_up = asyncio.ensure_future(engine.ask(lambda core: 1))
        await asyncio.sleep(0)
        given_up.cancel()
        assert await engine.ask(lambda core: core.has_work) is False
        await engine.stop(0)
        with pytest.raises(EngineStopped):
            await engine.ask(lambda core: 0)

    asyncio.run(asyncio.wait_for(test(), 60))


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    """One command line -> its status and what it printed."""
    with pytest.raises(SystemExit) as end:
        cli.main(["cache", *args])
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out + said.err


def test_the_command_line_lists_shows_and_drops(
    sum_text: TextModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with over_the_wire(new_app(new_engine(), sum_text, api_keys=KEYS)) as url:
        where = ("--url", url, "--api-key", "alice")
        for text in (PROMPT, "Red: \x1b[31m" * 20 + PROMPT):
            body = {"prompt": text, "max_tokens": 1}
            assert httpx.post(f"{url}/v1/completions", json=body, headers=bearer("alice")).status_code == 200
        status, said = run(capsys, "ls", *where, "--json")
        found: Mapping[str, Any] = json.loads(said)
        longest = max(found["data"], key=lambda each: each["tokens"])
        assert (status, found["total"]) == (0, 2)
        status, table = run(capsys, "ls", *where)
        assert status == 0
        assert longest["name"][:12] in table
        assert "prompt_end" in table
        status, said = run(capsys, "show", longest["name"], *where)
        assert status == 0
        assert "nobody else may know of it." in said
        assert "\x1b[31m" not in said
        assert run(capsys, "ls", "--url", url, "--api-key", "bob", "--json") == (
            0,
            '{\n  "data": [],\n  "total": 0\n}\n',
        )
        assert run(capsys, "drop", longest["name"], "--url", url, "--api-key", "bob")[0] == 2
        assert "freed" in run(capsys, "drop", longest["name"], *where)[1]
        assert json.loads(run(capsys, "ls", *where, "--json")[1])["total"] == 1
        assert json.loads(run(capsys, "drop", "--all", *where, "--json")[1])["freed_bytes"] > 0
        assert json.loads(run(capsys, "ls", *where, "--json")[1])["total"] == 0


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("ls", "--url", "http://127.0.0.1:9"), "no connection"),
        (("ls", "--url", "nonsense"), "not an address"),
        (("show", "../../health"), "no name"),
        (("drop",), "--all"),
        (("drop", "abcd", "--all"), "is no folder"),
    ],
)
def test_what_cannot_be_asked_is_an_error_in_a_line(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], reason: str
) -> None:
    status, said = run(capsys, *args)
    assert status == 2
    assert said.startswith("error:")
    assert reason in said
