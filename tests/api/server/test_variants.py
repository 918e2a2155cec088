"""One server, several models of one shape: a base, a fine-tune whose upper half moved, and a base with an adapter."""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli.options import named_folders
from hybrid_cache.api.server import launch, process
from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.launch import Loaded, LoadOptions
from hybrid_cache.api.server.process import ServeOptions
from hybrid_cache.api.server.serving import Variant
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.alike import SAME, TextDifference, difference_of
from hybrid_cache.api.text.tokenizer import TextModel, Tokenizer
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.adapted import AdaptedModel
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.free_memory import FreeMemory
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.selfcheck import check_model
from hybrid_cache.errors import ConfigError, HybridCacheError, ModelError
from hybrid_cache.models import adapters
from hybrid_cache.models.loading import embedded_path
from hybrid_cache.profile import Plan, Profile
from hybrid_cache.request import Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from hybrid_cache.transfer import projected
from tests.api.servers import new_app, over_the_wire

HALF, CHOREO = "half", "choreo"
NAMES = ("", HALF, CHOREO)
TALK = "The code for the blue box is 42. The code for the red box is 17. " * 6
FIRST_MOVED = 3  # layer


def moved(folder: Path, *, layers: int = FIRST_MOVED, **config: object) -> Path:
    """The embedded model with other weights from a layer on, or another config."""
    shutil.copytree(embedded_path(), folder)
    if config:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **config}))
    weights = load_file(folder / "model.safetensors")
    rng = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if ".layers." in name and int(name.split(".layers.")[1].split(".")[0]) >= layers:
            weights[name] = (weight.float() * (1 + 0.05 * torch.randn(weight.shape, generator=rng))).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moved(tmp_path_factory.mktemp("variants") / "half")


@pytest.fixture(scope="module")
def loaded(half: Path) -> Loaded:
    return launch.load(LoadOptions(variants={HALF: str(half)}, adapters={CHOREO: "embedded-choreo"}))


@pytest.fixture
def plain() -> Loaded:
    """The model by itself, to which others may come; what another test has loaded is not shared with it."""
    return launch.load(LoadOptions(shares=True))


@pytest.fixture(scope="module")
def url(loaded: Loaded) -> Iterator[str]:
    text = TextModel.load(loaded.path)
    models = {each.name: each.model for each in loaded.variants}
    engine = AsyncEngine(loaded.model, EngineConfig(budget_bytes=32 << 20, verify=True), variants=models)
    served = [Variant(each.name, str(each.path), text, each.adapter) for each in loaded.variants]
    app = new_app(engine, text, served, served_names=("embedded", "alias"), model_path=str(loaded.path))
    with over_the_wire(app) as address:
        yield address
        asyncio.run(engine.ask(Engine.check))


def alone(loaded: Loaded, name: str, prompt: list[int], num_tokens: int) -> list[int]:
    """What the model of a name says by itself, without a cache."""
    model = {"": loaded.model, **{each.name: each.model for each in loaded.variants}}[name]
    engine = Engine(model, EngineConfig(budget_bytes=32 << 20, prefix_cache=False))
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens)
    engine.submit(Request("a", Prompt(np.asarray(prompt, np.int32)), sampling))
    outputs = [output for _, output in engine.run_until_idle()]
    return [o.token for o in outputs if isinstance(o, TokenOutput) and o.token is not None]


def test_each_answers_as_it_does_alone_and_finds_its_own_turns_in_the_cache(loaded: Loaded, url: str) -> None:
    messages = [{"role": "user", "content": TALK + "What is the code for the red box?"}]
    prompt = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()["tokens"]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        said = {}
        for round_ in range(2):
            for name in NAMES:
                reply = client.completions.create(
                    model=name or "embedded", prompt=prompt, temperature=0, max_tokens=24, logprobs=1
                )
                assert reply.model == (name or "embedded")
                assert reply.usage is not None
                assert reply.usage.prompt_tokens_details is not None
                cached = reply.usage.prompt_tokens_details.cached_tokens
                assert cached == (reply.usage.prompt_tokens if round_ else 0)
                said.setdefault(name, reply.choices[0].text)
                assert said[name] == reply.choices[0].text
        text = TextModel.load(loaded.path)
        for name in NAMES:
            expected = alone(loaded, name, prompt, 24)
            eos = [token for token in expected if token in text.defaults.eos_ids]
            expected = expected[: expected.index(eos[0])] if eos else expected
            assert said[name] == text.tokenizer.decode(expected)
        assert len({*said.values()}) > 1


