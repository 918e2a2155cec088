"""How tokens are chosen: what a request asks, and what one continuation has had so far. See `device.sampler`."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hybrid_cache.errors import BadSampling
from hybrid_cache.tokens import TokenArray


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number may be: in [low, high], or in (low, high]."""

    low: float
    high: float
    open_low: bool = False

    def check(self, name: str, value: float) -> None:
        """Raises BadSampling."""
        if not (self.low < value if self.open_low else self.low <= value) or not value <= self.high:
            within = f"{'(' if self.open_low else '['}{self.low}, {self.high}]"
            raise BadSampling(f"{name} is {value}, must be in {within}", param=name)


MAX_INT = 2**31 - 1
# Of requests and of a model's own defaults alike.
BOUNDS = {
    "temperature": Bound(0.0, 100.0),
    "top_p": Bound(0.0, 1.0, open_low=True),
    "top_k": Bound(0, MAX_INT),
    "min_p": Bound(0.0, 1.0),
    "presence_penalty": Bound(-2.0, 2.0),
    "frequency_penalty": Bound(-2.0, 2.0),
    "repetition_penalty": Bound(0.0, 100.0, open_low=True),
    "max_tokens": Bound(0, MAX_INT),
    "seed": Bound(-(2**63), 2**63 - 1),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Raises BadSampling, when made, with the value and the bound."""

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
        for name, bound in BOUNDS.items():
            value: float | None = getattr(self, name)
            if value is not None:
                bound.check(name, value)
        Bound(0, self.max_tokens).check("min_tokens", self.min_tokens)
        for bias in self.logit_bias.values():
            Bound(-100.0, 100.0).check("logit_bias", bias)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token under the model's own distribution (temperature 1, no penalties)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # best first; includes `token` when it is among them


Mask = npt.NDArray[np.int32]  # [V / 32, rounded up]: bit t % 32 of word t / 32 is set if token t may come


def mask_of(allowed: npt.NDArray[np.bool_]) -> Mask:
    """From whether each token may come [V]."""
    bits = np.packbits(allowed, bitorder="little")
    return np.pad(bits, (0, -len(bits) % 4)).view("<i4").astype(np.int32, copy=False)


class Constraint(Protocol):
    """Which tokens one continuation may consist of, such as those of a grammar. It goes along with the tokens."""

    def mask(self) -> Mask:
        """The tokens that may come next, one at least; the same until a token is noted. Raises what `note` raises."""
        ...

    def note(self, token: int) -> None:
        """A token was chosen. Raises RequestError if the constraint cannot be followed any further."""
        ...

    def ahead(self, most: int) -> Sequence[int]:
        """Called once a token is noted, and before the next mask is asked for: `most` tokens at most that have to come
        next, whatever a model says. The tokens noted so far decide which, and nothing else. Raises what `note` raises.
        """
        ...

    @property
    def done(self) -> bool:
        """Whether nothing may follow."""
        ...


def _allows_others(mask: Mask, tokens: Sequence[int]) -> bool:
    """Whether a mask, as of `Constraint`, allows more than these tokens."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    bits[list(tokens)] = 0
    return bool(bits.any())


class _Owing:
    """A constraint that is some tokens ahead of its answer: they come first."""

    def __init__(self, constraint: Constraint, tokens: Iterable[int], vocab_size: int) -> None:
        self.tokens = deque(tokens)
        self._owed = False  # the latest token
        self._constraint = constraint
        self._vocab_size = vocab_size

    def mask(self) -> Mask:
        return mask_of(np.arange(self._vocab_size) == self.tokens[0]) if self.tokens else self._constraint.mask()

    def note(self, token: int) -> None:
        self._owed = bool(self.tokens)
        if self._owed:
            self.tokens.popleft()
        self._constraint.note(token)

    def ahead(self, most: int) -> Sequence[int]:
        return list(self.tokens)[: max(most, 0)] if self._owed else self._constraint.ahead(most)

    @property
    def done(self) -> bool:
        return not self.tokens and self._constraint.done


class TokenChooser:
    """What one continuation asks of its tokens; owns its random numbers and its counts of past tokens."""

    def __init__(
        self, params: SamplingParams, prompt: TokenArray, index: int, constraint: Constraint | None = None
    ) -> None:
        self.params = params
        self.constraint = constraint
        # A fixed seed gives each of the n choices a stream of its own; no seed, fresh entropy.
        entropy = None if params.seed is None else [params.seed & (2**64 - 1), index]
        self._random = np.random.default_rng(entropy)
        self._point: float | None = None  # drawn for the coming token
        self._prompt = prompt
        self.counts: Counter[int] = Counter()
        self._seen: npt.NDArray[np.int64] | None = None  # each token of prompt and answer once, when asked for

    @property
    def adjusts(self) -> bool:
        """True when the choice is not from the model's logits as they are."""
        return bool(self.params.logit_bias) or self._penalised or self.holds_back or self.constraint is not None

    @property
    def _penalised(self) -> bool:
        p = self.params
        return p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1

    @property
    def holds_back(self) -> bool:
        """Whether stop tokens are not to be chosen yet. A constraint that allows nothing else goes before that."""
        stops = self.params.stop_token_ids
        if not (stops and self.counts.total() < self.params.min_tokens):
            return False
        return self.constraint is None or _allows_others(self.constraint.mask(), stops)

    def prepare(self) -> None:
        """Has ready what the choice of the next token needs. Raises what the constraint raises."""
        if self.constraint is not None:
            self.constraint.mask()

    def point(self) -> float:
        """Where the next token is drawn, in [0, 1): the same until a token is noted."""
        if self._point is None:
            self._point = 0.0 if self.params.greedy or self._owes else self._random.random()
        return self._point

    def owe(self, tokens: Sequence[int], vocab_size: int) -> None:
        """Has tokens that the constraint has given as `ahead` chosen one by one. They draw no random numbers either."""
        if self.constraint is not None and tokens and not self._owes:
            self.constraint = _Owing(self.constraint, tokens, vocab_size)

    @property
    def _owes(self) -> bool:
        return isinstance(self.constraint, _Owing) and bool(self.constraint.tokens)

    def go_on(self, prompt: TokenArray) -> None:
        """The tokens so far are part of a longer prompt now."""
        self._prompt, self._seen = prompt, None

    def seen(self) -> npt.NDArray[np.int64]:
        """Each token of prompt and answer once."""
        if self._seen is None:
            self._seen = np.union1d(self._prompt, list(self.counts)).astype(np.int64)
        return self._seen

    def note(self, token: int) -> None:
        """Counts a token that was chosen, and goes on to the next one. Raises what the constraint raises."""
        self._point = None
        self.counts[token] += 1
        if self._seen is not None and token not in self._seen:
            self._seen = np.append(self._seen, token)
        if self.constraint is not None:
            self.constraint.note(token)
