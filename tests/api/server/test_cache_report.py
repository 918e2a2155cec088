"""What replies say about the cache on request, to both stock clients and by hand."""

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from hybrid_cache.api.server.anthropic.diagnostics import Diagnoses, Earlier, fingerprint
from hybrid_cache.api.server.schemas.anthropic import MessagesRequest
from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import events_of, in_process, new_app, new_engine, over_the_wire

SYSTEM = "You answer in one word, and you think about it for as long as it takes. " * 2
ASK = {"cache_report": True}
SALTS = (f"salt-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def messages_api(sum_text: TextModel) -> Iterator[anthropic.Anthropic]:
    """With a cache of its own: this dialect has no salt."""
    with (
        over_the_wire(new_app(new_engine(), sum_text)) as url,
        anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client,
    ):
        yield client


def turns(*texts: str) -> Any:
    roles = itertools.cycle(("user", "assistant"))
    system = {"role": "system", "content": SYSTEM}
    return [system, *({"role": role, "content": text} for role, text in zip(roles, texts, strict=False))]


def say(api: openai.OpenAI, salt: str, *texts: str, **more: Any) -> Any:
    body = {**ASK, "cache_salt": salt}
    return api.chat.completions.create(model="sum", messages=turns(*texts), max_tokens=1, extra_body=body, **more)


def test_a_chat_is_told_at_which_message_it_differs_and_both_texts(api: openai.OpenAI) -> None:
    salt, long = next(SALTS), "We talked of many things, of ships and kings, of cabbages and of much more. "
    first = say(api, salt, long, "Go on.", "What then?" + long).cache_report
    assert first["reason"] == "never_seen"
    assert (first["cached_tokens"], first["cached_from"], first["nearest"]) == (0, None, None)
    report = say(api, salt, long, "Go out.", "What then?" + long).cache_report
    nearest = report["nearest"]
    assert nearest["message"] == 2
    assert nearest["before"].endswith("assistant\nGo o")
    assert nearest["here"].startswith("ut.")
    assert nearest["there"].startswith("n.")
    assert report["reason"] == "differs"
    edges = [report["cached_tokens"], *(part["end"] for part in report["missed"])]
    assert [part["start"] for part in report["missed"]] == edges[:-1]
    assert edges[-1] == report["prompt_tokens"]
    assert nearest["token"] == report["missed"][-1]["start"]
    assert report["cached_tokens"] > 0


def test_a_repeat_misses_nothing_and_its_report_agrees_with_usage(api: openai.OpenAI) -> None:
    salt = next(SALTS)
    say(api, salt, "Hello")
    reply = say(api, salt, "Hello")
    assert reply.usage.prompt_tokens_details.cached_tokens == reply.cache_report["cached_tokens"]
    assert reply.cache_report == {
        "prompt_tokens": reply.usage.prompt_tokens,
        "cached_tokens": reply.usage.prompt_tokens,
        "disk_tokens": 0,
        "cached_from": "prompt_end",
        "kv_only_tokens": 0,
        "reason": None,
        "missed": [],
        "nearest": None,
    }


@pytest.mark.parametrize("with_usage", [False, True])
def test_the_last_chunk_of_a_stream_has_the_report(api: openai.OpenAI, with_usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = list(say(api, next(SALTS), "Hello", stream=True, **options))
    reports = [getattr(chunk, "cache_report", None) for chunk in chunks]
    assert reports[-1]["reason"] == "never_seen"
    assert not any(reports[:-1])
    assert (chunks[-1].usage is not None) is with_usage


def test_each_prompt_of_a_completion_has_its_own(client: httpx.Client) -> None:
    body = {"prompt": ["a" * 200, "b" * 100], "max_tokens": 1, "cache_salt": next(SALTS), **ASK}
    reports = client.post("/v1/completions", json=body).json()["cache_report"]
    assert [report["prompt_tokens"] for report in reports] == [200, 100]
    streamed = events_of(client.post("/v1/completions", json={**body, "stream": True}).text)
    assert [report["reason"] for report in streamed[-1]["cache_report"]] == [None, None]


@pytest.mark.parametrize(
    ("headers", "fields", "asked"),
    [
        ({}, {}, False),
        ({"x-cache-report": "1"}, {}, True),
        ({"X-Cache-Report": "true"}, {}, True),
        ({"x-cache-report": "0"}, {}, False),
        ({"x-cache-report": "1"}, {"cache_report": False}, False),
        ({"x-cache-report": "nonsense"}, ASK, True),
    ],
)
def test_a_report_comes_if_the_body_or_else_the_header_asks(
    client: httpx.Client, headers: dict[str, str], fields: dict[str, Any], asked: bool
) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/messages", {"model": "sum", "messages": [{"role": "user", "content": "x"}]}),
    ):
        reply = client.post(path, json={"max_tokens": 1, **body, **fields}, headers=headers)
        assert ("cache_report" in reply.json()) is asked, reply.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_header_that_says_neither_yes_nor_no_is_refused(client: httpx.Client, path: str) -> None:
    body = {"model": "sum", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}
    reply = client.post(path, json=body, headers={"x-cache-report": "maybe"})
    assert reply.status_code == 400
    assert "maybe" in reply.json()["error"]["message"]


def test_a_request_that_does_not_use_the_cache_is_told_so(client: httpx.Client) -> None:
    body = {"prompt": "x" * 100, "max_tokens": 1, "cache_salt": next(SALTS), **ASK}
    for more in ({"prompt_cache_options": {"mode": "explicit"}}, {"echo": True, "logprobs": 1}):
        report = client.post("/v1/completions", json={**body, **more}).json()["cache_report"]
        assert report["reason"] == "off"
        assert report["missed"][0]["end"] == 100


def test_a_choreography_reports_by_its_plan(client: httpx.Client) -> None:
    body = {"messages": turns("Hello"), "max_tokens": 1, "choreography": {}, "cache_salt": next(SALTS), **ASK}
    reply = client.post("/v1/chat/completions", json=body).json()
    assert reply["choreography"]["plan"]["prefix_tokens"] == reply["cache_report"]["cached_tokens"]


def test_what_was_evicted_says_when_and_with_which_score(sum_text: TextModel) -> None:
    async def test() -> None:
        engine, begin = new_engine(budget_bytes=192 << 10), time.time()
        async with in_process(new_app(engine, sum_text)) as client:

            async def ask(letter: str) -> dict[str, Any]:
                body = {"prompt": letter * 600, "max_tokens": 1, **ASK}
                return dict((await client.post("/v1/completions", json=body)).json()["cache_report"])

            await ask("a")
            for letter in "bcdefghijkl":
                await ask(letter)
            report = await ask("a")
            metrics = (await client.get("/metrics")).text
        assert report["reason"] == "evicted"
        part = report["missed"][0]
        assert begin < part["loss"]["at"] < time.time()
        assert 'hybrid_cache_misses_total{kind="never_seen"} 12.0' in metrics
        assert 'hybrid_cache_misses_total{kind="evicted"} 1.0' in metrics
        assert f'hybrid_cache_missed_tokens_total{{kind="never_seen"}} {12 * 600}.0' in metrics

    asyncio.run(asyncio.wait_for(test(), 60))


def test_kv_is_said_to_be_there_only_where_it_is(sum_text: TextModel) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(policy="none"), sum_text)) as client:
            body = {"prompt": "a" * 280, "max_tokens": 1, **ASK}
            reports = [(await client.post("/v1/completions", json=body)).json()["cache_report"] for _ in range(2)]
        assert (reports[1]["cached_tokens"], reports[1]["kv_only_tokens"]) == (0, 256)
        said = {(part["end"], part["reason"]): "its KV is there" in part["why"] for part in reports[1]["missed"]}
        assert said.pop((280, "declined")) is False
        assert said in ({(256, "declined"): True}, {(256, "not_kept"): True})

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_remainder_may_be_a_whole_tile(client: httpx.Client) -> None:
    body = {"prompt": "x" * 64, "max_tokens": 1, "cache_salt": next(SALTS), **ASK}
    [part] = client.post("/v1/completions", json=body).json()["cache_report"]["missed"]
    assert (part["start"], part["end"], part["reason"]) == (0, 64, "tile_remainder")
    assert "64 tokens at most" in part["why"]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("shared", [False, True])
