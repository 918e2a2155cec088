"""Who computes what in the next step. Owns the queues; asks the cache for room and never touches a tensor.

Continuous batching with chunked prefill: running sequences decode one token a step, and prompts go through in tiles
beside them. Without room the newest sequence gives its pages back and is computed again later.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.lease import Match
from hybrid_cache.cache.policies.base import Wish
from hybrid_cache.cache.tree import CheckpointKind
from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.choreography.stage import Stage
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.effects import Effect
from hybrid_cache.engine.sequence import Phase, Prefill, Sequence, grid_floor
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import TokenArray

logger = logging.getLogger("hybrid_cache")

MOST_EARLIER = 16  # prompts that an order of messages is chosen by
MAX_COMMITS = 64  # finished turns that wait for an idle moment; the oldest is dropped


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tiles of one prompt in one step."""

    prefill: Prefill
    sequence: Sequence | None  # None: a message for the store, or a canonical commit
    start: int
    end: int
    captures: tuple[tuple[int, int], ...]  # (position where a tile ends, slot that gets the state there)
    cuts: tuple[int, ...] = ()  # positions where a tile ends and the grid starts afresh, rising; none without `packs`
    spans: tuple[tuple[int, int, Effect], ...] = ()  # tokens of messages that will be stored, see `Stretch`


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass, and the sequences that need none because their prompt's end is kept."""

    chunks: tuple[Chunk, ...] = ()
    decodes: tuple[Sequence, ...] = ()
    resumed: tuple[Sequence, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.chunks or self.decodes or self.resumed)


