"""The JSON of what a folder of a disk tier has; it is that of a server's cache, and what only files have."""

from hybrid_cache.api.server.schemas.cache import ConversationDetail, ConversationInfo
from hybrid_cache.api.server.schemas.common import Response


class StoredFile(Response):
    file: str
    kind: str
    pages: int
    tokens: int  # up to its end
    bytes: int  # that it takes
    wrong: str | None  # how it differs from what it was; null for one that is right


class StoredInfo(ConversationInfo):
    """`models` has the beginning of the fingerprint, as no server says how the model is called."""

    fingerprint: str  # of the weights, with the type of their numbers
    identity: str  # of all that decides the bits


class StoredDetail(StoredInfo, ConversationDetail):
    files: list[StoredFile]  # that it needs, in the order in which they are needed
