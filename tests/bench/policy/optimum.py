"""What the best of all plans saves on a tiny trace, found by trying every set of things to keep after every request."""

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


def available(r: TraceRequest, kept: Kept, depth: int) -> Kept:
    """What can be kept after a request that resumed at a depth: it passed no states above."""
    pages = [int(page) for page in r.pages]
    return kept | {("page", page) for page in pages} | {("state", page) for page in pages[depth:]}


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
        r, wanted = t.requests[now], {int(page) for later in t.requests[now + 1 :] for page in later.pages}
        return max(
            cost.flops(0, depth * PAGE_TOKENS) + best(now + 1, after)
            for depth in depths(r, kept, slot_bytes)
            for after in fitting(sorted(i for i in available(r, kept, depth) if i[1] in wanted), capacity_bytes)
        )

    return best(0, frozenset())
