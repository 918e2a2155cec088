"""Replies that take long to build are built once, and on threads: the event loop serves others meanwhile."""

import json
import threading
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_cache.api.server.json_text import PIECE, json_bytes, json_in_pieces
from hybrid_cache.api.server.openai import completion_reply, logprobs, reply
from hybrid_cache.api.server.routes import tokens
from hybrid_cache.api.text.text_work import LONG_TEXT
from tests.api.servers import events_of

PROMPT = [300 + i % 600 for i in range(LONG_TEXT // 16)]
SCORED = {"max_tokens": 1, "logprobs": 20, "ignore_eos": True}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


class Threads:
    """Names of the threads that have called a function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> None:
        self.names: list[str] = []
        self._function = getattr(place, name)
        monkeypatch.setattr(place, name, self)

    def __call__(self, *args: object) -> object:
        self.names.append(threading.current_thread().name)
        return self._function(*args)

    @property
    def beside(self) -> list[bool]:
        """Which calls were made beside the event loop."""
        return [name.startswith("hybrid-cache-text") for name in self.names]


@given(VALUES, st.integers(0, 3 * PIECE))
def test_json_in_pieces_is_json(value: object, length: int) -> None:
    for whole in (value, [value] * length, {"a": {"b": [{"c": [value] * length}]}}):
        assert json_in_pieces(whole) == json_bytes(whole)
        assert json.loads(json_bytes(whole)) == whole


def test_json_has_no_infinities() -> None:
    for bad in (float("nan"), [0.0] * 1000 + [float("inf")]):
        with pytest.raises(ValueError, match="not JSON compliant"):
            json_in_pieces(bad)


def choices(reply: httpx.Response) -> Iterator[dict[str, object]]:
    assert reply.status_code == 200, reply.text
    for choice in reply.json()["choices"]:
        assert choice.pop("index") >= 0
        yield choice


def test_a_large_echo_is_worked_out_once_a_prompt_and_beside_the_event_loop(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets = Threads(monkeypatch, completion_reply, "prompt_offsets")
    written = Threads(monkeypatch, reply, "json_in_pieces")
    asked = {**SCORED, "prompt": [PROMPT, PROMPT[::-1]], "n": 3, "echo": True}
    first, *rest = choices(client.post("/v1/completions", json=asked))
    assert rest[:2] == [first] * 2
    assert rest[3:] == [rest[2]] * 2 != [first] * 2
    assert offsets.beside == [True] * 2
    assert written.beside == [True]
    assert len(first["logprobs"]["tokens"]) == len(PROMPT) + 1


def test_so_is_a_streamed_one(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {**SCORED, "prompt": PROMPT, "n": 3, "echo": True}
    whole = list(choices(client.post("/v1/completions", json=asked)))
    offsets = Threads(monkeypatch, completion_reply, "prompt_offsets")
    written = Threads(monkeypatch, reply, "json_in_pieces")
    events = events_of(client.post("/v1/completions", json={**asked, "stream": True}).text)
    assert offsets.beside == [True]
    assert written.beside == [True] * 3
    for number, choice in enumerate(whole):
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == number]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, column in choice["logprobs"].items():
            assert [item for part in parts for item in part["logprobs"][name]] == column


@pytest.mark.parametrize("number", [1, 2 + LONG_TEXT // 20])
def test_log_probabilities_of_a_long_chat_are_written_beside_the_event_loop(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 18, "ignore_eos": True}
    written = Threads(monkeypatch, reply, "json_in_pieces")
    (choice,) = choices(client.post("/v1/chat/completions", json={**asked, "max_tokens": number}))
    content = choice["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [18] * number
    assert written.beside == [number > 1]


@pytest.mark.parametrize("length", [10, LONG_TEXT + 1])
def test_so_are_many_tokens(client: httpx.Client, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    written = Threads(monkeypatch, tokens, "json_in_pieces")
    body = client.post("/tokenize", json={"prompt": "x" * length, "return_token_strs": True}).json()
    assert body["tokens"] == [ord("x")] * length == [ord(text) for text in body["token_strs"]]
    assert set(client.post("/tokenize", json={"prompt": "x"}).json()) == {"count", "max_model_len", "tokens"}
    back = client.post("/detokenize", json={"tokens": body["tokens"]}).json()
    assert back == {"prompt": "x" * length}
    assert written.beside == [length > 10, False, length > 10]


def test_a_reply_that_nobody_waits_for_is_not_written_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Exception):
        pass

    def gone() -> None:
        raise Gone

    monkeypatch.setattr("hybrid_cache.api.server.json_text.still_wanted", gone)
    with pytest.raises(Gone):
        json_in_pieces({"tokens": [1] * (PIECE + 1)})
    monkeypatch.setattr(logprobs, "still_wanted", gone)
    with pytest.raises(Gone):
        logprobs._top(None, None)  # type: ignore[arg-type]
