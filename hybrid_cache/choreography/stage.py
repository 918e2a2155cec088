"""Carries plans out on the cache: puts stored messages in their place, and stores those that were computed.

An arranged prompt is a list of moves. The engine computes what it always computes, chunk by chunk; between chunks the
stage takes the moves that need no model:

    [ attach a ][ attach b ][ compute c, keep it ][ attach d ][ compute e, keep it ][ compute the rest ]
      KV rows copied, keys turned; states composed              one chunk: states are captured between its messages

An arranged sequence shares with the tree only the pages below the state that it starts from; all others are its own,
and nothing of it is ever published in the tree. What is stored for one place is copied to another, never written to.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.tree import StoredMessage
from hybrid_cache.choreography.arrangement import Arrangement, Composition, Encoding, Fidelity, Positions
from hybrid_cache.choreography.plan import Action, Plan, exact_plan, make_plan, plan_behind
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.compose import compose
from hybrid_cache.device.effects import Anatomy, Effect, Numbers
from hybrid_cache.device.memory import HybridCache
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import StateTensors

SHORT = 32  # tokens of a message that is not worth a step of its own
MOST_TOGETHER = 16  # messages whose effects are looked at together, where one after the other does as well
STEP_TOKENS = 16  # a step costs about as much as so many tokens in a step that is made anyway


@dataclass(slots=True)
class Span:
    """Tokens from `start` on that are being computed and will be stored."""

    key: str
    start: int
    position: int
    effect: Effect  # in memory lent by the cache


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens [start, end) of a prompt: attached, or computed and then, if `keep` names a key, stored under it."""

    start: int
    end: int
    position: int  # of the first token
    stored: StoredMessage | None = None
    keep: str = ""
    opens: bool = False  # the answer's message begins here

    @property
    def shift(self) -> int:
        """Place of a row less its position."""
        return self.start - self.position


