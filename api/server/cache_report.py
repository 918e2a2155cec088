"""What a reply says about the cache on request: one form, in all dialects.

A client asks with `cache_report: true` in the body or with the header `x-cache-report: 1`; the body goes first.
"""

import time
from bisect import bisect_right
from collections.abc import Mapping

from pydantic import BaseModel

from hybrid_cache.api.server.errors import quoted
from hybrid_cache.api.server.schemas import cache as schemas
from hybrid_cache.api.server.schemas.cache import CacheReport, MissedPart, NearestConversation
from hybrid_cache.api.server.sharing import shown_sharing
from hybrid_cache.api.text.answer import Answer
from hybrid_cache.api.text.generation import Lookup
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.cache.misses import MOST_SHOWN, Found, Loss, Nearest, Part, Reason
from hybrid_cache.errors import RequestError
from hybrid_cache.tokens import Prompt

HEADER = "x-cache-report"
ANSWERS = {"": False, "0": False, "false": False, "1": True, "true": True}
WHY = {
    Reason.NEVER_SEEN: "nobody has said this here",
    Reason.DIFFERS: "it differs from the nearest conversation from here on",
    Reason.EVICTED: "it was cached, and had to make room",
    Reason.DROPPED: "it was cached until someone dropped it",
    Reason.DECLINED: "the policy kept no state here",
    Reason.NOT_KEPT: "no state was asked for here, or none is complete yet",
    Reason.OTHER_NAMESPACE: "it is cached for another model, adapter or cache_salt",
    Reason.TILE_REMAINDER: "it is a tile of 64 tokens at most, which only the same prompt as a whole finds again",
    Reason.OFF: "this request does not use the cache",
}


def wants_report(headers: Mapping[str, str], asked: BaseModel) -> bool:
    """Raises RequestError for a header that says neither yes nor no."""
    wanted = getattr(asked, "cache_report", None)
    if isinstance(wanted, bool):
        return wanted
    said = headers.get(HEADER, "").strip().lower()
    if said not in ANSWERS:
        raise RequestError(f"the header {HEADER} is {quoted(said)}, must be 1 or 0", param=HEADER)
    return ANSWERS[said]


def shown_report(tokenizer: Tokenizer, answer: Answer) -> dict[str, object]:
    """The fields of a reply, `cache_report` if somebody asked, and `sharing`. Several prompts have lists of them."""
    reports = [_report(tokenizer, lookup).model_dump() for lookup in answer.lookups]
    shown = {"cache_report": reports[0] if len(reports) == 1 else reports} if reports else {}
    return {**shown, **shown_sharing(answer)}


def _report(tokenizer: Tokenizer, lookup: Lookup) -> CacheReport:
    found = lookup.found or Found(len(lookup.prompt.tokens), lookup.cached, "choreography", 0, ())
    return CacheReport(
        prompt_tokens=found.num_tokens,
        cached_tokens=found.matched,
        disk_tokens=lookup.loaded,
        cached_from=found.kind or None,
        kv_only_tokens=found.kv_only,
        reason=found.reason.value if found.reason is not None else None,
        missed=[_part(part, found) for part in found.parts],
        nearest=None if found.nearest is None else _nearest(tokenizer, lookup.prompt, found.nearest),
    )


def _part(part: Part, found: Found) -> MissedPart:
    loss = None if part.loss is None else _loss(part.loss)
    without_state = part.reason in (Reason.DECLINED, Reason.NOT_KEPT) and part.end <= found.matched + found.kv_only
    kv = "its KV is there; " if without_state else ""
    return MissedPart(start=part.start, end=part.end, reason=part.reason.value, why=kv + WHY[part.reason], loss=loss)


def _loss(loss: Loss) -> schemas.Loss:
    return schemas.Loss(what=loss.what, at=time.time() - loss.age_s, score=loss.score)


def _nearest(tokenizer: Tokenizer, prompt: Prompt, nearest: Nearest) -> NearestConversation:
    at = nearest.position
    message = bisect_right(prompt.ends, at)
    return NearestConversation(
        token=at,
        message=message if message < len(prompt.ends) else None,
        before=tokenizer.decode(prompt.tokens[max(at - MOST_SHOWN, 0) : at].tolist()),
        here=tokenizer.decode(prompt.tokens[at : at + MOST_SHOWN].tolist()),
        there=tokenizer.decode(list(nearest.tokens)),
    )
