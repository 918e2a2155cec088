"""What the best of all plans saves on a tiny trace, found by trying every set of things to keep, request by request.

While a request runs, it holds the pages of its whole prompt and a working state; whatever else is there at its end was
there beside them. Only then may what it held itself be kept as well.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np

from hybrid_cache.bench.traces.trace import Trace, TraceRequest
from hybrid_cache.spec import PrefillCost

PAGE_TOKENS = 16

Item = tuple[str, int]  # ("page" or "state", the page it is or stands behind)
Kept = frozenset[Item]


def request(*pages: int, extra: int = 1, generated: tuple[int, ...] = ()) -> TraceRequest:
    """A prompt of some full pages and `extra` tokens of the next; what it generates ends with full pages, if any."""
    prompt = len(pages) * PAGE_TOKENS + extra
    known = (len(pages) + len(generated)) * PAGE_TOKENS if generated else prompt
    return TraceRequest(
        arrival_s=0.0,
        session="",
        pages=np.array(pages + generated, np.int32),
        num_prompt_tokens=prompt,
        num_output_tokens=known - prompt,
        num_known_tokens=known,
        whole=0,
    )


def trace(*requests: TraceRequest) -> Trace:
    return Trace("tiny", PAGE_TOKENS, requests)


def depths(r: TraceRequest, kept: Kept, slot_bytes: int) -> Iterator[int]:
    """The depths in pages at which a request may resume; 0 is to start over."""
    yield 0
    depth = 1
    while depth * PAGE_TOKENS < r.num_prompt_tokens and ("page", int(r.pages[depth - 1])) in kept:
        if not slot_bytes or ("state", int(r.pages[depth - 1])) in kept:
            yield depth
        depth += 1


def beside(r: TraceRequest, kept: Kept, depth: int) -> Kept:
    """What can be kept beside a request that resumed at a depth: states of the pages it passes, and what was there."""
    own = {("page", int(page)) for page in r.pages}
    return (kept - own) | {("state", int(page)) for page in r.pages[depth:]}


def room_beside(r: TraceRequest, page_bytes: int, slot_bytes: int, capacity_bytes: int) -> int:
    """Bytes that a request leaves while it runs; negative if it does not fit by itself."""
    return capacity_bytes - -(-r.num_prompt_tokens // PAGE_TOKENS) * page_bytes - slot_bytes


def best_saving(t: Trace, cost: PrefillCost, page_bytes: int, slot_bytes: int, capacity_bytes: int) -> float:
    """FLOPs. A larger set is never worse than its subsets, so only sets with no room for more are tried."""
    size = {"page": page_bytes, "state": slot_bytes}

    def fitting(items: list[Item], room: int) -> Iterator[Kept]:
        if not items:
            yield frozenset()
            return
        item, *rest = items
        if size[item[0]] <= room:
            for kept in fitting(rest, room - size[item[0]]):
                yield kept | {item}
        if sum(size[i[0]] for i in items) > room:
            yield from fitting(rest, room)

    @cache
    def best(now: int, kept: Kept) -> float:
        if now == len(t.requests):
            return 0.0
        r = t.requests[now]
        room = room_beside(r, page_bytes, slot_bytes, capacity_bytes)
        if room < 0:
            return best(now + 1, kept)
        return max(
            cost.flops(0, depth * PAGE_TOKENS) + best(now + 1, after)
            for depth in depths(r, kept, slot_bytes)
            for during in fitting(wanted(now, beside(r, kept, depth)), room)
            for after in fitting(wanted(now, during | {("page", int(page)) for page in r.pages}), capacity_bytes)
        )

    def wanted(now: int, items: Kept) -> list[Item]:
        """Those that a later request passes."""
        later = {int(page) for r in t.requests[now + 1 :] for page in r.pages}
        return sorted(item for item in items if item[1] in later)

    return best(0, frozenset())
