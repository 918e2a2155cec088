"""Whatever a client sends, it gets an error in OpenAI's form that names the value and the bound; the server goes on."""

import json
import time
from collections.abc import Iterator

import httpx
import pytest

from hybrid_cache.api.server.bodies import MAX_VALUES
from hybrid_cache.engine.async_engine import AsyncEngine
from tests.api.servers import TEXT, script_prompt

HI = [{"role": "user", "content": "Hi"}]
CHAT, TEXTS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(autouse=True)
def _goes_on(client: httpx.Client, engine: AsyncEngine) -> Iterator[None]:
    yield
    assert engine.alive
    body = client.post(TEXTS, json={"prompt": script_prompt(), "max_tokens": 20}).json()
    assert body["choices"][0]["text"] == TEXT


def error_of(reply: httpx.Response, status: int = 400) -> dict[str, str]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(reply.text) < 2000
    assert "Traceback" not in reply.text
    assert reply.headers["x-request-id"]
    assert isinstance(error, dict)
    return error


CHAT_CASES: dict[str, tuple[dict[str, object], str, tuple[str, ...]]] = {
    "no messages": ({"messages": []}, "messages", ("1",)),
    "messages missing": ({}, "messages", ("required",)),
    "messages is text": ({"messages": "Hi"}, "messages", ("'Hi'", "list")),
    "unknown role": ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", ("'wizard'", "system")),
    "role missing": ({"messages": [{"content": "x"}]}, "messages.0.role", ("required",)),
    "content missing": ({"messages": [{"role": "user"}]}, "messages.0", ("content",)),
    "content null": ({"messages": [{"role": "user", "content": None}]}, "messages.0", ("content",)),
    "content a number": ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content", ("7", "string")),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
        "messages.0.content",
        ("image_url", "text"),
    ),
    "4097 messages": ({"messages": HI * 4097}, "messages", ("4096", "4097")),
    "temperature negative": ({"messages": HI, "temperature": -1}, "temperature", ("-1", "0")),
    "temperature absurd": ({"messages": HI, "temperature": 1e300}, "temperature", ("1e+300", "100")),
    "temperature text": ({"messages": HI, "temperature": "hot"}, "temperature", ("'hot'", "number")),
    "top_p zero": ({"messages": HI, "top_p": 0}, "top_p", ("0",)),
    "max_tokens negative": ({"messages": HI, "max_tokens": -5}, "max_tokens", ("-5", "0")),
    "max_tokens absurd": ({"messages": HI, "max_tokens": 10**30}, "max_tokens", ("1000", "2147483647")),
    "max_tokens a fraction": ({"messages": HI, "max_tokens": 1.5}, "max_tokens", ("1.5", "integer")),
    "n zero": ({"messages": HI, "n": 0}, "n", ("0", "1")),
    "n absurd": ({"messages": HI, "n": 17}, "n", ("17", "16")),
    "min_tokens above max_tokens": ({"messages": HI, "min_tokens": 9, "max_tokens": 3}, "min_tokens", ("9", "3")),
    "1000 stop strings": ({"messages": HI, "stop": ["x"] * 1000}, "stop", ("1000", "16")),
    "a long stop string": ({"messages": HI, "stop": "x" * 257}, "stop", ("257", "256")),
    "an empty stop string": ({"messages": HI, "stop": ""}, "stop", ("0", "1")),
    "logit_bias not a token": ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias", ("'x'",)),
    "logit_bias in other digits": ({"messages": HI, "logit_bias": {"\u0661": 1}}, "logit_bias", ("token id",)),
    "logit_bias twice": ({"messages": HI, "logit_bias": {"1": 1, "01": 2}}, "logit_bias", ("token 1", "more than one")),
    "logit_bias too strong": ({"messages": HI, "logit_bias": {"1": 101}}, "logit_bias", ("101", "100")),
    "logit_bias unknown token": ({"messages": HI, "logit_bias": {"5000": 1}}, "logit_bias", ("5000", "997")),
    "logit_bias too many": (
        {"messages": HI, "logit_bias": {str(i): 1 for i in range(1025)}},
        "logit_bias",
        ("1025", "1024"),
    ),
    "top_logprobs": ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", ("21", "20")),
    "seed absurd": ({"messages": HI, "seed": 2**70}, "seed", (str(2**63 - 1),)),
    "stream_options without stream": (
        {"messages": HI, "stream_options": {"include_usage": True}},
        "stream_options",
        ("stream",),
    ),
    "top_logprobs without logprobs": ({"messages": HI, "top_logprobs": 2}, "top_logprobs", ("logprobs",)),
    "a tool_choice among tools": (
        {"messages": HI, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
        "tool_choice",
        ("'allowed_tools'", "'function'"),
    ),
    "an unknown tool_choice": ({"messages": HI, "tool_choice": "some"}, "tool_choice", ("'some'", "'required'")),
    "a tool_choice without a name": (
        {"messages": HI, "tool_choice": {"type": "function"}},
        "tool_choice.function",
        ("required",),
    ),
    "ttl": (
        {"messages": HI, "prompt_cache_options": {"mode": "explicit", "ttl": "99h"}},
        "prompt_cache_options.ttl",
        ("'99h'", "24h"),
    ),
    "cache_salt": ({"messages": HI, "cache_salt": "x" * 1025}, "cache_salt", ("1024",)),
    "too long": (
        {"messages": [{"role": "user", "content": "x" * 5000}]},
        "messages",
        ("4096", "5019"),
    ),
    "reserved template variable": (
        {"messages": HI, "chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs",
        ("messages",),
    ),
}


@pytest.mark.parametrize("name", CHAT_CASES)
def test_a_bad_chat_request_is_refused_with_value_and_bound(client: httpx.Client, name: str) -> None:
    asked, param, words = CHAT_CASES[name]
    error = error_of(client.post(CHAT, content=json.dumps(asked), headers={"Content-Type": "application/json"}))
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def calling(*names: str | None) -> dict[str, object]:
    return {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": name} for name in names]}


def result(name: str | None) -> dict[str, object]:
    return {"role": "tool", "content": "r", "tool_call_id": name}


UNKNOWN, APART, MISSING = "not found in 'tool_calls'", "must be a response to", "did not have response messages: a"
RESULT_CASES: dict[str, tuple[list[dict[str, object]], str, str]] = {
    "unknown": ([*HI, calling("a"), result("b")], "messages.[2].tool_call_id", f"'b' {UNKNOWN}"),
    "no call": ([*HI, result("a"), *HI], "messages.[1].role", APART),
    "before its call": ([result("a"), *HI, calling("a"), *HI], "messages.[0].role", APART),
    "not directly after": ([*HI, calling("a"), result("a"), *HI, result("a")], "messages.[4].role", APART),
    "no id": ([*HI, calling("a"), result(None)], "messages.[2].tool_call_id", "Missing parameter"),
    "call without id": ([*HI, calling(None)], "messages.[1].tool_calls.[0].id", "Missing parameter"),
    "calls of one id": ([*HI, calling("a", "a"), result("a")], "messages.[1].tool_calls.[1].id", "Duplicate"),
    "two results": ([*HI, calling("a"), result("a"), result("a")], "messages.[3].tool_call_id", UNKNOWN),
    "missing": ([*HI, calling("a"), *HI], "messages.[2].role", MISSING),
    "one of two missing": ([*HI, calling("a", "b"), result("b")], "messages.[3].role", MISSING),
}


@pytest.mark.parametrize("name", RESULT_CASES)
def test_a_tool_result_that_does_not_fit_its_call_is_refused(client: httpx.Client, name: str) -> None:
    messages, param, words = RESULT_CASES[name]
    for path, more in ((CHAT, {}), (CHAT, {"stream": True}), ("/tokenize", {})):
        error = error_of(client.post(path, json={"messages": messages, **more}))
        assert error["param"] == param
        assert words in error["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [*HI, calling("a", "b"), result("b"), result("a")],
        [*HI, calling("a"), result("a"), calling("a"), result("a"), *HI],
        [*HI, calling("a")],
    ],
    ids=["any order", "an id again in a later turn", "calls at the end"],
)
def test_tool_results_that_fit_are_taken(client: httpx.Client, messages: list[dict[str, object]]) -> None:
    assert client.post(CHAT, json={"messages": messages, "max_tokens": 1}).status_code == 200


TEXT_CASES: dict[str, tuple[dict[str, object], str, tuple[str, ...]]] = {
    "prompt missing": ({}, "prompt", ("required",)),
    "prompt empty list": ({"prompt": []}, "prompt", ("[]",)),
    "prompt empty text": ({"prompt": ""}, "prompt", ("0 tokens", "1")),
    "prompt mixed": ({"prompt": [1, "x"]}, "prompt", ("'x'", "token")),
    "prompt negative token": ({"prompt": [-1]}, "prompt", ("-1", "0")),
    "prompt unknown token": ({"prompt": [997]}, "prompt", ("997",)),
    "prompt true": ({"prompt": [True]}, "prompt", ("True",)),
    "prompt too many": ({"prompt": ["x"] * 129}, "prompt", ("129", "128")),
    "prompt too long": ({"prompt": [1] * 5000}, "prompt", ("5000", "4096")),
    "prompt an object": ({"prompt": {}}, "prompt", ("string",)),
    "logprobs": ({"prompt": "x", "logprobs": 21}, "logprobs", ("21", "20")),
    "best_of": ({"prompt": "x", "best_of": 3}, "best_of", ("3", "1")),
    "suffix": ({"prompt": "x", "suffix": "y"}, "suffix", ("suffix",)),
    "stop_token_ids": ({"prompt": "x", "stop_token_ids": [5000]}, "stop_token_ids", ("5000", "997")),
}


@pytest.mark.parametrize("name", TEXT_CASES)
def test_a_bad_completion_request_is_refused_with_value_and_bound(client: httpx.Client, name: str) -> None:
    asked, param, words = TEXT_CASES[name]
    error = error_of(client.post(TEXTS, json=asked))
    assert error["param"] == param
    for word in words:
        assert word in error["message"]


def test_a_prompt_without_room_for_an_answer_has_a_code_of_its_own(client: httpx.Client) -> None:
    for asked in ({"prompt": [1] * 4096}, {"prompt": [1] * 9000}):
        error = error_of(client.post(TEXTS, json=asked))
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("prompt is too long")
        assert str(len(asked["prompt"])) in error["message"]
        assert "4096" in error["message"]


RAW_CASES = {
    "nothing": b"",
    "cut off": b'{"messages": [',
    "not JSON": b"hello",
    "a list": b"[1]",
    "null": b"null",
    "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
    "invalid UTF-8 anywhere": b'\xff{"prompt": "x"}',
    "a lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}], "prompt": "\\udfff", "tokens": []}',
    "a lone surrogate in a key": b'{"messages": [], "prompt": "x", "tokens": [], "\\ud800": 1}',
    "UTF-16": '{"messages": [], "prompt": "x", "tokens": []}'.encode("utf-16"),
    "NaN": b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "temperature": NaN}',
    "Infinity": b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "temperature": -Infinity}',
    "overflow": b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "temperature": 1e999}',
    "many digits": b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "n": ' + b"9" * 5000 + b"}",
    "deep": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep where ignored": b'{"x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    "deep content": b'{"messages": [{"role": "user", "content": ' + b"[" * 900 + b"]" * 900 + b"}]}",
}


