"""What other servers take in request bodies is served, refused by name, or changes no answer, on every endpoint.

And what nobody has heard of fails no request, and is named in a header and in the log.
"""

import json
import logging
from contextvars import copy_context

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hybrid_cache.api.server import remarks
from hybrid_cache.api.server.remarks import (
    IGNORED,
    MAX_NAME,
    MOST_LOGGED,
    MOST_NAMED,
    RecentNames,
    Remarks,
    cleaned,
    current_remarks,
)
from hybrid_cache.api.server.schemas.anthropic import CountRequest, MessagesRequest
from hybrid_cache.api.server.schemas.chat import ChatRequest
from hybrid_cache.api.server.schemas.common import Request
from hybrid_cache.api.server.schemas.completions import CompletionRequest
from hybrid_cache.api.server.schemas.foreign import ANSWERED, COUNTED, Fate, Foreign
from hybrid_cache.api.server.schemas.responses import ResponsesRequest
from hybrid_cache.api.server.schemas.tokens import TokenizeRequest
from hybrid_cache.errors import RequestError
from tests.api.server.fields_of_others import FIELDS

HI = [{"role": "user", "content": "Hi"}]
KINDS: dict[str, tuple[type[Request], dict[str, object]]] = {
    "/v1/chat/completions": (ChatRequest, {"messages": HI, "max_tokens": 1}),
    "/v1/completions": (CompletionRequest, {"prompt": "Hi", "max_tokens": 1}),
    "/v1/responses": (ResponsesRequest, {"input": "Hi", "max_output_tokens": 1}),
    "/v1/messages": (MessagesRequest, {"model": "sum", "messages": HI, "max_tokens": 1}),
    "/v1/messages/count_tokens": (CountRequest, {"model": "sum", "messages": HI}),
    "/tokenize": (TokenizeRequest, {"messages": HI}),
}
ANSWERS = [path for path in KINDS if path not in ("/tokenize", "/v1/messages/count_tokens")]
# Values that ask for something, of fields for which most do not.
ASKING: dict[str, object] = {
    "skip_special_tokens": False,
    "separate_reasoning": False,
    "parse_tool_calls": False,
    "incremental_output": False,
    "parallel_tool_calls": False,
    "include_reasoning": False,
    "add_generation_prompt": False,
    "n": 2,
    "best_of": 3,
    "num_beams": 4,
    "max_length": 9,
    "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
}


def own_fields(kind: type[Request]) -> set[str]:
    return {field.alias or name for name, field in kind.model_fields.items()}


def asking_value(entry: Foreign, name: str) -> object:
    values = [ASKING.get(name), 0.5, 3, "x", ["x"], {"x": 1}, False]
    return next(value for value in values if value is not None and entry.asks(value))


def message_of(reply: httpx.Response) -> str:
    return str(reply.json()["error"]["message"])


@pytest.mark.parametrize("path", KINDS)
def test_every_field_of_other_servers_has_its_fate(path: str) -> None:
    kind, _ = KINDS[path]
    table = COUNTED if path not in ANSWERS else ANSWERED
    assert kind.foreign is table
    unknown = FIELDS[path] - own_fields(kind) - table.keys()
    assert not unknown


def test_what_one_endpoint_serves_another_one_does_not_drop() -> None:
    served = set[str]().union(*(own_fields(kind) for kind, _ in KINDS.values()))
    for kind, _ in KINDS.values():
        missing = served - own_fields(kind) - kind.foreign.keys() - {"model"}
        assert not missing, kind


def remarks_about(kind: type[Request], body: dict[str, object]) -> dict[str, str]:
    """The headers that a body causes, once it has been read."""

    def read() -> dict[str, str]:
        current_remarks.set(found := Remarks())
        kind.model_validate(body)
        return found.headers()

    return copy_context().run(read)


@pytest.mark.parametrize("path", KINDS)
def test_a_field_is_refused_by_name_where_it_asks_for_something(path: str) -> None:
    kind, body = KINDS[path]
    for name, entry in kind.foreign.items():
        if name in own_fields(kind):
            continue
        asked = {**body, name: asking_value(entry, name)}
        if entry.fate is Fate.REFUSED:
            with pytest.raises(RequestError) as caught:
                kind.model_validate(asked)
            assert caught.value.param == name
            assert str(caught.value) == f"{name} is not supported here: {entry.why}"
        else:
            assert remarks_about(kind, asked) == ({IGNORED: cleaned(name)} if entry.fate is Fate.NOTED else {}), name


leaves = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(-2, 2) | st.text(max_size=4)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner))


@settings(deadline=None, max_examples=300)
@given(data=st.data(), path=st.sampled_from(sorted(KINDS)), value=values)
def test_whatever_a_field_holds_it_is_taken_or_refused_by_name(data: st.DataObject, path: str, value: object) -> None:
    kind, body = KINDS[path]
    name = data.draw(st.sampled_from(sorted(FIELDS[path] - body.keys())))
    entry = None if name in own_fields(kind) else kind.foreign[name]
    found = blamed(kind, {**body, name: value})
    if entry is not None:
        assert found == (name if entry.fate_of(value) is Fate.REFUSED else None)


