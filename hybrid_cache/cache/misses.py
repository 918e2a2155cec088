"""Why tokens of a prompt were not found in the cache.

A prompt that has just been looked up falls into parts, each with one reason:

    [0, matched)          reused
    [matched, shared)     its pages are there, and no state to start from: evicted, dropped, declined, not kept
    [shared, gone)        pages were there: evicted, dropped
    [gone, elsewhere)     another namespace of the same owner has them
    [elsewhere, same)     as in the nearest conversation, but less than a page of it: tile remainder
    [same, end)           differs from that conversation, or nobody has said it yet: never seen

What is left of a prompt once only its last tile is missing is a tile remainder too, whatever its tokens are: only the
same prompt as a whole could have found it, unless the state at the end of this prompt is known to have gone.

Only the reader's own namespace and those of its owner are looked at. Everything takes time in proportion to the
prompt's pages and to bounds that are stated here.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import chain, islice

import numpy as np

from hybrid_cache.cache.fates import End, Fate, Fates
from hybrid_cache.cache.keys import TOKEN_BYTES, Keys, Name, common, tokens_in
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.tree import Node, PrefixTree
from hybrid_cache.namespaces import salt_in

LEAST_ALIKE = 16  # tokens: less in common comes from the template, and is no conversation that a prompt differs from
MOST_NEIGHBOURS = 64  # continuations of one prefix that are compared, the latest
MOST_ROOTS = 64  # namespaces that are looked at, the latest
MOST_WALKS = 4  # of these, so many in which a prompt's first page is known
MOST_SHOWN = 24  # tokens of the nearest conversation


class Reason(Enum):
    """Why a part of a prompt was computed."""

    NEVER_SEEN = "never_seen"
    DIFFERS = "differs"
    EVICTED = "evicted"
    DROPPED = "dropped"
    DECLINED = "declined"
    NOT_KEPT = "not_kept"  # nobody asked for a state there, or it is still being computed
    OTHER_NAMESPACE = "other_namespace"
    TILE_REMAINDER = "tile_remainder"
    OFF = "off"  # the request does not use the cache


@dataclass(frozen=True, slots=True)
class Loss:
    """A state or a page that went, or a state that the policy declined."""

    what: str  # the kind of state, or "page"
    age_s: float  # seconds since then
    score: float | None = None  # as in `Fate`


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens [start, end) of a prompt."""

    start: int
    end: int
    reason: Reason
    loss: Loss | None = None


@dataclass(frozen=True, slots=True)
class Nearest:
    """The conversation of the same namespace that has most in common with a prompt."""

    position: int  # of the first token that differs
    tokens: tuple[int, ...]  # its tokens from there on, at most MOST_SHOWN


@dataclass(frozen=True, slots=True)
class Found:
    """What a prompt has found, and what not."""

    num_tokens: int
    matched: int
    kind: str  # of what it starts from: a kind of state, "page" for a model without states, empty if nothing
    kv_only: int  # tokens whose pages are there, and which are computed again
    parts: tuple[Part, ...]  # of [matched, num_tokens), in order
    nearest: Nearest | None = None

    @property
    def reason(self) -> Reason | None:
        """That of the largest part; None if nothing is missing."""
        largest = max(self.parts, key=lambda part: part.end - part.start, default=None)
        return None if largest is None else largest.reason