@pytest.mark.parametrize("name", RAW_CASES)
@pytest.mark.parametrize("path", [CHAT, TEXTS, "/tokenize", "/detokenize"])
def test_a_body_that_is_no_request_is_refused(client: httpx.Client, path: str, name: str) -> None:
    reply = client.post(path, content=RAW_CASES[name], headers={"Content-Type": "application/json"})
    if reply.status_code == 200:
        assert path in ("/tokenize", "/detokenize")  # these ignore the numbers of the others
    else:
        error_of(reply)


@pytest.mark.parametrize("deep", [b"[" * 900 + b"]" * 900, b'{"a":' * 900 + b"1" + b"}" * 900])
@pytest.mark.parametrize(
    "field",
    [
        b'"chat_template_kwargs": {"a": DEEP}',
        b'"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]',
    ],
)
def test_deep_template_variables_and_tools_are_survived(client: httpx.Client, field: bytes, deep: bytes) -> None:
    body = b'{"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], ' + field.replace(b"DEEP", deep) + b"}"
    reply = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code in (200, 400), reply.text


def test_the_wrong_content_type_is_named(client: httpx.Client) -> None:
    body = b'{"prompt": "x"}'
    error = error_of(client.post(TEXTS, content=body, headers={"Content-Type": "application/x-www-form-urlencoded"}))
    assert "application/json" in error["message"]