def test_all_dialects_choose_by_name(url: str) -> None:
    messages: Any = [{"role": "user", "content": "Where is the ball? The ball is in the garden."}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chats = {
            name: client.chat.completions.create(model=name or "alias", messages=messages, temperature=0, max_tokens=20)
            for name in NAMES
        }
        prints = {chat.system_fingerprint for chat in chats.values()}
        assert len(prints) == 3
        responses = {
            name: client.responses.create(
                model=name or "embedded", input=messages, temperature=0, max_output_tokens=20
            ).output_text
            for name in NAMES
        }
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as other:
        for name in NAMES:
            reply = other.messages.create(
                model=name or "embedded", messages=messages, max_tokens=20, extra_body={"temperature": 0}
            )
            (block,) = reply.content
            assert block.type == "text"
            assert block.text == chats[name].choices[0].message.content == responses[name]
        with pytest.raises(anthropic.NotFoundError, match="only embedded, alias, half, choreo"):
            other.messages.create(model="nobody", messages=messages, max_tokens=2)


def test_the_list_of_models_says_whose_variants_they_are(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        cards = {card.id: card.to_dict() for card in client.models.list()}
        assert {name: card["parent"] for name, card in cards.items()} == {
            "embedded": None,
            "alias": None,
            HALF: "embedded",
            CHOREO: "embedded",
        }
        assert cards[HALF]["root"] == "half"
        assert client.models.retrieve(CHOREO).to_dict() == cards[CHOREO]
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nobody")


def test_what_is_equal_is_stored_once(loaded: Loaded, half: Path) -> None:
    shared = {each.name: each.shared for each in loaded.variants}
    assert 0.5 < shared[HALF] < 0.9
    assert 0.8 < shared[CHOREO] < 1
    merged = launch.load_variant(loaded, "merged", adapter="embedded-choreo", merges=True)
    assert 0.05 < merged.shared < 0.5
    assert merged.model.fingerprint != loaded.variants[1].model.fingerprint
    assert {each.name: each.equal_layers for each in loaded.variants} == {HALF: FIRST_MOVED, CHOREO: 0}
    same = launch.load_variant(loaded, "again", str(half))
    assert same.shared == 1.0
    assert same.model.fingerprint == loaded.variants[0].model.fingerprint
    plain = launch.load(LoadOptions())
    assert plain.shelf is None
    assert plain.model.fingerprint == loaded.model.fingerprint


def test_an_adapter_is_checked_on_a_copy_of_the_model_that_others_run(loaded: Loaded) -> None:
    """The checks of a new adapter run beside the engine, and a model runs one pass at a time."""
    variant = next(each.model for each in loaded.variants if each.name == CHOREO)
    assert isinstance(variant, AdaptedModel)
    assert variant.trunk is loaded.trunk is loaded.model
    assert loaded.shelf is not None
    loaded.shelf.begin()
    copy = launch.apart(loaded, variant)
    assert isinstance(copy, AdaptedModel)
    assert copy.trunk is not loaded.trunk
    assert copy.fingerprint == variant.fingerprint
    assert copy.factors is variant.factors
    assert loaded.shelf.num_shared_bytes == loaded.shelf.num_bytes
    assert check_model(copy) == []


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"max_position_embeddings": 4096}, "its max_length is 4096, not 32768"),
        ({"mamba_chunk_size": 64}, ""),
    ],
)
def test_a_folder_of_another_shape_is_refused_by_what_differs(
    loaded: Loaded, tmp_path: Path, config: dict[str, object], why: str
) -> None:
    folder = moved(tmp_path / "other", **config)
    if not why:
        assert launch.load_variant(loaded, "other", str(folder)).name == "other"
        return
    with pytest.raises(ConfigError, match=f"other: .* is no variant of embedded: {why}"):
        launch.load_variant(loaded, "other", str(folder))


