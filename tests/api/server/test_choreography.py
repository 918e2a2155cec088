"""Choreographies over HTTP, with the embedded model behind a real server."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any

import httpx
import pytest

from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.choreography import book
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.kernels import dispatch
from hybrid_cache.models.loading import embedded_path, load
from hybrid_cache.request import Output, Request
from hybrid_cache.tokens import BoundaryKind, Prompt
from tests.api.servers import events_of, in_process, new_app, new_engine, over_the_wire

GARAGE, ATTIC = "The code for the garage is 42.", "Please remember, the code for the attic is 17."
ASK = "What is the code for the garage?"
COMPOSED = {"fidelity": "composed"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    text = TextModel.load(embedded_path())
    settings = ServerSettings(served_names=("embedded",), backend="auto", model_path="embedded")
    engine = AsyncEngine(load(embedded_path(), ops=dispatch.select("auto")), EngineConfig(budget_bytes=64 << 20))
    with over_the_wire(create_app(engine, text, settings)) as url, httpx.Client(base_url=url, timeout=60) as made:
        yield made


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ref(name: str) -> dict[str, str]:
    return {"ref": name}


def ask(client: httpx.Client, *messages: Mapping[str, object], status: int = 200, **fields: object) -> Any:
    asked = {"messages": list(messages), "max_tokens": 24, "temperature": 0, **fields}
    reply = client.post("/v1/chat/completions", json=asked)
    assert reply.status_code == status, reply.text
    return reply.json()


def said(body: Any) -> str:
    return str(body["choices"][0]["message"]["content"])


def actions(body: Any) -> list[str]:
    return [item["action"] for item in body["choreography"]["plan"]["items"]]


def test_a_large_reply_enters_its_answer_in_the_book_on_the_event_loop(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, add = [], book.MessageBook.add

    def noted(*args: object, **fields: object) -> object:
        names.append(threading.current_thread().name)
        return add(*args, **fields)

    monkeypatch.setattr(book.MessageBook, "add", noted)
    scored = {"logprobs": True, "top_logprobs": 20, "max_tokens": 250, "ignore_eos": True}
    body = ask(client, user(GARAGE), user(ASK), choreography=COMPOSED, **scored)
    assert len(body["choices"][0]["logprobs"]["content"]) == 250
    assert ask(client, ref(body["choreography"]["answer"]), user(ASK), choreography=COMPOSED)
    assert not [name for name in names if name.startswith("hybrid-cache-text")]


def test_messages_are_named_and_used_again_in_another_order(client: httpx.Client) -> None:
    first = ask(client, user(GARAGE), user(ATTIC), user(ASK), choreography=COMPOSED)
    names = first["choreography"]["messages"]
    assert len(set(names)) == 3
    assert said(first) == "The code for the garage is 42."
    again = ask(client, ref(names[1]), ref(names[0]), user(ASK), choreography=COMPOSED)
    assert actions(again) == ["composed", "composed", "computed", "computed"]
    assert again["choreography"]["messages"][:2] == [names[1], names[0]]
    assert again["choreography"]["fidelity"] == "composed"
    plan = again["choreography"]["plan"]
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == again["usage"]["prompt_tokens"] - plan["computed_tokens"]
    assert plan["flops"] < plan["flops_of_encoding"] / 2


def test_an_answer_can_be_referred_to(client: httpx.Client) -> None:
    first = ask(client, user(GARAGE), user(ASK), choreography=COMPOSED)
    answer = first["choreography"]["answer"]
    names = [*first["choreography"]["messages"], answer]
    more = ask(client, *(ref(name) for name in names), user("Thank you."), choreography=COMPOSED)
    assert actions(more)[:3] == ["composed", "computed", "composed"]  # the short question was not stored
    assert said(more) == "You are welcome."


def test_exact_is_the_default_and_has_the_same_bits(client: httpx.Client) -> None:
    messages = [user(GARAGE), user(ATTIC), user(ASK)]
    options = {"logprobs": True, "top_logprobs": 5}
    plain = ask(client, *messages, prompt_cache_options={"mode": "explicit"}, **options)
    names = ask(client, *messages, choreography={})["choreography"]["messages"]
    exact = ask(client, *map(ref, names), **options)
    assert exact["choreography"]["fidelity"] == "exact"
    assert exact["choices"] == plain["choices"]
    assert "choreography" not in plain


def test_what_the_model_cannot_do_falls_back_and_says_so(client: httpx.Client) -> None:
    body = ask(client, user(GARAGE), user(ASK), choreography={"fidelity": "relocated"})
    assert body["choreography"]["fidelity"] == "exact"
    assert body["choreography"]["asked"] == "relocated"
    assert "recurrent states" in body["choreography"]["why"]


def test_messages_encoded_alone_are_the_same_in_any_place(client: httpx.Client) -> None:
    alone = {**COMPOSED, "encode": "alone"}
    one = ask(client, user(GARAGE), user(ATTIC), user(ASK), choreography=alone)["choreography"]
    other = ask(client, user(ATTIC), user(GARAGE), user(ASK), choreography={**alone, "composition": "rotations"})
    assert one["messages"][:2] == other["choreography"]["messages"][1::-1]
    assert actions(other)[:2] == ["composed"] * 2


def test_streams_end_with_the_report(client: httpx.Client) -> None:
    asked = {"messages": [user(GARAGE), user(ASK)], "stream": True, "temperature": 0, "choreography": COMPOSED}
    events = events_of(client.post("/v1/chat/completions", json=asked).text)
    reports = [e["choreography"] for e in events if isinstance(e, dict) and "choreography" in e]
    assert len(reports) == 1
    assert reports[0]["answer"].startswith("msg_")
    assert len(reports[0]["messages"]) == 2


def test_several_answers_get_no_names(client: httpx.Client) -> None:
    body = ask(client, user(GARAGE), user(ASK), n=2, choreography=COMPOSED)
    assert body["choreography"]["answer"] is None
    assert len(body["choices"]) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fidelity": "best"}, "fidelity"),
        ({"seam": 7}, "seam"),
        ({"composition": "soup"}, "composition"),
        ({"order": "random"}, "order"),
    ],
)
def test_bad_values_are_named(client: httpx.Client, change: dict[str, object], words: str) -> None:
    body = ask(client, user(ASK), status=400, choreography=change)
    assert words in json.dumps(body["error"])


def test_unknown_and_foreign_references(client: httpx.Client) -> None:
    missing = ask(client, ref("msg_0"), user(ASK), status=404)
    assert "msg_0" in missing["error"]["message"]
    assert missing["error"]["code"] == "message_not_found"
    body = ask(client, user(GARAGE), user(ASK), choreography=COMPOSED, cache_salt="tenant")
    name = body["choreography"]["messages"][0]
    assert ask(client, ref(name), user(ASK), status=404)["error"]["code"] == "message_not_found"
    assert said(ask(client, ref(name), user(ASK), cache_salt="tenant")) == "The code for the garage is 42."
    both = ask(client, {"ref": name, "content": "x"}, user(ASK), status=400)
    assert "nothing else" in both["error"]["message"]


def marked(*texts: str) -> dict[str, object]:
    """A user's message with a cache mark at the end of each of its parts."""
    mark = {"mode": "explicit", "ttl": "30m"}
    return {"role": "user", "content": [{"type": "text", "text": t, "prompt_cache_breakpoint": mark} for t in texts]}


