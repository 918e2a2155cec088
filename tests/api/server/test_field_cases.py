"""Requests that public issue threads report as failing elsewhere: each is served, or refused by name.

The names of the cases are those of the threads; docs/requests.md has the list.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hybrid_cache.api.server.remarks import IGNORED
from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import CALLS, events_of, new_app, new_engine, over_the_wire, script_messages, write_text_model

CHAT, TEXTS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"name": "f", "input_schema": {"type": "object"}}
CALL = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
CLAUDE = {"model": "sum", "max_tokens": 1, "messages": HI}

# What is ignored of a request that is served; None where nothing is. The template of these tests shows no tools.
SERVED: dict[str, tuple[str, dict[str, object], str | None]] = {
    "decolua/9router#1468: Claude Code's context_management": (
        MESSAGES,
        {**CLAUDE, "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        None,
    ),
    "anomalyco/opencode#23193: eager_input_streaming of a tool": (
        MESSAGES,
        {**CLAUDE, "tools": [{**TOOL, "eager_input_streaming": True}]},
        "tools",
    ),
    "anthropics/claude-code#31033: defer_loading of a tool": (
        MESSAGES,
        {**CLAUDE, "tools": [{**TOOL, "defer_loading": True}]},
        "tools.defer_loading, tools",
    ),
    "caozhiyuan/copilot-api#145: scope of cache_control": (
        MESSAGES,
        {
            **CLAUDE,
            "system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "scope": "global"}}],
        },
        "cache_control.scope",
    ),
    "ggml-org/llama.cpp#27367: a system message between turns": (
        MESSAGES,
        {**CLAUDE, "messages": [*HI, {"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}, *HI]},
        None,
    ),
    "vllm-project/vllm#10463: id and opts of CodeCompanion's messages": (
        CHAT,
        {"messages": [{**HI[0], "id": 1947269257, "opts": {"visible": False}}], "max_tokens": 1},
        "messages.opts",
    ),
    "CopilotKit/CopilotKit#2103: an empty list as the result of a tool": (
        CHAT,
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": None, "tool_calls": CALL},
                {"role": "tool", "tool_call_id": "a", "content": []},
            ],
            "max_tokens": 1,
        },
        None,
    ),
    "n8n-io/n8n#38526: an empty list as the content of a call": (
        CHAT,
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": [], "tool_calls": CALL},
                {"role": "tool", "tool_call_id": "a", "content": "1"},
            ],
            "max_tokens": 1,
        },
        None,
    ),
    "anomalyco/opencode#23193: refusal null in messages": (
        CHAT,
        {"messages": [*HI, {"role": "assistant", "content": "x", "refusal": None}, *HI], "max_tokens": 1},
        None,
    ),
    "lmstudio-ai/lmstudio-bug-tracker#169: response_format text": (
        CHAT,
        {"messages": HI, "max_tokens": 1, "response_format": {"type": "text"}},
        None,
    ),
    "openai/codex#12669: an answer without id and status": (
        RESPONSES,
        {
            "input": [
                *HI,
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi!"}]},
                *HI,
            ],
            "max_output_tokens": 1,
        },
        None,
    ),
    "webai-at-home/webai-at-home#214: the twelve fields of Codex": (
        RESPONSES,
        {
            "client_metadata": {"session": "x"},
            "include": ["reasoning.encrypted_content"],
            "input": HI,
            "instructions": "Be brief.",
            "model": "sum",
            "parallel_tool_calls": False,
            "prompt_cache_key": "x",
            "reasoning": None,
            "store": False,
            "stream": False,
            "tool_choice": "auto",
            "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}],
        },
        "tools",
    ),
    "anomalyco/opencode#27920: an answer comes last": (
        CHAT,
        {"messages": [*HI, {"role": "assistant", "content": "Summarise."}], "max_tokens": 1},
        None,
    ),
    "dapr/dapr-agents#248: tool_choice without tools": (
        CHAT,
        {"messages": HI, "max_tokens": 1, "tool_choice": "auto"},
        None,
    ),
    "ollama/ollama#16825: num_ctx": (CHAT, {"messages": HI, "max_tokens": 1, "num_ctx": 16000}, None),
    "NVIDIA/garak#748: penalties and n at their defaults": (
        CHAT,
        {"messages": HI, "max_tokens": 1, "n": 1, "frequency_penalty": 0.0, "presence_penalty": 0.0, "top_p": 1.0},
        None,
    ),
}
# The field that a refusal names.
REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "arbs-io/github-copilot-llm-gateway#68: suffix": (
        TEXTS,
        {"prompt": "a", "suffix": "b"},
        "suffix",
    ),
    "ggml-org/llama.cpp#7149: json_schema beside response_format": (
        CHAT,
        {"messages": HI, "response_format": {"type": "json_object"}, "json_schema": {"type": "object"}},
        "json_schema",
    ),
    "ggml-org/llama.cpp#28806: a tool_choice that names no tool": (
        CHAT,
        {
            "messages": HI,
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "tool_choice": {"type": "function", "function": {"name": "g"}},
        },
        "tool_choice",
    ),
    "kekzl/imp#1265: a call that is required, and no tools": (
        CHAT,
        {"messages": HI, "tool_choice": "required"},
        "tool_choice",
    ),
    "BerriAI/litellm#5803: stream_options without a stream": (
        CHAT,
        {"messages": HI, "stream_options": {"include_usage": True}},
        "stream_options",
    ),
    "open-webui/open-webui#12159: mirostat beside a field of the client's own": (
        CHAT,
        {"messages": HI, "mirostat": 1, "some_key": "value"},
        "mirostat",
    ),
    "envoyproxy/ai-gateway#2455: input items of Codex's own": (
        RESPONSES,
        {"input": [{"type": "agent_message", "content": "x"}]},
        "input",
    ),
    "farion1231/cc-switch#7451: additional_tools of Codex": (
        RESPONSES,
        {"input": [{"type": "additional_tools", "role": "developer", "tools": []}]},
        "input",
    ),
    "ikawrakow/ik_llama.cpp#1964: tools that run elsewhere": (
        RESPONSES,
        {"input": "Hi", "tools": [{"type": "web_search"}]},
        "tools.0",
    ),
    "vllm-project/vllm#5709: a template in the request": (
        CHAT,
        {"messages": HI, "chat_template": "X"},
        "chat_template",
    ),
    "lmstudio-ai/lmstudio-bug-tracker#2403: response_format of /v1/responses": (
        RESPONSES,
        {"input": "Hi", "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format",
    ),
}


@pytest.mark.parametrize("name", SERVED)
def test_it_is_served(client: httpx.Client, name: str) -> None:
    path, body, ignored = SERVED[name]
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers.get(IGNORED) == ignored


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(client: httpx.Client, name: str) -> None:
    path, body, field = REFUSED[name]
    reply = client.post(path, json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].startswith(field)


# --- What was answered comes back


def test_an_answer_is_sent_back_without_a_remark(caller: httpx.Client, text: TextModel) -> None:
    said = script_messages(text, CALLS)
    tools = [{"type": "function", "function": function} for function in FUNCTIONS]
    message = caller.post(CHAT, json={"messages": said, "tools": tools}).json()["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in message["tool_calls"]]
    body: dict[str, Any] = {"messages": [*said, message, *results], "max_tokens": 1}
    assert_silent(caller.post(CHAT, json=body))

    tools = [{"type": "function", **function} for function in FUNCTIONS]
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    response = caller.post(RESPONSES, json={"input": said, "tools": tools, "include": include}).json()
    called = [item["call_id"] for item in response["output"] if item["type"] == "function_call"]
    outputs = [{"type": "function_call_output", "call_id": name, "output": "1"} for name in called]
    whole = {"input": [*said, *response["output"], *outputs]}
    for body in (whole, {"input": outputs, "previous_response_id": response["id"]}):
        assert_silent(caller.post(RESPONSES, json={**body, "max_output_tokens": 1}))

    tools = [{"name": function["name"], "input_schema": {}} for function in FUNCTIONS]
    asked = {"model": "sum", "max_tokens": 60, "messages": said}
    content = caller.post(MESSAGES, json={**asked, "tools": tools}).json()["content"]
    used = [block["id"] for block in content if block["type"] == "tool_use"]
    blocks = [{"type": "tool_result", "tool_use_id": name, "content": "1", "is_error": False} for name in used]
    talk = [*said, {"role": "assistant", "content": content}, {"role": "user", "content": blocks}]
    assert_silent(caller.post(MESSAGES, json={**asked, "messages": talk}))


def assert_silent(reply: httpx.Response) -> None:
    assert reply.status_code == 200, reply.text
    assert IGNORED not in reply.headers


# --- Functions in the form that was before tools


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder: Path = tmp_path_factory.mktemp("functions")
    write_text_model(folder, CALLS)
    return TextModel.load(folder)


@pytest.fixture(scope="module")
def caller(text: TextModel) -> Iterator[httpx.Client]:
    """Of a model that calls f."""
    with (
        over_the_wire(new_app(new_engine(), text)) as url,
        httpx.Client(base_url=url, timeout=30) as connection,
    ):
        yield connection


FUNCTIONS = [{"name": "f", "parameters": {"type": "object"}}, {"name": "g"}]


def test_functions_are_called_in_their_own_form(caller: httpx.Client, text: TextModel) -> None:
    body: dict[str, Any] = {"messages": script_messages(text, CALLS), "functions": FUNCTIONS, "function_call": "auto"}
    choice = caller.post(CHAT, json=body).json()["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "f", "arguments": '{"x": [1]}'}
    assert "tool_calls" not in choice["message"]
    chunks = events_of(caller.post(CHAT, json={**body, "stream": True}).text)
    deltas = [chunk["choices"][0]["delta"].get("function_call") for chunk in chunks]
    calls = [delta for delta in deltas if delta]
    assert calls[0]["name"] == "f"
    assert "".join(call["arguments"] for call in calls) == '{"x": [1]}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


def test_their_results_are_those_of_tools(caller: httpx.Client, text: TextModel) -> None:
    call = {"name": "f", "arguments": "{}"}
    old = [
        *HI,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function", "name": "f", "content": "1"},
    ]
    new = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "call_1", "name": "f", "content": "1"},
    ]
    tools = [{"type": "function", "function": function} for function in FUNCTIONS]
    bodies: list[dict[str, object]] = [{"messages": old, "functions": FUNCTIONS}, {"messages": new, "tools": tools}]
    counts = [caller.post("/tokenize", json=body).json()["tokens"] for body in bodies]
    assert counts[0] == counts[1]


def test_a_function_that_has_to_be_called(caller: httpx.Client, text: TextModel) -> None:
    body: dict[str, Any] = {"messages": HI, "functions": FUNCTIONS, "function_call": {"name": "g"}, "max_tokens": 60}
    choice = caller.post(CHAT, json=body).json()["choices"][0]
    assert choice["message"]["function_call"]["name"] == "g"
    assert choice["finish_reason"] in ("function_call", "length")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"functions": FUNCTIONS, "tools": [{"type": "function", "function": FUNCTIONS[0]}]}, "functions"),
        ({"messages": [*HI, {"role": "function", "name": "f", "content": "1"}]}, "messages.[1].role"),
        ({"functions": FUNCTIONS, "function_call": "f"}, "function_call"),
    ],
)
def test_what_functions_cannot_be(caller: httpx.Client, fields: dict[str, object], param: str) -> None:
    reply = caller.post(CHAT, json={"messages": HI, **fields})
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].startswith(param) or reply.json()["error"]["param"] == "tool_choice"


def test_thoughts_come_under_both_names_or_not_at_all(tmp_path: Path) -> None:
    """openai/codex#3721 wants `reasoning`, others `reasoning_content`."""
    script = ("<think>", "They ask.", "</think>", "Yes.")
    write_text_model(tmp_path, script)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").write_text(template + "{#- <think> -#}")
    text = TextModel.load(tmp_path)
    body: dict[str, Any] = {"messages": script_messages(text, script)}
    with over_the_wire(new_app(new_engine(), text)) as url, httpx.Client(base_url=url, timeout=30) as client:
        message = client.post(CHAT, json=body).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("They ask.",) * 2 + (
            "Yes.",
        )
        chunks = events_of(client.post(CHAT, json={**body, "stream": True}).text)
        for name in ("reasoning", "reasoning_content"):
            assert "".join(chunk["choices"][0]["delta"].get(name, "") for chunk in chunks) == "They ask."
        for field in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
            shown = client.post(CHAT, json={**body, **field}).json()["choices"][0]["message"]
            assert (shown["content"], "reasoning" in shown, "reasoning_content" in shown) == ("Yes.", False, False)
            chunks = events_of(client.post(CHAT, json={**body, **field, "stream": True}).text)
            assert not any("reasoning_content" in chunk["choices"][0]["delta"] for chunk in chunks)
