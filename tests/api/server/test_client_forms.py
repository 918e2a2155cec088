"""Forms in which real clients send messages: rendered as the vendors' own APIs read them, or refused by name."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from hybrid_cache.api.server.remarks import IGNORED, REARRANGED
from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import new_app, new_engine, over_the_wire, write_text_model

CHAT, TEXTS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
TURN = "{{ '[' + m.role + ']' + (m.content or '') }}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}"
THOUGHTS = (
    "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content }}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}[no thoughts]{% endif %}"
    "{{ '[effort ' + reasoning_effort + ']' if reasoning_effort }}"
)
SYSTEM_FIRST = (  # as Qwen3.5 has it
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}" + TURN + "{% endfor %}"
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ raise_exception('No user query found in messages.') }}{% endif %}"
)
IN_TURNS = (  # as Mistral has it
    "{% set talk = messages[1:] if messages[0].role == 'system' else messages %}{% for m in talk %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) or m.role == 'system' %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% endfor %}{% for m in messages %}" + TURN + "{% endfor %}"
)
NO_SYSTEM = (  # as Gemma has it
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) or m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + TURN + "{% endfor %}"
)
DOCUMENTS = "{% for d in documents or [] %}{{ '<' + d.title + ': ' + d.text + '>' }}{% endfor %}" + PLAIN


def user(text: object = "Hi") -> dict[str, object]:
    return {"role": "user", "content": text}


def said(text: object = "Yes", **fields: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **fields}


def system(text: str = "Be brief.") -> dict[str, object]:
    return {"role": "system", "content": text}


class Asking:
    """A client of a server whose model has a template of ours."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.reply: httpx.Response = httpx.Response(200)

    def prompt(self, messages: list[Any], **fields: object) -> str:
        """The prompt of a chat completion, as text."""
        body = {"messages": messages, "max_tokens": 1, "return_token_ids": True, **fields}
        self.reply = self.client.post(CHAT, json=body)
        assert self.reply.status_code == 200, self.reply.text
        tokens = self.reply.json()["prompt_token_ids"]
        counted = self.client.post("/tokenize", json={k: v for k, v in body.items() if k != "return_token_ids"})
        assert counted.json()["tokens"] == tokens
        return str(self.client.post("/detokenize", json={"tokens": tokens}).json()["prompt"])

    def refusal(self, path: str, body: dict[str, object]) -> tuple[str, str]:
        """-> the field that is named, and the message."""
        self.reply = self.client.post(path, json=body)
        assert self.reply.status_code == 400, self.reply.text
        error = self.reply.json()["error"]
        return str(error.get("param")), str(error["message"])

    @property
    def rearranged(self) -> str | None:
        return self.reply.headers.get(REARRANGED)


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Asking]]:
    """From a template to a client of a server that has it."""
    with ExitStack() as stack:
        known: dict[str, Asking] = {}

        def start(template: str) -> Asking:
            if template not in known:
                folder: Path = tmp_path_factory.mktemp("forms")
                write_text_model(folder)
                (folder / "chat_template.jinja").write_text(template)
                url = stack.enter_context(over_the_wire(new_app(new_engine(), TextModel.load(folder))))
                known[template] = Asking(stack.enter_context(httpx.Client(base_url=url, timeout=30)))
            return known[template]

        yield start


Ask = Callable[[str], Asking]


# --- Forms of messages


@pytest.mark.parametrize(
    "answer",
    [
        said(None),
        said(None, tool_calls=[]),
        said([]),
        said(""),
        {"role": "assistant"},
        said(None, refusal=None, annotations=[], audio=None, function_call=None),
    ],
    ids=str,
)
def test_an_answer_that_says_nothing_is_empty(asking: Ask, answer: dict[str, object]) -> None:
    assert asking(PLAIN).prompt([user(), answer, user("go on")]) == "[user]Hi[assistant][user]go on"


@pytest.mark.parametrize("content", [None, []])
def test_a_tool_may_have_nothing_to_say(asking: Ask, content: object) -> None:
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    talk = [user(), said(None, tool_calls=calls), {"role": "tool", "tool_call_id": "a", "content": content}]
    assert asking(PLAIN).prompt(talk) == "[user]Hi[assistant][tool]"