class Inquest:
    """Looks a prompt up in the tree and among what has gone, and counts reasons.

    misses   of prompts, by that of their largest part
    tokens   of their parts
    """

    def __init__(self, tree: PrefixTree, fates: Fates, clock: Callable[[], float], *, stateless: bool) -> None:
        """stateless: a model of attention layers only, which may resume from any page"""
        self.misses: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self._tree = tree
        self._fates = fates
        self._clock = clock
        self._step = tree.page_tokens
        self._stateless = stateless

    def of(self, lease: Lease, owner: str | None) -> Found:
        """What a prompt has found whose room has just been taken. owner: as in `Request`"""
        return self._counted(self._look(lease, owner, self._clock()))

    def off(self, num_tokens: int) -> Found:
        """The same of a prompt that does not use the cache."""
        return self._counted(Found(num_tokens, 0, "", 0, (Part(0, num_tokens, Reason.OFF),)))

    def _counted(self, found: Found) -> Found:
        if found.reason is not None:
            self.misses[found.reason.value] += 1
        for part in found.parts:
            self.tokens[part.reason.value] += part.end - part.start
        return found

    def _look(self, lease: Lease, owner: str | None, now: float) -> Found:
        keys, length = lease.keys, lease.length
        if length == keys.num_tokens:
            return Found(length, length, "prompt_end", 0, ())
        last = (keys.num_tokens - 1) // self._step * self._step  # the last tile has to be computed
        shared, parts = min(lease.shared, last), list[Part]()
        if shared > length:
            parts.append(self._without_state(keys, length, shared, now))
        at = max(shared, length)
        for part in (self._gone(keys, at, last, now), self._elsewhere(keys, at, last, owner)):
            if part is not None and part.end > at:
                parts.append(Part(at, part.end, part.reason, part.loss))
                at = part.end
        untouched = at == max(length, min(lease.shared, last))
        nearest = self._nearest(lease) if owner is not None and untouched else None
        parts += self._rest(keys, at, last, nearest, now)
        if nearest is not None and not (nearest.tokens and 0 < nearest.position < keys.num_tokens):
            nearest = None  # nothing in common, or nothing that differs
        kv_only = max(shared - length, 0)
        return Found(keys.num_tokens, length, self._kind(lease), kv_only, tuple(parts), nearest)

    def _kind(self, lease: Lease) -> str:
        if self._stateless or not lease.length:
            return "page" if lease.length else ""
        if lease.length % self._step:
            return "prompt_end"  # of what comes before a mark
        checkpoint = lease.nodes[lease.length // self._step - 1].checkpoint
        return "checkpoint" if checkpoint is None else checkpoint.label

    def _without_state(self, keys: Keys, start: int, end: int, now: float) -> Part:
        """Pages are there: what became of the deepest state that would have helped."""
        for index in range(end // self._step, start // self._step, -1):
            if (fate := self._fates.of_state(keys.names[index])) is not None:
                return _lost(start, end, fate, now)
        return Part(start, end, Reason.NOT_KEPT)

    def _gone(self, keys: Keys, start: int, last: int, now: float) -> Part | None:
        """Pages that were there up to some place."""
        for index in range(last // self._step, start // self._step, -1):
            if (fate := self._gone_at(keys.names[index])) is not None:
                return _lost(start, index * self._step, fate, now)
        return None

    def _gone_at(self, name: Name) -> Fate | None:
        fate = self._fates.of_state(name)
        return self._fates.of_page(name) if fate is None or fate.end is End.DECLINED else fate

    def _elsewhere(self, keys: Keys, start: int, last: int, owner: str | None) -> Part | None:
        """Pages that another namespace of the same owner has, further than this one."""
        if not (owner and keys.pages):
            return None
        roots = islice(reversed(self._tree.roots.values()), MOST_ROOTS)
        others = (r for r in roots if r.namespace != keys.namespace and salt_in(r.namespace).startswith(owner))
        known = islice((root.namespace for root in others if keys.pages[0] in root.children), MOST_WALKS)
        most = max((len(self._tree.walk(namespace, keys.pages)) for namespace in known), default=0)
        return Part(start, min(most * self._step, last), Reason.OTHER_NAMESPACE)

    def _rest(self, keys: Keys, at: int, last: int, nearest: Nearest | None, now: float) -> Iterator[Part]:
        end = keys.num_tokens
        if at >= last:
            fate = self._fates.of_state(keys.end_name)
            yield Part(at, end, Reason.TILE_REMAINDER) if fate is None else _lost(at, end, fate, now)
            return
        if nearest is None or nearest.position < LEAST_ALIKE:
            yield Part(at, end, Reason.NEVER_SEEN)
            return
        if nearest.position > at:
            yield Part(at, nearest.position, Reason.TILE_REMAINDER)
        yield Part(max(nearest.position, at), end, Reason.DIFFERS if nearest.tokens else Reason.NEVER_SEEN)

    def _nearest(self, lease: Lease) -> Nearest:
        """What has most in common with a prompt; without tokens if it ends there."""
        pages, index = lease.keys.pages, len(lease.nodes)
        rest = pages[index] if index < len(pages) else lease.keys.tail
        best, text, follower = 0, b"", None
        known: Iterator[tuple[bytes, Node | None]] = chain(
            islice(reversed(lease.tip.children.items()), MOST_NEIGHBOURS),
            ((tail, None) for tail in islice(reversed(lease.tip.ends), MOST_NEIGHBOURS)),
        )
        for key, child in known:
            if not text or key[: best + TOKEN_BYTES] == rest[: best + TOKEN_BYTES]:
                alike = common(key, rest)
                if not text or alike > best:
                    best, text, follower = alike, key, child
        theirs = tokens_in(text)[best:] + _following(follower)
        tokens = np.frombuffer(theirs, "<i4", min(len(theirs) // TOKEN_BYTES, MOST_SHOWN))
        return Nearest(lease.shared + best // TOKEN_BYTES, tuple(tokens.tolist()))


def _lost(start: int, end: int, fate: Fate, now: float) -> Part:
    """A part that something would have spared that is not kept."""
    what = "page" if fate.kind is None else fate.kind.value
    return Part(start, end, Reason(fate.end.value), Loss(what, now - fate.time, fate.score))


def _following(node: Node | None) -> bytes:
    """The tokens that one conversation goes on with after a node: at least MOST_SHOWN, if it has them."""
    text = b""
    while node is not None and len(text) < MOST_SHOWN * TOKEN_BYTES and (node.children or node.ends):
        text += tokens_in(next(reversed(node.children or node.ends)))
        node = next(reversed(node.children.values()), None)
    return text