def test_what_is_no_model_or_has_no_base_is_refused(loaded: Loaded, half: Path, tmp_path: Path) -> None:
    with pytest.raises(HybridCacheError, match="not a local folder"):
        launch.load_variant(loaded, "a", str(tmp_path / "nowhere"))
    merged = LoadOptions(adapter="embedded-choreo", adapters={"x": "embedded-choreo"})
    with pytest.raises(ConfigError, match="is merged into the model"):
        launch.load(merged)
    text, models = TextModel.load(loaded.path), {"embedded": loaded.variants[0].model}
    engine = AsyncEngine(loaded.model, EngineConfig(budget_bytes=8 << 20), variants=models)
    with pytest.raises(ConfigError, match="the name 'embedded' is taken"):
        new_app(engine, text, [Variant("embedded", str(half), text)], served_names=("embedded",))


def test_the_command_line_hands_them_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    odd = tmp_path / "c=d"
    odd.symlink_to(embedded_path())
    told: list[ServeOptions] = []
    monkeypatch.setattr("hybrid_cache.api.server.process.serve", told.append)
    variants, adapters = {"style": "embedded-style", "b": str(odd)}, {"a": "embedded-choreo"}
    said = ["serve", "--port", "0", "--variant", "style=embedded-style", "--adapter", "a=embedded-choreo"]
    said += ["--adapter", "embedded-polite", "--variant", f"b={odd}"]
    assert CliRunner().invoke(cli.app, said).exit_code == 0
    assert told[0].load == LoadOptions(
        adapter="embedded-polite", variants=variants, adapters=adapters, path=embedded_path()
    )


def test_names_and_folders(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert named_folders("--adapter", [str(odd), "x=y"]) == (str(odd), {"x": "y"})
    for given, why in (
        (["x=y", "x=z"], "the name 'x' is there twice"),
        (["=y"], "wanted NAME=DIR"),
        (["x="], "wanted NAME=DIR"),
        (["y", "z"], "one can be merged"),
    ):
        with pytest.raises(ConfigError, match=why):
            named_folders("--adapter", given)
    with pytest.raises(ConfigError, match="wanted NAME=DIR"):
        named_folders("--variant", ["somewhere"], all_named=True)


OPERATOR, CLIENT = "operator", "client"
CHOREO_BYTES, CHOREO_SIZE = 1212416, "1.16 MiB"  # its factors in bfloat16, as they are packed


@contextmanager
def loading_server(loaded: Loaded, free_bytes: int = 1 << 30, **settings: object) -> Iterator[httpx.Client]:
    """A server that loads adapters when it is asked, as far as memory is free."""
    text = TextModel.load(loaded.path)

    def load(name: str, folder: str, later_bytes: int) -> tuple[Variant, HybridModel, list[Profile]]:
        room = FreeMemory(free_bytes - later_bytes, "the machine")
        variant = launch.load_variant(loaded, name, adapter=folder, room=room)
        served = Variant(name, str(variant.path), text, variant.adapter, own_bytes=variant.own_bytes)
        return served, variant.model, launch.profiles_in(variant.path)

    engine = AsyncEngine(loaded.model, EngineConfig(budget_bytes=32 << 20))
    facts = {"served_names": ("embedded",), "backend": "fake", "model_path": str(loaded.path), **settings}
    app = create_app(engine, text, ServerSettings(drain_timeout_s=1.0, **facts), (), load)  # type: ignore[arg-type]
    with over_the_wire(app) as address, httpx.Client(base_url=address, timeout=30) as client:
        yield client
        asyncio.run(engine.ask(Engine.check))


def ask(client: httpx.Client, model: str, **more: object) -> httpx.Response:
    messages = [{"role": "user", "content": TALK + "What is the code for the red box?"}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 12, **more}
    return client.post("/v1/chat/completions", json=body)


def test_adapters_come_and_go(plain: Loaded) -> None:
    with loading_server(plain) as client:
        asked = {"lora_name": "later", "lora_path": "embedded-choreo"}
        assert ask(client, "later").status_code == 404
        reply = client.post("/v1/load_lora_adapter", json=asked)
        said = f"Success: LoRA adapter 'later' added successfully. Its own weights take {CHOREO_SIZE}."
        assert (reply.status_code, reply.text) == (200, said)
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["embedded", "later"]
        health = client.get("/health").json()
        assert (health["variants"], health["variant_bytes"]) == (["later"], {"later": CHOREO_BYTES})
        first, base = ask(client, "later").json(), ask(client, "embedded").json()
        assert first["system_fingerprint"] != base["system_fingerprint"]
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        again = client.post("/v1/load_lora_adapter", json=asked)
        assert (again.status_code, again.json()["error"]["code"]) == (409, "name_taken")
        gone = client.post("/v1/unload_lora_adapter", json={"lora_name": "later"})
        assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'later' removed successfully.")
        assert ask(client, "later").status_code == 404
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "later"}).status_code == 404
        assert client.post("/v1/load_lora_adapter", json=asked).status_code == 200
        second = ask(client, "later").json()
        assert second["choices"] == first["choices"]
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "what was cached of it has gone with it"


