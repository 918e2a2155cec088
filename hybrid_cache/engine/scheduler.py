"""Who computes what in the next step. Owns the queues; asks the cache for room and never touches a tensor.

Continuous batching with chunked prefill: running sequences decode one token a step, and prompts go through in tiles
in the same steps. Without room the newest sequence gives its pages back and is computed again later.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.disk.loading import Load
from hybrid_cache.cache.disk.tier import DiskTier
from hybrid_cache.cache.lease import Match
from hybrid_cache.cache.policies.signals import Finish
from hybrid_cache.choreography import commands as choreography
from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.choreography.compiler import Compiler
from hybrid_cache.choreography.stage import Stage
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.canonical import CanonicalPasses
from hybrid_cache.engine.encodings import Encodings
from hybrid_cache.engine.endings import Endings
from hybrid_cache.engine.pace import Pace
from hybrid_cache.engine.prefills import Chunk, Prefills, decode_rows
from hybrid_cache.engine.senders import Senders
from hybrid_cache.engine.sequence import Phase, Prefill, Sequence
from hybrid_cache.engine.shares import DECODE_WEIGHT, Shares
from hybrid_cache.engine.suspects import Suspects
from hybrid_cache.engine.tasks import Tasks
from hybrid_cache.engine.turns import MOST_PASSED_OVER, Gap, prompts_in_turn
from hybrid_cache.engine.twins import Twins
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.scheduling.base import Order
from hybrid_cache.spec import PrefillCost
from hybrid_cache.work import Command, Work

SCARCE = 8  # memory is, where less than this part of it is free

logger = logging.getLogger("hybrid_cache")


@dataclass(frozen=True, slots=True)
class Step:
    """Who takes part in one forward pass, and the sequences that need none because their prompt's end is kept."""

    chunks: tuple[Chunk, ...] = ()
    decodes: tuple[Sequence, ...] = ()
    resumed: tuple[Sequence, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.chunks or self.decodes or self.resumed)

    @property
    def sequences(self) -> Iterator[Sequence]:
        """Those of requests."""
        yield from (chunk.sequence for chunk in self.chunks if chunk.sequence is not None)
        yield from self.decodes
        yield from self.resumed

    @property
    def request_ids(self) -> str:
        """For logs."""
        return ", ".join(dict.fromkeys(sequence.request.id for sequence in self.sequences)) or "-"

    def work(self, commands: tuple[Command, ...]) -> Work:
        """What the device has to do, after some commands. Behind the chunks come sequences that are fed several tokens,
        and last what is made beside chunks.
        """
        kept = tuple(s.prefill.lease.slot for s in self.resumed if s.prefill.lease is not None)
        fed = [decode_rows(s) for s in self.decodes]
        leaps, singles = (tuple(rows for rows in fed if (len(rows.tokens) > 1) is several) for several in (True, False))
        beside = (rows._replace(beside=i) for i, chunk in enumerate(self.chunks) for _, rows in chunk.twins)
        return Work(commands, (*(c.rows for c in self.chunks), *leaps, *beside), singles, kept)


