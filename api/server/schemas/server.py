"""The JSON of what a server says about itself."""

from typing import Literal

from hybrid_cache.api.server.schemas.common import Response


class ModelCard(Response):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hybrid-cache"
    root: str
    parent: str | None = None  # the model that it is a variant of
    max_model_len: int


class ModelList(Response):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(Response):
    status: Literal["ok", "hung", "failed"]
    exact: bool
    inexact: list[str]  # why not
    backend: str
    fallbacks: dict[str, str]  # what runs slower than it could, and why: operations left to torch, no CUDA graphs
    model: str
    adapter: str | None  # that is merged into the model
    variants: list[str]  # other models that are served beside it, by name
    dtype: str
    version: str


Readiness = Literal["ready", "draining", "hung", "failed"]


class Ready(Response):
    status: Readiness


class Version(Response):
    version: str
