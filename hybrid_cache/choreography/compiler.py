"""From an arrangement to a program: what of a prompt is attached, what is computed, and what of that is stored.

An arranged sequence shares with the tree only the pages below the state that it starts from; all others are its own,
and nothing of it is ever published in the tree.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hybrid_cache.cache.books import Books
from hybrid_cache.choreography.arrangement import Arrangement, Composition, Encoding, Fidelity, Positions
from hybrid_cache.choreography.plan import Action, Plan, exact_plan, make_plan, plan_after
from hybrid_cache.choreography.program import Attach, Compute, Program, Step
from hybrid_cache.spec import PrefillCost

SHORT = 32  # tokens of a message that is not worth a step of its own
STEP_TOKENS = 16  # fixed cost of one more step, in tokens of a step that runs anyway


@dataclass(frozen=True, slots=True)
class Traits:
    """What a model allows.

    fidelities  those that it supports besides `exact`, see `Fidelity`
    commutes    effects on the states may be averaged over all orders
    packs       chunks follow each other without padding, so that one may hold several messages
    recurrent   it has states
    """

    fidelities: tuple[str, ...]
    commutes: bool
    packs: bool
    recurrent: bool


def key_of(namespace: str, name: str, seam: int) -> str:
    """The key that a message is stored under. Its first `seam` tokens, which are computed again, are not stored.

    A namespace begins with its model and a slash, so nothing that is stored is found for another model.
    """
    return f"{namespace}/{name}/{seam}"


class Compiler:
    """Knows what is stored and in the making. Takes room only for the effects of messages.

    making: keys of messages that are being computed
    """

    def __init__(self, cache: Books, cost: PrefillCost, traits: Traits) -> None:
        self.traits = traits
        self.making: set[str] = set()
        self._messages = cache.messages
        self._cost = cost

    def why_exact(self, arrangement: Arrangement) -> str:
        """Why a prompt can only be computed exactly; empty if it can be arranged as asked."""
        if arrangement.fidelity is Fidelity.EXACT:
            return "as asked"
        if arrangement.fidelity not in self.traits.fidelities:
            states = "recurrent states, which cannot be moved"
            has = states if self.traits.fidelities else "layers that cannot be put together"
            return f"{arrangement.fidelity} is not possible: the model has {has}"
        if arrangement.composition is Composition.PERMUTATIONS and not self.traits.commutes:
            return "permutations are not possible: the model's transitions are matrices, which do not commute"
        return ""

    def exact_plan(self, arrangement: Arrangement, prefix: int, why: str) -> Plan:
        """Everything after a prefix is computed; why, if something else was asked for."""
        ids, lengths = [p.id for p in arrangement.parts], [p.num_tokens for p in arrangement.parts]
        why = "" if arrangement.fidelity is Fidelity.EXACT else why
        if arrangement.reordered:
            why = "; ".join(filter(None, [why, "the order was chosen for what the cache has of it"]))
        return exact_plan(arrangement.fidelity, ids, lengths, prefix, self._cost, why)

    def plan(self, namespace: str, arrangement: Arrangement, prefix: int, *, in_place: bool = False) -> Plan:
        """What would be done now for a prompt whose first `prefix` tokens the cache has a state for.

        in_place: no stored message is used
        """
        has = self._has(namespace, arrangement, in_place=in_place)
        return make_plan(arrangement, prefix, has, self._cost, states=self.traits.recurrent)

    def is_stored(self, key: str) -> bool:
        return self._messages.get(key) is not None

    def is_making(self, key: str) -> bool:
        """Whether it is being computed."""
        return key in self.making

    def missing(self, namespace: str, arrangement: Arrangement) -> list[int]:
        """Indices of parts that have to be encoded from zero before a prompt begins; all of them at once.

        The first part starts from zero in the prompt, too, and is stored from there; but not where messages are
        averaged.
        """
        first = int(arrangement.composition is Composition.ORDERED)
        return [
            i
            for i, part in enumerate(arrangement.parts)
            if i >= first
            and part.id
            and part.encoding is Encoding.ALONE
            and part.num_tokens > arrangement.seam
            and not self.is_stored(key_of(namespace, part.id, arrangement.seam))
        ]

    def lacking(self, namespace: str, arrangement: Arrangement) -> list[str]:
        """Keys of its messages that are neither stored nor being computed, each once."""
        parts = (part for part in arrangement.parts if part.id and part.num_tokens > arrangement.seam)
        keys = dict.fromkeys(key_of(namespace, part.id, arrangement.seam) for part in parts)
        return [key for key in keys if not (self.is_stored(key) or self.is_making(key))]

    def _has(self, namespace: str, arrangement: Arrangement, *, in_place: bool) -> Callable[[str], bool]:
        """Whether the message of an id is stored as an arrangement needs it."""
        return lambda name: not in_place and self.is_stored(key_of(namespace, name, arrangement.seam))

    def program(
        self,
        namespace: str,
        arrangement: Arrangement,
        prefix: int,
        num_others: Callable[[str], int] = lambda _: 0,
        *,
        in_place: bool = False,
    ) -> Program:
        """The steps of a prompt that has just got its pages; holds the stored messages that it uses.

        num_others: number of waiting prompts that have a message with this id   in_place: everything is computed,
        and nothing of it stored
        """
        has = self._has(namespace, arrangement, in_place=in_place)
        plan = plan_after(arrangement, prefix, has, self._cost, states=self.traits.recurrent)
        assert plan.prefix == prefix
        steps = self._steps(namespace, arrangement, plan, prefix, num_others, keeps=not in_place)
        answer_at = -1
        if arrangement.closing is not None and not in_place:
            answer_at = arrangement.answer_start + arrangement.seam
        if 0 <= answer_at < plan.num_tokens:
            _open_answer(steps, answer_at)
        first = steps[0]
        from_zero = arrangement.parts[0].encoding is Encoding.ALONE and isinstance(first, Compute) and bool(first.keep)
        return Program(
            namespace,
            steps,
            plan,
            arrangement.composition,
            joins=self.traits.packs,
            from_zero=from_zero and first.start == 0,
            answer_at=answer_at,
        )

    def _steps(
        self,
        namespace: str,
        arrangement: Arrangement,
        plan: Plan,
        prefix: int,
        num_others: Callable[[str], int],
        *,
        keeps: bool,
    ) -> deque[Step]:
        passing = arrangement.parts[-2] if self._passes(plan, arrangement, num_others) else None
        steps, position = deque[Step](), prefix
        sibling_start = sibling_end = prefix
        leftmost = arrangement.positions is Positions.LEFTMOST
        for item, part in zip(plan.items, arrangement.parts, strict=True):
            if item.end <= prefix:
                continue
            first, key = max(item.start, prefix), key_of(namespace, part.id, arrangement.seam)
            if leftmost:
                position = sibling_start if item.id else sibling_end
            if item.action is Action.COMPUTED:
                kept = keeps and part.id and part.keep and part is not passing and first == item.start
                self._add_computed(steps, first, item.end, position, arrangement.seam, key if kept else "")
            else:
                self._add_attached(steps, first, item.end, position, arrangement.seam, key)
            position += item.end - first
            sibling_end = max(sibling_end, position)
            if not item.id:
                sibling_start = sibling_end
        return steps

    def _add_computed(self, steps: deque[Step], start: int, end: int, position: int, seam: int, key: str) -> None:
        """key: under which the message is stored, unless it is stored or being computed already; empty for none"""
        key = key if end - start > seam else ""
        if key and not self.is_stored(key) and not self.is_making(key):
            steps += self._kept_steps(start, end, position, seam, key)
        else:
            _compute(steps, start, end, position)

    def _add_attached(self, steps: deque[Step], start: int, end: int, position: int, seam: int, key: str) -> None:
        message = self._messages.get(key)
        assert message is not None
        if seam:
            _compute(steps, start, start + seam, position)
        self._messages.hold(message)
        steps.append(Attach(start + seam, end, position + seam, message))

    @staticmethod
    def _passes(plan: Plan, arrangement: Arrangement, num_others: Callable[[str], int]) -> bool:
        """Whether the last message is new and too short for a step of its own: then it is computed, but not stored.

        Storing it costs one more step in each prompt that waits for it, and in its own where a chunk holds one message.
        """
        if len(arrangement.parts) < 2 or arrangement.parts[-1].id:
            return False
        item, part = plan.items[-2], arrangement.parts[-2]
        if item.action is not Action.COMPUTED or part.num_tokens > SHORT:
            return False
        return part.num_tokens * num_others(part.id) <= STEP_TOKENS

    def encoding(self, namespace: str, arrangement: Arrangement, index: int) -> Program | None:
        """The steps that encode one part from zero, in a sequence of its own. None without room."""
        part, seam = arrangement.parts[index], arrangement.seam
        key = key_of(namespace, part.id, arrangement.seam)
        items = self._messages.lend_extra(namespace, key, seam, part.num_tokens)
        if items is None:
            return None
        steps = deque[Step](self._kept_steps(0, part.num_tokens, 0, seam, key))
        plan = exact_plan(arrangement.fidelity, [part.id], [part.num_tokens], 0, self._cost)
        return Program(namespace, steps, plan, joins=self.traits.packs, from_zero=True, spare=tuple(items))

    def _kept_steps(self, start: int, end: int, position: int, seam: int, key: str) -> list[Step]:
        self.making.add(key)
        kept = Compute(start + seam, end, position + seam, keep=key)
        return [Compute(start, start + seam, position), kept] if seam else [kept]


def _compute(steps: deque[Step], start: int, end: int, position: int) -> None:
    """Appends tokens that are computed and not stored, to the last step where they go on from it."""
    last = steps[-1] if steps else None
    if isinstance(last, Compute) and not last.keep and last.end == start and last.shift == start - position:
        steps.pop()
        start, position = last.start, last.position
    steps.append(Compute(start, end, position))


def _open_answer(steps: deque[Step], answer_at: int) -> None:
    """Splits the last step where the answer's message begins."""
    last = steps.pop()
    assert isinstance(last, Compute)
    if last.start < answer_at:
        steps.append(Compute(last.start, answer_at, last.position))
    start = max(answer_at, last.start)
    steps.append(Compute(start, last.end, last.position + start - last.start, opens=True))
