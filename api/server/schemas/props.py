"""The JSON of what a server says of its settings, and of who is in it."""

from typing import Literal

from hybrid_cache.api.server.schemas.common import Response


class ModelProps(Response):
    """A model that is served."""

    id: str
    aliases: list[str]  # other names of it
    parent: str | None  # the model that it is a variant of
    adapter: str | None
    dtype: str
    context: int  # tokens of a prompt and its answer
    longest: int  # of these, what the cache's budget holds, too
    vocab_size: int
    tool_format: str  # in which it writes calls
    thinks: bool
    chat_template: str | None
    special_tokens: dict[str, str]
    generation_defaults_ignored: list[str]  # of its generation_config.json


class Props(Response):
    """What holds for all requests."""

    version: str
    models: list[ModelProps]  # the first answers requests that name none
    backend: str
    exact: bool
    inexact: list[str]  # why not
    max_running: int  # sequences in one batch
    max_waiting: int  # requests in the queue
    budget_bytes: int  # of the cache
    max_body_bytes: int
    special_tokens_in_content: bool  # those that clients write act as such
    shared_cache: bool  # by all API keys


class Slot(Response):
    """One choice of a request that is here now."""

    id: str  # the engine's: the request's, and digits of its own
    request_id: str | None  # as in x-request-id
    choice: int
    model: str
    state: Literal["waiting", "loading", "prefill", "decoding", "paused"]
    prompt_tokens: int
    computed_tokens: int  # of the prompt so far, with those that were cached
    cached_tokens: int | None  # null until it has begun
    generated_tokens: int
    age_s: float  # since it was queued


class Slots(Response):
    """The oldest first."""

    data: list[Slot]
    total: int  # of those that may be seen
    max_running: int
    max_waiting: int