@pytest.mark.parametrize("content", [None, []])
def test_a_user_may_not(asking: Ask, content: object) -> None:
    param, message = asking(PLAIN).refusal(CHAT, {"messages": [user(content)]})
    assert param.startswith("messages.0")
    assert "content" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"thinking": "hm"},
        {"reasoning_content": "hm", "reasoning": "hm"},
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "output_text", "text": "Yes"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}], "closed": True},
                {"type": "text", "text": "Yes"},
            ]
        },
        {"content": [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "Yes"}]},
    ],
    ids=str,
)
def test_thoughts_have_many_names(asking: Ask, fields: dict[str, object]) -> None:
    prompt = asking(THOUGHTS).prompt([user(), {**said(), **fields}, user("go on")])
    assert prompt == "[user]Hi[assistant]<think>hm</think>Yes[user]go on"


def test_only_answers_have_thoughts(asking: Ask) -> None:
    param, message = asking(THOUGHTS).refusal(CHAT, {"messages": [user([{"type": "thinking", "thinking": "hm"}])]})
    assert (param, "'user' has no thoughts" in message) == ("messages.0", True)


def test_what_a_clients_library_has_parsed_comes_back_beside_its_text(asking: Ask) -> None:
    """Messages of the `parse` helpers are sent back as they are."""
    parsed = {"x": 1}
    function = {"name": "f", "arguments": '{"x":1}', "parsed_arguments": parsed}
    calls = [{"id": "a", "type": "function", "function": function}]
    talk = [user(), said('{"x":1}', parsed=parsed), user(), said(None, tool_calls=calls, parsed=parsed)]
    client = asking("{% for m in messages %}" + TURN + "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}")
    client.prompt([*talk, {"role": "tool", "tool_call_id": "a", "content": "1"}])
    assert IGNORED not in client.reply.headers
    items = [
        {"type": "message", **said([{"type": "output_text", "text": '{"x":1}', "annotations": [], "parsed": parsed}])},
        {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "parsed_arguments": {}},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
    ]
    reply = client.client.post(RESPONSES, json={"input": [user(), *items], "max_output_tokens": 1})
    assert reply.status_code == 200, reply.text
    assert IGNORED not in reply.headers


@pytest.mark.parametrize("arguments", ['{"x":1}', {"x": 1}])
def test_arguments_of_calls_may_be_objects(asking: Ask, arguments: object) -> None:
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    template += "{{ m.content or '' }}"
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    talk = [user(), said(None, tool_calls=calls), {"role": "tool", "tool_call_id": "a", "content": "1"}]
    assert asking(template + "{% endfor %}").prompt(talk) == 'Hi{"x": 1}1'


def test_a_refusal_that_is_sent_back_is_what_was_said(asking: Ask) -> None:
    assert asking(PLAIN).prompt([user(), said(None, refusal="No."), user("go on")]) == (
        "[user]Hi[assistant]No.[user]go on"
    )


# --- Orders of roles


@pytest.mark.parametrize(
    ("template", "messages", "prompt", "done"),
    [
        (SYSTEM_FIRST, [system(), user()], "[system]Be brief.[user]Hi", None),
        (
            SYSTEM_FIRST,
            [system(), user(), said(), system("Be long."), user("go on")],
            "[system]Be brief.\nBe long.[user]Hi[assistant]Yes[user]go on",
            "system-first",
        ),
        (SYSTEM_FIRST, [user(), {**system(), "role": "developer"}], "[system]Be brief.[user]Hi", "system-first"),
        (SYSTEM_FIRST, [system()], "[system]Be brief.[user]", "user-first"),
        (IN_TURNS, [user(), user("you")], "[user]Hi\nyou", "merged"),
        (IN_TURNS, [user(), said(), said("No"), user("go on")], "[user]Hi[assistant]Yes\nNo[user]go on", "merged"),
        (IN_TURNS, [said(), user()], "[user][assistant]Yes[user]Hi", "user-first"),
        (
            IN_TURNS,
            [said(), user(), system(), user("you")],
            "[system]Be brief.[user][assistant]Yes[user]Hi\nyou",
            "system-first, merged, user-first",
        ),
        (NO_SYSTEM, [system(), user()], "[user]Be brief.\nHi", "system-in-user"),
        (NO_SYSTEM, [system(), said(), user()], "[user]Be brief.[assistant]Yes[user]Hi", "system-in-user"),
        (NO_SYSTEM, [system(), user(), user("you")], "[user]Be brief.\nHi\nyou", "system-in-user, merged"),
        (PLAIN, [said(), system(), said(), user()], "[assistant]Yes[system]Be brief.[assistant]Yes[user]Hi", None),
    ],
)
def test_roles_stand_in_an_order_that_the_template_takes(
    asking: Ask, template: str, messages: list[Any], prompt: str, done: str | None
) -> None:
    assert asking(template).prompt(messages) == prompt
    assert asking(template).rearranged == done


