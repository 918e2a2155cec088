"""Every error that hybrid-cache raises on purpose.

HybridCacheError
├── ConfigError                a setting that cannot work
├── ModelError                 a model folder that we cannot serve
│   └── UnsupportedModel       a well-formed folder of a kind we do not know
├── RequestError               the client's fault; the message names the value and the bound
│   ├── ContextTooLong
│   ├── BadSampling
│   ├── UnknownMessage         a reference to a message of another tenant or model, or to none
│   └── MessageGone            a reference to a message whose text has been dropped
├── OwnershipError             our own bug: rows or states would be written or read that belong to another owner
├── PublishedBytesChanged      the same, found by a checking mode after the fact
├── RequestFailed              an error of ours that ended one request
├── Overloaded                 the server is full, try again later
│   └── OverShare              it is full for one tenant, who takes more than others could
└── EngineStopped              the engine is draining, hangs or has failed

No room in the cache is not an error: `Books.acquire` returns `None` and the scheduler waits.
"""

TOO_LONG = "prompt is too long"


class HybridCacheError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(HybridCacheError):
    """A setting that cannot work."""


class ModelError(HybridCacheError):
    """A model folder that cannot be served: missing shard, wrong shape, not-a-number weights."""


class UnsupportedModel(ModelError):
    """A readable model folder of an architecture, activation or file format that we do not know."""


class RequestError(HybridCacheError):
    """A request that cannot be served as it stands.

    `param` names the offending request field, `code` is OpenAI's machine-readable code, where there is one.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextTooLong(RequestError):
    """More tokens than the model's context, or than the cache can ever hold.

    It begins with words by which agents' clients know that they have to shorten their messages.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(f"{TOO_LONG}: {message}", param=param, code="context_length_exceeded")


class BadSampling(RequestError):
    """A sampling parameter outside its range."""


class UnknownMessage(RequestError):
    """A reference to a message that never was, or that belongs to another tenant, model or adapter."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="message_not_found")


class MessageGone(RequestError):
    """A reference to a message whose text has been dropped to make room."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, code="message_gone")


class OwnershipError(HybridCacheError):
    """Rows or states were about to be written or read by what does not own them. Only a bug of ours can cause it."""


class PublishedBytesChanged(HybridCacheError):
    """What the cache published does not hold the same bytes any more; see `EngineConfig.verify`."""


class Overloaded(HybridCacheError):
    """There is no room for more requests; try again later."""


class OverShare(Overloaded):
    """There is no room for more requests of one tenant, who takes its share already."""


class RequestFailed(HybridCacheError):
    """The engine gave a request up after an error of its own; others go on."""


class EngineStopped(HybridCacheError):
    """The engine is draining, a step of it hangs, or its thread has failed."""
