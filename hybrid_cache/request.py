"""What is asked of the engine, and what it answers: tokens in, tokens out. Text stays in `api`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.choreography.plan import Plan
from hybrid_cache.errors import BadSampling
from hybrid_cache.tokens import Prompt


class CacheMode(Enum):
    """What a request lets the cache do (OpenAI's `prompt_cache_options.mode`)."""

    IMPLICIT = "implicit"  # our policy, and the marked places
    EXPLICIT = "explicit"  # the marked places only; none marked, nothing kept
    OFF = "off"  # neither read nor write; for measurements and for prompt log-probabilities


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Checked when made; an error names the value and the bound."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # number of alternatives returned with each token; None returns none
    prompt_logprobs: int | None = None  # the same for the prompt's own tokens

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("top_k", self.top_k, 0, 2**31)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _within("max_tokens", self.max_tokens, 0, 2**31)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        for bias in self.logit_bias.values():
            _within("logit_bias", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if not (low < value if open_low else low <= value) or not value <= high:
        raise BadSampling(f"{name} is {value}, must be in {'(' if open_low else '['}{low}, {high}]", param=name)


# Called on the engine's thread with each new token of one choice; True ends the choice with `FinishReason.STOP`.
Stopper = Callable[[int], bool]


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
    arrangement: Arrangement | None = None  # messages reused in this order; approximate, and labelled


def namespace_of(salt: str, fingerprint: str) -> str:
    """The tenant's salt and the model (weights and dtype): no hit ever crosses either."""
    return f"{fingerprint}/{salt}"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the model's own distribution (temperature 1, no penalties)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # best first; includes `token` when it is among them


@dataclass(frozen=True, slots=True)
class PromptOutput:
    """Sent once per request, before its first token."""

    cached_tokens: int  # prompt tokens that were not computed
    written_tokens: int  # prompt tokens whose pages this request added to the cache
    logprobs: tuple[TokenLogprob | None, ...] | None = None  # per prompt token; the first has none
    queued_s: float = field(default=0.0, compare=False)  # from submission to the first step
    plan: Plan | None = None  # of an arranged request: what was really done


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One step of one choice. `token` is None only when a choice ends without one (`max_tokens=0`)."""

    index: int  # which of the n choices
    token: int | None
    logprob: TokenLogprob | None = None
    finish: FinishReason | None = None


Output = PromptOutput | TokenOutput
