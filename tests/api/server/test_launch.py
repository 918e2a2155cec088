"""From options to a model, and why it is not exact."""

import pytest

from hybrid_cache.api.server import launch
from hybrid_cache.api.server.launch import LoadOptions
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