def test_a_body_of_eleven_megabytes_is_413(client: httpx.Client) -> None:
    body = json.dumps({"prompt": "x" * 11_000_000}).encode()
    headers = {"Content-Type": "application/json"}
    for content in (body, iter([body[:6_000_000], body[6_000_000:]])):
        error = error_of(client.post(TEXTS, content=content, headers=headers), 413)
        assert str(10 * 2**20) in error["message"]


def test_a_long_text_just_below_the_limit_is_too_many_tokens(client: httpx.Client) -> None:
    for path, asked in (
        (TEXTS, {"prompt": "x" * 10_000_000}),
        (CHAT, {"messages": [{"role": "user", "content": "x " * 5_000_000}]}),
    ):
        error = error_of(client.post(path, json=asked))
        assert error["code"] == "context_length_exceeded"
        assert "prompt is too long" in error["message"]  # agents' clients look for these words, and shorten


def test_a_place_in_the_body_is_told(client: httpx.Client) -> None:
    reply = client.post(TEXTS, content=b'{"prompt":\n  tru}', headers={"Content-Type": "application/json"})
    assert "at line 2, column 6." in error_of(reply)["message"]


def test_a_byte_order_mark_is_let_pass(client: httpx.Client) -> None:
    body = b'\xef\xbb\xbf{"prompt": "x", "max_tokens": 1}'
    assert client.post(TEXTS, content=body, headers={"Content-Type": "application/json"}).status_code == 200


