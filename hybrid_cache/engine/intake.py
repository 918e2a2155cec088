"""From a request to a sequence that can be scheduled: whether it can be served, and in which way."""

import bisect
import logging
from collections.abc import Callable
from collections.abc import Sequence as Numbers
from dataclasses import replace
from functools import partial

import numpy as np

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.keys import keys_of
from hybrid_cache.cache.policies.signals import Origin
from hybrid_cache.choreography.arrangement import Order
from hybrid_cache.choreography.compiler import Compiler
from hybrid_cache.choreography.order import best_order
from hybrid_cache.choreography.plan import Plan
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.family import Family
from hybrid_cache.engine.scheduler import Scheduler
from hybrid_cache.engine.sequence import Prefill, Sequence, new_prefill
from hybrid_cache.engine.sharing import soon_known
from hybrid_cache.errors import BadSampling, ContextTooLong, RequestError
from hybrid_cache.namespaces import fingerprint_in
from hybrid_cache.request import CacheMode, Request
from hybrid_cache.sampling import SamplingParams, TokenChooser
from hybrid_cache.tokens import Prompt, TokenArray

OWN = "\0own"  # id of a request of our own

logger = logging.getLogger("hybrid_cache")


class Intake:
    """What one model on one cache takes in."""

    def __init__(
        self,
        family: Family,
        vocab_size: int,
        max_length: int,
        config: EngineConfig,
        cache: Books,
        compiler: Compiler,
        scheduler: Scheduler,
        clock: Callable[[], float],
    ) -> None:
        """max_length: tokens of the model's longest context, prompt and answer together"""
        self._family = family
        self.vocab_size = vocab_size
        self._max_length = max_length
        self._config = config
        self._cache = cache
        self._compiler = compiler
        self._scheduler = scheduler
        self._clock = clock
        self._arrivals = 0

    @property
    def longest_sequence(self) -> int:
        """Tokens that the model's context and an empty cache both hold."""
        return bisect.bisect_left(range(self._max_length), True, key=lambda n: not self._cache.fits(n + 1))

    def check(self, request: Request) -> None:
        """Raises RequestError, ContextTooLong or BadSampling for a request that can never be served."""
        self._family.fingerprint(request.model)
        n, limit = self._check_prompt(request.prompt), self._max_length
        if (n >= limit and request.sampling.max_tokens > 0) or n > limit:
            raise ContextTooLong(f"the prompt has {n} tokens, the context holds {limit} with the answer")
        longest = min(n + request.sampling.max_tokens, limit)
        if not self._cache.fits(longest):
            budget_bytes = self._config.budget_bytes
            raise ContextTooLong(f"{longest} tokens need more than the cache budget of {budget_bytes} bytes")
        if request.arrangement is not None:
            request.arrangement.check(n)
        if request.n < 1:
            raise BadSampling(f"n is {request.n}, must be at least 1", param="n")
        for token in (*request.sampling.logit_bias, *request.sampling.stop_token_ids):
            if not 0 <= token < self.vocab_size:
                raise BadSampling(f"token {token} is outside the vocabulary [0, {self.vocab_size})")

    def commit(self, namespace: str, prompt: Prompt, session: str, model: str) -> None:
        """See `Engine.commit`."""
        namespace = self._family.namespace(model, namespace)
        n = self._check_prompt(prompt)
        if n > self.longest_sequence:
            raise ContextTooLong(f"the prompt has {n} tokens, context and cache hold {self.longest_sequence}")
        if self._config.prefix_cache:
            self._scheduler.canonical.add(namespace, prompt.tokens, prompt.boundaries, Origin(session))

    def tokens_of(self, numbers: Numbers[object]) -> TokenArray:
        """Numbers as tokens. Raises RequestError for one that is none."""
        if not isinstance(numbers, Numbers | np.ndarray):
            raise RequestError(f"tokens are {repr(numbers)[:100]}, must be a sequence of integers", param="tokens")
        for number in numbers:
            if not isinstance(number, int | np.integer) or not 0 <= number < self.vocab_size:
                raise RequestError(
                    f"token {repr(number)[:100]} is not an integer in the vocabulary [0, {self.vocab_size})",
                    param="tokens",
                )
        return np.asarray(numbers, np.int32)

    def _check_prompt(self, prompt: Prompt) -> int:
        """-> its number of tokens. Raises RequestError."""
        if len(prompt.tokens) == 0:
            raise RequestError("the prompt has 0 tokens, must have at least 1", param="prompt")
        low, high = int(prompt.tokens.min()), int(prompt.tokens.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(f"prompt token {wrong} is outside the vocabulary [0, {self.vocab_size})", param="prompt")
        last = max((boundary.position for boundary in prompt.boundaries), default=0)
        if last > len(prompt.tokens):
            raise RequestError(f"a boundary at {last}, the prompt has {len(prompt.tokens)} tokens", param="prompt")
        return len(prompt.tokens)

    def num_cached(self, request: Request) -> int:
        """Tokens of a prompt that the cache has a state for."""
        salt, tokens = request.namespace, request.prompt.tokens
        namespace, mark = self._family.namespace(request.model, salt), self._family.mark(request.model, salt, tokens)
        return self._cache.match(namespace, keys_of(namespace, tokens, mark)).length

    def sequence(self, request: Request, index: int, before: Prefill | None = None) -> Sequence:
        """One of the `n` continuations of a request. before: what it goes on from, after a pause"""
        asked, salt = request.arrangement, request.namespace
        arranged = asked is not None and not self.why_exact(request)
        if index == 0 and asked is not None and asked.order is Order.ANY and not arranged:  # forks have its prompt
            namespace, earlier = self._family.namespace(request.model, salt), tuple(self._scheduler.sequences())
            known = partial(soon_known, self._cache, earlier, namespace)
            prompt, asked = best_order(request.prompt, asked, known)
            request = replace(request, prompt=prompt, arrangement=asked)
        mark = self._family.mark(request.model, salt, request.prompt.tokens) if before is None else before.mark
        if mark is None and index == 0 and self._family[request.model].invocation:
            logger.debug("request %s does not invoke %s: the base answers", request.id, request.model)
        reader = fingerprint_in(self._family.namespace(request.model, salt))
        prefill = new_prefill(request, reader, enabled=self._config.prefix_cache, arranged=arranged, mark=mark)
        prefill.asks = index == 0 and not arranged
        constraint = None if request.make_constraint is None else request.make_constraint()
        self._arrivals += 1
        return Sequence(
            request=request,
            index=index,
            arrival=self._arrivals,
            prefill=prefill,
            chooser=TokenChooser(request.sampling, request.prompt.tokens, index, constraint),
            submitted_s=self._clock(),
        )

    def own(self) -> Sequence:
        """A prompt of one token that uses no cache. Where it fails, no other request is at fault."""
        sampling = SamplingParams(temperature=0, max_tokens=1)
        return self.sequence(Request(OWN, Prompt(np.zeros(1, np.int32)), sampling, cache_mode=CacheMode.OFF), 0)

    def plan(self, request: Request) -> Plan:
        """What would be done for an arranged request if it came now. Changes nothing.

        Raises RequestError for one that can never be served, or is not arranged.
        """
        if request.arrangement is None:
            raise RequestError("the request names no messages: there is nothing to plan", param="arrangement")
        self.check(request)
        sequence = self.sequence(request, 0)
        prompt = sequence.prefill
        prefix = self._scheduler.prefix_of(prompt)
        if prompt.arrangement is None:
            plan = self.exact_plan(sequence.request, prefix)
            assert plan is not None
            return plan
        return self._compiler.plan(prompt.namespace, prompt.arrangement, prefix)

    def exact_plan(self, request: Request, prefix: int) -> Plan | None:
        """What is done for a request that names messages and is computed exactly; None for one that names none."""
        if request.arrangement is None:
            return None
        return self._compiler.exact_plan(request.arrangement, prefix, self.why_exact(request))

    def why_exact(self, request: Request) -> str:
        """Why a request that names messages is computed exactly; empty if it may be arranged."""
        if not self._config.prefix_cache or request.cache_mode is CacheMode.OFF:
            return "the cache is off"
        if request.sampling.prompt_logprobs is not None:
            return "log-probabilities of a prompt take all of it"
        return self._compiler.why_exact(request.arrangement) if request.arrangement else "as asked"
