"""Activated adapters over HTTP: named in the list of models, switched on by the tokens of a rendered prompt."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from hybrid_cache.api.server import launch
from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.launch import Loaded, LoadOptions, inexact_reasons
from hybrid_cache.api.server.process import variant_of
from hybrid_cache.api.server.serving import Variant
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.tokenizer import TEMPLATE, TextModel
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import HybridCacheError, UnsupportedModel
from hybrid_cache.models import adapters
from hybrid_cache.models.loading import embedded_path
from hybrid_cache.profile import Profile
from hybrid_cache.request import Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt, last_occurrence
from tests.api.servers import over_the_wire

TALK = "The code for the blue box is 42. The code for the red box is 17. " * 6
ASKED: list[dict[str, Any]] = [{"role": "user", "content": TALK + "What is the code for the red box?"}]
TEXT = TextModel.load(embedded_path())
INVOKED = {"critic": "<|im_start|>critic\n", "guard": "<|im_start|>guard\n"}


def adapter_of(folder: Path, name: str) -> Path:
    """The shipped adapter, switched on by a role of its own, which its own template opens the answer with."""
    shutil.copytree(adapters.resolve("embedded-choreo"), folder)
    config = json.loads((folder / adapters.CONFIG).read_text())
    config["alora_invocation_tokens"] = TEXT.tokenizer.encode(INVOKED[name])
    (folder / adapters.CONFIG).write_text(json.dumps(config))
    template = (embedded_path() / TEMPLATE).read_text()
    assert template.count("'<|im_start|>assistant\\n'") == 1
    (folder / TEMPLATE).write_text(template.replace("'<|im_start|>assistant\\n'", f"'<|im_start|>{name}\\n'"))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: str(adapter_of(tmp_path_factory.mktemp("adapters") / name, name)) for name in INVOKED}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, str]) -> Loaded:
    return launch.load(LoadOptions(adapters={"critic": folders["critic"]}, shares=True))


@pytest.fixture(scope="module")
def client(loaded: Loaded, folders: dict[str, str]) -> Iterator[httpx.Client]:
    def load(name: str, folder: str, later_bytes: int) -> tuple[Variant, HybridModel, list[Profile]]:
        variant = launch.load_variant(loaded, name, adapter=folder)
        return variant_of(variant, loaded, TEXT), variant.model, []

    models = {each.name: each.model for each in loaded.variants}
    engine = AsyncEngine(loaded.model, EngineConfig(budget_bytes=64 << 20, verify=True), variants=models)
    served = [variant_of(each, loaded, TEXT) for each in loaded.variants]
    facts = ServerSettings(served_names=("embedded",), backend="x", model_path=str(loaded.path), drain_timeout_s=1.0)
    app = create_app(engine, TEXT, facts, served, load)
    with over_the_wire(app) as address, httpx.Client(base_url=address, timeout=30) as found:
        reply = found.post("/v1/load_lora_adapter", json={"lora_name": "guard", "lora_path": folders["guard"]})
        assert reply.status_code == 200
        yield found
        asyncio.run(engine.ask(Engine.check))


def ask(client: httpx.Client, model: str, messages: list[dict[str, Any]], **more: object) -> httpx.Response:
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 16, **more}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply


def prompt_of(client: httpx.Client, model: str, messages: list[dict[str, Any]]) -> list[int]:
    body = {"model": model, "messages": messages}
    tokens: list[int] = client.post("/tokenize", json=body).json()["tokens"]
    return tokens


def place_of(prompt: list[int], name: str) -> int:
    place = last_occurrence(np.array(prompt, np.int32), tuple(TEXT.tokenizer.encode(INVOKED[name])))
    assert place is not None
    return place


def alone(loaded: Loaded, model: HybridModel, prompt: list[int], num_tokens: int = 16) -> str:
    """What an adapter says beside the base and nothing else, without a cache."""
    engine = Engine(loaded.model, EngineConfig(budget_bytes=32 << 20, prefix_cache=False), variants={"x": model})
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, stop_token_ids=tuple(TEXT.defaults.eos_ids))
    engine.submit(Request("a", Prompt(np.asarray(prompt, np.int32)), sampling, model="x"))
    outputs = [output for _, output in engine.run_until_idle()]
    tokens = [o.token for o in outputs if isinstance(o, TokenOutput) and o.token is not None]
    return TEXT.tokenizer.decode([token for token in tokens if token not in TEXT.defaults.eos_ids])


def test_the_list_of_models_names_the_invocation(client: httpx.Client) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    found = {name: (card["invocation"], card["invocation_tokens"]) for name, card in cards.items()}
    expected = {name: (text, TEXT.tokenizer.encode(text)) for name, text in INVOKED.items()}
    assert found == {"embedded": (None, None), **expected}
    assert client.get("/v1/models/critic").json() == cards["critic"]


def test_adapters_and_the_base_alternate_over_one_conversation(
    client: httpx.Client, loaded: Loaded, folders: dict[str, str]
) -> None:
    guard = launch.load_variant(loaded, "guard", adapter=folders["guard"])
    models = {each.name: each.model for each in (*loaded.variants, guard)}
    talk = list(ASKED)
    for turn in range(3):
        for name in ("critic", "embedded", "guard", "critic"):
            reply = ask(client, name, talk)
            prompt = prompt_of(client, name, talk)
            text, usage = reply.json()["choices"][0]["message"]["content"], reply.json()["usage"]
            assert usage["prompt_tokens"] == len(prompt)
            assert reply.headers.get("x-adapter-active") == (None if name == "embedded" else "1")
            if name != "embedded":
                assert text == alone(loaded, models[name], prompt)
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            if name == "guard":
                assert cached == place_of(prompt, "guard"), "the critic has left the base's state where both begin"
        assert cached == len(prompt), "the same again"
        talk += [{"role": "assistant", "content": text}, {"role": "user", "content": f"And the blue box? {turn}"}]


def test_a_reply_says_whether_the_prompt_invoked_the_adapter(client: httpx.Client, loaded: Loaded) -> None:
    tokens = TEXT.tokenizer.encode(TALK)
    body = {"model": "critic", "prompt": tokens, "temperature": 0, "max_tokens": 9}
    plain = client.post("/v1/completions", json=body)
    assert plain.headers["x-adapter-active"] == "0"
    base = client.post("/v1/completions", json={**body, "model": "embedded"})
    assert "x-adapter-active" not in base.headers
    assert plain.json()["choices"][0]["text"] == base.json()["choices"][0]["text"]
    invoked = [*tokens, *TEXT.tokenizer.encode(INVOKED["critic"])]
    both = client.post("/v1/completions", json={**body, "prompt": [tokens, invoked]})
    assert both.headers["x-adapter-active"] == "0,1"
    with client.stream("POST", "/v1/completions", json={**body, "prompt": invoked, "stream": True}) as stream:
        assert stream.headers["x-adapter-active"] == "1"
        stream.read()


def test_what_is_written_as_text_invokes_nothing(client: httpx.Client) -> None:
    """It is matched in the rendered prompt, where a client's words are never special tokens."""
    messages = [{"role": "user", "content": INVOKED["guard"] + "hello"}]
    prompt = prompt_of(client, "embedded", messages)
    assert last_occurrence(np.array(prompt, np.int32), tuple(TEXT.tokenizer.encode(INVOKED["guard"]))) is None


def test_one_that_is_to_be_merged_is_refused_in_one_line(folders: dict[str, str], loaded: Loaded) -> None:
    for options in (
        LoadOptions(adapter=folders["critic"]),
        LoadOptions(adapters={"critic": folders["critic"]}, merges=True),
    ):
        with pytest.raises(
            UnsupportedModel, match=r"is activated by the tokens \[.*\], and cannot be merged"
        ) as refused:
            launch.load(options)
        assert "\n" not in str(refused.value)
    with pytest.raises(HybridCacheError, match="cannot be merged"):
        launch.load_variant(loaded, "merged", adapter=folders["guard"], merges=True)


def test_the_check_at_the_start_runs_it_beside_the_base(loaded: Loaded) -> None:
    assert inexact_reasons(replace(loaded)) == []
