"""The way of a prompt into the cache: what is found of it, the room it takes, and the chunks it becomes."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.claims import Spare
from hybrid_cache.cache.lease import Lease, Match, Sent
from hybrid_cache.cache.policies.signals import Ending, Finish
from hybrid_cache.choreography.compiler import Compiler
from hybrid_cache.choreography.program import Span, Stretch
from hybrid_cache.choreography.stage import Stage
from hybrid_cache.engine.senders import Offer, Senders
from hybrid_cache.engine.sequence import Phase, Prefill, Sequence, Source, Twin, grid_floor
from hybrid_cache.engine.sharing import someone_computes_more, will_share, wish_for
from hybrid_cache.engine.twins import Twins
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.namespaces import fingerprint_in, lane_in, namespace_beside
from hybrid_cache.spec import PrefillCost
from hybrid_cache.work import InputRows, Noted, Rows, input_rows


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tiles of one prompt in one step."""

    prefill: Prefill
    sequence: Sequence | None  # None: a message for the store, or a canonical pass
    rows: Rows
    cost: PrefillCost
    twins: tuple[tuple[Twin, Rows], ...] = ()  # what the pass makes beside it

    @property
    def flops(self) -> float:
        beside = (twin.offer.cost.flops(rows.start, rows.end) for twin, rows in self.twins)
        return self.cost.flops(self.start, self.end) + sum(beside)

    @property
    def start(self) -> int:
        return self.rows.start

    @property
    def end(self) -> int:
        return self.rows.end

    @property
    def least_tiles(self) -> int:
        """As many as its tokens fill; cuts add to them."""
        return -(-len(self.rows.tokens) // TILE)

    @property
    def most_tiles(self) -> int:
        return self.least_tiles + len(self.rows.cuts)


class Prefills:
    """Takes room for prompts, of requests and others, and cuts them into chunks."""

    def __init__(
        self, cache: Books, cost: PrefillCost, compiler: Compiler, stage: Stage, senders: Senders, twins: Twins
    ) -> None:
        self._cache = cache
        self._cost = cost
        self._senders = senders
        self._twins = twins
        self._compiler = compiler
        self._stage = stage

    def match(self, prefill: Prefill) -> Match:
        """What the cache has of a prompt that it may use."""
        if prefill.arrangement is not None:
            return self._match_arranged(prefill)
        if self._may_enter_a_lane(prefill):
            prefill.enter_lane(self._best_lane(prefill, prefill.max_loss or 0.0))
        return self._cache.match(prefill.namespace, prefill.keys if prefill.reuse else prefill.tokens[:0])

    def is_on_its_way(self, prefill: Prefill, match: Match, running: Iterable[Sequence]) -> bool:
        """True while a running prompt will leave more for this one than there is now: in its namespace, or in another
        model's, what it can go on from.
        """
        lanes: list[Offer | None] = [prefill.lane]
        if self._may_enter_a_lane(prefill):
            lanes = [None, *self._senders.profiled(prefill.model, prefill.max_loss or 0.0)]
        namespaces = [namespace_beside(prefill.namespace, prefill.model, lane.lane) for lane in lanes if lane]
        if someone_computes_more(running, prefill, match, namespaces):
            return True
        return self._receives(prefill) and any(
            self._is_sent(prefill, match, offer, sequence.prefill)
            for sequence in running
            if sequence.phase is Phase.PREFILL
            for lane in lanes
            for offer in self._offers(prefill, lane)
        )

    def _is_sent(self, prefill: Prefill, match: Match, offer: Offer, other: Prefill) -> bool:
        """Whether a running prompt keeps what a transfer reads, and will have more of it than is matched, or can be
        received, now.
        """
        namespace = namespace_beside(prefill.namespace, offer.sender)
        plain = other.source is None and other.arrangement is None
        if other.namespace != namespace or not (other.publish and plain):
            return False
        shared, reads = will_share(other, prefill), offer.transfer.reads
        if shared <= max(other.computed, match.length) or not set(reads) <= {*self._kept_layers(other, shared)}:
            return False
        first, there = -(-match.length // TILE), min(other.computed, shared) // TILE
        if self._cache.inputs.reach(prefill.keys_in(namespace), reads, first, there) < there:
            return False
        now = self._best_sent(prefill, match.length, prefill.lane)
        if now is not None and shared <= now[1].end * TILE:
            return False
        wish_for(other, shared)
        return True

    def _match_arranged(self, prefill: Prefill) -> Match:
        """The prefix that an arranged prompt starts from, which ends before its answer's header."""
        assert prefill.arrangement is not None
        end = min(prefill.arrangement.answer_start or len(prefill.tokens), len(prefill.tokens) - 1)
        match = self._cache.match(prefill.namespace, prefill.keys.beginning(end if prefill.reuse else 0))
        plan = self._compiler.plan(prefill.namespace, prefill.arrangement, match.length, in_place=prefill.in_place)
        return match if plan.prefix == match.length else self._cache.match(prefill.namespace, prefill.tokens[:0])

    def acquire(
        self,
        prefill: Prefill,
        match: Match,
        num_others: Callable[[str], int] = lambda _: 0,
        keeps_end: bool = False,
        spare: Spare | None = None,
    ) -> bool:
        """Takes room for all of a prompt -> whether there was enough.

        num_others: how many waiting prompts have a message with an id   keeps_end, spare: as in `Books.acquire`
        """
        lease = self._cache.acquire(match, prefill.keys, publish=prefill.publish, keeps_end=keeps_end, spare=spare)
        if lease is None:
            return False
        prefill.lease, prefill.computed = lease, lease.length
        prefill.parts = []
        prefill.cached = lease.length if prefill.cached is None else prefill.cached
        if prefill.arrangement is not None:
            begin = (prefill.namespace, prefill.arrangement, lease.length, num_others)
            prefill.program = self._compiler.program(*begin, in_place=prefill.in_place)
            if prefill.from_zero:
                self._stage.clear(lease)
            return True
        if prefill.asks and prefill.found is None:
            inquest = self._cache.inquest
            off = not prefill.reuse
            prefill.found = inquest.off(len(prefill.tokens)) if off else inquest.of(lease, prefill.owner)
        again = prefill.proposed
        wishes = self._cache.propose(
            lease,
            prefill.boundaries,
            only_marked=prefill.only_marked,
            generated=prefill.generated,
            again=again,
            origin=prefill.origin,
        )
        prefill.wishes, prefill.proposed = deque(wishes), True
        if prefill.lane is not None:
            self._twins.readers.found(prefill.keys.names[1 : lease.length // TILE + 1])
        self._receive(prefill, lease)
        self._twins.begin(prefill, spare, again=again)
        return True

    def _best_lane(self, prefill: Prefill, max_loss: float) -> Offer | None:
        """In which namespace least of a prompt is left to compute; None for that of the model's own entries."""
        num_tokens, best, least = len(prefill.tokens), None, math.inf
        for lane in (None, *self._senders.profiled(prefill.model, max_loss)):
            namespace = namespace_beside(prefill.namespace, prefill.model, lane.lane if lane else "")
            start = self._cache.match(namespace, prefill.keys_in(namespace)).length
            sent = self._best_sent(prefill, start, lane)
            flops = self._cost.flops(start, num_tokens) - (sent[2] if sent else 0.0)
            if flops < least:
                best, least = lane, flops
        return best

    def _best_sent(self, prefill: Prefill, start: int, lane: Offer | None) -> tuple[Offer, Sent, float] | None:
        """From what most is saved of a prompt of which the first tokens are there; and how many FLOPs."""
        best, most = None, 0.0
        for offer in self._offers(prefill, lane):
            keys = prefill.keys_in(namespace_beside(prefill.namespace, offer.sender))
            sent = None if start % TILE else self._cache.sent(keys, start, offer.transfer.reads)
            saved = 0.0 if sent is None else offer.spares.flops(start, sent.end * TILE)
            if sent is not None and saved > most:
                best, most = (offer, sent, saved), saved
        return best

    def _offers(self, prefill: Prefill, lane: Offer | None) -> Iterable[Offer]:
        """From what entries of a namespace may be made: a lane's, or the model's own."""
        return self._senders.exact(prefill.model) if lane is None else (lane,)

    def _may_enter_a_lane(self, prefill: Prefill) -> bool:
        """Not once it has begun: its first answer names what was done."""
        return prefill.max_loss is not None and prefill.cached is None and prefill.mark is None

    def _receives(self, prefill: Prefill) -> bool:
        own = lane_in(prefill.namespace) == (prefill.lane.lane if prefill.lane else "")
        return prefill.publish and prefill.reuse and prefill.mark is None and own  # a finished turn of a lane is not

    def _receive(self, prefill: Prefill, lease: Lease) -> None:
        """Begins to make entries from those of the model from which most is saved, if there is one."""
        first = prefill.computed
        best = self._best_sent(prefill, first, prefill.lane) if self._receives(prefill) else None
        if best is None:
            return
        offer, sent, _ = best
        runs = self._cache.take_over(lease, sent, offer.entries)
        prefill.source = prefill.received = Source(offer, first, sent.end * TILE, runs)
        self._twins.readers.read(offer.lane, sent.end * TILE - first)
        if not offer.transfer.computes:
            prefill.computed = prefill.source.end
            self._end_source(prefill)

    def _end_source(self, prefill: Prefill) -> None:
        if prefill.source is not None:
            self._cache.inputs.let_go(prefill.source.runs, used=prefill.computed == prefill.source.end)
        prefill.source = None

    def release(
        self, prefill: Prefill, num_output_tokens: int | None = None, finish: Finish = Finish.UNKNOWN
    ) -> Ending | None:
        """Gives back all that a prompt holds; the rest as in `Books.release`."""
        ending = None
        if prefill.program is not None:
            self._stage.end(prefill.program)
        self._end_source(prefill)
        self._twins.end(prefill)
        if prefill.lease is not None:
            prefill.written += prefill.lease.written_tokens
            ending = self._cache.release(prefill.lease, num_output_tokens, finish)
        prefill.lease, prefill.program, prefill.computed = None, None, 0
        return ending

    def cut(self, prefill: Prefill, sequence: Sequence | None, tiles: int) -> Chunk:
        """The next at most `tiles` tiles of a prompt, with slots for the checkpoints wished for inside them."""
        lease, program = prefill.lease, prefill.program
        assert lease is not None
        if program is not None:
            prefill.computed = self._stage.advance(program, lease, prefill.computed)
        if prefill.source is not None and prefill.computed == prefill.source.end:
            self._end_source(prefill)
        if program is None:
            start, end, cuts = self._next(prefill, tiles)
            stretch = Stretch(end, self._captures(prefill, lease, start, end), ())
        else:
            start = prefill.computed
            stretch = self._stage.cut(program, start, min(start + tiles * TILE, prefill.until))
            cuts = stretch.cuts
        source = prefill.source
        rows = Rows(
            model=prefill.next_model,
            tokens=prefill.tokens[start : stretch.end],
            start=start,
            shift=prefill.shift,
            slot=lease.slot,
            pages=tuple(lease.pages),
            kv_rows=lease.rows_to_fill(start, stretch.end),
            fresh=start == 0 and not prefill.from_zero,
            captures=stretch.captures,
            cuts=cuts,
            noted=tuple(_noted(span, first, last) for first, last, span in stretch.spans),
            num_wanted=0 if sequence is None else _num_wanted(sequence, start, stretch.end),
            kept_inputs=() if source or program else self._keep_inputs(prefill, lease, start, stretch.end),
            transfer=source.offer.transfer if source else None,
            sent_inputs=source.inputs(start, stretch.end) if source else (),
        )
        twins = tuple(self._twins.rows(prefill, rows))
        return Chunk(prefill, sequence, rows, source.offer.cost if source else self._cost, twins)

    def wrote(self, chunk: Chunk) -> None:
        """To be called when a chunk has been computed, before what it has written is published."""
        for twin, rows in chunk.twins:
            self._twins.wrote(chunk.prefill, chunk.rows, twin, rows)

    def _keep_inputs(self, prefill: Prefill, lease: Lease, start: int, end: int) -> tuple[InputRows, ...]:
        runs = (
            run
            for layer, spared in self._kept_layers(prefill, end).items()
            for run in self._cache.reserve_inputs(lease, layer, spared, start, end)
        )
        return tuple(map(input_rows, runs))

    def _kept_layers(self, prefill: Prefill, end: int) -> Mapping[int, PrefillCost]:
        """Layers whose inputs are kept of a prompt up to a position, with what that spares."""
        if lane_in(prefill.namespace) or (prefill.mark is not None and end > prefill.mark.position):
            return {}
        written = frozenset(twin.offer.lane for twin in prefill.twins)
        return self._senders.kept_inputs(fingerprint_in(prefill.namespace), written)

    def _next(self, prefill: Prefill, tiles: int) -> tuple[int, int, tuple[int, ...]]:
        """Where the next chunk starts, ends, and comes back to the grid if it starts off it, behind a mark."""
        start = prefill.computed
        end, back = min(grid_floor(start) + tiles * TILE, prefill.until), grid_floor(start) + TILE
        if start % TILE == 0 or end <= back:
            return start, end, ()
        return (start, end, (back,)) if self._compiler.traits.packs else (start, back, ())

    def _captures(self, prefill: Prefill, lease: Lease, start: int, end: int) -> tuple[tuple[int, int], ...]:
        while prefill.wishes and prefill.wishes[0].position <= end:
            wish = prefill.wishes.popleft()
            if wish.position <= start or (prefill.source and wish.position < prefill.source.end):
                continue
            self._cache.reserve_checkpoint(lease, wish.position, wish.kind, ttl_s=wish.ttl_s)
        captures = tuple(sorted((r.position, r.slot) for r in lease.reserved if start < r.position <= end))
        if prefill.source:  # the pass adds what it computes
            self._cache.copy_taken(lease, (slot for _, slot in captures), prefill.source.offer.entries)
        return captures


def _num_wanted(sequence: Sequence, start: int, end: int) -> int:
    """How many of the last rows of a chunk are read: all, to score a prompt; the last one, to decode from."""
    if sequence.request.sampling.prompt_logprobs is not None:
        return end - start
    return int(end == len(sequence.prefill.tokens) or sequence.prefill.leaves_stem(end))


def decode_rows(sequence: Sequence) -> Rows:
    """What a decoding sequence is fed: as a rule one token. Raises OwnershipError if a row may not be written."""
    prefill, lease = sequence.prefill, sequence.prefill.lease
    assert lease is not None
    index, program, tokens = sequence.fed, prefill.program, sequence.next_tokens()
    kv_rows = tuple(lease.own_row(i) for i in range(index, index + len(tokens)))
    rows = Rows(prefill.model, tokens, index, prefill.shift, lease.slot, tuple(lease.pages), kv_rows)
    if len(tokens) > 1:
        scored = sequence.request.sampling.logprobs is not None
        return rows._replace(num_wanted=0 if sequence.replaying else len(tokens) if scored else 1)
    if program is None or program.span is None:
        return rows
    return rows._replace(noted=(_noted(program.span, index, index + 1),))


def _noted(span: Span, start: int, end: int) -> Noted:
    return Noted(start, end, span.items, first=start == span.start)