def test_an_order_that_nothing_helps_is_refused_in_the_words_of_the_template(asking: Ask) -> None:
    template = "{% if messages[-1].role != 'tool' %}{{ raise_exception('only tools') }}{% endif %}"
    assert "only tools" in asking(template).refusal(CHAT, {"messages": [user()]})[1]


def test_the_next_turn_of_a_rearranged_talk_begins_like_it(asking: Ask) -> None:
    """Messages that stand where they stood stay where they are, so that the cache finds them."""
    talk = [user("a" * 200), user("b" * 200), said("c" * 200)]
    once = asking(IN_TURNS).prompt([*talk, user("d")])
    later = asking(IN_TURNS).prompt([*talk, user("d"), said("e"), user("f")])
    assert later.startswith(once)
    assert asking(IN_TURNS).reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 512


def test_the_words_of_one_user_are_not_put_into_the_mouth_of_another(asking: Ask) -> None:
    template = IN_TURNS.replace("m.role + ']'", "(m.name or m.role) + ']'")
    talk = [user("a") | {"name": "Al"}, user("b") | {"name": "Bo"}]
    assert asking(template).prompt(talk) == "[user]a\nb"
    assert (asking(template).rearranged, asking(template).reply.headers[IGNORED]) == ("merged", "messages.name")
    talk[1]["name"] = "Al"
    assert asking(template).prompt(talk) == "[Al]a\nb"
    assert IGNORED not in asking(template).reply.headers


def test_a_system_that_speaks_late_in_the_other_dialects(asking: Ask) -> None:
    ask = asking(SYSTEM_FIRST)
    talk = [user(), said(), system(), user("go on")]
    wanted = ask.client.post("/tokenize", json={"messages": talk}).json()["count"]
    reply = ask.client.post(f"{MESSAGES}/count_tokens", json={"model": "sum", "messages": talk})
    assert (reply.json()["input_tokens"], reply.headers[REARRANGED]) == (wanted, "system-first")
    reply = ask.client.post(RESPONSES, json={"input": talk, "max_output_tokens": 1})
    assert (reply.json()["usage"]["input_tokens"], reply.headers[REARRANGED]) == (wanted, "system-first")


def test_a_system_between_a_call_and_its_result(asking: Ask) -> None:
    talk = [
        user(),
        said([{"type": "tool_use", "id": "a", "name": "f", "input": {}}]),
        system(),
        user([{"type": "tool_result", "tool_use_id": "a", "content": "1"}]),
    ]
    reply = asking(PLAIN).client.post(f"{MESSAGES}/count_tokens", json={"model": "sum", "messages": talk})
    assert reply.status_code == 200, reply.text


# --- What would be lost beside something else


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (user() | {"reasoning_content": "hm"}, "messages.reasoning_content"),
        (user() | {"tool_calls": [CALL]}, "messages.tool_calls"),
        (user() | {"function_call": {"name": "f"}}, "messages.function_call"),
        (user() | {"tool_call_id": "a"}, "messages.tool_call_id"),
        (user() | {"name": "Bo"}, "messages.name"),
        (said(refusal="No."), "messages.refusal"),
        (said(reasoning="a", reasoning_content="b"), "messages.reasoning"),
        (said(reasoning="a", reasoning_content="a", refusal="", tool_calls=[], name=None), None),
        (user([{"type": "text", "text": "a", "thinking": "b"}]), "messages.content.thinking"),
        (said([{"type": "thinking", "thinking": "a", "text": "a"}]), None),
    ],
    ids=str,
)
def test_a_field_that_another_one_or_the_role_sets_aside_is_named(
    asking: Ask, message: dict[str, object], named: str | None
) -> None:
    asking(PLAIN).prompt([user(), message, user()])
    assert asking(PLAIN).reply.headers.get(IGNORED) == named


FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
FORM = {"type": "json_schema", "schema": {"const": 1}}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
        (CHAT, {"functions": [FUNCTION], "function_call": "auto", "tool_choice": "none"}, "tool_choice"),
        (CHAT, {"functions": [FUNCTION], "parallel_tool_calls": True}, "parallel_tool_calls"),
        (CHAT, {"tools": [TOOL], "function_call": "none"}, "function_call"),
        (CHAT, {"response_format": {**FORM, "json_schema": {"schema": {"const": 2}}}}, "response_format"),
        (TEXTS, {"response_format": {**FORM, "json_schema": {"schema": {"const": 2}}}}, "response_format"),
        (RESPONSES, {"text": {"format": {"type": "text", "schema": {"const": 1}}}}, "text.format"),
        (MESSAGES, {"output_config": {"format": FORM}, "output_format": {**FORM, "schema": {}}}, "None"),
    ],
    ids=str,
)
def test_two_fields_that_say_different_things_are_refused(
    asking: Ask, path: str, fields: dict[str, object], param: str
) -> None:
    bodies: dict[str, dict[str, object]] = {
        CHAT: {"messages": [user()]},
        TEXTS: {"prompt": "Hi"},
        RESPONSES: {"input": "Hi"},
    }
    body = bodies.get(path, {"model": "sum", "messages": [user()], "max_tokens": 1})
    assert asking(PLAIN).refusal(path, {**body, **fields})[0] == param


def test_two_fields_that_say_the_same_are_served(asking: Ask) -> None:
    same = {"max_tokens": 1, "max_completion_tokens": 1}
    assert asking(PLAIN).client.post(CHAT, json={"messages": [user()], **same}).status_code == 200


def test_functions_take_a_tool_choice_where_there_is_no_other(asking: Ask) -> None:
    body = {"messages": [user()], "functions": [FUNCTION], "tool_choice": "required", "max_tokens": 40}
    message = asking(PLAIN).client.post(CHAT, json=body).json()["choices"][0]["message"]
    assert message["function_call"]["name"] == "f"


def test_of_tools_what_the_template_does_not_show_is_named_in_every_dialect(asking: Ask) -> None:
    ask, own = asking(PLAIN), {"name": "f", "input_schema": {"type": "object", "properties": {}}}
    bodies: dict[str, dict[str, object]] = {
        CHAT: {"messages": [user()], "tools": [TOOL], "max_tokens": 1},
        RESPONSES: {"input": "Hi", "tools": [{"type": "function", **FUNCTION}], "max_output_tokens": 1},
        MESSAGES: {"model": "sum", "messages": [user()], "tools": [own], "max_tokens": 1},
    }
    for path, body in bodies.items():
        reply = ask.client.post(path, json=body)
        assert (reply.status_code, reply.headers.get(IGNORED)) == (200, "tools"), path


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (
            MESSAGES,
            [
                user(),
                said([{"type": "tool_use", "id": "a", "name": "f", "input": {}}]),
                user([{"type": "tool_result", "tool_use_id": "a", "content": "1", "is_error": True}]),
            ],
            "content.is_error, messages.tool_calls",
        ),
        (
            MESSAGES,
            [user(), said([{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "Yes"}]), user()],
            "content.redacted_thinking",
        ),
        (
            RESPONSES,
            [user(), {"type": "reasoning", "summary": [], "encrypted_content": "gAA"}, user()],
            "input.encrypted_content",
        ),
        (
            RESPONSES,
            [user(), {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}, user()],
            "input.summary",
        ),
    ],
)
def test_what_nobody_here_can_read_is_named(asking: Ask, path: str, body: list[object], named: str) -> None:
    bodies: dict[str, dict[str, object]] = {
        RESPONSES: {"input": body, "max_output_tokens": 1},
        MESSAGES: {"model": "sum", "messages": body, "max_tokens": 1},
    }
    reply = asking(PLAIN).client.post(path, json=bodies[path])
    assert (reply.status_code, reply.headers.get(IGNORED)) == (200, named), reply.text


# --- Thoughts and documents