def test_the_profiles_beside_an_adapter_are_read(plain: Loaded, tmp_path: Path) -> None:
    shutil.copytree(adapters.resolve("embedded-choreo"), tmp_path / "adapter")
    adapter = launch.load_variant(plain, "later", adapter=str(tmp_path / "adapter")).model.fingerprint
    num = len(plain.model.layers)  # type: ignore[arg-type]
    plans = (Plan(projected(num, range(num)), 0.004, 0.99, 0.2, 1),)
    Profile(plain.model.fingerprint, adapter, num, "by hand", plans).save(tmp_path / "adapter/sharing-base.json")
    Profile("another", adapter, num, "by hand", plans).save(tmp_path / "adapter/sharing-another.json")
    asked = {"lora_name": "later", "lora_path": str(tmp_path / "adapter")}
    with loading_server(plain) as client:
        assert client.post("/v1/load_lora_adapter", json=asked).status_code == 200
        profiled = {"fidelity": "profiled", "max_loss": 0.01}
        ask(client, "later", sharing=profiled, cache_salt="so that what is read later is kept")
        ask(client, "embedded")
        assert ask(client, "later", sharing=profiled).json()["sharing"]["layers"] == f"project 0-{num - 1}"
        client.post("/v1/unload_lora_adapter", json={"lora_name": "later"})
        (tmp_path / "adapter/sharing-base.json").write_text("{}")
        refused = client.post("/v1/load_lora_adapter", json=asked)
        assert refused.status_code == 400
        assert "sharing-base.json" in refused.json()["error"]["message"]
        Profile(plain.model.fingerprint, adapter, num + 1, "", ()).save(tmp_path / "adapter/sharing-base.json")
        assert "layers" in client.post("/v1/load_lora_adapter", json=asked).json()["error"]["message"]
        (tmp_path / "adapter/sharing-base.json").unlink()
        assert client.post("/v1/load_lora_adapter", json=asked).status_code == 200, "nothing of it had stayed"


def test_an_adapter_in_use_stays(loaded: Loaded) -> None:
    with loading_server(loaded) as client:
        client.post("/v1/load_lora_adapter", json={"lora_name": "busy", "lora_path": "embedded-choreo"})
        body = {"model": "busy", "prompt": TALK, "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()  # which ends the stream when it is forgotten
            next(lines)
            refused = client.post("/v1/unload_lora_adapter", json={"lora_name": "busy"})
            assert refused.status_code == 409
            assert refused.json()["error"]["code"] == "model_in_use"
            assert "'busy' is in use by 1 requests" in refused.json()["error"]["message"]
        deadline = time.monotonic() + 20
        while client.post("/v1/unload_lora_adapter", json={"lora_name": "busy"}).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert ask(client, "").status_code == 200


@pytest.mark.parametrize(
    ("asked", "status", "what"),
    [
        ({"lora_name": "x", "lora_path": "/nowhere"}, 400, "neither a folder nor one that ships"),
        ({"lora_name": "x", "lora_path": str(embedded_path())}, 400, "adapter_config.json"),
        ({"lora_name": "embedded", "lora_path": "embedded-choreo"}, 409, "is taken"),
        ({"lora_name": "", "lora_path": "embedded-choreo"}, 400, "lora_name"),
        ({"lora_name": "a b", "lora_path": "embedded-choreo"}, 400, "lora_name"),
        ({"lora_name": "x" * 300, "lora_path": "embedded-choreo"}, 400, "lora_name"),
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "a\0b"}, 400, "lora_path"),
    ],
)
def test_what_cannot_be_loaded_is_named(loaded: Loaded, asked: dict[str, str], status: int, what: str) -> None:
    with loading_server(loaded) as client:
        refused = client.post("/v1/load_lora_adapter", json=asked)
        assert refused.status_code == status, refused.text
        assert what in json.dumps(refused.json()["error"])
        assert len(client.get("/v1/models").json()["data"]) == 1
        assert ask(client, "embedded").status_code == 200