def blamed(kind: type[Request], body: dict[str, object]) -> str | None:
    """The field for which a body is refused; None for one that is taken."""
    try:
        kind.model_validate(body)
    except RequestError as error:
        return error.param
    except ValidationError as error:
        return str(error.errors()[0]["loc"][:1])
    return None


@pytest.mark.parametrize("path", KINDS)
@pytest.mark.parametrize("name", ["chat_template", "lora_path", "mcp_servers", "truncate_prompt_tokens"])
def test_a_refusal_is_in_the_words_of_the_endpoint(client: httpx.Client, path: str, name: str) -> None:
    body = KINDS[path][1]
    error = client.post(path, json={**body, name: [1]}).json()["error"]
    assert error["message"].startswith(f"{name} is not supported here: ")
    assert error["type"] == "invalid_request_error"
    assert path.startswith("/v1/messages") or error["param"] == name


@pytest.mark.parametrize("path", KINDS)
def test_null_asks_for_nothing(client: httpx.Client, path: str) -> None:
    kind, body = KINDS[path]
    nulls = dict.fromkeys([*FIELDS[path], *kind.foreign, "nobody_knows_me"])
    reply = client.post(path, json={**nulls, **body})
    assert reply.status_code == 200, reply.text
    assert IGNORED not in reply.headers


NOTHING: dict[str, object] = {
    "repeat_penalty": 1.0,
    "typical_p": 1.0,
    "mirostat": 0,
    "dry_multiplier": 0.0,
    "grammar": "",
    "bad_words": [],
    "logits_processors": [],
    "use_beam_search": False,
    "modalities": ["text"],
    "verbosity": "medium",
    "parse_tool_calls": True,
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "top_n_sigma": -1,
    "n_probs": 0,
    "extra_body": {},
}


@pytest.mark.parametrize("path", KINDS)
def test_values_that_ask_for_nothing_are_taken(client: httpx.Client, path: str) -> None:
    reply = client.post(path, json={**KINDS[path][1], **NOTHING})
    assert reply.status_code == 200, reply.text
    assert IGNORED not in reply.headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_has_the_header_too(client: httpx.Client, stream: bool) -> None:
    body = {**KINDS["/v1/chat/completions"][1], "stream": stream, "frobnicate": 1, "more_of_it": {"a": 1}}
    assert client.post("/v1/chat/completions", json=body).headers[IGNORED] == "frobnicate, more_of_it"


def test_so_has_a_refusal(client: httpx.Client) -> None:
    reply = client.post("/v1/chat/completions", json={"frobnicate": 1, "messages": HI, "temperature": -3})
    assert (reply.status_code, reply.headers[IGNORED]) == (400, "frobnicate")


def test_fields_of_inner_objects_are_named_with_their_place(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi", "shade": 1}], "opts": {"visible": True}}]
    reply = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1})
    assert reply.status_code == 200
    assert set(reply.headers[IGNORED].split(", ")) == {"messages.opts", "messages.content.shade"}
    images = [{"role": "user", "content": "Hi", "images": ["data"]}]
    reply = client.post("/v1/chat/completions", json={"messages": images})
    assert reply.status_code == 400
    assert "messages.images is not supported here" in message_of(reply)


def test_the_log_names_a_field_once(
    client: httpx.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remarks, "_recent", RecentNames())
    body = {**KINDS["/v1/chat/completions"][1], "only_here_in_the_tests": 1}
    with caplog.at_level(logging.WARNING, "hybrid_cache.remarks"):
        for _ in range(3):
            client.post("/v1/chat/completions", json=body)
    lines = [record.getMessage() for record in caplog.records if "only_here_in_the_tests" in record.getMessage()]
    assert len(lines) == 1


def test_names_pass_once_a_minute_and_not_without_end() -> None:
    names = RecentNames()
    assert [names.is_new("a", now) for now in (0.0, 1.0, 59.0, 61.0, 62.0)] == [True, False, False, True, False]
    assert sum(names.is_new(str(i), 63.0) for i in range(1000)) == MOST_LOGGED - 1


odd_names = st.text(min_size=1, max_size=200).filter(lambda name: "\ud800" not in name)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(odd_names, min_size=1, max_size=40, unique=True), path=st.sampled_from(sorted(KINDS)))
def test_unknown_names_fail_no_request_and_the_header_is_legal(
    client: httpx.Client, names: list[str], path: str
) -> None:
    kind, body = KINDS[path]
    unknown = [name for name in names if name not in own_fields(kind) and name not in kind.foreign]
    asked = json.dumps({**{name: [1] for name in unknown}, **body})
    reply = client.post(path, content=asked, headers={"content-type": "application/json"})
    assert reply.status_code == 200, reply.text
    if not unknown:
        assert IGNORED not in reply.headers
        return
    value = reply.headers[IGNORED]
    assert value.isascii()
    assert value.isprintable()
    assert len(value) <= MOST_NAMED * (MAX_NAME + 2) + 32
    shown, more = value.split(", "), 0
    if shown[-1].startswith("and "):
        more = int(shown.pop().split()[1])
    assert len(shown) + more == len({cleaned(name) for name in unknown}) or more
    assert set(shown) <= {cleaned(name) for name in unknown}


def test_a_header_counts_what_it_does_not_name() -> None:
    counted = Remarks(dict.fromkeys("ab"), 3)
    assert counted.headers() == {IGNORED: "a, b, and 3 more"}