def cached(body: Any) -> int:
    return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_cache_marks_count_in_a_choreography_and_behind_a_reference(client: httpx.Client) -> None:
    explicit = {"prompt_cache_options": {"mode": "explicit"}, "max_tokens": 1}
    texts = [" ".join([GARAGE] * 12), " ".join([ATTIC] * 12)]

    def second_turn(salt: str, *, by_reference: bool = False, **fields: object) -> int:
        options = {**explicit, "cache_salt": salt}
        first = ask(client, marked(*texts), **options, **fields)
        opening = ref(first["choreography"]["messages"][0]) if by_reference else marked(*texts)
        return cached(ask(client, opening, {"role": "assistant", "content": "Yes."}, user(ASK), **options, **fields))

    plain = second_turn("plain")
    assert plain > 128
    assert second_turn("arranged", choreography={}) == plain
    assert second_turn("referred", choreography={}, by_reference=True) == plain


def test_a_choreography_has_the_prompt_of_the_plain_request(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Prompt] = []
    submit = AsyncEngine.submit

    def spy(engine: AsyncEngine, request: Request) -> AsyncGenerator[Output, None]:
        prompts.append(request.prompt)
        return submit(engine, request)

    monkeypatch.setattr(AsyncEngine, "submit", spy)
    messages = [{"role": "system", "content": "Be brief."}, marked(GARAGE, ATTIC), user(ASK)]
    for fields in ({}, {"choreography": {}}):
        ask(client, *messages, prompt_cache_options={"mode": "implicit", "ttl": "1h"}, **fields)
    plain, arranged = prompts
    assert arranged.tokens.tolist() == plain.tokens.tolist()
    assert arranged.boundaries == plain.boundaries
    assert [b.role for b in plain.boundaries if b.role] == ["system", "user", "user"]
    assert [b.ttl_s for b in plain.boundaries if b.kind is BoundaryKind.EXPLICIT] == [1800.0, 1800.0]


