"""The JSON of requests that reuse messages, and of what is reported about them."""

from typing import Literal

from hybrid_cache.api.server.schemas.common import Request, Response


class Choreography(Request):
    """How the messages of a request may be put together from what is stored of them.

    fidelity     exact: the bits of encoding everything; relocated, composed: approximate, for models that can
    order        any: messages side by side are unordered, and stand where the cache has most of them (exact only)
    seam         tokens at the start of each reused message that are computed again in their new place
    composition  how effects on recurrent states become one
    positions    leftmost: reused messages side by side all stand at the same place
    encode       alone: new messages see nothing before them, and are the same wherever they stand
    """

    place = "choreography."
    fidelity: Literal["exact", "relocated", "composed"] = "exact"
    order: Literal["given", "any"] = "given"
    seam: Literal[0, 8, 16, 32, 64] = 0
    composition: Literal["ordered", "rotations", "permutations", "mean", "last"] = "ordered"
    positions: Literal["consecutive", "leftmost"] = "consecutive"
    encode: Literal["in_place", "alone"] = "in_place"


class PlanItem(Response):
    message: str | None
    action: Literal["reused", "relocated", "composed", "computed"]
    tokens: int
    computed_tokens: int
    flops: float
    why: str


class PlanReport(Response):
    items: list[PlanItem]
    prefix_tokens: int
    computed_tokens: int
    flops: float
    flops_of_encoding: float


class ChoreographyReport(Response):
    """What was really done, and the ids under which the messages and the answer can be referred to."""

    fidelity: Literal["exact", "relocated", "composed"]
    asked: Literal["exact", "relocated", "composed"]
    why: str
    messages: list[str | None]
    answer: str | None
    plan: PlanReport
