"""Takes programs forward: what has to happen between the chunks of an arranged prompt, and what becomes a message.

    [ attach a ][ attach b ][ compute c, keep it ][ attach d ][ compute e, keep it ][ compute the rest ]
      KV rows copied, keys rotated; states composed             one chunk: states are captured between its messages

All that touches memory is a command, which the device carries out before its next pass. Stored rows are copied to where
they are used, and never written to.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.lease import Lease
from hybrid_cache.choreography.commands import (
    Clear,
    Command,
    Compose,
    KeepEffect,
    Relocate,
    Relocation,
    StoredEffect,
)
from hybrid_cache.choreography.compiler import Compiler
from hybrid_cache.choreography.program import Attach, Compute, Program, Span, Step, Stretch
from hybrid_cache.kernels.grid import TILE


class Stage:
    """The programs of one engine. Holds integers only."""

    def __init__(self, cache: Books, compiler: Compiler, emit: Callable[[Command], None]) -> None:
        """emit: takes commands, in one sequence with those of the books"""
        self._cache = cache
        self._making = compiler.making
        self._compiler = compiler
        self._recurrent = compiler.traits.recurrent
        self._has_rows = cache.pool.geometry.page_bytes > 0
        self._emit = emit

    def clear(self, lease: Lease) -> None:
        """Zeroes the states of a lease."""
        if self._recurrent:
            self._emit(Clear(lease.slot))

    def advance(self, program: Program, lease: Lease, computed: int) -> int:
        """Takes the steps that need no model -> tokens that are now in the lease's pages and states."""
        steps = program.steps
        while steps and steps[0].end <= computed:
            self._end_step(program, lease, steps.popleft())
            if program.later and steps and steps[0].start == program.later[0].start:
                program.span = program.later.popleft()
        assert not program.later
        attached = list[Attach]()
        while steps and isinstance(first := steps[0], Attach):
            attached.append(first)
            steps.popleft()
        if attached:
            self._attach(program, lease, attached, from_zero=computed == 0)
            computed = attached[-1].end
        self._give_back(program, keep=program.span)
        if steps and isinstance(first := steps[0], Compute) and first.start == computed:
            self._begin_step(program, lease, first)
        return computed

    def cut(self, program: Program, start: int, end: int) -> Stretch:
        """What a chunk with the tokens [start, end) of a stretch computes; it ends earlier where slots run out."""
        captures: list[tuple[int, int]] = []
        spans = [program.span] if program.span is not None else []
        for before, step in pairwise(program.stretch()):
            if step.start >= end:
                break
            if not (before.keep or step.keep or step.opens):
                continue
            opens = step.keep or step.opens
            span = self._new_span(program, step.keep, step.start, step.end, step.position) if opens else None
            slot = self._cache.messages.lend_slot() if self._recurrent and (span or not opens) else None
            if (opens and span is None) or (self._recurrent and slot is None):
                if span is not None:
                    self._drop(span.items)
                end = step.start
                break
            if slot is not None:
                program.states[step.start] = slot
                captures.append((step.start, slot))
            if span is not None:
                program.later.append(span)
        ends = {step.start: min(step.end, end) for step in program.steps}
        noted = ((span, min(ends.get(span.start, end), end)) for span in (*spans, *program.later))
        return Stretch(end, tuple(captures), tuple((max(s.start, start), stop, s) for s, stop in noted))

    def before_decode(self, program: Program, lease: Lease, index: int) -> None:
        """To be called before the token with index `index` of an answer is computed."""
        if index == program.answer_at and program.span is None:
            self._open(program, lease, "", index, index + TILE)  # its length is not known yet

    def answer(self, program: Program, key: str, end: int, index: int) -> Program | None:
        """The steps that complete an answer's message: tokens [index, end) are not computed yet. None: not possible."""
        if program.span is None or self._compiler.is_stored(key) or self._compiler.is_making(key):
            return None
        span, program.span = program.span, None
        span.key = key
        self._making.add(key)
        step = Compute(index, end, index - program.shift, keep=key)
        states, program.states = program.states, {}
        rest = program.fork()
        rest.steps.append(step)
        rest.span, rest.states = span, states
        return rest

    def end(self, program: Program) -> None:
        """Lets go of all that a program still holds."""
        for step in program.steps:
            if isinstance(step, Attach):
                self._cache.messages.let_go(step.stored, used=False)
            else:
                self._making.discard(step.keep)
        if program.span is not None:
            self._making.discard(program.span.key)
        spans = ([] if program.span is None else [program.span]) + list(program.later)
        for items in [span.items for span in spans] + ([] if program.spare is None else [program.spare]):
            self._drop(items)
        program.steps.clear()
        program.later.clear()
        program.span = program.spare = None
        self._give_back(program, keep=None)

    def forgo(self, program: Program) -> bool:
        """Gives up storing the answer as a message -> whether it was to be stored."""
        if program.span is None:
            return False
        self._drop(program.span.items)
        program.span = None
        self._give_back(program, keep=None)
        return True

    # Spans

    def _begin_step(self, program: Program, lease: Lease, step: Compute) -> None:
        program.shift = step.shift
        if (step.keep or step.opens) and program.span is None:
            self._open(program, lease, step.keep, step.start, step.end)

    def _open(self, program: Program, lease: Lease, key: str, start: int, end: int) -> None:
        """Records what tokens [start, end) do to the states, if there is room for that and the states before them."""
        span = self._new_span(program, key, start, end, start - program.shift)
        base = self._cache.messages.lend_slot() if span is not None and self._recurrent and start > 0 else None
        if span is None or (self._recurrent and start > 0 and base is None):
            self._making.discard(key)
            if span is not None:
                self._drop(span.items)
            return
        if base is not None:
            self._cache.messages.copy_slot(lease.slot, base)
            program.states[start] = base
        program.span = span

    def _new_span(self, program: Program, key: str, start: int, end: int, position: int) -> Span | None:
        items, program.spare = program.spare, None
        if items is None:
            lent = self._cache.messages.lend_extra(program.namespace, key, start, end)
            items = None if lent is None else tuple(lent)
        return None if items is None else Span(key, start, position, items)

    def _drop(self, items: Sequence[int]) -> None:
        """Gives back the memory of what will not be stored."""
        self._cache.messages.return_extra(items)

    def _give_back(self, program: Program, keep: Span | None) -> None:
        """Gives back slots that a program needs no more, except those of one span."""
        for index in [index for index in program.states if keep is None or index != keep.start]:
            self._cache.messages.return_slot(program.states.pop(index))

    # Messages

    def _attach(self, program: Program, lease: Lease, steps: Sequence[Attach], *, from_zero: bool) -> None:
        """Attaches some messages: copies their rows, and composes their effects on the states."""
        messages = [step.stored for step in steps]
        if self._has_rows:
            rows = ((s.stored.rows(), lease.own_rows(s.start, s.end), s.position - s.stored.position) for s in steps)
            self._emit(Relocate(program.model, tuple(Relocation(*each) for each in rows)))
        if self._recurrent:
            effects = tuple(StoredEffect(m.slot, tuple(m.extra), m.length) for m in messages)
            self._emit(Compose(program.model, lease.slot, program.composition, effects, from_zero))
        for message in messages:
            self._cache.messages.let_go(message, used=True)

    def _end_step(self, program: Program, lease: Lease, step: Step) -> None:
        if isinstance(step, Compute) and step.keep and program.span is not None:
            self._store(program, lease, program.span, step.end)
            self._making.discard(step.keep)
            program.span = None

    def _store(self, program: Program, lease: Lease, span: Span, end: int) -> None:
        """Keeps the tokens [span.start, end) of a lease as a message, if the cache gives room."""
        found = (program.namespace, span.key, span.start, end, span.position)
        stored = self._cache.messages.reserve(*found, span.items)
        if stored is None:
            self._drop(span.items)
            return
        if self._has_rows:
            self._emit(Relocate(program.model, (Relocation(lease.rows(span.start, end), stored.own_rows(), 0),)))
        self._cache.messages.copy_slot(program.states.get(end, lease.slot), stored.slot)
        self._emit(KeepEffect(program.model, stored.slot, span.items, program.states.get(span.start)))
        self._cache.messages.publish(stored)