class Scheduler:
    """The queues: waiting, running (in order of arrival), messages to store, and finished turns to commit when idle."""

    def __init__(self, cache: Books, config: EngineConfig, stage: Stage) -> None:
        self._cache = cache
        self._stage = stage
        self._max_running = config.max_running
        self._max_tiles = config.max_tiles
        self._max_tiles_beside_decode = config.max_tiles_beside_decode
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._messages: list[Prefill] = []  # on their way into the store
        self._commits: deque[Prefill] = deque()
        self.num_preemptions = 0
        self.num_out_of_memory = 0

    @property
    def has_room(self) -> bool:
        """Whether one more sequence may run beside those that do."""
        return len(self._running) < self._max_running

    @property
    def num_waiting(self) -> int:
        """Waiting requests; further choices of one that has begun are not counted."""
        return sum(sequence.index == 0 for sequence in self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Nobody waits for an answer; canonical commits may still be pending."""
        return not (self._waiting or self._running or self._messages)

    @property
    def has_work(self) -> bool:
        return not self.idle or bool(self._commits)

    def sequences(self) -> Iterator[Sequence]:
        yield from self._running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def adopt(self, sequence: Sequence) -> None:
        """Takes in a sequence that already has a lease: a fork of a running one."""
        sequence.phase = Phase.DECODE
        self._running.append(sequence)

    def commit_later(self, prefill: Prefill) -> None:
        """Queues the tokens of a finished turn for the prefill path, when nobody waits."""
        if len(self._commits) == MAX_COMMITS:
            self._drop_commit_lease()
            self._commits.popleft()
        self._commits.append(prefill)

    def store(self, message: Prefill) -> None:
        """Takes in tokens that are to become a message in the store; before any prompt that waits for it."""
        self._messages.append(message)

    def end_message(self, message: Prefill) -> None:
        self._messages.remove(message)
        self._release(message)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence wherever it is; what it has published stays in the cache."""
        queue = self._waiting if sequence.phase is Phase.WAITING else self._running
        queue.remove(sequence)
        sequence.phase = Phase.FINISHED
        self._release(sequence.prefill, len(sequence.generated))

    def schedule(self) -> Step:
        """Chooses the next step and takes the room that it needs."""
        if self.idle:
            return self._commit_step()
        decodes = self._extend_decodes()
        resumed = self._admit()
        tiles = self._max_tiles_beside_decode if decodes else self._max_tiles
        return Step(self._cut_chunks(tiles), decodes, resumed)

    # Messages for the store

    def _encode_missing(self, prefill: Prefill) -> bool:
        """Sees to it that the parts which a prompt wants encoded alone are stored -> whether it has to wait for any."""
        arrangement = prefill.arrangement
        if arrangement is None:
            return False
        starts = np.cumsum([0, *(part.num_tokens for part in arrangement.parts)])
        for index in self._stage.missing(arrangement):
            key = self._stage.key(arrangement, arrangement.parts[index].id)
            if self._stage.is_making(key) or key in prefill.refused:
                continue
            if len(self._messages) >= self._max_tiles:  # a step computes no more: the others hold no room meanwhile
                return True
            tokens = prefill.tokens[starts[index] : starts[index + 1]]
            begun = self._begin_message(Prefill(prefill.namespace, tokens, False, False), arrangement, index)
            if not begun and self._is_making_any(arrangement):
                return True  # there is more room when they are done
            prefill.refused.add(key)  # it is tried once
        return self._is_making_any(arrangement)

    def _is_making_any(self, arrangement: Arrangement) -> bool:
        keys = (self._stage.key(arrangement, part.id) for part in arrangement.parts if part.id)
        return any(self._stage.is_making(key) for key in keys)

    def _begin_message(self, message: Prefill, arrangement: Arrangement, index: int) -> bool:
        """Takes room to encode one part alone -> whether there was any."""
        nothing = self._cache.match(message.namespace, message.tokens[:0])
        lease = self._cache.acquire(nothing, message.tokens, publish=False)
        program = None if lease is None else self._stage.encoding(message.namespace, arrangement, index)
        if lease is None or program is None:
            if lease is not None:
                self._cache.release(lease)
            return False
        message.lease, message.program = lease, program
        self._stage.clear(lease)
        self._messages.append(message)
        return True

    def _num_waiting_for(self, name: str) -> int:
        """Waiting prompts with a message of this id."""
        arrangements = (sequence.prefill.arrangement for sequence in self._waiting)
        return sum(arrangement is not None and name in arrangement.ids for arrangement in arrangements)

    def out_of_memory(self, step: Step) -> bool:
        """Takes back a step for which the device had no memory, and makes all later ones smaller.

        Some states of its sequences may have moved on and others not, so these sequences begin again, as after any
        preemption. A canonical commit is given up, and so are messages for the store: prompts that wait for them
        compute them in place. False, and nothing changes, where a step cannot be smaller.
        """
        if self.idle:
            self.end_commit(self._commits[0])
            self.num_out_of_memory += 1
            return True
        messages = [chunk.prefill for chunk in step.chunks if chunk.prefill in self._messages]
        num_tiles = sum(-(-(chunk.end - chunk.start) // TILE) for chunk in step.chunks)
        num_sequences = len(step.chunks) + len(step.decodes)
        if num_tiles <= 1 and num_sequences <= 1 and not messages:
            return False
        for message in messages:
            self.end_message(message)
        if num_tiles > 1:
            self._max_tiles = min(self._max_tiles, num_tiles // 2)
            self._max_tiles_beside_decode = min(self._max_tiles_beside_decode, num_tiles // 2)
        if step.decodes and num_sequences > 1:
            self._max_running = min(self._max_running, num_sequences // 2)
        sequences = [*(chunk.sequence for chunk in step.chunks if chunk.sequence is not None), *step.decodes]
        for sequence in sorted(sequences, key=lambda s: s.rank, reverse=True):
            self._preempt(sequence)
        self.num_out_of_memory += 1
        logger.warning(
            "no device memory for %d prefill tiles and %d decode rows; from now on at most %d tiles (%d beside decode) "
            "and %d sequences",
            *(num_tiles, len(step.decodes), self._max_tiles, self._max_tiles_beside_decode, self._max_running),
        )
        return True

    # Decoding

    def _extend_decodes(self) -> tuple[Sequence, ...]:
        """Sequences that decode in this step, each with room for one more token; preempts from the newest."""
        for sequence in [s for s in self._running if s.phase is Phase.DECODE]:
            while sequence.phase is Phase.DECODE and not self._extend(sequence):
                self._preempt(max(self._running, key=lambda s: s.rank))
        return tuple(s for s in self._running if s.phase is Phase.DECODE)

    def _extend(self, sequence: Sequence) -> bool:
        assert sequence.prefill.lease is not None
        lease, num_tokens = sequence.prefill.lease, sequence.fed + 1
        while not self._cache.extend(lease, num_tokens):
            if not (self._drop_commit_lease() or self._forgo_answer()):
                return False
        return True

    def _forgo_answer(self) -> bool:
        """Gives up the room of the newest answer that was to become a message -> whether there was one.

        A sequence that made room for itself by beginning again would need the same room again.
        """
        for sequence in sorted(self._running, key=lambda s: s.rank, reverse=True):
            program = sequence.prefill.program
            if program is not None and sequence.phase is Phase.DECODE and self._stage.forgo(program):
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue, with its tokens but without its pages."""
        self._running.remove(sequence)
        self._release(sequence.prefill)
        sequence.phase = Phase.WAITING
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    # Admission

    def _admit(self) -> tuple[Sequence, ...]:
        """Moves waiting sequences to running while there is room -> those whose whole prompt was kept."""
        resumed, passed_over = [], list[Sequence]()
        while self._waiting and self.has_room:
            sequence = self._waiting.popleft()
            if self._encode_missing(sequence.prefill):
                passed_over.append(sequence)
                continue
            match = self._match(sequence.prefill)
            if self._someone_computes_more(sequence.prefill, match):
                passed_over.append(sequence)  # its turn comes when the shared prefix is there
                continue
            if not self._acquire(sequence.prefill, match):
                passed_over.append(sequence)
                break
            self._running.append(sequence)
            sequence.started_s = sequence.started_s or time.monotonic()
            sequence.fed = len(sequence.prefill.tokens)
            sequence.phase = Phase.DECODE if sequence.prefill.done else Phase.PREFILL
            if sequence.prefill.done:
                resumed.append(sequence)
        self._waiting.extendleft(reversed(passed_over))
        return tuple(resumed)

    def _match(self, prefill: Prefill) -> Match:
        if prefill.arrangement is not None:
            return self._match_arranged(prefill)
        return self._cache.match(prefill.namespace, prefill.tokens if prefill.reuse else prefill.tokens[:0])

    def prefix_of(self, prefill: Prefill) -> int:
        """Tokens of a prompt that the cache has a state for."""
        return self._match(prefill).length

    def known(self, namespace: str, tokens: TokenArray) -> tuple[int, int]:
        """Tokens of a prefix that have a state, or will have one soon; tokens that have rows."""
        match = self._cache.match(namespace, tokens)
        most = match.length
        for prefill in (sequence.prefill for sequence in islice(self.sequences(), MOST_EARLIER)):
            if prefill.publish and prefill.namespace == namespace:
                needed = grid_floor(max(most, prefill.computed)) + TILE
                most = max(most, grid_floor(common_prefix(prefill.tokens, tokens, needed)))
        return most, match.shared

    def _match_arranged(self, prefill: Prefill) -> Match:
        """The prefix that an arranged prompt starts from, which ends before its answer's header."""
        assert prefill.arrangement is not None
        end = min(prefill.arrangement.answer_start or len(prefill.tokens), len(prefill.tokens) - 1)
        known = np.append(prefill.tokens[:end] if prefill.reuse else prefill.tokens[:0], np.int32(0))
        match = self._cache.match(prefill.namespace, known)  # one token more: no prompt ends there
        plan = self._stage.plan(prefill.arrangement, match.length)
        return match if plan.prefix == match.length else self._cache.match(prefill.namespace, known[:0])

    def _someone_computes_more(self, prefill: Prefill, match: Match) -> bool:
        """True while a running prompt is on its way to a longer shared prefix; asks it for a checkpoint there."""
        if not prefill.reuse or match.end is not None or prefill.arrangement is not None:
            return False
        for other in (s.prefill for s in self._running if s.phase is Phase.PREFILL):
            if not other.publish or other.namespace != prefill.namespace:
                continue
            if np.array_equal(other.tokens, prefill.tokens):
                return True
            shared = grid_floor(min(common_prefix(other.tokens, prefill.tokens), len(prefill.tokens) - 1))
            if shared > max(other.computed, match.length):
                other.wish(Wish(shared, CheckpointKind.BRANCH))
                return True
        return False

    def _acquire(self, prefill: Prefill, match: Match) -> bool:
        lease = self._cache.acquire(match, prefill.tokens, publish=prefill.publish)
        if lease is None and self._drop_commit_lease():
            lease = self._cache.acquire(self._match(prefill), prefill.tokens, publish=prefill.publish)
        if lease is None:
            return False
        prefill.lease, prefill.computed = lease, lease.length
        if prefill.arrangement is not None:
            begin = (prefill.namespace, prefill.arrangement, lease.length)
            prefill.program = self._stage.begin(*begin, self._num_waiting_for)
            if prefill.alone:
                self._stage.clear(lease)
            return True
        prefill.wishes = deque(
            self._cache.plan(
                lease,
                prefill.boundaries,
                only_marked=prefill.only_marked,
                generated=prefill.generated,
                again=prefill.planned,
            )
        )
        prefill.planned = True
        return True

    def _release(self, prefill: Prefill, num_output_tokens: int | None = None) -> None:
        if prefill.program is not None:
            self._stage.end(prefill.program)
        if prefill.lease is not None:
            self._cache.release(prefill.lease, num_output_tokens)
        prefill.lease, prefill.program, prefill.computed = None, None, 0

    # Prefill

    def _cut_chunks(self, tiles: int) -> tuple[Chunk, ...]:
        chunks = []
        for message in self._messages:
            if tiles > 0:
                chunks.append(self._cut(message, None, tiles))
                tiles -= -(-(chunks[-1].end - chunks[-1].start) // TILE)
        for sequence in self._running:
            if sequence.phase is Phase.PREFILL and tiles > 0:
                chunk = self._cut(sequence.prefill, sequence, tiles)
                tiles -= -(-(chunk.end - chunk.start) // TILE)
                chunks.append(chunk)
        return tuple(chunks)

    def _cut(self, prefill: Prefill, sequence: Sequence | None, tiles: int) -> Chunk:
        """The next at most `tiles` tiles of a prompt, with slots for the checkpoints wished for inside them."""
        assert prefill.lease is not None
        if prefill.program is not None:
            prefill.computed = self._stage.advance(prefill.program, prefill.lease, prefill.computed)
        start, end = prefill.computed, min(prefill.computed + tiles * TILE, prefill.until)
        if prefill.program is not None:
            stretch = self._stage.cut(prefill.program, prefill.lease, start, end)
            return Chunk(prefill, sequence, start, stretch.end, stretch.captures, stretch.cuts, stretch.spans)
        captures = []
        while prefill.wishes and prefill.wishes[0].position <= end:
            wish = prefill.wishes.popleft()
            if wish.position <= start:
                continue
            slot = self._cache.reserve_checkpoint(prefill.lease, wish.position, wish.kind, ttl_s=wish.ttl_s)
            if slot is not None:
                captures.append((wish.position, slot))
        return Chunk(prefill, sequence, start, end, tuple(captures))

    # Canonical commits

    def _commit_step(self) -> Step:
        """One tile of a finished turn, so that a request which arrives meanwhile waits for one tile at most."""
        while self._commits:
            commit = self._commits[0]
            if commit.lease is None and not self._start_commit(commit):
                self._commits.popleft()
                continue
            return Step((self._cut(commit, None, 1),))
        return Step()

    def _start_commit(self, commit: Prefill) -> bool:
        # A match leaves at least one token to compute; one more token shows whether all of ours are there.
        known = self._cache.match(commit.namespace, np.append(commit.tokens, np.int32(0)))
        return known.length < len(commit.tokens) and self._acquire(commit, self._match(commit))

    def end_commit(self, commit: Prefill) -> None:
        self._release(commit)
        self._commits.remove(commit)

    def _drop_commit_lease(self) -> bool:
        """Gives up the room of the commit in progress -> whether there was one. What it has published stays."""
        if not self._commits or self._commits[0].lease is None:
            return False
        self._release(self._commits[0])
        return True


def common_prefix(a: TokenArray, b: TokenArray, needed: int = 1) -> int:
    """Number of leading tokens that a and b share; 0 if these are fewer than `needed`."""
    n = min(len(a), len(b))
    if n < needed or a[needed - 1] != b[needed - 1]:
        return 0
    differs = np.flatnonzero(a[:n] != b[:n])
    shared = int(differs[0]) if len(differs) else n
    return shared if shared >= needed else 0
