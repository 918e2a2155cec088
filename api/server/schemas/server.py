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
    text_differs: list[str]  # from that one: tokenizer, special tokens, chat templates
    same_tokens: bool  # whether text becomes the tokens that it becomes for that one
    max_model_len: int
    invocation: str | None = None  # text that switches an activated adapter on, from its last occurrence in a prompt
    invocation_tokens: list[int] | None = None  # what is really looked for


class ModelList(Response):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class DiskHealth(Response):
    budget_bytes: int
    used_bytes: int  # whoever wrote it
    entries: int  # files of the models that are served
    refused: dict[str, int]  # that could not be read, or were not what they had been, by why
    not_saved: dict[str, int]  # states, by why


class Health(Response):
    status: Literal["ok", "hung", "failed"]
    exact: bool
    inexact: list[str]  # why not
    backend: str
    fallbacks: dict[str, str]  # what runs slower than it could, and why: operations left to torch, no CUDA graphs
    model: str
    adapter: str | None  # that is merged into the model
    variants: list[str]  # other models that are served beside it, by name
    variant_bytes: dict[str, int]  # of their weights, that no other model has
    dtype: str
    disk: DiskHealth | None = None  # of the tier that outlives the process, if there is one
    version: str


Readiness = Literal["ready", "draining", "hung", "failed"]


class Ready(Response):
    status: Readiness


class Version(Response):
    version: str
