"""What a cache policy is asked, and what most of them share.

The cache reports to a policy what happens to *kept states* (checkpoints and prompt ends) and asks it two things: where
a new prompt deserves states, and which state is evicted next. KV pages have no score of their own: a page that no kept
state needs saves nothing and is evicted first, and a page that one needs counts among its bytes.

The server and `hybrid-cache bench policy` run the same objects.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isnan
from typing import NamedTuple, Protocol, runtime_checkable

from hybrid_cache.cache.eviction import LazyHeap
from hybrid_cache.cache.keys import Keys, Name
from hybrid_cache.cache.policies.signals import NOWHERE, Ending, Origin
from hybrid_cache.cache.tree import Checkpoint, CheckpointKind, Kept, Node
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import Boundary, BoundaryKind


class Worth(NamedTuple):
    """What a state saves each time it is used, and what is freed when it is evicted."""

    flops: float  # to compute again what it spares, from the nearest other state that is there
    num_bytes: int  # the state, and the pages that nothing else needs
    share: float = 0.0  # of the cache: all pages from that other state to this one


@dataclass(frozen=True, slots=True)
class Wish:
    """A grid position at which a checkpoint would be welcome."""

    position: int
    kind: CheckpointKind
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True)
class Outline:
    """A prompt that has just found its pages and is about to be computed.

    [0, start)            resumed from a kept state
    [start, shared)       its pages are there but no state to resume from: it diverges from another request at `shared`
    [shared, num_tokens)  new
    """

    keys: Keys
    start: int
    shared: int
    page_tokens: int
    boundaries: tuple[Boundary, ...] = ()  # ends of messages, rising
    only_marked: bool = False  # the client wants states at explicit boundaries and nowhere else
    generated: bool = False  # the end of these tokens was generated: no request waits for them
    again: bool = False  # the same request was admitted before, and preempted
    origin: Origin = NOWHERE

    @property
    def session(self) -> str:
        """Which of a tenant's conversations this belongs to, as the client says; empty if it does not."""
        return self.origin.session

    @property
    def num_tokens(self) -> int:
        return self.keys.num_tokens

    @property
    def end(self) -> int:
        """The last grid position."""
        return self.floor(self.num_tokens)

    def floor(self, position: int) -> int:
        return position // self.page_tokens * self.page_tokens

    def name(self, position: int) -> Name:
        """Names the prefix that ends at a grid position."""
        return self.keys.names[position // self.page_tokens]

    @property
    def start_name(self) -> Name:
        """Names what the prompt is resumed from."""
        keys = self.keys.ending_at(self.start)
        return keys.end_name if self.start == keys.num_tokens else self.name(self.start)

    @property
    def end_name(self) -> Name:
        """Names the state at the very end, from which decoding starts."""
        return self.keys.end_name


class Policy(Protocol):
    """Decides what enters and what leaves. One object belongs to one cache."""

    name: str
    keeps_states: bool  # at all; else none is kept for a task that will return either
    wants_rises: bool  # whether `add` is to be called also when the worth of a state may have risen

    def open(self, worth_of: Callable[[Kept], Worth], clock: Callable[[], float]) -> None:
        """Called once by the cache: how to ask for the present worth of a state, and the time in seconds."""

    def propose(self, outline: Outline) -> Iterable[Wish]:
        """A prompt has been admitted -> the checkpoints proposed for it."""
        ...

    def ended(self, ending: Ending) -> None:
        """A request has ended, or more is known of one that had."""

    def candidate(self, kind: CheckpointKind, name: Name, worth: Worth) -> float | None:
        """The score that a state of a running request would have; None refuses it even if there is room."""
        ...

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        """A state was made or used by a request whose prompt runs along `path`."""

    def add(self, kept: Kept) -> None:
        """From now on a state may be evicted. Called again when its worth may have fallen."""

    def remove(self, kept: Kept) -> None:
        """A state may no longer be evicted, or has gone. Nothing happens if it was not there."""

    def lowest(self) -> tuple[float, Kept] | None:
        """The state that is evicted next, and its score."""
        ...

    def lost(self, name: Name, score: float, above: Kept | None) -> None:
        """A state was evicted, or a candidate refused; its future requests have to resume from `above`.

        score: minus infinity for a state that was evicted for another reason than its score
        """

    def items(self) -> Iterable[Kept]:
        """All states that may be evicted."""
        ...

    def score_of(self, kept: Kept) -> float | None:
        """The score of a state now, for people; None for one that may not be evicted. Changes nothing."""
        ...


def hears_endings(policy: Policy) -> Callable[[Ending], None]:
    """How a policy is told of endings: one that was written before there was `ended` has `finished` alone."""
    if callable(getattr(policy, "ended", None)):
        return policy.ended
    finished: Callable[[Name, int], None] = policy.finished  # type: ignore[attr-defined]
    return lambda ending: None if ending.again else finished(ending.name, ending.num_output_tokens)


@runtime_checkable
class Remembers(Protocol):
    """A policy whose knowledge a later process can take over."""

    def remembered(self) -> bytes:
        """What was learned."""
        ...

    def recall(self, data: bytes, elapsed_s: float) -> None:
        """Takes over what another process had learned so long ago. Raises ValueError for what is of another form."""
        ...


@runtime_checkable
class Foresees(Protocol):
    """A policy that can say more of a prefix, kept or not, for tiers below."""

    def standing(self, name: Name) -> float:
        """How soon a return is expected, in proportion to that of a new message's end: from 1/8 to 8."""
        ...


def interior_positions(start: int, end: int) -> list[int]:
    """Grid positions inside [start, end) at which a long stretch deserves a checkpoint that no client asked for.

    They lie at tiles 8, 16, 32, 64 ... so that a branch at any place finds a state at least half as deep, for a number
    of states that grows with the logarithm of the length.
    """
    position, positions = 8 * TILE, []
    while position < end:
        if position > start:
            positions.append(position)
        position *= 2
    return positions


def every_place(outline: Outline) -> Iterable[Wish]:
    """Marked places, the end, ends of messages, the branch point, and a sparse set inside."""
    places: dict[int, Wish] = {}
    for b in outline.boundaries:
        if b.kind is BoundaryKind.EXPLICIT:
            places.setdefault(
                outline.floor(b.position), Wish(outline.floor(b.position), CheckpointKind.EXPLICIT, b.ttl_s)
            )
    if not outline.only_marked:
        for b in outline.boundaries:
            places.setdefault(outline.floor(b.position), Wish(outline.floor(b.position), CheckpointKind.MESSAGE_END))
        kind = CheckpointKind.TURN_END if outline.generated else CheckpointKind.MESSAGE_END
        places.setdefault(outline.end, Wish(outline.end, kind))
        if outline.shared > outline.start:
            places.setdefault(outline.shared, Wish(outline.shared, CheckpointKind.BRANCH))
        for position in interior_positions(outline.start, outline.num_tokens):
            if outline.floor(position) == position:
                places.setdefault(position, Wish(position, CheckpointKind.INTERIOR))
    return [places[position] for position in sorted(places) if position > outline.start]


def branch_and_end(outline: Outline) -> Iterable[Wish]:
    """At most two states a sequence: where it diverges from an earlier one, and its end (Marconi, section 4.1)."""
    kind = CheckpointKind.TURN_END if outline.generated else CheckpointKind.MESSAGE_END
    if outline.start < outline.shared < outline.end:
        yield Wish(outline.shared, CheckpointKind.BRANCH)
    if outline.end > outline.start:
        yield Wish(outline.end, kind)


class ScoredPolicy:
    """Keeps states in a heap by a score that may only rise while a state is not used. Subclasses say the score."""

    name = ""
    keeps_states = True
    wants_rises = False

    def __init__(self) -> None:
        self._heap: LazyHeap[Kept] = LazyHeap()
        self._worth_of: Callable[[Kept], Worth] = _closed

    def open(self, worth_of: Callable[[Kept], Worth], clock: Callable[[], float]) -> None:
        self._worth_of = worth_of

    @property
    def clock(self) -> float:
        """Stored with a state when it is made or used, and handed back to `score`."""
        raise NotImplementedError

    def score(self, base: float, kind: CheckpointKind, worth: Worth) -> float:
        """The score of a state last used when the clock said `base`."""
        raise NotImplementedError

    def propose(self, outline: Outline) -> Iterable[Wish]:
        return every_place(outline)

    def ended(self, ending: Ending) -> None:
        if not ending.again:
            self.finished(ending.name, ending.num_output_tokens)

    def finished(self, name: Name, num_output_tokens: int) -> None:
        """What there was before `ended`, for policies that are written for it."""

    def candidate(self, kind: CheckpointKind, name: Name, worth: Worth) -> float | None:
        return self.score(self.clock, kind, worth)

    def used(self, kept: Kept, path: Iterable[Node]) -> None:
        kept.base = self.clock

    def add(self, kept: Kept) -> None:
        self._heap.push(kept, self._score(kept))

    def remove(self, kept: Kept) -> None:
        self._heap.discard(kept)

    def lowest(self) -> tuple[float, Kept] | None:
        return self._heap.peek(self._score)

    def lost(self, name: Name, score: float, above: Kept | None) -> None:
        pass

    def items(self) -> Iterable[Kept]:
        scores = self._heap.items()
        assert all(score <= self._score(kept) for kept, score in scores.items()), "a fall that was not reported"
        return scores

    def score_of(self, kept: Kept) -> float | None:
        return self._score(kept) if kept in self._heap else None

    def _score(self, kept: Kept) -> float:
        score = self.score(kept.base, kept.kind, self._worth_of(kept))
        if isnan(score):
            raise ConfigError(f"policy {self.name!r}: the score of a state is nan")
        return score


def refresh(path: Iterable[Node], base: float) -> list[Checkpoint]:
    """Marks all states along a path as used -> those states."""
    found = [node.checkpoint for node in path if node.checkpoint is not None]
    for checkpoint in found:
        checkpoint.base = base
    return found


def _closed(kept: Kept) -> Worth:
    raise AssertionError("the policy belongs to no cache yet")
