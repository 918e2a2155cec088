"""What requests and replies say about entries of the cache that one model makes from another's."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from hybrid_cache.api.server import launch
from hybrid_cache.api.server.launch import Loaded, LoadOptions, find_profiles
from hybrid_cache.api.server.serving import Variant
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.server.sharing import NOTHING
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.errors import ConfigError
from hybrid_cache.models.loading import embedded_path
from hybrid_cache.profile import Plan, Profile
from hybrid_cache.transfer import projected, upper
from tests.api.server.test_variants import HALF, moved
from tests.api.servers import new_app, over_the_wire

OTHER = "other"
TALK = "The code for the blue box is 42. The code for the red box is 17. " * 12
PROFILED = {"fidelity": "profiled", "max_loss": 0.01}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("sharing")
    half, other = moved(folder / HALF), moved(folder / OTHER, layers=0)
    return launch.load(LoadOptions(variants={HALF: str(half), OTHER: str(other)}))


def profile_of(loaded: Loaded) -> Profile:
    num = len(loaded.model.layers)  # type: ignore[arg-type]
    (other,) = [each.model for each in loaded.variants if each.name == OTHER]
    plans = (Plan(upper(num, num), 0.5, 0.9, 0.0, 0), Plan(projected(num, range(num)), 0.004, 0.99, 0.2, 1))
    return Profile(loaded.model.fingerprint, other.fingerprint, num, "by hand", plans)


@pytest.fixture
def url(loaded: Loaded) -> Iterator[str]:
    text = TextModel.load(loaded.path)
    models = {each.name: each.model for each in loaded.variants}
    config = EngineConfig(budget_bytes=32 << 20, verify=True)
    engine = AsyncEngine(loaded.model, config, variants=models, profiles=[profile_of(loaded)])
    served = [Variant(each.name, str(each.path), text, each.adapter) for each in loaded.variants]
    app = new_app(engine, text, served, served_names=("embedded",), model_path=str(loaded.path))
    with over_the_wire(app) as address:
        yield address


def chat(url: str, model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": TALK}], "max_tokens": 4, "temperature": 0, **more}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def test_a_reply_says_what_was_taken_from_another_model(url: str) -> None:
    assert "sharing" not in chat(url, "embedded")
    shared = chat(url, HALF)["sharing"]
    assert shared["fidelity"] == "exact"
    assert shared["sender"] == "embedded"
    assert shared["layers"] == "take 0-2, recompute 3-5"
    assert shared["tokens"] % 64 == 0
    assert shared["tokens"] > 0
    assert "sharing" not in chat(url, HALF), "it has its own by now"
    assert "sharing" not in chat(url, OTHER), "nobody allowed a loss"


def test_a_loss_is_allowed_by_request_and_told(url: str) -> None:
    first = chat(url, OTHER, cache_salt="first", sharing=PROFILED)
    assert first["sharing"] == {"fidelity": "exact", "tokens": 0, "why": NOTHING.format(0.01)}
    chat(url, "embedded")
    shared = chat(url, OTHER, sharing=PROFILED)["sharing"]
    expected = {"fidelity": "profiled", "sender": "embedded", "layers": "project 0-5", "expected_loss": 0.004}
    assert {key: shared[key] for key in expected} == expected
    assert shared["tokens"] > 64
    again = chat(url, OTHER, sharing=PROFILED)
    assert again["sharing"]["expected_loss"] == 0.004, "what it goes on from was made so"
    assert again["sharing"]["tokens"] == 0
    cheap = chat(url, OTHER, sharing={"fidelity": "profiled", "max_loss": 0.5})["sharing"]
    assert (cheap["layers"], cheap["expected_loss"]) == ("take 0-5", 0.5)
    exact = chat(url, OTHER, sharing={"fidelity": "exact"})
    assert "sharing" not in exact
    assert exact["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    tight = chat(url, OTHER, sharing={"fidelity": "profiled", "max_loss": 0.001})
    assert tight["sharing"]["fidelity"] == "exact"
    own = chat(url, OTHER, sharing={"fidelity": "profiled", "max_loss": 0.5})["sharing"]
    assert own["fidelity"] == "exact", "nothing is cheaper than what it has itself"


def test_all_dialects_and_streams_say_it(url: str) -> None:
    chat(url, OTHER, cache_salt="first", sharing=PROFILED)
    chat(url, "embedded")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": TALK}]
    extra = {"sharing": PROFILED}
    stream = client.chat.completions.create(
        model=OTHER,
        messages=messages,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    *_, last = stream
    assert last.model_dump()["sharing"]["expected_loss"] == 0.004
    response = client.responses.create(model=OTHER, input=TALK, max_output_tokens=16, extra_body=extra)
    assert response.model_dump()["sharing"]["fidelity"] == "profiled"
    completion = client.completions.create(model=OTHER, prompt=[TALK, "a"], max_tokens=2, extra_body=extra)
    assert [each["fidelity"] for each in completion.model_dump()["sharing"]] == ["exact", "exact"]
    talker = anthropic.Anthropic(base_url=url, api_key="none")
    message = talker.messages.create(model=OTHER, messages=messages, max_tokens=4, extra_body=extra)
    assert message.model_dump()["sharing"]["expected_loss"] == 0.004


@pytest.mark.parametrize(
    ("sharing", "says"),
    [
        ({"fidelity": "loose"}, "fidelity"),
        ({"fidelity": "profiled", "max_loss": -1}, "max_loss"),
        ({"fidelity": "profiled", "max_loss": "much"}, "max_loss"),
        ({"fidelity": "profiled", "max_loss": "0.1"}, "max_loss"),
        ({"fidelity": "profiled", "max_loss": True}, "max_loss"),
        ({"max_los": 1}, "max_los"),
        ("profiled", "sharing"),
    ],
)
def test_what_cannot_be_allowed_is_refused(url: str, sharing: object, says: str) -> None:
    body = {"model": OTHER, "messages": [{"role": "user", "content": "a"}], "sharing": sharing}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert says in answer.text


@pytest.mark.parametrize("max_loss", [-1.0, math.inf, math.nan])
def test_a_server_allows_no_endless_loss(max_loss: float) -> None:
    with pytest.raises(ConfigError, match=f"max_loss is {max_loss} nats a token, must be a number of at least 0"):
        ServerSettings(("embedded",), "native", "embedded", max_loss_asked=max_loss)


def test_profiles_are_found_beside_models(loaded: Loaded, tmp_path: Path) -> None:
    (other,) = [each for each in loaded.variants if each.name == OTHER]
    path = other.path / "sharing-embedded.json"
    profile = profile_of(loaded)
    profile.save(path)
    assert find_profiles(loaded, ()) == ([profile], [])
    strange = tmp_path / "strange.json"
    Profile("0" * 32, profile.receiver, profile.num_layers, "", profile.plans).save(strange)
    with pytest.raises(ConfigError, match=f"of other weights: no model here is {'0' * 32}"):
        find_profiles(loaded, [strange])
    strange.rename(path)
    assert find_profiles(loaded, ()) == ([], [path])
    path.unlink()
    assert embedded_path() == loaded.path


def test_a_model_that_is_expected_to_read_is_written_for(url: str) -> None:
    for salt in ("one", "two", "three"):
        chat(url, "embedded", cache_salt=salt)
        shared = chat(url, OTHER, cache_salt=salt, sharing=PROFILED)
    assert shared["sharing"]["expected_loss"] == 0.004
    assert shared["sharing"]["tokens"] == 0, "it found them"
    details = shared["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] == shared["usage"]["prompt_tokens"] // 64 * 64
    written = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if "twin_tokens_total" in line]
    assert float(written[-1].split()[-1]) >= details["cached_tokens"]
