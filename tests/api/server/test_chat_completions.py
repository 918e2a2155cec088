"""/v1/chat/completions over a real server, on a model whose answers are known."""

import json
from typing import Any

import httpx
import pytest

from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import SCRIPT, TEXT, events_of, script_ids, script_messages


def chat(client: httpx.Client, text: TextModel, **fields: object) -> Any:
    reply = client.post("/v1/chat/completions", json={"messages": script_messages(text), **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def stream(client: httpx.Client, text: TextModel, **fields: object) -> Any:
    asked = {"messages": script_messages(text), "stream": True, **fields}
    return events_of(client.post("/v1/chat/completions", json=asked).text)


def test_an_answer_in_openais_form(client: httpx.Client, sum_text: TextModel) -> None:
    body = chat(client, sum_text, model="sum-alias")
    prompt_tokens = body["usage"]["prompt_tokens"]
    assert str(body.pop("id")).startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert str(body.pop("system_fingerprint")).startswith("hybrid-cache-")
    assert body == {
        "object": "chat.completion",
        "model": "sum-alias",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 10,
            "total_tokens": prompt_tokens + 10,
            "prompt_tokens_details": body["usage"]["prompt_tokens_details"],
        },
    }


GOLDEN = """\
data: {HEAD,"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}

data: {HEAD,"choices":[{"index":0,"delta":{"content":"Hel"},"logprobs":null,"finish_reason":null}],"usage":null}

data: {HEAD,"choices":[{"index":0,"delta":{"content":"lo"},"logprobs":null,"finish_reason":null}],"usage":null}

data: {HEAD,"choices":[{"index":0,"delta":{"content":" €"},"logprobs":null,"finish_reason":null}],"usage":null}

data: {HEAD,"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":" ST"}],"usage":null}

data: {HEAD,"choices":[],"usage":{"prompt_tokens":23,"completion_tokens":6,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":0,"cache_write_tokens":0}}}

data: [DONE]

"""  # noqa: E501


def test_the_bytes_of_a_stream(client: httpx.Client, sum_text: TextModel) -> None:
    asked = {
        "messages": script_messages(sum_text),
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop": " ST",
        "prompt_cache_options": {"mode": "explicit"},
    }
    reply = client.post("/v1/chat/completions", json=asked)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    first = json.loads(reply.text.split("\n\n")[0].removeprefix("data: "))
    keys = ("id", "object", "created", "model", "system_fingerprint")
    head = ",".join(f"{json.dumps(key)}:{json.dumps(first[key])}" for key in keys)
    assert first["object"] == "chat.completion.chunk"
    assert reply.text.replace(head, "HEAD") == GOLDEN


def test_several_choices_are_interleaved_and_complete(client: httpx.Client, sum_text: TextModel) -> None:
    events = stream(client, sum_text, n=3)
    for index in range(3):
        choices = [c for e in events for c in e["choices"] if c["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in choices) == TEXT
        assert choices[-1]["delta"] == {}
        assert choices[-1]["finish_reason"] == "stop"
    order = [c["index"] for e in events for c in e["choices"]]
    assert order[:6] == [0, 1, 2, 0, 1, 2]


def test_logprobs_name_every_token_with_its_bytes(client: httpx.Client, sum_text: TextModel) -> None:
    body = chat(client, sum_text, logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content][3:6] == ["bytes:\\xe2", "bytes:\\x82\\xac", " ST"]
    expected = [list(s.encode() if isinstance(s, str) else s) for s in SCRIPT] + [list(b"<|im_end|>")]
    assert [entry["bytes"] for entry in content] == expected
    for entry in content:
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]
    events = stream(client, sum_text, logprobs=True, top_logprobs=2)
    parts = [c["logprobs"] for e in events for c in e["choices"] if c["logprobs"]]
    assert [entry for part in parts for entry in part["content"]] == content


def test_token_ids_on_request(client: httpx.Client, sum_text: TextModel) -> None:
    body = chat(client, sum_text, return_token_ids=True)
    assert body["choices"][0]["token_ids"] == script_ids()
    assert len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]


def test_parts_are_one_text_and_developer_is_system(client: httpx.Client) -> None:
    def tokens(*messages: dict[str, object]) -> object:
        return client.post("/tokenize", json={"messages": messages}).json()["tokens"]

    whole: dict[str, object] = {"role": "user", "content": "one\ntwo"}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert tokens({"role": "user", "content": parts}) == tokens(whole)
    system: dict[str, object] = {"role": "system", "content": "Be brief."}
    assert tokens({**system, "role": "developer"}, whole) == tokens(system, whole)


def test_a_final_message_is_continued(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    reply = client.post("/tokenize", json={"messages": messages, "continue_final_message": True}).json()
    text = client.post("/detokenize", json={"tokens": reply["tokens"]}).json()["prompt"]
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nWell,"


def test_tool_calls_of_earlier_turns_reach_the_template(client: httpx.Client) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]
    tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>' in text


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("unknown_field", {"a": [1]}, 200),
        ("store", True, 200),
        ("metadata", {"a": "b"}, 200),
        ("user", "me", 200),
        ("prompt_cache_key", "k", 200),
        ("service_tier", "auto", 200),
        ("model", "", 200),
        ("model", None, 200),
        ("response_format", {"type": "text"}, 200),
        ("response_format", {"type": "json_object"}, 200),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}, 200),
        ("tools", [], 200),
        ("tool_choice", "required", 400),
    ],
)
def test_fields_are_used_ignored_or_refused(
    client: httpx.Client, sum_text: TextModel, field: str, value: object, status: int
) -> None:
    asked = {"messages": script_messages(sum_text), "max_tokens": 2, field: value}
    reply = client.post("/v1/chat/completions", json=asked)
    assert reply.status_code == status, reply.text
    if status == 400:
        assert reply.json()["error"]["param"] == field


def test_the_limit_may_be_called_either_way(client: httpx.Client, sum_text: TextModel) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = chat(client, sum_text, **{name: 2})
        assert body["choices"][0]["message"]["content"] == "Hello"
        assert body["choices"][0]["finish_reason"] == "length"
    assert chat(client, sum_text, max_tokens=0)["usage"]["completion_tokens"] == 0