def test_messages_whose_text_is_gone(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    small = book.MessageBook(most_bytes=40_000)
    first = small.add("a", "user", [1] * 30)
    for other in range(2, 40):
        small.add("a", "user", [other] * 300)
    with pytest.raises(book.MessageGone, match=first.id):
        small.find("a", first.id)
    find = book.MessageBook.find
    monkeypatch.setattr(book.MessageBook, "find", lambda *_: find(small, "a", first.id))
    body = ask(client, ref(first.id), user(ASK), status=409)
    assert body["error"]["code"] == "message_gone"


def test_what_the_template_does_not_show_counts_as_well(sum_text: TextModel) -> None:
    """Of messages that say little and carry much, only as many are kept as the book has room for."""

    async def ids_and_errors() -> tuple[list[str], list[int], float]:
        async with in_process(new_app(new_engine(), sum_text, message_book_bytes=4 << 20)) as client:
            ids, statuses = [], []
            for i in range(20):
                hidden = {"role": "assistant", "content": f"m{i}", "reasoning_content": "z" * 400_000}
                large = {"role": "assistant", "content": f"l{i}", "reasoning_content": "z" * 600_000}
                body = {"messages": [hidden, large], "max_tokens": 1, "choreography": {"encode": "alone"}}
                reply = await client.post("/v1/chat/completions", json=body)
                assert reply.status_code == 200, reply.text
                ids = [*ids, *reply.json()["choreography"]["messages"]]
            for name in ids:
                body = {"messages": [{"ref": name}, {"role": "user", "content": "x"}], "max_tokens": 1}
                statuses.append((await client.post("/v1/chat/completions", json=body)).status_code)
            text = (await client.get("/metrics")).text
            [said] = [line for line in text.splitlines() if line.startswith("hybrid_cache_message_book_bytes ")]
            return ids, statuses, float(said.split()[1])

    ids, statuses, num_bytes = asyncio.run(ids_and_errors())
    hidden, large = statuses[::2], statuses[1::2]
    assert set(large) == {409}  # more than an eighth of the book
    assert hidden[-5:] == [200] * 5
    assert hidden[:5] == [409] * 5
    assert 2 << 20 < num_bytes <= 4 << 20
    assert len(set(ids)) == 40


def test_limits(client: httpx.Client) -> None:
    body = ask(client, *[user("Hi there.")] * 257, status=400, choreography=COMPOSED)
    assert "257 messages" in body["error"]["message"]
    final = {"continue_final_message": True, "add_generation_prompt": False}
    body = ask(client, user("Hi"), {"role": "assistant", "content": "I"}, status=400, choreography=COMPOSED, **final)
    assert "continue_final_message" in body["error"]["message"]


def test_the_forms_are_documented(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]
    assert set(schema["Choreography"]["properties"]) >= {"fidelity", "order", "seam", "encode"}
