"""Finds the architecture for a `model_type`: the file of that name in `arch/`."""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

import torch

from hybrid_cache.device.adapted import Trunk
from hybrid_cache.errors import UnsupportedModel
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.bank import AdapterBank
from hybrid_cache.models.config import Config
from hybrid_cache.models.context import Context
from hybrid_cache.models.files import shown
from hybrid_cache.models.folders import ALIASES, supported
from hybrid_cache.models.shapes import ModelShape
from hybrid_cache.models.weights import ModelWeights


class ShapedModel(Trunk, Protocol):
    """A model that can also say what it is made of, and what may stand beside it."""

    max_length: int  # before anything has been made of the model, it may be lowered

    @property
    def shape(self) -> ModelShape: ...

    @property
    def context(self) -> Context: ...

    @property
    def bank(self) -> AdapterBank | None: ...


Build = Callable[[Config, ModelWeights, Ops, torch.dtype], ShapedModel]


def find(model_type: object) -> Build:
    """The builder of an architecture. Raises UnsupportedModel if there is none."""
    build = _build(model_type) if isinstance(model_type, str) else None
    if build is None:
        raise UnsupportedModel(f"model_type {shown(model_type)} is not supported; supported: {', '.join(supported())}")
    return build


def _build(name: str) -> Build | None:
    name = ALIASES.get(name, name)
    if name not in supported():
        return None
    build: Build = import_module(f"hybrid_cache.models.arch.{name}").build
    return build
