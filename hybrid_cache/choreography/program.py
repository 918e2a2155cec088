"""A prompt as steps: what is attached, what is computed, and what of that is kept.

What the cache holds of a prompt's beginning is restored when its room is taken; the steps begin after that.
"""

from collections import deque
from dataclasses import dataclass, field

from hybrid_cache.cache.tree import StoredMessage
from hybrid_cache.choreography.arrangement import Composition
from hybrid_cache.choreography.plan import Plan
from hybrid_cache.namespaces import fingerprint_in


@dataclass(frozen=True, slots=True)
class Attach:
    """Tokens [start, end) of a prompt are those of a stored message."""

    start: int
    end: int
    position: int  # of the first token
    stored: StoredMessage


@dataclass(frozen=True, slots=True)
class Compute:
    """Tokens [start, end) of a prompt are computed and then, if `keep` names a key, stored under it."""

    start: int
    end: int
    position: int  # of the first token
    keep: str = ""
    opens: bool = False  # the answer's message begins here

    @property
    def shift(self) -> int:
        """Index of a row in the sequence minus its position."""
        return self.start - self.position


Step = Attach | Compute


@dataclass(slots=True)
class Span:
    """Tokens from `start` on that are being computed and will be stored."""

    key: str
    start: int
    position: int
    items: tuple[int, ...]  # lent by the cache, to note in what the tokens do to the states


@dataclass(slots=True, eq=False)
class Program:
    """What is left to do of a prompt."""

    namespace: str
    steps: deque[Step]
    plan: Plan
    composition: Composition = Composition.ORDERED
    joins: bool = False  # one chunk may compute several steps
    from_zero: bool = False  # begins with a message that is encoded from zero, not as the start of a text
    span: Span | None = None  # of the first step
    later: deque[Span] = field(default_factory=deque)  # of other steps that the chunk in progress computes
    states: dict[int, int] = field(
        default_factory=dict
    )  # index in the sequence -> a slot with the states before it, lent by the cache
    shift: int = 0  # index of a row in the sequence minus its position, for what is being computed
    answer_at: int = -1  # index from which on the answer's message is kept
    spare: tuple[int, ...] | None = None  # items for the first message

    @property
    def model(self) -> str:
        """The fingerprint of the model whose prompt it is."""
        return fingerprint_in(self.namespace)

    def fork(self) -> "Program":
        """For another answer to the same prompt, which is not kept."""
        return Program(self.namespace, deque(), self.plan, shift=self.shift)

    def until(self) -> int:
        """Where the present stretch of computing ends."""
        return self.stretch()[-1].end

    def stretch(self) -> list[Compute]:
        """The steps that one chunk may compute."""
        found: list[Compute] = []
        for step in self.steps:
            if isinstance(step, Attach) or (found and not (self.joins and step.shift == found[0].shift)):
                break
            found.append(step)
        return found


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a chunk of an arranged prompt computes: tokens up to `end`, each message as a span of its own."""

    end: int
    captures: tuple[tuple[int, int], ...]  # index between messages, slot that gets the states there
    spans: tuple[tuple[int, int, Span], ...]  # start and end of the tokens of a span that are computed

    @property
    def cuts(self) -> tuple[int, ...]:
        """Indices at which a tile ends."""
        return tuple(index for index, _ in self.captures)