def not_finite(folder: Path) -> Path:
    """The embedded model with one weight that makes more than numbers can be."""
    shutil.copytree(embedded_path(), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.2.mamba.in_proj.weight"))
    weights[name] = torch.full_like(weights[name], 3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def huge(folder: Path) -> Path:
    """An adapter whose factors are finite, and make numbers that are not."""
    shutil.copytree(adapters.resolve("embedded-choreo"), folder)
    weights = {name: torch.full_like(w, 1e30) for name, w in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_variant_whose_numbers_are_not_finite_is_named(tmp_path: Path) -> None:
    models = LoadOptions(variants={"good": str(embedded_path()), "bad": str(not_finite(tmp_path / "a"))})
    with pytest.raises(ModelError, match=r"^variant bad: the model computes values that are not finite"):
        launch.inexact_reasons(launch.load(models))
    models = LoadOptions(adapters={"much": str(huge(tmp_path / "b"))})
    with pytest.raises(ModelError, match=r"^adapter much: the model computes values that are not finite"):
        launch.inexact_reasons(launch.load(models))


def test_what_differs_on_a_probe_is_named(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "check_exact", lambda ops, dtype: [])
    monkeypatch.setattr(
        launch, "check_model", lambda model, base=None: [] if model is loaded.model else ["a prompt differs"]
    )
    assert launch.inexact_reasons(loaded) == ["variant half: a prompt differs", "adapter choreo: a prompt differs"]
    twice = replace(loaded, variants=(*loaded.variants, replace(loaded.variants[0], name="again")))
    assert len(launch.inexact_reasons(twice)) == 2


def test_weights_that_do_not_fit_are_refused_before_they_are_packed(plain: Loaded) -> None:
    asked = {"lora_name": "a", "lora_path": "embedded-choreo"}
    with loading_server(plain, free_bytes=5 << 20) as client:
        assert client.post("/v1/load_lora_adapter", json=asked).status_code == 200
        refused = client.post("/v1/load_lora_adapter", json={**asked, "lora_name": "b"})
        assert refused.status_code == 400
        why = "adapter b: its weights take up to 4.57 MiB, and 3.84 MiB are free by the machine beside the cache"
        assert refused.json()["error"]["message"] == why
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 200
        assert client.post("/v1/load_lora_adapter", json={**asked, "lora_name": "b"}).status_code == 200
    room = FreeMemory(7 << 20, "a test")
    with pytest.raises(ModelError, match=r"adapter m: its weights take up to 7.17 MiB, and 7 MiB are free by a test"):
        launch.load_variant(plain, "m", adapter="embedded-choreo", merges=True, room=room)


def test_what_is_freed_is_given_back(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    called = list[str]()
    monkeypatch.setattr("hybrid_cache.api.server.routes.adapters.give_back_freed", lambda: called.append("back"))
    asked = {"lora_name": "a", "lora_path": "embedded-choreo"}
    with loading_server(loaded) as client:
        client.post("/v1/load_lora_adapter", json=asked)
        assert called == []
        client.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
        assert called == ["back"]
        client.post("/v1/load_lora_adapter", json={**asked, "lora_path": str(embedded_path())})
        assert called == ["back"] * 2


def test_only_an_operator_loads_where_there_is_one(loaded: Loaded) -> None:
    keys = {"api_keys": (CLIENT, OPERATOR), "operator_keys": (OPERATOR,)}
    asked = {"lora_name": "x", "lora_path": "embedded-choreo"}
    with loading_server(loaded, **keys) as client:
        statuses = [
            client.post(path, json=asked, headers={"Authorization": f"Bearer {key}"}).status_code
            for key in (CLIENT, OPERATOR)
            for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
        ]
        assert statuses == [403, 403, 200, 200]


OWN_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


def served_with(tmp_path: Path, **files: str) -> Variant:
    """What is served of the embedded model's weights in a folder with these text files beside them."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(embedded_path() / name)
    for name, text in files.items():
        (folder / {"jinja": "chat_template.jinja"}.get(name, f"{name}.json")).write_text(text)
    base = launch.load(LoadOptions(shares=True))
    variant = launch.load_variant(base, "v", str(folder))
    return process.variant_of(variant, base, TextModel.load(base.path))


def test_a_folder_without_text_files_has_those_of_the_model(tmp_path: Path) -> None:
    served, base = served_with(tmp_path), TextModel.load(embedded_path())
    assert served.text_difference == SAME
    assert str(served.text_difference) == "reads text as the model does"
    assert {name: t.source for name, t in served.text.chat_templates.items()} == {
        name: t.source for name, t in base.chat_templates.items()
    }
    assert served.text.defaults == base.defaults


def test_a_template_of_its_own_is_used_without_a_tokenizer_beside_it(tmp_path: Path) -> None:
    served = served_with(tmp_path, jinja=OWN_TEMPLATE, generation_config='{"temperature": 0.25, "eos_token_id": 3}')
    assert served.text.chat_templates["default"].source == OWN_TEMPLATE
    assert served.text.defaults.temperature == 0.25
    assert 3 in served.text.defaults.eos_ids
    assert served.text.tokenizer.as_json() == TextModel.load(embedded_path()).tokenizer.as_json()
    assert served.text_difference == TextDifference(("chat template 'default'",), same_tokens=False)
    assert str(served.text_difference) == (
        "differs from the model in its chat template 'default'; a conversation becomes other tokens"
    )


def test_a_template_that_is_given_stands_in_for_those_of_variants_without_one(tmp_path: Path) -> None:
    path = tmp_path / "given.jinja"
    path.write_text(OWN_TEMPLATE)
    base = TextModel.load(embedded_path()).with_template(path)
    assert [(name, each.source) for name, each in base.chat_templates.items()] == [("default", OWN_TEMPLATE)]
    bare, own = tmp_path / "bare", tmp_path / "own"
    for folder in (bare, own):
        folder.mkdir()
    (own / "chat_template.jinja").write_text("{{ 'mine' }}")
    assert TextModel.load_variant(bare, embedded_path(), base).chat_templates["default"].source == OWN_TEMPLATE
    assert TextModel.load_variant(own, embedded_path(), base).chat_templates["default"].source == "{{ 'mine' }}"


@pytest.mark.parametrize(
    ("text", "words"), [(None, "given.jinja is not there"), ("{% if", "does not compile"), ("x" * 1048577, "at most")]
)
def test_a_template_that_cannot_be_used_is_named(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "given.jinja"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ModelError, match=words) as caught:
        TextModel.load(embedded_path()).with_template(path)
    assert str(caught.value).startswith(f"chat template {path}: ")


def test_a_template_in_the_tokenizers_settings_is_used_too(tmp_path: Path) -> None:
    config = json.loads((embedded_path() / "tokenizer_config.json").read_text())
    served = served_with(tmp_path, tokenizer_config=json.dumps({**config, "chat_template": OWN_TEMPLATE}))
    assert served.text.chat_templates["default"].source == OWN_TEMPLATE
    assert not served.text_difference.same_tokens


def test_a_template_of_other_words_that_renders_the_same_may_share(tmp_path: Path) -> None:
    base = TextModel.load(embedded_path()).chat_templates["default"].source
    served = served_with(tmp_path, jinja=base + "{# a remark #}")
    assert served.text_difference == TextDifference(("chat template 'default'",), same_tokens=True)


def test_a_tokenizer_of_its_own_stands_alone(tmp_path: Path) -> None:
    values = json.loads((embedded_path() / "tokenizer.json").read_text())
    values["model"]["merges"] = values["model"]["merges"][:-50]
    served = served_with(tmp_path, tokenizer=json.dumps(values))
    assert served.text.chat_templates == {}
    assert "tokenizer" in served.text_difference.parts
    assert not served.text_difference.same_tokens
    assert served.text.tokenizer.as_json() != TextModel.load(embedded_path()).tokenizer.as_json()


def test_a_copy_of_the_tokenizer_is_the_same_one(tmp_path: Path) -> None:
    served = served_with(tmp_path, tokenizer=(embedded_path() / "tokenizer.json").read_text())
    assert served.text_difference == SAME
    assert [*served.text.chat_templates] == [*TextModel.load(embedded_path()).chat_templates]


def test_text_files_that_cannot_be_read_name_the_variant(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"variant v: .*: the chat template does not compile"):
        served_with(tmp_path, jinja="{% for %}")


def swapped(text: TextModel) -> TextModel:
    """A text model in which two letters are each other's tokens."""
    values = json.loads(text.tokenizer.as_json())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    return replace(text, tokenizer=Tokenizer(Backend.from_str(json.dumps(values)), {}))


@pytest.fixture(scope="module")
def mixed_url(loaded: Loaded) -> Iterator[str]:
    """A base and a variant that spells in its own way, which has two names."""
    text, model = TextModel.load(loaded.path), loaded.variants[0].model
    engine = AsyncEngine(loaded.model, EngineConfig(budget_bytes=32 << 20), variants={"odd": model, "odder": model})
    other = swapped(text)
    served = [Variant(name, "odd", other, None, difference_of(text, other), 77) for name in ("odd", "odder")]
    with over_the_wire(new_app(engine, text, served, served_names=("embedded", "alias"))) as address:
        yield address


def test_what_is_cached_is_told_with_its_models_and_in_their_words(
    mixed_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = {"odd": "There are three green apples here. " * 9, "embedded": "A base has a name as well. " * 9}
    for model, prompt in words.items():
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        assert httpx.post(f"{mixed_url}/v1/completions", json=body).status_code == 200
    found = httpx.get(f"{mixed_url}/cache/conversations").json()["data"]
    names = {tuple(each["models"]): each["name"] for each in found}
    assert {*names} == {("odd", "odder"), ("embedded", "alias")}
    shown = {models[0]: httpx.get(f"{mixed_url}/cache/conversations/{name}").json() for models, name in names.items()}
    for model, prompt in words.items():
        assert prompt.strip() in shown[model]["text"]
    for command, said in (("ls", ("odd, odder", "embedded, alias")), ("show", ("odd, odder", "three green apples"))):
        name = [names["odd", "odder"]] if command == "show" else []
        with pytest.raises(SystemExit) as end:
            cli.main(["cache", command, *name, "--url", mixed_url])
        assert not end.value.code
        table = capsys.readouterr().out
        assert all(each in table for each in said)


def test_a_report_and_the_facts_of_a_tokenizer_are_those_of_the_model_asked(mixed_url: str) -> None:
    for end in ("one way to end", "another end here"):
        body = {
            "model": "odd",
            "prompt": "The greatest table stands near the lake. " * 6 + end,
            "max_tokens": 1,
            "cache_report": True,
        }
        reply = httpx.post(f"{mixed_url}/v1/completions", json=body).json()
    nearest = reply["cache_report"]["nearest"]
    assert "table stands near the lake" in nearest["before"]
    assert "one" in nearest["there"]
    cards = {card["id"]: card for card in httpx.get(f"{mixed_url}/v1/models").json()["data"]}
    assert {name: (card["same_tokens"], card["text_differs"]) for name, card in cards.items()} == {
        "embedded": (True, []),
        "alias": (True, []),
        "odd": (False, ["tokenizer", "special tokens"]),
        "odder": (False, ["tokenizer", "special tokens"]),
    }
    facts = [httpx.get(f"{mixed_url}/tokenizer_info", params={"model": name}).json() for name in ("odd", "embedded")]
    assert facts[0]["eos_token"] is None
    assert facts[1]["eos_token"] is not None
    assert httpx.get(f"{mixed_url}/tokenizer_info", params={"model": "nobody"}).status_code == 404


def test_nobody_loads_where_it_was_not_allowed(url: str) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        assert httpx.post(f"{url}{path}", json={"lora_name": "x", "lora_path": "y"}).status_code == 404


def test_a_folder_in_another_dtype_is_refused_unless_one_is_asked_for(half: Path, tmp_path: Path) -> None:
    folder = tmp_path / "float32"
    shutil.copytree(half, folder)
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"its rows are torch.float32, not torch.bfloat16"):
        launch.load(LoadOptions(variants={"other": str(folder)}))
    asked = launch.load(LoadOptions(dtype="float32", variants={"other": str(folder)}))
    assert asked.variants[0].model.cache_spec == asked.model.cache_spec


def test_an_adapter_that_is_gone_leaves_nothing_with_the_backend(loaded: Loaded) -> None:
    def prepared() -> int:
        return sum(len(getattr(loaded.ops, name, ())) for name in ("_weights", "_scans", "_convs"))

    before = prepared()
    for _ in range(2):
        check_model(launch.load_variant(loaded, "gone", adapter="embedded-choreo").model)
    assert prepared() == before
