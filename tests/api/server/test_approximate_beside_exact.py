"""Exact requests on a server that also answers approximate ones, with the embedded model behind real servers."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.kernels import dispatch
from hybrid_cache.models.loading import embedded_path, load
from tests.api.servers import over_the_wire

PETS = "Anna has a cat and a dog. The box is red. " * 6
CODES = "The code for the garage is 42. Tom has the key of the house. " * 5
WEATHER = "Some other text that was sent before, about the weather and the sea. " * 3
ASK = "What is the code for the garage?"


@pytest.fixture
def clients() -> Iterator[list[httpx.Client]]:
    """Of a server with the default settings, and of one without a cache."""
    model, text = load(embedded_path(), ops=dispatch.select("auto")), TextModel.load(embedded_path())
    settings = ServerSettings(served_names=("embedded",), backend="auto", model_path="embedded")
    with ExitStack() as stack:
        urls = [
            stack.enter_context(over_the_wire(create_app(AsyncEngine(model, config), text, settings)))
            for config in (EngineConfig(), EngineConfig(prefix_cache=False))
        ]
        yield [stack.enter_context(httpx.Client(base_url=url, timeout=60)) for url in urls]


def chat(client: httpx.Client, *messages: str, **fields: object) -> Any:
    asked = {"messages": [{"role": "user", "content": m} for m in messages], "temperature": 0, **fields}
    reply = client.post("/v1/chat/completions", json=asked)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_composed_requests_leave_what_exact_ones_read_alone(clients: list[httpx.Client]) -> None:
    cached, plain = clients
    longer = CODES + "Also, the lamp is green now. " * 12 + ASK
    exact = {"max_tokens": 12, "logprobs": True, "top_logprobs": 5}
    composed = {"max_tokens": 8, "choreography": {"fidelity": "composed", "encode": "alone"}}
    expected = chat(plain, PETS, longer, **exact)["choices"][0]["logprobs"]
    assert chat(cached, PETS, longer, **exact)["choices"][0]["logprobs"] == expected
    chat(cached, WEATHER, CODES, ASK, **composed)
    moved = chat(cached, PETS, CODES, ASK, **composed)["choreography"]
    assert [item["action"] for item in moved["plan"]["items"]][1] == "composed"
    again = chat(cached, PETS, longer, **exact)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert "choreography" not in again
    assert again["choices"][0]["logprobs"] == expected
