"""One request of `hybrid-cache bench exactness`: what it is made from, what came of it, what is special about it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hybrid_cache.choreography.arrangement import Encoding
from hybrid_cache.request import CacheMode, PromptOutput, Request, Stopper, TokenOutput
from hybrid_cache.sampling import Mask, mask_of
from hybrid_cache.tokens import BoundaryKind, TokenArray

VARIANT = "variant"  # begins the names of other models, whose conversations are their own as those of a salt are
ACTIVATED = "activated"  # the name of an adapter that is on from its invocation, for requests of any other salt
ROLES = ("user", "user", "user", "critic")


@dataclass(frozen=True, slots=True)
class Said:
    """A message that prompts may hold. context: ids of those behind which it was encoded"""

    tokens: TokenArray
    role: str
    context: tuple[str, ...] = ()
    is_answer: bool = False


@dataclass(slots=True)
class Asked:
    """A request, and what came of it."""

    request: Request
    messages: tuple[Said, ...]
    opening: TokenArray
    named: Mapping[str, TokenArray] = field(default_factory=dict)  # messages by id
    reported: PromptOutput | None = None
    choices: dict[int, list[TokenOutput]] = field(default_factory=dict)
    aborted: bool = False

    @property
    def publishes(self) -> bool:
        """What it says may enter the cache, provided that it is computed exactly."""
        request = self.request
        marked = any(b.kind is BoundaryKind.EXPLICIT for b in request.prompt.boundaries)
        wanted = request.cache_mode is CacheMode.IMPLICIT or (request.cache_mode is CacheMode.EXPLICIT and marked)
        return wanted and request.sampling.prompt_logprobs is None

    def answer(self, index: int) -> TokenArray:
        tokens = (output.token for output in self.choices.get(index, ()) if output.token is not None)
        return np.fromiter(tokens, np.int32)

    def finished(self, index: int) -> bool:
        return index in self.choices and self.choices[index][-1].finish is not None

    def reported_prompt(self) -> TokenArray:
        """The prompt in the order that the reply used."""
        asked, plan = self.request.arrangement, self.reported.plan if self.reported else None
        if asked is None or plan is None:
            return self.request.prompt.tokens
        ends = np.cumsum([part.num_tokens for part in asked.parts])
        unnamed = iter(
            self.request.prompt.tokens[end - part.num_tokens : end]
            for part, end in zip(asked.parts, ends, strict=True)
            if not part.id
        )
        return np.concatenate([self.named[item.id] if item.id else next(unnamed) for item in plan.items])


def traits(asked: Asked) -> Iterator[str]:
    """Names of what is special about a request."""
    request, sampling, arranged = asked.request, asked.request.sampling, asked.request.arrangement
    marks = [b for b in request.prompt.boundaries if b.kind is BoundaryKind.EXPLICIT]
    named = {
        "no arrangement": arranged is None,
        "n > 1": request.n > 1,
        "salts": bool(request.namespace),
        "of a variant": bool(request.model),
        f"of {request.model}": bool(request.model),
        "mode off": request.cache_mode is CacheMode.OFF,
        "mode explicit": request.cache_mode is CacheMode.EXPLICIT and bool(marks),
        "mode explicit, nothing marked": request.cache_mode is CacheMode.EXPLICIT and not marks,
        "marks with a ttl": any(b.ttl_s for b in marks),
        "penalties": sampling.repetition_penalty != 1 or bool(sampling.presence_penalty or sampling.frequency_penalty),
        "logit bias": bool(sampling.logit_bias),
        "min tokens": sampling.min_tokens > 0,
        "stop tokens": bool(sampling.stop_token_ids),
        "stoppers": request.make_stopper is not None,
        "constraints": request.make_constraint is not None,
        "sampled": not sampling.greedy,
        "prompt logprobs": sampling.prompt_logprobs is not None,
        "no answer wanted": sampling.max_tokens == 0,
    }
    yield from (name for name, holds in named.items() if holds)
    if arranged is None:
        return
    yield f"asked for {arranged.fidelity}"
    yield f"composition {arranged.composition}"
    yield f"positions {arranged.positions}"
    yield f"order {arranged.order}"
    named = {
        "seams": arranged.seam > 0,
        "refs": any(said.is_answer for said in asked.messages),
        "answers to keep": arranged.closing is not None,
        "parts alone": any(part.encoding is Encoding.ALONE for part in arranged.parts),
        "parts not to keep": not all(part.keep for part in arranged.parts),
    }
    yield from (name for name, holds in named.items() if holds)


class _StopAt:
    """Stops at the third token of some kind."""

    def __init__(self, rest: int) -> None:
        self._rest = rest
        self._left = 3

    def __call__(self, token: int) -> bool:
        self._left -= token % 7 == self._rest
        return self._left <= 0


def stop_at(rest: int) -> Callable[[], Stopper]:
    return lambda: _StopAt(rest)


class Some:
    """A constraint: of each token and its place, the sum is no multiple of a number."""

    def __init__(self, vocab_size: int, number: int) -> None:
        self._vocab_size, self._number = vocab_size, number
        self._place = 0
        self._last = 0

    def mask(self) -> Mask:
        return mask_of((np.arange(self._vocab_size) + self._place) % self._number != 0)

    def note(self, token: int) -> None:
        if (token + self._place) % self._number == 0:
            raise ValueError(f"token {token} may not be number {self._place}")
        self._place += 1
        self._last = token

    def ahead(self, most: int) -> Sequence[int]:
        """Behind each third token, up to 13 that are forced."""
        forced = list[int]()
        for i in range(0 if self._last % 3 else min(most, self._last // 3 % 14)):
            token = (self._last + 7 * i) % self._vocab_size
            if (token + self._place + i) % self._number == 0:
                break
            forced.append(token)
        return forced

    @property
    def done(self) -> bool:
        return False