BOMBS: dict[str, tuple[str, dict[str, object]]] = {
    "wrong tokens": ("/detokenize", {"tokens": [""] * 2**18}),
    "wrong calls": (CHAT, {"messages": [{"role": "assistant", "tool_calls": [0] * 60}] * 4096}),
    "empty calls": (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}] * 20}] * 4096}),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 16}] * 4096}),
    "tokens": (TEXTS, {"prompt": [0] * 2**18}),
    "wrong prompts": (TEXTS, {"prompt": [[0] * 2000] * 127 + [["x"]]}),
    "unknown fields": (CHAT, {f"f{i}": i for i in range(2**17)}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_large_wrong_body_is_refused_at_its_first_fault(client: httpx.Client, name: str) -> None:
    path, asked = BOMBS[name]
    started_s = time.process_time()  # client and server are one process
    error_of(client.post(path, json=asked))
    assert time.process_time() - started_s < 2  # it took 8 seconds when all faults were listed


def test_a_body_of_too_many_values_is_413(client: httpx.Client) -> None:
    for path, asked in (("/detokenize", {"tokens": [0] * (MAX_VALUES + 9)}), (TEXTS, {"prompt": [[]] * MAX_VALUES})):
        assert str(MAX_VALUES) in error_of(client.post(path, json=asked), 413)["message"]


def test_unknown_models_routes_and_methods(client: httpx.Client) -> None:
    error = error_of(client.post(CHAT, json={"model": "gpt-9", "messages": HI}), 404)
    assert error["code"] == "model_not_found"
    assert "gpt-9" in error["message"]
    assert error_of(client.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"
    assert error_of(client.get("/v1/models/"), 404)["code"] == "model_not_found"
    assert error_of(client.get("/v2"), 404)["code"] == "not_found"
    assert error_of(client.get(CHAT), 405)["code"] == "method_not_allowed"


def test_bad_tokens_cannot_be_detokenised(client: httpx.Client) -> None:
    assert "997" in error_of(client.post("/detokenize", json={"tokens": [997]}))["message"]
    assert error_of(client.post("/detokenize", json={"tokens": [-1]}))["param"] == "tokens.0"
    assert error_of(client.post("/tokenize", json={}))["message"]


BROKEN_CASES: dict[str, tuple[str, dict[str, object]]] = {
    "a name": (CHAT, {"messages": [{"role": "user", "content": "x", "name": "\udfff"}]}),
    "a reference": (CHAT, {"messages": [{"ref": "\ud800"}]}),
    "reasoning": (
        CHAT,
        {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "a\ud83d"}]},
    ),
    "a call's id": (
        CHAT,
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "\udc00", "type": "function", "function": {"name": "f", "arguments": ""}}],
                }
            ]
        },
    ),
    "a part of content": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
    ),
    "a key of the template's variables": (
        CHAT,
        {"messages": HI, "chat_template_kwargs": {"a": {"\ud800": 1}}},
    ),
    "a tool's schema": (
        CHAT,
        {"messages": HI, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": ["\ud800"]}}}]},
    ),
    "what is ignored": (CHAT, {"messages": HI, "metadata": {"who": "\ud800"}}),
    "a key of the body": (CHAT, {"messages": HI, "\ud800": 1}),
    "a salt": (CHAT, {"messages": HI, "cache_salt": "\ud800"}),
    "a user": (TEXTS, {"prompt": "x", "user": "\ud800"}),
    "a model": (TEXTS, {"prompt": "x", "model": "\ud800"}),
    "a stop string": (TEXTS, {"prompt": "x", "stop": ["a", "\ud800"]}),
    "a text prompt": (TEXTS, {"prompt": ["a", "\ud800"]}),
    "a text to tokenize": ("/tokenize", {"prompt": "\ud800"}),
    "a model to detokenize for": ("/detokenize", {"tokens": [1], "model": "\ud800"}),
}


