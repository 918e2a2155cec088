"""What one continuation asks of its tokens, and what it has had so far: numbers only, see `device.sampler`."""

from collections import Counter

import numpy as np
import numpy.typing as npt

from hybrid_cache.request import SamplingParams
from hybrid_cache.tokens import TokenArray


class TokenChooser:
    """What one continuation asks of its tokens; owns its random numbers and its counts of past tokens."""

    def __init__(self, params: SamplingParams, prompt: TokenArray, index: int) -> None:
        self.params = params
        # A fixed seed gives each of the n choices a stream of its own; no seed, fresh entropy.
        entropy = None if params.seed is None else [params.seed & (2**64 - 1), index]
        self._random = np.random.default_rng(entropy)
        self._prompt = prompt
        self.counts: Counter[int] = Counter()
        self._seen: npt.NDArray[np.int64] | None = None  # each token of prompt and answer once, when asked for

    @property
    def adjusts(self) -> bool:
        """True when the choice is not from the model's logits as they are."""
        return bool(self.params.logit_bias) or self._penalised or self.holds_back

    @property
    def _penalised(self) -> bool:
        p = self.params
        return p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1

    @property
    def holds_back(self) -> bool:
        """Whether stop tokens are not to be chosen yet."""
        return bool(self.params.stop_token_ids) and self.counts.total() < self.params.min_tokens

    def point(self) -> float:
        """Where the next token is drawn, in [0, 1)."""
        return 0.0 if self.params.greedy else self._random.random()

    def seen(self) -> npt.NDArray[np.int64]:
        """Each token of prompt and answer once."""
        if self._seen is None:
            self._seen = np.union1d(self._prompt, list(self.counts)).astype(np.int64)
        return self._seen

    def note(self, token: int) -> None:
        """Counts a token that was chosen."""
        self.counts[token] += 1
        if self._seen is not None and token not in self._seen:
            self._seen = np.append(self._seen, token)
