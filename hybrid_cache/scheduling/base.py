"""What an order of service is asked, and by what it decides.

A *task* is a run of requests that tool calls link: an agent's way from a question to its answer. Between two of
them it is *paused*: it holds nothing, but an order may have what the cache has of it spared when another is admitted.
The server and `hybrid-cache bench agents` run the same objects.
"""

from dataclasses import dataclass, field
from typing import Protocol

from hybrid_cache.cache.claims import Claim
from hybrid_cache.scheduling.outlook import Outlook
from hybrid_cache.scheduling.tool_times import ToolTimes
from hybrid_cache.spec import PrefillCost


@dataclass(slots=True, eq=False)
class Task:
    """See the module docstring."""

    arrival_s: float  # of its first request
    tenant: str
    kind: str  # tasks of one kind are alike, such as those that are offered the same tools
    num_calls: int = 0  # requests that were answered
    tool: str = ""  # the one that it called last
    guess_s: float | None = None  # for how long it would keep the machine busy, when it came; None: nobody guessed
    spent_s: float = 0.0  # for how long it has


@dataclass(slots=True, eq=False)
class Pause(Claim):
    """A turn that has ended in a tool call; a claim on what the cache has of the conversation."""

    task: Task = field(default_factory=lambda: Task(0.0, "", ""))
    began_s: float = 0.0
    tool: str | None = None  # None: nobody has said that it is a call, and nothing is spared for it
    hint_s: float | None = None  # how long the client says that it takes
    keep_until_s: float = 0.0  # for orders that decide once
    returned: bool = False  # its next request is there, and waits
    running: bool = False  # the turn has not ended yet


@dataclass(frozen=True, slots=True)
class Job:
    """A request that waits."""

    task: Task
    submitted_s: float
    num_tokens: int  # of its prompt
    num_cached: int  # of these, tokens that the cache has
    max_tokens: int


@dataclass(slots=True)
class Load:
    """What runs now, at which rates, and what is known of tools and kinds of tasks. The scheduler keeps it."""

    budget_bytes: int
    token_bytes: float  # of KV
    state_bytes: int
    cost: PrefillCost
    host_bytes_per_s: float = 0.0  # at which what has left comes back from a second tier; 0: there is none
    now: float = 0.0
    running_bytes: int = 0  # that running requests hold
    s_per_flop: float = 0.0  # of prefill
    step_s: float = 0.0  # of a step, in the mean
    row_s: float = 0.0  # by which a sequence that decodes makes a step longer, in the mean
    wait_s: float = 0.0  # of those admitted lately, in the mean
    tools: ToolTimes = field(default_factory=ToolTimes)
    outlook: Outlook = field(default_factory=Outlook)

    def memory(self, num_tokens: float) -> float:
        """Bytes of a context: m(C) = S + kv * C."""
        return self.state_bytes + self.token_bytes * num_tokens

    def prefill_s(self, start: float, end: float) -> float:
        """Seconds to compute tokens [start, end) of a prompt."""
        n = max(end - start, 0.0)
        cost = self.cost
        return n * (cost.per_token + cost.per_token_per_position * (start + end - 1) / 2) * self.s_per_flop

    def call_s(self, num_cached: float, num_tokens: float, output: float) -> float:
        """Machine seconds of a request: of its prompt, of its rows, and of the share of memory that it holds."""
        prefill_s = self.prefill_s(num_cached, num_tokens)
        dwell_s = 3 * prefill_s + output * self.step_s
        return prefill_s + output * self.row_s + dwell_s * self.memory(num_tokens + output) / self.budget_bytes

    def again_s(self, num_tokens: int) -> float:
        """Seconds until a context that has left is there again: computed, or from a second tier."""
        seconds = self.prefill_s(0, num_tokens)
        return min(seconds, self.memory(num_tokens) / self.host_bytes_per_s) if self.host_bytes_per_s else seconds

    def waste(self, num_tokens: int, seconds: float) -> float:
        """Bytes times seconds of having a context there again in so many seconds: half of its own memory while it
        fills, and what others hold meanwhile (InferCept, arXiv 2402.01869).
        """
        return seconds * (self.memory(num_tokens) / 2 + self.running_bytes)

    def time_left(self, pause: Pause) -> float:
        """Seconds until a paused task returns, in the mean. A client's word holds until it proves wrong."""
        elapsed = self.now - pause.began_s
        if pause.hint_s is not None and elapsed < pause.hint_s:
            return pause.hint_s - elapsed
        return self.tools.left(pause.task.tenant, pause.tool or "", elapsed)


class Order(Protocol):
    """Whose turn it is, and what is spared. One object belongs to one scheduler."""

    name: str
    resumes: bool  # knows of pauses: what tasks return to is kept while they run, and those whose is go first
    patience_s: float  # a request that has waited for so long goes before those that have not

    def key(self, job: Job, load: Load) -> float:
        """The lowest goes first."""
        ...

    def came(self, job: Job, load: Load) -> None:
        """A request begins to wait."""

    def turns(self, load: Load) -> bool:
        """Whether keys have changed so much that all who wait are to be asked about again."""
        ...

    def paused(self, pause: Pause, load: Load) -> None:
        """A turn has ended in a call."""

    def reserves(self, job: Job, load: Load) -> bool:
        """Whether a request that is to be admitted, and may end in a call, takes room for what its task returns to,
        and has it spared while it runs.
        """
        ...

    def keeps(self, pause: Pause, load: Load) -> bool:
        """Whether what a pause lies on is spared. Asked only when another request is admitted while others run."""
        ...
