"""What is still to come of a task, by what came of others of its kind: means, by how many calls it has made.

Means of a class are the prediction: noisy guesses about single requests are worse than these. How much a guess is worth
is learned from those before (`Sizes`).
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from hybrid_cache.scheduling.tool_times import UNKNOWN_S

MOST_KINDS = 4096  # the one heard of longest ago is forgotten
MEMORY = 200  # values that a mean goes back
SIZES, FEW = 400, 20  # tasks that sizes go back, and by how many the mean counts for more than a guess
DISTINCT_CALLS = 8  # later ones count as this one
OUTPUT_TOKENS, CALLS_LEFT, NEW_TOKENS = 60.0, 0.0, 200.0  # of what nothing is known about


@dataclass(slots=True)
class Mean:
    """A moving average that starts from a guess, which counts as one value."""

    value: float
    count: int = 1

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, MEMORY)
        self.value += (value - self.value) / self.count


@dataclass(slots=True)
class Sizes:
    """How long tasks of one kind keep the machine busy, and what guesses say of that when they come.

    The line of least squares through guesses and truths, its slope between 0 and 1, and shrunk to the mean while few
    are known. So where guesses say nothing, all tasks of a kind are of one size.
    """

    guessed: Mean = field(default_factory=lambda: Mean(0.0, 0))  # of all that came, seconds
    _count: int = 0  # of those that have ended; over them:
    _guess: float = 0.0  # means
    _truth: float = 0.0
    _spread: float = 0.0  # variance of the guesses
    _joint: float = 0.0  # covariance with the truths

    def ended(self, guess_s: float, seconds: float) -> None:
        """A task has kept the machine busy for so long."""
        self._count = min(self._count + 1, SIZES)
        weight = 1 / self._count
        guess, truth = guess_s - self._guess, seconds - self._truth
        self._guess += weight * guess
        self._truth += weight * truth
        self._spread += weight * (guess * (guess_s - self._guess) - self._spread)
        self._joint += weight * (guess * (seconds - self._truth) - self._joint)

    @property
    def mean_s(self) -> float:
        return self.guessed.value + self._known * (self._truth - self.guessed.value)

    def expected(self, guess_s: float) -> float:
        """Seconds of a task by what is guessed of it."""
        slope = min(max(self._joint / self._spread, 0.0), 1.0) if self._spread else 0.0
        return self.mean_s + self._known * slope * (guess_s - self.guessed.value)

    @property
    def _known(self) -> float:
        """What those that have ended count for."""
        return self._count / (self._count + FEW)


@dataclass(slots=True)
class Habits:
    """Means of one kind of task, by the number of calls before."""

    output: list[Mean] = field(default_factory=lambda: [Mean(OUTPUT_TOKENS) for _ in range(DISTINCT_CALLS)])
    left: list[Mean] = field(default_factory=lambda: [Mean(CALLS_LEFT) for _ in range(DISTINCT_CALLS)])
    called: list[Mean] = field(default_factory=lambda: [Mean(0.0) for _ in range(DISTINCT_CALLS)])
    paused: list[Mean] = field(default_factory=lambda: [Mean(UNKNOWN_S) for _ in range(DISTINCT_CALLS)])
    new: Mean = field(default_factory=lambda: Mean(NEW_TOKENS))  # tokens that a call adds beside the answer before it
    sizes: Sizes = field(default_factory=Sizes)

    def answer(self, call: int) -> float:
        """Tokens of the answer to the call with this number, from 0."""
        return self.output[min(call, DISTINCT_CALLS - 1)].value

    def calls(self, call: int) -> float:
        """The share of turns with this number that end in a call."""
        return self.called[min(call, DISTINCT_CALLS - 1)].value

    def pause_s(self, call: int) -> float:
        """Seconds until the call that the turn with this number ends in is answered."""
        return self.paused[min(call, DISTINCT_CALLS - 1)].value

    def calls_left(self, call: int) -> float:
        """Calls that follow the one with this number."""
        return self.left[min(call, DISTINCT_CALLS - 1)].value


class Outlook:
    """Habits of all kinds, each of a tenant's."""

    def __init__(self) -> None:
        self._habits: OrderedDict[tuple[str, str], Habits] = OrderedDict()
        self._unknown = Habits()
        self._sizes = Sizes()  # of all tasks

    def of(self, tenant: str, kind: str) -> Habits:
        """Not to be written to."""
        return self._habits.get((tenant, kind), self._unknown)

    def guessed(self, tenant: str, kind: str, seconds: float) -> None:
        """A task has come, about which so much is guessed."""
        for sizes in (self._known(tenant, kind).sizes, self._sizes):
            sizes.guessed.add(seconds)

    def took(self, tenant: str, kind: str, guess_s: float, seconds: float) -> None:
        """A task has ended that kept the machine busy for so long."""
        for sizes in (self._known(tenant, kind).sizes, self._sizes):
            sizes.ended(guess_s, seconds)

    def size(self, tenant: str, kind: str, guess_s: float) -> float:
        """For how long a task is expected to keep the machine busy, as a multiple of the mean of all tasks."""
        mean_s = self._sizes.mean_s
        return self.of(tenant, kind).sizes.expected(guess_s) / mean_s if mean_s else 0.0

    def answered(self, tenant: str, kind: str, call: int, num_tokens: int) -> None:
        """The call with this number, from 0, was answered with so many tokens."""
        self._known(tenant, kind).output[min(call, DISTINCT_CALLS - 1)].add(num_tokens)

    def returned(self, tenant: str, kind: str, call: int, seconds: float) -> None:
        """The call that the turn with this number ended in was answered after so many seconds."""
        self._known(tenant, kind).paused[min(call, DISTINCT_CALLS - 1)].add(seconds)

    def grown(self, tenant: str, kind: str, num_tokens: int) -> None:
        """A call has added so many tokens to the conversation."""
        self._known(tenant, kind).new.add(num_tokens)

    def ended(self, tenant: str, kind: str, num_calls: int) -> None:
        """A task has ended after so many calls."""
        habits = self._known(tenant, kind)
        for call in range(min(num_calls, 4 * DISTINCT_CALLS)):
            left = num_calls - 1 - call
            habits.left[min(call, DISTINCT_CALLS - 1)].add(left)
            habits.called[min(call, DISTINCT_CALLS - 1)].add(left > 0)

    def _known(self, tenant: str, kind: str) -> Habits:
        key = tenant, kind
        habits = self._habits.pop(key, None) or Habits()
        self._habits[key] = habits
        if len(self._habits) > MOST_KINDS:
            self._habits.popitem(last=False)
        return habits