def test_no_key_is_told_what_another_one_has_said(sum_text: TextModel, shared: bool) -> None:
    """Neither the text of it, nor that it is there, though one key sees what it has itself under another salt."""

    async def test() -> None:
        settings = {"api_keys": ("alice", "bob"), "shared_cache": shared}
        async with in_process(new_app(new_engine(), sum_text, **settings)) as client:

            async def ask(key: str, end: str, **more: str) -> dict[str, Any]:
                body = {"prompt": "The launch code of the moon rocket is " * 4 + end, "max_tokens": 1, **ASK, **more}
                reply = await client.post("/v1/completions", json=body, headers=bearer(key))
                return dict(reply.json()["cache_report"])

            secret = "4711, and nobody else may know of it. " * 3
            await ask("alice", secret, cache_salt="red")
            theirs = await ask("bob", "what? " * 20, cache_salt="red")
            other = await ask("bob", secret, cache_salt="blue")
            own = await ask("alice", "what? " * 20, cache_salt="red")
            elsewhere = await ask("alice", secret, cache_salt="green")
        for report in (theirs, other):
            assert report["nearest"] is None
            assert not any(part["loss"] for part in report["missed"])
        known = [part for part in other["missed"] if part["reason"] != "never_seen"]
        if shared:
            assert known == []
            assert {part["reason"] for part in theirs["missed"]} == {"not_kept", "never_seen"}
            assert own["nearest"] is elsewhere["nearest"] is None
        else:
            assert {part["reason"] for part in theirs["missed"]} == {"never_seen"}
            assert [(part["reason"], part["end"]) for part in known] == [("other_namespace", 128)]  # what bob has said
            assert own["nearest"]["there"].startswith("4711")
            assert elsewhere["reason"] == "other_namespace"

    asyncio.run(asyncio.wait_for(test(), 60))