@dataclass(slots=True, eq=False)
class Program:
    """What is left to do of a prompt."""

    namespace: str
    moves: deque[Move]
    plan: Plan
    composition: Composition = Composition.ORDERED
    joins: bool = False  # one chunk may compute several moves
    alone: bool = False  # begins with a message that is stored from its first token, as if no text began there
    span: Span | None = None  # of the first move
    later: deque[Span] = field(default_factory=deque)  # of other moves that the chunk on its way computes
    states: dict[int, int] = field(default_factory=dict)  # place -> a slot with the states there, lent by the cache
    shift: int = 0  # place of a row less its position, for what is being computed
    answer_at: int = -1  # the answer's message is kept from this place on
    spare: Effect | None = None  # for the first message

    def fork(self) -> "Program":
        """For another answer to the same prompt, which is not kept."""
        return Program(self.namespace, deque(), self.plan, shift=self.shift)

    def until(self) -> int:
        """Where the present stretch of computing ends."""
        return self.stretch()[-1].end

    def stretch(self) -> list[Move]:
        """The moves that one chunk may compute."""
        first, *others = self.moves
        found = [first]
        for move in others if self.joins else ():
            if move.stored is not None or move.shift != first.shift:
                break
            found.append(move)
        return found


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a chunk of an arranged prompt computes: tokens up to `end`, with its messages apart."""

    end: int
    captures: tuple[tuple[int, int], ...]  # place between messages, slot that gets the states there
    spans: tuple[tuple[int, int, Effect], ...]  # start, end, and where what these tokens do to the states is noted

    @property
    def cuts(self) -> tuple[int, ...]:
        """Places where a tile ends."""
        return tuple(place for place, _ in self.captures)


class Stage:
    """The choreography of one engine: what its layers have told, and what is in the making."""

    def __init__(self, cache: HybridCache, model: HybridModel, anatomy: Anatomy) -> None:
        """anatomy: filled by recorded passes of the model"""
        self.anatomy = anatomy
        self._cache = cache
        self._model = model
        self._cost = model.prefill_cost
        self._states = [t for t in cache.tensors if isinstance(t, StateTensors)]
        self._num_sums = model.cache_spec.effect_sums
        self._making: set[str] = set()

    def can(self, arrangement: Arrangement) -> str:
        """Why a prompt is computed exactly and not arranged in this way; empty if it can be arranged."""
        if arrangement.fidelity is Fidelity.EXACT:
            return "as asked"
        if arrangement.fidelity not in self._model.ways:
            has = (
                "recurrent states, which cannot be moved" if self._model.ways else "layers that cannot be put together"
            )
            return f"{arrangement.fidelity} is not possible: the model has {has}"
        if arrangement.composition is Composition.PERMUTATIONS and not self._model.commutes:
            return "permutations are not possible: the model's transitions are matrices, which do not commute"
        return ""

    def exact_plan(self, arrangement: Arrangement, prefix: int, why: str) -> Plan:
        """Everything behind a prefix is computed; why, if something else was asked for."""
        ids, lengths = [p.id for p in arrangement.parts], [p.num_tokens for p in arrangement.parts]
        why = "" if arrangement.fidelity is Fidelity.EXACT else why
        if arrangement.reordered:
            why = "; ".join(filter(None, [why, "the order was chosen for what the cache has of it"]))
        return exact_plan(arrangement.fidelity, ids, lengths, prefix, self._cost, why)

    def key(self, arrangement: Arrangement, name: str) -> str:
        """A message whose first tokens are computed again is stored without them."""
        return f"{name}/{arrangement.seam}"

    def is_stored(self, key: str) -> bool:
        return self._cache.messages.get(key) is not None

    def is_making(self, key: str) -> bool:
        """Somebody is computing it."""
        return key in self._making

    def plan(self, arrangement: Arrangement, prefix: int) -> Plan:
        """What would be done now for a prompt whose first `prefix` tokens the cache has a state for."""
        return make_plan(arrangement, prefix, self._has(arrangement), self._cost, states=bool(self._states))

    def _has(self, arrangement: Arrangement) -> Callable[[str], bool]:
        """Whether the message of an id is stored as an arrangement needs it."""
        return lambda name: self.is_stored(self.key(arrangement, name))

    def missing(self, arrangement: Arrangement) -> list[int]:
        """Indices of parts that have to be encoded alone before a prompt begins; all of them can be encoded at once.

        The first part is alone in its place, too; but where messages are averaged, each has to be apart.
        """
        first = int(arrangement.composition is Composition.ORDERED)
        return [
            i
            for i, part in enumerate(arrangement.parts)
            if i >= first
            and part.id
            and part.encoding is Encoding.ALONE
            and part.num_tokens > arrangement.seam
            and not self.is_stored(self.key(arrangement, part.id))
        ]

    # Programs

    def begin(
        self, namespace: str, arrangement: Arrangement, prefix: int, num_others: Callable[[str], int] = lambda _: 0
    ) -> Program:
        """The moves of a prompt that has just got its pages; holds the stored messages that it uses.

        num_others: how many waiting prompts have a message with this id
        """
        plan = plan_behind(arrangement, prefix, self._has(arrangement), self._cost, states=bool(self._states))
        assert plan.prefix == prefix
        passing = arrangement.parts[-2] if self._passes(plan, arrangement, num_others) else None
        moves, position = deque[Move](), prefix
        sibling_start = sibling_end = prefix
        leftmost = arrangement.positions is Positions.LEFTMOST
        for item, part in zip(plan.items, arrangement.parts, strict=True):
            if item.end <= prefix:
                continue
            first = max(item.start, prefix)
            message = (
                self._cache.messages.get(self.key(arrangement, item.id)) if item.action is not Action.COMPUTED else None
            )
            if leftmost and item.id:
                position = sibling_start
            elif leftmost:
                position = sibling_end
            if message is None:
                wanted = part.id and part.keep and item.end - first > arrangement.seam and first == item.start
                keep = self.key(arrangement, part.id) if wanted and part is not passing else ""
                if keep and not self.is_stored(keep) and not self.is_making(keep):
                    moves += self._kept_moves(first, item.end, position, arrangement.seam, keep)
                else:
                    _compute(moves, first, item.end, position)
            else:
                seam = arrangement.seam
                if seam:
                    _compute(moves, first, first + seam, position)
                self._cache.messages.hold(message)
                moves.append(Move(first + seam, item.end, position + seam, stored=message))
            position += item.end - first
            sibling_end = max(sibling_end, position)
            if not item.id:
                sibling_start = sibling_end
        answer_at = -1 if arrangement.closing is None else arrangement.answer_start + arrangement.seam
        if 0 <= answer_at < plan.num_tokens:
            moves = self._opened(moves, answer_at)
        begins_alone = arrangement.parts[0].encoding is Encoding.ALONE
        return Program(
            namespace,
            moves,
            plan,
            arrangement.composition,
            joins=self._model.packs,
            alone=begins_alone and bool(moves[0].keep) and moves[0].start == 0,
            answer_at=answer_at,
        )

    @staticmethod
    def _passes(plan: Plan, arrangement: Arrangement, num_others: Callable[[str], int]) -> bool:
        """Whether the last message is new and too short for a step of its own: it is computed, but not stored.

        Whoever waits for a message needs one more step, and so does its prompt where a chunk holds one message.
        """
        if len(arrangement.parts) < 2 or arrangement.parts[-1].id:
            return False
        item, part = plan.items[-2], arrangement.parts[-2]
        if item.action is not Action.COMPUTED or part.num_tokens > SHORT:
            return False
        return part.num_tokens * num_others(part.id) <= STEP_TOKENS

    def encoding(self, namespace: str, arrangement: Arrangement, index: int) -> Program | None:
        """The moves that encode one part alone, in a sequence that starts with states of zero. None without room."""
        part, seam = arrangement.parts[index], arrangement.seam
        key = self.key(arrangement, part.id)
        spare = self._new_effect(namespace, key, seam, part.num_tokens)
        if spare is None:
            return None
        moves = deque(self._kept_moves(0, part.num_tokens, 0, seam, key))
        plan = exact_plan(arrangement.fidelity, [part.id], [part.num_tokens], 0, self._cost)
        return Program(namespace, moves, plan, joins=self._model.packs, alone=True, spare=spare)

    def _new_effect(self, namespace: str, key: str, start: int, end: int) -> Effect | None:
        """To note what the tokens [start, end) do to the states; None where the cache gives no room for it."""
        items = self._cache.messages.lend_extra(namespace, key, start, end)
        return None if items is None else Effect(Numbers(self._cache.memory.numbers, items), self._num_sums)

    def _new_span(self, program: Program, key: str, start: int, end: int, position: int) -> Span | None:
        spare, program.spare = program.spare, None
        effect = spare or self._new_effect(program.namespace, key, start, end)
        return None if effect is None else Span(key, start, position, effect)

    def _drop(self, effect: Effect) -> None:
        """Gives back the memory of what will not be stored."""
        self._cache.messages.return_extra(effect.close())

    def _kept_moves(self, start: int, end: int, position: int, seam: int, key: str) -> list[Move]:
        self._making.add(key)
        kept = Move(start + seam, end, position + seam, keep=key)
        return [Move(start, start + seam, position), kept] if seam else [kept]

    @staticmethod
    def _opened(moves: deque[Move], answer_at: int) -> deque[Move]:
        """Splits the last move where the answer's message begins."""
        last = moves.pop()
        assert last.stored is None
        if last.start < answer_at:
            moves.append(Move(last.start, answer_at, last.position))
        start = max(answer_at, last.start)
        moves.append(Move(start, last.end, last.position + start - last.start, opens=True))
        return moves

    def clear(self, lease: Lease) -> None:
        """Gives a lease states of zero."""
        for tensors in self._states:
            tensors.conv[lease.slot] = 0
            tensors.state[lease.slot] = 0

    def advance(self, program: Program, lease: Lease, computed: int) -> int:
        """Takes the moves that need no model -> tokens that are now in the lease's pages and states."""
        moves = program.moves
        while moves and moves[0].end <= computed:
            self._end_move(program, lease, moves.popleft())
            if program.later and moves and moves[0].start == program.later[0].start:
                program.span = program.later.popleft()
        assert not program.later
        attached = []
        while moves and moves[0].stored is not None:
            attached.append(moves.popleft())
        if attached:
            self._attach(program, lease, attached, from_zero=computed == 0)
            computed = attached[-1].end
        self._give_back(program, keep=program.span)
        if moves and moves[0].start == computed:
            self._begin_move(program, lease, moves[0])
        return computed

    def cut(self, program: Program, lease: Lease, start: int, end: int) -> Stretch:
        """What a chunk with the tokens [start, end) of a stretch computes; it ends earlier where slots run out."""
        captures: list[tuple[int, int]] = []
        spans = [program.span] if program.span is not None else []
        for before, move in pairwise(program.stretch()):
            if move.start >= end:
                break
            if not (before.keep or move.keep or move.opens):
                continue
            opens = move.keep or move.opens
            span = self._new_span(program, move.keep, move.start, move.end, move.position) if opens else None
            slot = self._cache.messages.lend_slot() if self._states and (span or not opens) else None
            if (opens and span is None) or (self._states and slot is None):
                if span is not None:
                    self._drop(span.effect)
                end = move.start
                break
            if slot is not None:
                program.states[move.start] = slot
                captures.append((move.start, slot))
            if span is not None:
                program.later.append(span)
        ends = {move.start: min(move.end, end) for move in program.moves}
        noted = ((span, min(ends.get(span.start, end), end)) for span in (*spans, *program.later))
        return Stretch(end, tuple(captures), tuple((max(s.start, start), stop, s.effect) for s, stop in noted))

    def _begin_move(self, program: Program, lease: Lease, move: Move) -> None:
        program.shift = move.shift
        if (move.keep or move.opens) and program.span is None:
            self._open(program, lease, move.keep, move.start, move.end)

    def _open(self, program: Program, lease: Lease, key: str, start: int, end: int) -> None:
        """Records what the tokens [start, end) do; not where there is no room for it and the states before them."""
        span = self._new_span(program, key, start, end, start - program.shift)
        base = self._cache.messages.lend_slot() if span is not None and self._states and start > 0 else None
        if span is None or (self._states and start > 0 and base is None):
            self._making.discard(key)
            if span is not None:
                self._drop(span.effect)
            return
        if base is not None:
            self._cache.messages.copy_slot(lease.slot, base)
            program.states[start] = base
        program.span = span

    def decoded(self, program: Program, lease: Lease, place: int) -> None:
        """To be called before the token at `place` of an answer is computed."""
        if place == program.answer_at and program.span is None:
            self._open(program, lease, "", place, place + TILE)  # how long it will be, nobody knows

    def _end_move(self, program: Program, lease: Lease, move: Move) -> None:
        if move.keep and program.span is not None:
            self._store(program, lease, program.span, move.end)
            self._making.discard(move.keep)
            program.span = None

    def answer(self, program: Program, key: str, end: int, place: int) -> Program | None:
        """The moves that complete an answer's message: tokens [place, end) are not computed yet. None: not possible."""
        if program.span is None or self.is_stored(key) or self.is_making(key):
            return None
        span, program.span = program.span, None
        span.key = key
        self._making.add(key)
        move = Move(place, end, place - program.shift, keep=key)
        states, program.states = program.states, {}
        return Program(program.namespace, deque([move]), program.plan, span=span, states=states, shift=program.shift)

    def end(self, program: Program) -> None:
        """Lets go of all that a program still holds."""
        for move in program.moves:
            if move.stored is not None:
                self._cache.messages.let_go(move.stored, used=False)
            self._making.discard(move.keep)
        if program.span is not None:
            self._making.discard(program.span.key)
        spans = ([] if program.span is None else [program.span]) + list(program.later)
        for effect in [span.effect for span in spans] + ([program.spare] if program.spare else []):
            self._drop(effect)
        program.moves.clear()
        program.later.clear()
        program.span = program.spare = None
        self._give_back(program, keep=None)

    def forgo(self, program: Program) -> bool:
        """Lets go of what would make an answer a message -> whether there was anything."""
        if program.span is None:
            return False
        self._drop(program.span.effect)
        program.span = None
        self._give_back(program, keep=None)
        return True

    def _give_back(self, program: Program, keep: Span | None) -> None:
        """Slots that a program does not need any more, but for those of one span."""
        for place in [place for place in program.states if keep is None or place != keep.start]:
            self._cache.messages.return_slot(program.states.pop(place))

    def effects(self, key: str) -> list[tuple[Tensor, Tensor]] | None:
        """Copies of (P, S) of a stored message, one pair for each state; None if it is not stored."""
        stored = self._cache.messages.get(key)
        if stored is None:
            return None
        numbers = Numbers(self._cache.memory.numbers, stored.extra)
        return [(part.of(numbers), part.state[stored.slot].clone()) for part in self.anatomy.states]

    # Tensors

    def _attach(self, program: Program, lease: Lease, moves: Sequence[Move], *, from_zero: bool) -> None:
        """Copies the rows of some messages to where a prompt wants them, and composes what they do to its states."""
        messages = [move.stored for move in moves if move.stored is not None]
        self._copy_rows(lease, moves)
        apart = MOST_TOGETHER if program.composition is Composition.ORDERED else len(messages)
        for first in range(0, len(messages), apart):
            self._compose(program, lease, messages[first : first + apart], from_zero=from_zero and not first)
        for tensors in self._states:
            if from_zero:
                tensors.conv[lease.slot] = 0
            long = [i for i, message in enumerate(messages) if message.length >= tensors.conv.shape[1]]
            for message in messages[long[-1] if long else 0 :]:  # what came before a long one has left the window
                _slide(tensors.conv[lease.slot], tensors.conv[message.slot], message.length)
        for message in messages:
            self._cache.messages.let_go(message, used=True)

    def _compose(self, program: Program, lease: Lease, messages: Sequence[StoredMessage], *, from_zero: bool) -> None:
        """Takes the states of a lease to those after some messages."""
        numbers = [Numbers(self._cache.memory.numbers, message.extra) for message in messages]
        for part in self.anatomy.states:
            sums = [part.state[message.slot] for message in messages]
            state, ps = part.state[lease.slot], part.of_all(numbers)
            compose(program.composition, part.transition, state, ps, sums, from_zero=from_zero)

    def _copy_rows(self, lease: Lease, moves: Sequence[Move]) -> None:
        if not self.anatomy.keys:
            return
        sources, targets, turns = [], [], []
        for move in moves:
            assert move.stored is not None
            sources.append(move.stored.rows())
            targets.append(lease.own_rows(move.start, move.end))
            turns.append(np.full(move.stored.length, move.position - move.stored.position))
        self._copy(np.concatenate(sources), np.concatenate(targets), np.concatenate(turns))

    def _copy(self, sources: np.ndarray, targets: np.ndarray, turns: np.ndarray) -> None:
        device = self.anatomy.keys[0].kv.k.device
        source, target, turn = (torch.from_numpy(x).to(device) for x in (sources, targets, turns))
        for rows in self.anatomy.keys:
            self._model.ops.relocate_keys(rows.kv, source, target, turn, rows.inv_freq, rows.first)

    def _store(self, program: Program, lease: Lease, span: Span, end: int) -> None:
        """Keeps the tokens [span.start, end) of a lease as a message, if the cache gives room."""
        span.effect.flush()
        numbers = span.effect.numbers
        found = (program.namespace, span.key, span.start, end, span.position)
        stored = self._cache.messages.reserve(*found, numbers.items)
        if stored is None:
            self._drop(span.effect)
            return
        span.effect.close()
        if self.anatomy.keys:
            sources, targets = lease.rows(span.start, end), stored.own_rows()
            self._copy(sources, targets, np.zeros(len(sources), np.int64))
        self._cache.messages.copy_slot(program.states.get(end, lease.slot), stored.slot)
        base = program.states.get(span.start)
        if base is not None:
            for part in self.anatomy.states:
                part.transition.take_away(part.state[stored.slot], part.of(numbers), part.state[base])
        self._cache.messages.publish(stored)


def _compute(moves: deque[Move], start: int, end: int, position: int) -> None:
    """Appends tokens that are computed and not stored, to the last move where they go on from it."""
    last = moves[-1] if moves else None
    goes_on = last is not None and last.end == start and start - position == last.start - last.position
    if last is not None and goes_on and last.stored is None and not last.keep:
        moves.pop()
        start, position = last.start, last.position
    moves.append(Move(start, end, position))


def _slide(window: Tensor, later: Tensor, num_tokens: int) -> None:
    """The window [K - 1, channels] after a message of so many tokens, whose own window is `later`."""
    width = len(window)
    if num_tokens >= width:
        window.copy_(later)
    elif num_tokens:
        window.copy_(torch.cat([window[num_tokens:], later[width - num_tokens :]]))
