"""Settings of the HTTP server."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from hybrid_cache.errors import ConfigError

MAX_BODY_BYTES = 10 << 20
MESSAGE_BOOK_BYTES = 64 << 20
RESPONSE_STORE_BYTES = 64 << 20
MAX_LOSS = 0.005  # nats a token of an answer
RESPONSE_LIFE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Checked when made, read by the app and its metrics."""

    served_names: tuple[str, ...]  # the first is the default, and the one that replies carry
    backend: str
    model_path: str
    adapter: str | None = None  # the name of the one that is merged into the model
    inexact: Sequence[str] = ()  # why the cache is not exact; empty if it is
    fallbacks: Mapping[str, str] = field(default_factory=dict)  # operations the backend leaves to torch, and why
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    operator_keys: tuple[str, ...] = field(default=(), repr=False)  # of these, those for the whole cache
    shared_cache: bool = False  # all API keys share one cache
    special_tokens_in_content: bool = False  # what clients write may hold special tokens
    keep_billing_header: bool = False  # of Anthropic's clients, in the prompt
    tool_parser: str | None = None  # the format of tool calls; None to find it from the chat template
    allowed_hosts: tuple[str, ...] = ()  # names that the Host header may have; empty if any
    allowed_origins: tuple[str, ...] = ()  # web pages that may read answers; "*" for all
    max_body_bytes: int = MAX_BODY_BYTES
    message_book_bytes: int = MESSAGE_BOOK_BYTES  # of messages that requests may refer to
    response_store: Path | None = None  # the file that keeps responses; None for memory
    response_store_bytes: int = RESPONSE_STORE_BYTES
    response_life_s: float = RESPONSE_LIFE_S  # after their last use
    beside_bytes: int = 0  # most that the server takes beside weights and cache, see `budget`; 0 if nobody knows
    body_timeout_s: float = 30.0  # for the body of a request, beside a least rate
    vllm_metrics: bool = False
    pages: bool = True  # for people, beside the API
    log_content: bool = False  # of requests and answers, in the log at debug level
    drain_timeout_s: float = 30.0
    max_loss: float | None = None  # of requests that do not say, in nats a token; None: only exact sharing
    max_loss_asked: float = MAX_LOSS  # of those that allow a loss and do not say how much
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def exact(self) -> bool:
        return not self.inexact

    def __post_init__(self) -> None:
        if not self.served_names or not all(self.served_names):
            raise ConfigError(f"served_names is {self.served_names!r}, must hold at least one name and no empty one")
        for name in ("max_body_bytes", "message_book_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least 1")
        if not self.response_life_s > 0:
            raise ConfigError(f"response_life_s is {self.response_life_s}, must be more than 0")
        if not 0 <= self.max_loss_asked < inf:
            raise ConfigError(f"max_loss is {self.max_loss_asked} nats a token, must be a number of at least 0")
        if not self.body_timeout_s > 0:
            raise ConfigError(f"body_timeout_s is {self.body_timeout_s}, must be more than 0")
        if self.drain_timeout_s < 0:
            raise ConfigError(f"drain_timeout_s is {self.drain_timeout_s}, must be at least 0")
        if not all(self.api_keys):
            raise ConfigError("an API key is empty")
        if not set(self.operator_keys) <= set(self.api_keys):
            raise ConfigError("an operator's key is none of the API keys")
