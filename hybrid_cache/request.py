"""What is asked of the engine, and what it answers: tokens in, tokens out. Text stays in `api`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from hybrid_cache.cache.misses import Found
from hybrid_cache.cache.policies.signals import Origin
from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.choreography.plan import Plan
from hybrid_cache.errors import RequestError
from hybrid_cache.sampling import Constraint, SamplingParams, TokenLogprob
from hybrid_cache.tokens import Prompt


class CacheMode(Enum):
    """What a request lets the cache do (OpenAI's `prompt_cache_options.mode`)."""

    IMPLICIT = "implicit"  # our policy, and the marked positions
    EXPLICIT = "explicit"  # the marked positions only; none marked, nothing kept
    OFF = "off"  # neither read nor write; for measurements and for prompt log-probabilities


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALL = "tool_call"  # the turn has ended in a call, whose result the next request of its task will bring


# Called on the engine's thread with each new token of one choice; True ends the choice with `FinishReason.STOP`, a
# reason with that.
Stopper = Callable[[int], bool | FinishReason]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and `n` continuations of it."""

    id: str
    prompt: Prompt
    sampling: SamplingParams
    n: int = 1
    namespace: str = ""  # tenant salt; no cache entry crosses it
    cache_mode: CacheMode = CacheMode.IMPLICIT
    make_stopper: Callable[[], Stopper] | None = None  # one per choice, e.g. for stop strings
    make_constraint: Callable[[], Constraint] | None = None  # one per choice, e.g. a grammar
    arrangement: Arrangement | None = None  # messages reused in this order; approximate, and labelled
    tenant: str = ""  # whose share of the engine it takes
    commits: bool = True  # its answer is computed again as a prompt; else `Engine.commit` is told what comes next
    session: str = ""  # which of the tenant's conversations it belongs to, as the client says
    user: str = ""  # of the tenant's, who sent it, as the client says
    tools: bool | None = None  # whether its answer may call any; None: nobody says
    template: str = ""  # equal for prompts that one program makes; empty: nobody says
    kind: str = ""  # tasks of one kind are alike in calls and lengths, such as those that are offered the same tools
    owner: str | None = ""  # what salts of namespaces begin with that it may be told of beside its own; empty: none;
    # None: others use its own, too, and it is not told what is in there
    model: str = ""  # the name of a variant that the engine runs; empty for its own model
    max_loss: float | None = None  # entries may be made from another model's where a profile expects no more than this,
    # in nats a token; None: only where the bits are the model's own

    @property
    def origin(self) -> Origin:
        """What the cache's policy is told of it beside its tokens."""
        return Origin(self.session, self.user, self.tools, self.template)


@dataclass(frozen=True, slots=True)
class Received:
    """Tokens [start, end) of a prompt whose entries were made from another model's; maybe none, in a lane."""

    sender: str  # its name, as in `Request.model`
    start: int
    end: int
    transfer: str  # what was done with each layer, see `transfer.Transfer`
    loss: float | None = None  # expected in the answer, in nats a token; None: the bits are the model's own


@dataclass(frozen=True, slots=True)
class PromptOutput:
    """Sent once per request, before its first token."""

    cached_tokens: int  # prompt tokens that were not computed
    written_tokens: int  # prompt tokens whose pages this request added to the cache
    logprobs: tuple[TokenLogprob | None, ...] | None = None  # per prompt token; the first has none
    queued_s: float = field(default=0.0, compare=False)  # from submission to the first step
    plan: Plan | None = None  # of an arranged request: what was really done
    found: Found | None = field(default=None, compare=False)  # why the rest was not cached; None of arranged requests
    received: Received | None = None  # beside what was cached
    loaded_tokens: int = 0  # of those that were cached, came from a disk for this request


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One step of one choice. `token` is None only when a choice ends without one (`max_tokens=0`)."""

    index: int  # which of the n choices
    token: int | None
    logprob: TokenLogprob | None = None
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class FailedOutput:
    """The last output of a request that the engine gave up, all choices of it."""

    why: str  # for logs
    fault: RequestError | None = None  # of the request itself; None after an error of the engine's own


Output = PromptOutput | TokenOutput