def test_without_keys_one_salt_is_not_told_of_another(client: httpx.Client) -> None:
    body = {"prompt": "The code of the rocket is 4711. " * 8, "max_tokens": 1, **ASK}
    salts = [f"{salt}:x" for salt in (next(SALTS), next(SALTS))] + [next(SALTS)]
    reports = [client.post("/v1/completions", json={**body, "cache_salt": s}).json()["cache_report"] for s in salts]
    assert {report["reason"] for report in reports} == {"never_seen"}
    assert not any(report["nearest"] for report in reports)


# Anthropic's dialect


def tell(api: anthropic.Anthropic, *texts: str, **fields: Any) -> Any:
    messages = turns(*texts)[1:]
    body = {"model": "sum", "max_tokens": 1, "system": SYSTEM, "messages": messages, **fields}
    return api.messages.create(**body)


def test_a_message_has_a_report_too_also_at_the_end_of_a_stream(messages_api: anthropic.Anthropic) -> None:
    text = "The ship sails on Monday. " * 5
    assert tell(messages_api, text, extra_body=ASK).cache_report["reason"] == "never_seen"
    nearest = tell(messages_api, text.replace("Monday", "Sunday"), extra_body=ASK).cache_report["nearest"]
    assert (nearest["message"], nearest["here"][:6], nearest["there"][:6]) == (1, "Sunday", "Monday")
    events = list(tell(messages_api, text, extra_headers={"x-cache-report": "1"}, stream=True))
    assert events[0].message.cache_report == events[-2].cache_report
    assert events[-2].type == "message_delta"
    assert events[-2].cache_report["cached_from"] == "prompt_end"


def test_diagnostics_say_what_has_changed_since_an_earlier_message(messages_api: anthropic.Anthropic) -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}}
    first = tell(messages_api, "one", "two", "three", tools=[tool], diagnostics={"previous_message_id": None})
    assert first.diagnostics is None
    named = {"tools": [tool], "diagnostics": {"previous_message_id": first.id}}
    same = {"type": "text", "text": "three", "cache_control": {"type": "ephemeral"}}

    def reason(*texts: Any, **more: Any) -> Any:
        found = tell(messages_api, *texts, **{**named, **more}).diagnostics
        return found and found.cache_miss_reason.type

    assert reason("one", "two", "three", "four", "five") is None
    assert reason("one", "two", [same], "four", "five") is None
    assert reason("one", "2", "three", "four", "five") == "messages_changed"
    assert reason("one") == "messages_changed"
    assert reason("one", "two", "three", system="Be kind.") == "system_changed"
    assert reason("one", "two", "three", tools=[tool, {**tool, "name": "g"}]) == "tools_changed"
    assert reason("one", "two", "three", model="sum-alias") == "model_changed"
    assert reason("one", "two", "three", tool_choice={"type": "none"}) == "unavailable"
    unknown = {"previous_message_id": "msg_0"}
    assert reason("one", "two", "three", diagnostics=unknown) == "previous_message_not_found"
    changed = tell(messages_api, "one", "two", "three", **{**named, "system": "Be kind."})
    usage = first.usage
    before = usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens
    missed = changed.diagnostics.cache_miss_reason.cache_missed_input_tokens
    assert missed == before - changed.usage.cache_read_input_tokens > 0
    with messages_api.messages.stream(
        model="sum",
        max_tokens=1,
        messages=[{"role": "user", "content": "x"}],
        **named,  # type: ignore[arg-type]
    ) as stream:
        final: Any = stream.get_final_message()
    assert final.diagnostics.cache_miss_reason.type == "system_changed"


def test_the_oldest_requests_are_forgotten() -> None:
    kept = Diagnoses(most=2)
    asked = MessagesRequest.model_validate({"model": "m", "max_tokens": 1, "messages": turns("x")[1:]})
    for name in "abc":
        kept.keep(name, Earlier(fingerprint(asked, "t", None), 7))
    assert [kept.find(name, "t") is not None for name in "abc"] == [False, True, True]
    assert kept.find("c", "u") is None


def test_a_message_of_another_key_was_never_sent(sum_text: TextModel) -> None:
    async def test() -> None:
        async with in_process(new_app(new_engine(), sum_text, api_keys=("alice", "bob"))) as client:

            async def ask(key: str, earlier: str | None) -> dict[str, Any]:
                turn = {"role": "user", "content": "x"}
                body = {"model": "sum", "max_tokens": 1, "messages": [turn]}
                body["diagnostics"] = {"previous_message_id": earlier}
                return dict((await client.post("/v1/messages", json=body, headers=bearer(key))).json())

            name = (await ask("alice", None))["id"]
            refused = await ask("bob", name)
            assert refused["diagnostics"]["cache_miss_reason"] == {"type": "previous_message_not_found"}
            assert (await ask("alice", name))["diagnostics"] is None

    asyncio.run(asyncio.wait_for(test(), 60))