class Scheduler:
    """The queues: waiting, running (in order of arrival), messages to store, and finished turns to compute again."""

    def __init__(
        self,
        cache: Books,
        cost: PrefillCost,
        config: EngineConfig,
        order: Order,
        compiler: Compiler,
        stage: Stage,
        clock: Callable[[], float],
        disk: DiskTier | None = None,
    ) -> None:
        self._clock = clock
        self._cache = cache
        self._cost = cost
        self._stage = stage
        self._compiler = compiler
        self.disk = disk
        self._max_running = config.max_running
        self._max_tiles = config.max_tiles
        self._max_tiles_beside_decode = config.max_tiles_beside_decode
        self.pace = Pace(cost, None if config.max_step_ms is None else config.max_step_ms / 1e3)
        self.tasks = Tasks(order, cache, cost, self.pace, clock)
        self._waiting = self.tasks.waiting
        self._running: list[Sequence] = []
        self.senders = Senders()
        self.twins = Twins(cache, cost, self.senders, on=config.double_writing)
        self._prefills = Prefills(cache, cost, compiler, stage, self.senders, self.twins)
        self.messages = Encodings(cache, compiler, stage, self._prefills, config.max_tiles)
        self.canonical = CanonicalPasses(cache, self._prefills, self.tasks.pauses)
        self.endings = Endings(cache.tell)
        self._shares = Shares()
        self._suspects = Suspects()
        self._aged_last = False  # in the last step with a prompt, one that had been passed over too often went first
        self.num_preemptions = 0
        self.num_out_of_memory = 0

    @property
    def has_room(self) -> bool:
        """Whether one more sequence may run."""
        return len(self._running) < self._max_running

    @property
    def num_waiting(self) -> int:
        """Waiting requests; further choices of one that has begun are not counted."""
        return self._waiting.num_requests

    @property
    def num_loading(self) -> int:
        """Of the waiting ones, those that wait for a disk."""
        return sum(bool(sequence.prefill.loads) for sequence in self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Nobody waits for an answer; canonical passes may still be pending."""
        return not (self._waiting or self._running or self.messages)

    @property
    def has_work(self) -> bool:
        return not self.idle or bool(self.canonical) or (self.disk is not None and self.disk.can_save)

    def sequences(self) -> Iterator[Sequence]:
        yield from self._running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        self._shares.enter(sequence.request.tenant)
        self.tasks.enter(sequence, self._num_cached(sequence.prefill))

    def _num_cached(self, prefill: Prefill) -> int:
        """Tokens of a prompt that the cache has; not looked for where a choreography says what is taken from it."""
        return 0 if prefill.arrangement is not None or not prefill.reuse else self._prefills.match(prefill).length

    def adopt(self, sequence: Sequence) -> None:
        """Takes in a sequence that already has a lease: a fork of a running one."""
        sequence.phase = Phase.DECODE
        self._shares.enter(sequence.request.tenant)
        self._running.append(sequence)

    def finish(self, sequence: Sequence, finish: Finish) -> None:
        """Ends a sequence wherever it is; what it has published stays in the cache."""
        if sequence.phase is not Phase.WAITING:
            self._running.remove(sequence)
        self.tasks.gone(sequence)
        sequence.phase = Phase.FINISHED
        self._shares.leave(sequence.request.tenant)
        self._suspects.ended(sequence.rank)
        self.endings.ended(
            sequence.request.id, self._prefills.release(sequence.prefill, len(sequence.generated), finish)
        )

    def schedule(self) -> Step:
        """Chooses the next step and takes the room that it needs."""
        if self.disk is not None:
            self.disk.look(idle=self.idle)
        if self.idle:
            chunk = self.canonical.next_chunk()
            return Step() if chunk is None else Step((chunk,))
        if self._suspects.advance():
            self._preempt_all(self._running)
        running, admitted = self._extend_decodes(), self._admit()
        decodes, resumed = _decoding(running), _decoding(admitted)  # some may have given way
        chunks = self._cut_chunks(self._max_tiles_beside_decode if decodes else self._max_tiles, bool(decodes))
        if self._shares.compares:
            for sequence in decodes:
                self._shares.charge(sequence.request.tenant, DECODE_WEIGHT * sequence.stride)
        return Step(chunks or self.canonical.spare_tile(), decodes, resumed)

    def gap(self, step: Step) -> Gap | None:
        """What fits between the layers of a pass; None if it has to stay by itself."""
        if self._suspects or not step.chunks or any(chunk.sequence is None for chunk in step.chunks):
            return None
        flops = sum(chunk.flops for chunk in step.chunks)
        return Gap(flops, self._max_tiles, frozenset(step.sequences))

    def schedule_between(self, gap: Gap) -> Step:
        """Chooses whole prompts that need not wait for the end of a pass, and takes the room that they need."""
        admitted = self._admit(gap)
        chunks = tuple(self._cut(s.prefill, s, s.prefill.tiles_left) for s in admitted if s.phase is Phase.PREFILL)
        return Step(chunks, (), _decoding(admitted))

    def _num_waiting_for(self, namespace: str, name: str) -> int:
        """Waiting prompts of a namespace with a message of this id."""
        prefills = (sequence.prefill for sequence in self._waiting)
        arrangements = (prefill.arrangement for prefill in prefills if prefill.namespace == namespace)
        return sum(arrangement is not None and name in arrangement.ids for arrangement in arrangements)

    # Decoding

    def _extend_decodes(self) -> tuple[Sequence, ...]:
        """Sequences that decode in this step, each with room for one more token; preempts from the newest."""
        for sequence in _decoding(self._running):
            while sequence.phase is Phase.DECODE and not self._extend(sequence):
                self._preempt(max(self._running, key=lambda s: s.rank))
        return _decoding(self._running)

    def _extend(self, sequence: Sequence) -> bool:
        assert sequence.prefill.lease is not None
        lease, num_tokens = sequence.prefill.lease, sequence.fed + sequence.stride
        while not self._cache.extend(lease, num_tokens):
            if not (self.canonical.give_room() or self.twins.give_room() or self._forgo_answer()):
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
        self.tasks.gave_way(sequence)
        if sequence.prefill.lease is not None:
            sequence.spells.append((sequence.prefill.lease.since_s, self._clock()))
        self._prefills.release(sequence.prefill)
        sequence.phase, sequence.prefill.asked_disk = Phase.WAITING, False
        self._waiting.add(sequence)
        self.num_preemptions += 1
        logger.debug("request %s gives its memory back, and begins again", sequence.request.id)

    # Admission

    def _admit(self, gap: Gap | None = None) -> list[Sequence]:
        """Moves waiting sequences to running while there is room, and a gap if one is given -> those that were moved.

        One whose whole prompt is kept decodes, the others have theirs computed.
        """
        admitted, passed_over = list[Sequence](), list[Sequence]()
        if not self._waiting:
            return admitted
        for sequence in self.tasks.in_turn(self._running, self._shares):
            if not (self._suspects.may_run(sequence.arrival) and (not gap or gap.may_enter(sequence, self._shares))):
                passed_over.append(sequence)
                continue
            if self._still_loads(sequence.prefill):
                passed_over.append(sequence)
                continue
            if not (self.has_room or self._make_room(sequence, gap)):
                passed_over.append(sequence)
                break
            match = self._match_now(sequence.prefill, gap)
            if match is None:
                passed_over.append(sequence)
                continue
            if gap is None and self._would_wait(sequence.prefill):
                passed_over.append(sequence)
                break
            if self._is_loading(sequence.prefill, match):
                passed_over.append(sequence)
                continue
            if not self._acquire(sequence, match, gap):
                passed_over.append(sequence)
                break
            if gap:
                gap.take(*_left(self._cost, sequence.prefill, match))
            self._running.append(sequence)
            self.tasks.admitted(sequence)
            sequence.started_s = sequence.started_s or self._clock()
            sequence.fed = len(sequence.prefill.tokens)
            sequence.phase = Phase.DECODE if sequence.prefill.done else Phase.PREFILL
            admitted.append(sequence)
        for sequence in passed_over:
            self._waiting.add(sequence)
        return admitted

    def _match_now(self, prefill: Prefill, gap: Gap | None) -> Match | None:
        """What the cache has of a prompt; None while it waits for its messages, a prefix on its way or a larger gap."""
        if self.messages.wanted(prefill):
            return None
        match = self._prefills.match(prefill)
        if self._prefills.is_on_its_way(prefill, match, self._running):
            return None
        flops, tiles = _left(self._cost, prefill, match)
        return match if gap is None or (flops <= gap.flops and tiles <= gap.tiles) else None

    def _is_loading(self, prefill: Prefill, match: Match) -> bool:
        """Whether more of a prompt is on its way from the disk, which is asked once, and comes sooner than computed."""
        if self.disk is None or not prefill.reuse or prefill.arrangement is not None:
            return False
        if not prefill.asked_disk:
            prefill.asked_disk = True
            load = self.disk.begin(match, self._seconds)
            prefill.loads = [] if load is None else [load]
        return self._still_loads(prefill)

    def _still_loads(self, prefill: Prefill) -> bool:
        if self.disk is None:
            return False
        if prefill.arrangement is not None and prefill.reuse and not prefill.asked_disk:
            prefill.asked_disk, prefill.loads = True, self._load_messages(self.disk, prefill, prefill.arrangement)
        under_way = [load for load in prefill.loads if self.disk.loading.is_under_way(load)]
        prefill.num_loaded += sum(load.num_loaded for load in prefill.loads if load not in under_way)
        prefill.loads = under_way
        return bool(prefill.loads)

    def _load_messages(self, disk: DiskTier, prefill: Prefill, arrangement: Arrangement) -> list[Load]:
        """Has the messages of a prompt loaded that are on the disk and not stored."""
        if prefill.in_place:
            return []
        keys = self._compiler.lacking(prefill.namespace, arrangement)
        loads = (disk.begin_message(prefill.namespace, key, self._seconds) for key in keys)
        return [load for load in loads if load is not None]

    def _seconds(self, start: int, end: int) -> float:
        """That it takes to compute tokens [start, end) of a prompt; 0 while that is not known."""
        return self.pace.s_per_flop * self._cost.flops(start, end)

    def _make_room(self, sequence: Sequence, gap: Gap | None) -> bool:
        """Takes a place from the tenant who holds most for one who holds less than its share -> whether it did.

        The sequence that gives way is one for which least was computed, and none whose pass is under way; not for one
        that would wait all the same.
        """
        if not self._shares.compares:
            return False
        held = Counter(s.request.tenant for s in self._running)
        share = self._max_running // self._shares.num_present
        most, count = held.most_common(1)[0]
        if held[sequence.request.tenant] >= share or count <= share:
            return False
        under_way = gap.under_way if gap else ()
        candidates = [s for s in self._running if s.request.tenant == most and s not in under_way]
        if not candidates or self._match_now(sequence.prefill, gap) is None:
            return False
        self._preempt(min(candidates, key=lambda s: (s.phase is Phase.DECODE, s.prefill.computed + len(s.generated))))
        return True

    def prefix_of(self, prefill: Prefill) -> int:
        """Tokens of a prompt that the cache has a state for."""
        return self._prefills.match(prefill).length

    def _would_wait(self, prefill: Prefill) -> bool:
        """Whether running prompts that go before this one fill the next step, and memory is too scarce for prompts that
        do not use it yet.
        """
        if self._cache.free_bytes * SCARCE > self._cache.budget_bytes:
            return False
        most = -(-len(prefill.tokens) // TILE)
        decodes = any(s.phase is Phase.DECODE for s in self._running)
        tiles = self._max_tiles_beside_decode if decodes else self._max_tiles
        before = (s.prefill for s in self._running if s.phase is Phase.PREFILL)
        return sum(p.tiles_left for p in before if p.tiles_left <= most) >= tiles

    def _acquire(self, sequence: Sequence, match: Match, gap: Gap | None) -> bool:
        """Takes room for a prompt; while others run, what those who will come back count on stays."""
        prefill, spare = sequence.prefill, self.tasks.spare(busy=bool(self._running))
        keeps_end = self.tasks.reserves(sequence, match.length)
        num_others = partial(self._num_waiting_for, prefill.namespace)
        if self._prefills.acquire(prefill, match, num_others, keeps_end, spare):
            return True
        if keeps_end and spare is None and self._prefills.acquire(prefill, match, num_others):
            return True
        if not (self.canonical.give_room() or (gap is None and self.twins.give_room())):
            return False
        match = self._prefills.match(prefill)
        return self._prefills.acquire(prefill, match, num_others, keeps_end and bool(spare), spare)

    # Prefill

    def _cut_chunks(self, tiles: int, decodes: bool) -> tuple[Chunk, ...]:
        """Messages first, then prompts in turn. Behind one that ends in the first quarter of a step come only others
        that end in it: more would delay its first token several times.
        """
        chunks, room, ends, quarter = list[Chunk](), self.pace.room(decodes=decodes), False, tiles - tiles // 4
        aged_first = not self._aged_last
        prompts = prompts_in_turn(self._running, self._shares, aged_first=aged_first)
        if not (prompts or self.messages):
            return ()
        for prefill, sequence in [*((message, None) for message in self.messages), *((s.prefill, s) for s in prompts)]:
            most = min(room.tiles(prefill.computed, tiles, prefill.beside), tiles)
            if most <= 0 or (ends and prefill.tiles_left > most):
                prefill.passed_over += 1
                continue
            chunk = self._cut(prefill, sequence, most)
            chunks.append(chunk)
            room.take(chunk.start, chunk.end, prefill.beside)
            tiles -= chunk.most_tiles
            if not chunks[1:]:
                self._aged_last = aged_first and prefill.passed_over >= MOST_PASSED_OVER
                if sequence is not None:
                    self._shares.take_turn(sequence.request.tenant)
            prefill.passed_over = 0
            if sequence is not None:
                ends = ends or (chunk.end == len(prefill.tokens) and tiles >= quarter)
        return tuple(chunks)

    def wrote_twins(self, chunk: Chunk) -> None:
        """To be called when a chunk has been computed, before what it has written is published."""
        self._prefills.wrote(chunk)

    def _cut(self, prefill: Prefill, sequence: Sequence | None, tiles: int) -> Chunk:
        chunk = self._prefills.cut(prefill, sequence, tiles)
        if sequence is not None:
            self._shares.charge(sequence.request.tenant, chunk.end - chunk.start)
        return chunk

    # Failures

    def failed(self, step: Step) -> str | None:
        """Takes back a step that failed -> the id of the request at fault, if that is known now.

        States of its sequences may have moved on: all that run begin again, as after any preemption, and those of the
        step as suspects. Messages for the store and canonical passes in it are given up, and all twins; then these may
        have been at fault, and nobody is suspected.
        """
        self.twins.forget()
        doubled = any(chunk.twins for chunk in step.chunks)
        others = [chunk.prefill for chunk in step.chunks if chunk.sequence is None]
        for prefill in others:
            if prefill in self.messages:
                self.messages.end(prefill)
            elif prefill in self.canonical:
                self.canonical.end(prefill)
        ends = {chunk.sequence.rank: chunk.end for chunk in step.chunks if chunk.sequence is not None}
        arrivals = {sequence.arrival for sequence in step.sequences}
        goals = {s.rank: ends.get(s.rank, s.fed + 1) for s in self._running if s.arrival in arrivals}
        self._preempt_all(self._running)
        arrival = None if others or doubled else self._suspects.failed(goals)
        self._max_running = self._suspects.fewer(self._max_running)
        return next((s.request.id for s in self._waiting if s.arrival == arrival), None)

    def take_back(self, step: Step, gap: Gap) -> None:
        """Takes back a step between layers: its sequences begin again in another one, with what forked from them."""
        arrivals = {sequence.arrival for sequence in step.sequences}
        self._preempt_all([s for s in self._running if s.arrival in arrivals and s not in gap.under_way])

    def passed(self, step: Step) -> None:
        """To be called after a step that has not failed."""
        if not self._suspects:
            return self._suspects.rest()
        for sequence in step.sequences:
            decodes = sequence.phase is Phase.DECODE
            self._suspects.reached(sequence.rank, sequence.fed if decodes else sequence.prefill.computed)

    def add_alone(self, sequence: Sequence) -> None:
        """Takes in a sequence that runs before all others and by itself."""
        self._preempt_all(self._running)
        self.add(sequence)
        self._suspects.try_alone(sequence.rank)

    # Device memory

    def out_of_memory(self, step: Step, lost: Collection[Command] = ()) -> bool:
        """Takes back a step for which the device had no memory, and makes all later ones smaller.

        lost: commands that were not carried out
        Some states of its sequences may have moved on and others not, so these sequences begin again, as after any
        preemption. A canonical pass is given up, and so are messages for the store: prompts that wait for them
        compute them in place. False, and nothing changes, where a step cannot be smaller.
        """
        if lost:
            return self._lost(lost)
        if self.idle:
            self.canonical.give_up_first()
            self.num_out_of_memory += 1
            return True
        self.twins.forget()
        messages = [chunk.prefill for chunk in step.chunks if chunk.prefill in self.messages]
        turns = [chunk.prefill for chunk in step.chunks if chunk.sequence is None and chunk.prefill not in messages]
        num_tiles = sum(chunk.least_tiles for chunk in step.chunks)  # what limits are set for
        num_sequences = len(step.chunks) + len(step.decodes)
        if num_tiles <= 1 and num_sequences <= 1 and not messages:
            return False
        for message in messages:
            self.messages.end(message)
        for turn in turns:
            self.canonical.end(turn)
        if num_tiles > 1:
            self._max_tiles = self.messages.most = min(self._max_tiles, num_tiles // 2)
            self._max_tiles_beside_decode = min(self._max_tiles_beside_decode, num_tiles // 2)
        if step.decodes and num_sequences > 1:
            self._max_running = min(self._max_running, num_sequences // 2)
        sequences = [chunk.sequence for chunk in step.chunks if chunk.sequence is not None]
        self._preempt_all([*sequences, *step.decodes, *step.resumed])
        self.num_out_of_memory += 1
        logger.warning(
            "no device memory for %d prefill tiles and %d decode rows; from now on at most %d tiles (%d beside decode) "
            "and %d sequences",
            *(num_tiles, len(step.decodes), self._max_tiles, self._max_tiles_beside_decode, self._max_running),
        )
        return True

    def _lost(self, commands: Collection[Command]) -> bool:
        """Begins again with all sequences, and without what there was no memory for: messages that could not be
        written are forgotten, and prompts of messages compute all of them.
        """
        moves = [command for command in commands if isinstance(command, choreography.Command)]
        if len(moves) < len(commands):
            return False
        self.canonical.give_room()
        for message in list(self.messages):
            self.messages.end(message)
        self._preempt_all(self._running)
        for command in moves:
            self._cache.messages.forget(command.written())
        for sequence in self._waiting:
            sequence.prefill.in_place = True
        self.num_out_of_memory += 1
        logger.warning("no device memory to put messages together: %d prompts compute theirs", len(self._waiting))
        return True

    def _preempt_all(self, sequences: Collection[Sequence]) -> None:
        for sequence in list(sequences):
            self._preempt(sequence)


def _decoding(sequences: Iterable[Sequence]) -> tuple[Sequence, ...]:
    return tuple(sequence for sequence in sequences if sequence.phase is Phase.DECODE)


def _left(cost: PrefillCost, prefill: Prefill, match: Match) -> tuple[float, int]:
    """FLOPs and tiles of what the cache lacks of a prompt."""
    num_tokens = len(prefill.tokens)
    return cost.flops(match.length, num_tokens), -(-(num_tokens - match.length) // TILE)
