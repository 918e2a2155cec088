"""The JSON of what the cache says about requests, and about itself."""

from typing import Literal

from hybrid_cache.api.server.schemas.common import Response

Reason = Literal[
    "never_seen", "differs", "evicted", "dropped", "declined", "not_kept", "other_namespace", "tile_remainder", "off"
]


class Loss(Response):
    """A state or a page that went, or a state that the policy declined."""

    what: str  # "page", or the kind of state
    at: float  # Unix time
    score: float | None  # the policy's, where that was the reason


class MissedPart(Response):
    """The tokens [start, end) of a prompt, which were computed."""

    start: int
    end: int
    reason: Reason
    why: str
    loss: Loss | None = None


class NearestConversation(Response):
    """Where a prompt differs from the conversation of the same namespace that it has most in common with."""

    token: int  # of the prompt
    message: int | None  # of the prompt as rendered; null in what opens the answer, and for prompts without messages
    before: str  # what both have
    here: str  # how the prompt goes on
    there: str  # how the other one goes on


class CacheReport(Response):
    """Why tokens of a prompt were not cached."""

    prompt_tokens: int
    cached_tokens: int
    disk_tokens: int  # of these, came from a disk for this request
    cached_from: str | None  # the kind of state that was started from
    kv_only_tokens: int  # their KV was there but no state, so they were computed
    reason: Reason | None  # of the largest part
    missed: list[MissedPart]
    nearest: NearestConversation | None


class CachedState(Response):
    """A place from which a request can go on."""

    name: str
    kind: str
    tokens: int
    bytes: int
    hits: int  # requests that started from it
    age_s: float  # since it was made or used
    score: float | None  # the policy's; the lowest goes first


class ConversationInfo(CachedState):
    """A cached conversation: a state that no other goes on from. `bytes` and `hits` are those of all that it has to
    itself: pages and states after the last place where another conversation branches off."""

    models: list[str]  # the names of the model whose it is
    namespace: str  # the tenant's digest and the salt; empty for neither


class OutlinedConversation(ConversationInfo):
    states: list[CachedState]  # on its path, rising; those that two have in common have the same names


class Gone(Response):
    """A state that is not kept."""

    kind: str
    end: Literal["evicted", "declined", "dropped"]
    age_s: float
    score: float | None  # the policy's, where that was the reason


class CacheOutline(Response):
    data: list[OutlinedConversation]
    total: int  # of which the list has those used last
    gone: list[Gone]


class ConversationList(Response):
    data: list[ConversationInfo]
    total: int  # of which the list has those used last


class ConversationDetail(ConversationInfo):
    states: list[CachedState]
    text: str  # the last of it


class Dropped(Response):
    freed_bytes: int