@pytest.mark.parametrize(
    ("fields", "ending"),
    [
        ({}, ""),
        ({"reasoning_effort": "none"}, "[no thoughts]"),
        ({"reasoning_effort": "low"}, "[effort low]"),
        ({"reasoning": {"effort": "high"}}, "[effort high]"),
        ({"reasoning": {"enabled": False}}, "[no thoughts]"),
        ({"thinking": {"type": "disabled"}}, "[no thoughts]"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, ""),
        ({"enable_thinking": False}, "[no thoughts]"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "[no thoughts]"),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, ""),
        ({"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}, "[effort high]"),
        ({"reasoning_effort": "low", "thinking": {"type": "disabled"}}, "[effort low]"),
    ],
    ids=str,
)
def test_effort_reaches_the_template(asking: Ask, fields: dict[str, object], ending: str) -> None:
    assert asking(THOUGHTS).prompt([user()], **fields) == "[user]Hi" + ending
    assert IGNORED not in asking(THOUGHTS).reply.headers


def test_effort_of_a_template_without_degrees_is_named(asking: Ask) -> None:
    template = PLAIN + "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
    assert asking(template).prompt([user()], reasoning_effort="low") == "[user]Hi<think>"
    assert asking(template).reply.headers[IGNORED] == "reasoning_effort"
    body = {"model": "sum", "max_tokens": 1, "messages": [user()], "output_config": {"effort": "low"}}
    reply = asking(template).client.post(MESSAGES, json=body)
    assert (reply.status_code, reply.headers[IGNORED]) == (200, "output_config.effort")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
        (CHAT, {"thinking": {"type": "enabled"}}, "thinking"),
        (CHAT, {"enable_thinking": True}, "enable_thinking"),
        (CHAT, {"reasoning": {"effort": "low"}}, "reasoning"),
        (RESPONSES, {"reasoning": {"effort": "low"}}, "reasoning"),
        (CHAT, {"documents": [{"text": "x"}]}, "documents"),
    ],
)
def test_what_the_template_does_not_know_is_refused(
    asking: Ask, path: str, fields: dict[str, object], param: str
) -> None:
    body: dict[str, object] = {"messages": [user()]} if path == CHAT else {"input": "Hi"}
    assert asking(PLAIN).refusal(path, {**body, **fields})[0] == param


def test_a_variable_that_the_template_does_not_read_is_named(asking: Ask) -> None:
    assert asking(PLAIN).prompt([user()], chat_template_kwargs={"mood": "good"}) == "[user]Hi"
    assert asking(PLAIN).reply.headers[IGNORED] == "chat_template_kwargs.mood"


def test_documents_are_the_templates(asking: Ask) -> None:
    documents = [{"title": "t", "text": "The code is 7."}]
    shown = asking(DOCUMENTS).prompt([user()], documents=documents)
    assert shown == "<t: The code is 7.>[user]Hi"
    assert asking(DOCUMENTS).prompt([user()], chat_template_kwargs={"documents": documents}) == shown


def test_cache_control_of_a_tool_is_not_shown_to_the_model(asking: Ask) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    template = "{{ tools | tojson }}" + PLAIN
    marked = {**tool, "cache_control": {"type": "ephemeral"}}
    assert asking(template).prompt([user()], tools=[marked]) == asking(template).prompt([user()], tools=[tool])


# --- Log-probabilities of prompts, and lengths


def test_log_probabilities_of_a_prompt_are_those_of_echo(client: httpx.Client) -> None:
    body: dict[str, object] = {"prompt": [300, 301, 302] * 30, "max_tokens": 1}
    for _ in range(2):  # cached or not
        echoed = client.post(TEXTS, json={**body, "echo": True, "logprobs": 2}).json()["choices"][0]["logprobs"]
        scored = client.post(TEXTS, json={**body, "prompt_logprobs": 2}).json()["choices"][0]["prompt_logprobs"]
        assert len(scored) == 90
        assert scored[0] is None
        for token, place, logprob in zip([300, 301, 302] * 30, scored, echoed["token_logprobs"], strict=False):
            assert place is None or place[str(token)]["logprob"] == logprob
    both = client.post(TEXTS, json={**body, "echo": True, "logprobs": 1, "prompt_logprobs": 2}).json()["choices"][0]
    assert both["prompt_logprobs"] == scored
    assert max(len(top) for top in both["logprobs"]["top_logprobs"] if top) <= 2


def test_log_probabilities_of_a_chat_prompt(client: httpx.Client) -> None:
    body = {"messages": [user()], "max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": True}
    reply = client.post(CHAT, json=body).json()
    ids, scored = reply["prompt_token_ids"], reply["prompt_logprobs"]
    assert [None if place is None else next(iter(place)) for place in scored] == [None, *map(str, ids[1:])]
    ranks = {entry["rank"] for place in scored if place for entry in place.values()}
    assert ranks <= {1, None}
    assert 1 in ranks