@pytest.mark.parametrize("choreography", [{}, {"choreography": {}}])
@pytest.mark.parametrize("name", BROKEN_CASES)
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(
    client: httpx.Client, name: str, choreography: dict[str, object]
) -> None:
    path, asked = BROKEN_CASES[name]
    body = json.dumps({"max_tokens": 1, **asked, **choreography})
    error = error_of(client.post(path, content=body, headers={"Content-Type": "application/json"}))
    assert error["code"] == "invalid_json"
    assert "surrogates" in error["message"]
    assert "at line 1, column" in error["message"]


@pytest.mark.parametrize("body", [b'{"prompt": "\xed\xa0\x80"}', '{"prompt": "\\ud800"}'.encode("utf-16")])
def test_half_a_surrogate_pair_is_refused_however_it_is_written(client: httpx.Client, body: bytes) -> None:
    assert error_of(client.post(TEXTS, content=body, headers={"Content-Type": "application/json"}))["message"]


def test_a_long_name_is_not_sent_back(client: httpx.Client) -> None:
    body = json.dumps({"messages": HI, "x" * 100_000: "\ud800"})
    error_of(client.post(CHAT, content=body, headers={"Content-Type": "application/json"}))


def test_nul_and_both_halves_of_a_pair_are_served(client: httpx.Client) -> None:
    odd = "\0 \U0001f600 \u202e"
    message = {"role": "user", "content": odd, "name": odd, "reasoning_content": odd}
    for choreography in ({}, {"choreography": {}}):
        fields = {"cache_salt": odd, "user": odd, "metadata": {odd: odd}, "chat_template_kwargs": {odd: odd}}
        body = json.dumps({"messages": [message], "max_tokens": 1, **fields, **choreography})
        reply = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 200, reply.text
