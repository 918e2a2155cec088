"""From options to a model, and why it is not exact."""

from dataclasses import replace

import pytest

from hybrid_cache.api.server import launch
from hybrid_cache.api.server.budget import plan_memory
from hybrid_cache.api.server.launch import LoadOptions
from hybrid_cache.config import EngineConfig
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.kernels.torch_ops import TorchOps


class HastyOps(TorchOps):
    """A backend that promises nothing."""

    name = "hasty"
    inexact = "hasty on purpose"


def test_fast_reaches_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def select(name: str, *, fast: bool) -> Ops:
        asked.append((name, fast))
        return TorchOps()

    monkeypatch.setattr(dispatch, "select", select)
    launch.load(LoadOptions(backend="torch", fast=True))
    assert asked == [("torch", True)]


def test_what_a_backend_says_of_itself_comes_before_what_probes_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "select", lambda name, *, fast: HastyOps())
    monkeypatch.setattr(launch, "check_exact", lambda ops, dtype: ["linear 3 -> 4"])
    monkeypatch.setattr(launch, "check_model", lambda model: [])
    loaded = launch.load(LoadOptions())
    assert launch.inexact_reasons(loaded) == ["hasty on purpose", "linear 3 -> 4"]
    monkeypatch.setattr(HastyOps, "inexact", "")
    monkeypatch.setattr(launch, "check_exact", lambda ops, dtype: [])
    assert launch.inexact_reasons(loaded) == []


def test_a_context_below_the_models_own_holds_for_it_and_its_variants() -> None:
    options = LoadOptions(variants={"style": "embedded-style"}, adapters={"choreo": "embedded-choreo"}, shares=True)
    whole = launch.load(replace(options, backend="torch"))
    cut = launch.load(replace(options, backend="torch", max_model_len=256))
    for loaded, length in ((whole, 32768), (cut, 256)):
        models = loaded.model, *(each.model for each in loaded.variants)
        assert [model.max_length for model in models] == [length] * 3
        assert loaded.info.max_length == length
    assert cut.model.fingerprint == whole.model.fingerprint  # no bit is another one
    assert launch.load_variant(cut, "later", "embedded-half").model.max_length == 256


def test_a_shorter_context_needs_less_memory_beside_the_cache() -> None:
    def beside(max_model_len: int | None) -> int:
        loaded = launch.load(LoadOptions(backend="torch", max_model_len=max_model_len))
        return plan_memory(loaded, EngineConfig(), 64 << 20).beside_bytes

    assert beside(256) < beside(None)


def test_a_context_above_the_models_own_is_refused() -> None:
    assert launch.load(LoadOptions(max_model_len=32768)).model.max_length == 32768
    with pytest.raises(ConfigError, match=r"max_model_len is 32,769, must be from 256 to 32,768"):
        launch.load(LoadOptions(max_model_len=32769))
    with pytest.raises(ConfigError, match=r"max_model_len is 255, must be"):
        launch.load(LoadOptions(max_model_len=255))
