"""Which conversation a request belongs to: found in what clients send, in a stated order, and it changes nothing."""

import asyncio
import json
from typing import Any

import pytest
from starlette.datastructures import Headers

from hybrid_cache.api.server.schemas.anthropic import MessagesRequest
from hybrid_cache.api.server.schemas.completions import CompletionRequest
from hybrid_cache.api.server.sessions import MOST_CHARACTERS, session_of
from hybrid_cache.api.text.records import RequestRecord
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.request import Request
from tests.api.servers import in_process, new_app, new_engine

UUID = "0f8fad5b-d9cb-469f-a165-70867728950e"
PROMPT = "one two three four five six seven eight nine ten " * 8


def openai(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "x", **fields})


def anthropic(**fields: Any) -> MessagesRequest:
    turn = {"role": "user", "content": "x"}
    return MessagesRequest.model_validate({"model": "m", "max_tokens": 1, "messages": [turn], **fields})


def user(user_id: str) -> MessagesRequest:
    return anthropic(metadata={"user_id": user_id})


@pytest.mark.parametrize(
    ("asked", "headers", "session"),
    [
        (openai(), {}, ""),
        (openai(prompt_cache_key=" key "), {}, "key"),
        (openai(prompt_cache_key="key", session_id="own"), {}, "own"),
        (openai(prompt_cache_key="key"), {"X-Session-Id": "h"}, "h"),
        (openai(session_id="own"), {"x-session-id": "h"}, "own"),
        (openai(session_id="  "), {"x-session-id": "h"}, "h"),
        (openai(), {"thread-id": "t", "session-id": "s"}, "s"),
        (openai(), {"thread-id": "t"}, "t"),
        (openai(), {"session-id": "s", "x-claude-code-session-id": "c"}, "c"),
        (openai(), {"x-session-id": "h", "x-claude-code-session-id": "c"}, "h"),
        (
            openai(),
            {"x-claude-code-session-id": "c", "x-claude-code-agent-id": "a", "x-claude-code-parent-agent-id": "p"},
            "c/p/a",
        ),
        (user("somebody"), {}, "somebody"),
        (user(f"user_4f_account_{UUID}_session_{UUID}"), {}, UUID),
        (user(json.dumps({"device_id": "d", "session_id": UUID})), {}, UUID),
        (user(json.dumps({"device_id": "d"})), {}, '{"device_id": "d"}'),
        (user('{"session_id": 5}'), {}, '{"session_id": 5}'),
        (user("{nonsense"), {}, "{nonsense"),
        (user("[" * 3000), {}, None),
        (user("a_session_"), {}, "a_session_"),
        (user(UUID), {"thread-id": "t"}, "t"),
        (anthropic(), {}, ""),
    ],
)
def test_where_a_session_is_found(asked: Any, headers: dict[str, str], session: str | None) -> None:
    found = session_of(Headers(headers), asked)
    assert found == session if session is not None else found.startswith("sha256:")


def test_a_long_session_is_known_by_its_digest_and_stays_apart_from_others() -> None:
    longest = "s" * MOST_CHARACTERS
    one, two = (session_of(Headers(), openai(session_id=longest + end)) for end in "ab")
    assert session_of(Headers(), openai(session_id=longest)) == longest
    assert len({longest, one, two}) == 3
    assert max(map(len, (one, two))) <= MOST_CHARACTERS


def test_a_session_reaches_engine_and_record_and_changes_neither_tokens_nor_what_is_found(
    sum_text: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        engine, seen, records = new_engine(), list[Request](), list[RequestRecord]()
        submit = engine.submit
        monkeypatch.setattr(engine, "submit", lambda request: seen.append(request) or submit(request))
        app = new_app(engine, sum_text)
        monkeypatch.setattr(
            "hybrid_cache.api.server.metrics.Metrics.observe", lambda self, record: records.append(record)
        )
        async with in_process(app) as client:

            async def ask(**more: str) -> dict[str, Any]:
                body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, **more}
                return dict((await client.post("/v1/completions", json=body)).json())

            first, other = await ask(session_id="one"), await ask(session_id="two")
        assert [request.session for request in seen] == [record.session for record in records] == ["one", "two"]
        assert seen[0].namespace == seen[1].namespace
        assert first["choices"] == other["choices"]
        assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == other["usage"]["prompt_tokens"]

    asyncio.run(asyncio.wait_for(test(), 30))
