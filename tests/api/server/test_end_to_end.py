"""The promise, through HTTP: with the cache on, every token and every log-probability is what it is with the cache off.

The model is the one in the package. Two servers run it, and are asked the same.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.loading import load
from tests.api.servers import over_the_wire

MODEL = Path(__file__).parents[3] / "models" / "embedded"

SYSTEM = {"role": "system", "content": "You are a helpful assistant. You remember what people tell you. " * 12}
Messages = list[dict[str, str]]
Talk = tuple[Messages, list[int], list[int]]


class Pair:
    """A server with the prefix cache and one without."""

    def __init__(self, cached: httpx.Client, plain: httpx.Client) -> None:
        self.clients = cached, plain

    def ask(self, messages: Messages, **fields: object) -> tuple[str, int, int]:
        """Asks both -> the answer, and the cached and all tokens of the prompt. They must agree on every bit."""
        asked = {
            "messages": messages,
            "max_tokens": 24,
            "logprobs": True,
            "top_logprobs": 5,
            "return_token_ids": True,
            **fields,
        }
        cached, plain = (c.post("/v1/chat/completions", json=asked).json() for c in self.clients)
        assert cached["choices"] == plain["choices"]
        assert cached["prompt_token_ids"] == plain["prompt_token_ids"]
        assert plain["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        usage: Any = cached["usage"]
        found = usage["prompt_tokens_details"]["cached_tokens"]
        return cached["choices"][0]["message"]["content"], found, usage["prompt_tokens"]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    text = TextModel.load(MODEL)
    settings = ServerSettings(served_names=("embedded",), backend="auto", model_path="embedded")
    engines = [
        # Kernels keep scratch memory, so each engine has its own.
        AsyncEngine(load(MODEL, ops=dispatch.select("auto")), EngineConfig(budget_bytes=256 << 20, prefix_cache=on))
        for on in (True, False)
    ]
    with (
        over_the_wire(create_app(engines[0], text, settings)) as cached,
        over_the_wire(create_app(engines[1], text, settings)) as plain,
        httpx.Client(base_url=cached, timeout=60) as cached_client,
        httpx.Client(base_url=plain, timeout=60) as plain_client,
    ):
        yield Pair(cached_client, plain_client)


def said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answered(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


FACTS = [
    "Hello! My locker code is 4711. Please remember it, because I will ask you for it again later today.",
    "I have three apples and two pears in my basket, and my neighbour Anna has four plums in hers. Keep that in mind.",
    "Now I give one apple to Anna and she gives me two plums for it. Then I eat a pear, because I am rather hungry.",
    "What is my locker code?",
]


def talk(pair: Pair, system: dict[str, str], turns: list[str], **fields: object) -> Talk:
    """A conversation -> its messages, and the cached and all tokens of each turn's prompt."""
    messages, hits, totals = [system], [], []
    for turn in turns:
        messages.append(said(turn))
        answer, found, total = pair.ask(messages, **fields)
        messages.append(answered(answer))
        hits.append(found)
        totals.append(total)
    return messages, hits, totals


def test_a_growing_conversation_an_edit_and_a_regenerated_answer(pair: Pair) -> None:
    messages, hits, totals = talk(pair, SYSTEM, FACTS)
    assert hits[0] == 0
    for hit, before in zip(hits[1:], totals, strict=False):
        assert hit >= before // TILE * TILE  # all of the turn before, up to the grid

    question = messages[:-1]
    answer, found, total = pair.ask(question)
    assert answer == messages[-1]["content"]
    assert found == total  # the end of a prompt is kept whole

    edited = [*messages[:3], said(FACTS[1].replace("three", "seven")), *messages[4:-1]]
    _, found, total = pair.ask(edited)
    assert 0 < found < total


def test_a_shared_system_prompt(pair: Pair) -> None:
    system = {"role": "system", "content": SYSTEM["content"] + "Answer briefly."}
    hits = [pair.ask([system, said(f"My name is {name}. What is my name?")])[1] for name in ("Ben", "Cleo", "Dora")]
    assert hits[0] < 192
    assert hits[1] == hits[2] >= 128


@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.0, "seed": 7, "n": 3}, {"temperature": 0.7, "top_p": 0.9, "seed": 1}]
)
def test_sampled_answers(pair: Pair, sampling: dict[str, object]) -> None:
    for _ in range(2):
        talk(pair, {"role": "system", "content": f"Be kind. {sampling}"}, FACTS[:3], **sampling)


def test_answers_to_marked_prompts(pair: Pair) -> None:
    mark = {"mode": "explicit", "ttl": "30m"}
    system = {"role": "system", "content": [{"type": "text", "text": "Note: " * 150, "prompt_cache_breakpoint": mark}]}
    fields = {"prompt_cache_options": {"mode": "explicit"}}
    first = pair.ask([system, said(FACTS[0])], **fields)  # type: ignore[list-item]
    second = pair.ask([system, said(FACTS[1])], **fields)  # type: ignore[list-item]
    assert first[1] == 0
    assert second[1] >= 128


def test_completions_and_scores(pair: Pair) -> None:
    prompt = " ".join(FACTS) * 2
    for fields in ({"max_tokens": 8, "logprobs": 3}, {"max_tokens": 1, "logprobs": 3, "echo": True}):
        for _ in range(2):
            asked = {"prompt": prompt, "return_token_ids": True, **fields}
            cached, plain = (c.post("/v1/completions", json=asked).json() for c in pair.clients)
            assert cached["choices"] == plain["choices"]
        hit = cached["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (hit == 0) == ("echo" in fields)  # scores need all of the prompt computed