@pytest.mark.parametrize("path", [CHAT, TEXTS])
def test_a_stream_has_no_log_probabilities_of_the_prompt(client: httpx.Client, path: str) -> None:
    body = {"messages": [user()], "prompt": "Hi", "stream": True, "prompt_logprobs": 1}
    del body["prompt" if path == CHAT else "messages"]
    reply = client.post(path, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt_logprobs")


@pytest.mark.parametrize("fields", [{"logprobs": False, "top_logprobs": 0}, {"top_logprobs": 0}])
def test_no_log_probabilities_may_be_asked_for_twice(client: httpx.Client, fields: dict[str, object]) -> None:
    reply = client.post(CHAT, json={"messages": [user()], "max_tokens": 1, **fields})
    assert reply.json()["choices"][0]["logprobs"] is None


def test_completions_take_the_false_of_chat(client: httpx.Client) -> None:
    reply = client.post(TEXTS, json={"prompt": "Hi", "max_tokens": 1, "logprobs": False})
    assert "logprobs" not in reply.json()["choices"][0] or reply.json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("length", [-1, None, 2_000_000_000])
def test_a_length_that_is_open_or_too_large_ends_where_the_budget_does(sum_text: TextModel, length: int | None) -> None:
    engine = new_engine(budget_bytes=1 << 15)
    room = engine.longest_sequence
    assert room < engine.model.max_length
    with over_the_wire(new_app(engine, sum_text)) as url, httpx.Client(base_url=url, timeout=60) as client:
        body = {"messages": [user()], "max_tokens": length, "ignore_eos": True}
        reply = client.post(CHAT, json=body).json()
    assert reply["usage"]["total_tokens"] == room
    assert reply["choices"][0]["finish_reason"] == "length"


# --- Forms of answers

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "enum": [7]}},
    "required": ["a"],
    "additionalProperties": False,
}
SEVEN = '{"a":7}'


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"json_schema": SCHEMA},
        {"json_schema": json.dumps(SCHEMA)},
        {"guided_regex": r'\{"a":7\}'},
        {"regex": r'\{"a":7\}'},
        {"guided_choice": [SEVEN]},
        {"guided_grammar": 'start: "{\\"a\\":7}"'},
    ],
    ids=range(11),
)
@pytest.mark.parametrize("path", [CHAT, TEXTS])
def test_every_spelling_of_a_form_is_kept_to(client: httpx.Client, path: str, fields: dict[str, object]) -> None:
    asked = {"messages": [user()]} if path == CHAT else {"prompt": "Hi"}
    reply = client.post(path, json={**asked, "max_tokens": 200, **fields})
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    text = choice["message"]["content"] if path == CHAT else choice["text"]
    assert json.loads(text) == {"a": 7}


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"guided_json": SCHEMA, "regex": "a"}, "regex", "guided_json"),
        ({"response_format": {"type": "json_object"}, "json_schema": SCHEMA}, "json_schema", "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": SCHEMA}}, "response_format.json_schema", "schema"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format", "schema"),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format.type", "structural_tag"),
        ({"response_format": {"type": "grammar", "grammar": "x"}}, "response_format.type", "grammar"),
        ({"grammar": 'root ::= "a"'}, "grammar", "Lark"),
        ({"ebnf": 'root ::= "a"'}, "ebnf", "Lark"),
        ({"guided_regex": "("}, "guided_regex", ""),
    ],
    ids=str,
)
def test_a_form_that_cannot_be_kept_to_is_refused(
    client: httpx.Client, fields: dict[str, object], param: str, word: str
) -> None:
    reply = client.post(CHAT, json={"messages": [user()], **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert word in error["message"]


def test_empty_spellings_ask_for_nothing(client: httpx.Client) -> None:
    fields = {"guided_json": {}, "guided_choice": [], "json_schema": {}, "regex": "", "grammar": ""}
    assert client.post(CHAT, json={"messages": [user()], "max_tokens": 1, **fields}).status_code == 200


def test_the_older_place_of_a_form_in_messages(client: httpx.Client) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    body = {"model": "sum", "max_tokens": 200, "messages": [user()], "output_format": form}
    assert json.loads(client.post(MESSAGES, json=body).json()["content"][0]["text"]) == {"a": 7}
