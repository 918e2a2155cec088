"""The way of a prompt into the cache: what is found of it, the room it takes, and the chunks it becomes."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.claims import Spare
from hybrid_cache.cache.lease import Lease, Match
from hybrid_cache.choreography.compiler import Compiler
from hybrid_cache.choreography.program import Span, Stretch
from hybrid_cache.choreography.stage import Stage
from hybrid_cache.engine.sequence import Prefill, Sequence
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.work import Noted, Rows


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tiles of one prompt in one step."""

    prefill: Prefill
    sequence: Sequence | None  # None: a message for the store, or a canonical pass
    rows: Rows

    @property
    def start(self) -> int:
        return self.rows.start

    @property
    def end(self) -> int:
        return self.rows.end

    @property
    def num_tiles(self) -> int:
        return -(-len(self.rows.tokens) // TILE)


class Prefills:
    """Takes room for prompts, of requests and others, and cuts them into chunks."""

    def __init__(self, cache: Books, compiler: Compiler, stage: Stage) -> None:
        self._cache = cache
        self._compiler = compiler
        self._stage = stage

    def match(self, prefill: Prefill) -> Match:
        """What the cache has of a prompt that it may use."""
        if prefill.arrangement is not None:
            return self._match_arranged(prefill)
        return self._cache.match(prefill.namespace, prefill.keys if prefill.reuse else prefill.tokens[:0])

    def _match_arranged(self, prefill: Prefill) -> Match:
        """The prefix that an arranged prompt starts from, which ends before its answer's header."""
        assert prefill.arrangement is not None
        end = min(prefill.arrangement.answer_start or len(prefill.tokens), len(prefill.tokens) - 1)
        match = self._cache.match(prefill.namespace, prefill.keys.beginning(end if prefill.reuse else 0))
        plan = self._compiler.plan(prefill.arrangement, match.length, in_place=prefill.in_place)
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
        wishes = self._cache.propose(
            lease,
            prefill.boundaries,
            only_marked=prefill.only_marked,
            generated=prefill.generated,
            again=prefill.proposed,
            session=prefill.session,
        )
        prefill.wishes, prefill.proposed = deque(wishes), True
        return True

    def release(self, prefill: Prefill, num_output_tokens: int | None = None) -> None:
        """Gives back all that a prompt holds; `num_output_tokens` if its request is done."""
        if prefill.program is not None:
            self._stage.end(prefill.program)
        if prefill.lease is not None:
            prefill.written += prefill.lease.written_tokens
            self._cache.release(prefill.lease, num_output_tokens)
        prefill.lease, prefill.program, prefill.computed = None, None, 0

    def cut(self, prefill: Prefill, sequence: Sequence | None, tiles: int) -> Chunk:
        """The next at most `tiles` tiles of a prompt, with slots for the checkpoints wished for inside them."""
        lease, program = prefill.lease, prefill.program
        assert lease is not None
        if program is not None:
            prefill.computed = self._stage.advance(program, lease, prefill.computed)
        start, end = prefill.computed, min(prefill.computed + tiles * TILE, prefill.until)
        if program is None:
            stretch = Stretch(end, self._captures(prefill, lease, start, end), ())
        else:
            stretch = self._stage.cut(program, start, end)
        rows = Rows(
            model=prefill.model,
            tokens=prefill.tokens[start : stretch.end],
            start=start,
            shift=prefill.shift,
            slot=lease.slot,
            pages=tuple(lease.pages),
            kv_rows=lease.rows_to_fill(start, stretch.end),
            fresh=start == 0 and not prefill.from_zero,
            captures=stretch.captures,
            cuts=() if program is None else stretch.cuts,
            noted=tuple(_noted(span, first, last) for first, last, span in stretch.spans),
            num_wanted=0 if sequence is None else _num_wanted(sequence, start, stretch.end),
        )
        return Chunk(prefill, sequence, rows)

    def _captures(self, prefill: Prefill, lease: Lease, start: int, end: int) -> tuple[tuple[int, int], ...]:
        while prefill.wishes and prefill.wishes[0].position <= end:
            wish = prefill.wishes.popleft()
            if wish.position <= start:
                continue
            self._cache.reserve_checkpoint(lease, wish.position, wish.kind, ttl_s=wish.ttl_s)
        return tuple(sorted((r.position, r.slot) for r in lease.reserved if start < r.position <= end))


def _num_wanted(sequence: Sequence, start: int, end: int) -> int:
    """How many of the last rows of a chunk are read: all, to score a prompt; the last one, to decode from."""
    if sequence.request.sampling.prompt_logprobs is not None:
        return end - start
    return int(end == len(sequence.prefill.tokens))


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
