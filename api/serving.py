"""What a server needs to answer requests: an engine, the text side of its model, and facts about both."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from hybrid_cache.api.chat import ChatEncoder
from hybrid_cache.api.errors import ModelNotFound, quoted
from hybrid_cache.api.metrics import Metrics
from hybrid_cache.api.tokenizer import GenerationDefaults, Tokenizer
from hybrid_cache.engine import EngineStats
from hybrid_cache.request import Output, Request


class OutputStream(AsyncIterator[Output], Protocol):
    """Outputs of one request. Closing it aborts the request."""

    async def aclose(self) -> None: ...


class ServingEngine(Protocol):
    """What is used of `AsyncEngine`."""

    @property
    def alive(self) -> bool: ...

    @property
    def draining(self) -> bool: ...

    def start(self) -> None: ...

    async def stop(self, grace_s: float) -> None: ...

    def submit(self, request: Request) -> OutputStream: ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Facts about the model and how it runs."""

    names: tuple[str, ...]  # what clients call it, the first is what replies say
    root: str  # the folder's name
    backend: str
    dtype: str
    exact: bool  # the backend has passed the check that cache on equals cache off, bit for bit
    fingerprint: str
    max_length: int
    vocab_size: int
    version: str

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def system_fingerprint(self) -> str:
        """What a seed's promise holds for: engine, weights, dtype and kernels."""
        return f"hybrid-cache-{self.version}-{self.fingerprint[:12]}-{self.dtype}-{self.backend}"

    def check_name(self, asked: str | None) -> None:
        """Raises ModelNotFound for a model that is not this one; no name means this one."""
        if asked and asked not in self.names:
            raise ModelNotFound(
                f"the model {quoted(asked)} is not served here, only {', '.join(self.names)}", param="model"
            )


@dataclass(frozen=True, slots=True)
class Serving:
    """Everything that the routes share."""

    engine: ServingEngine
    model: ServedModel
    tokenizer: Tokenizer
    chat: ChatEncoder
    defaults: GenerationDefaults
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
