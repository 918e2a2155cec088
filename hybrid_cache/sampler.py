"""From logits to tokens, one row at a time so that a row's choice never depends on its neighbours.

Order: bias, penalties, temperature, min_p, top_k, top_p, then one draw from the inverse cumulative distribution. A
choice uses exactly one uniform number per sampled token, so a seed gives the same tokens after a preemption, too.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.request import SamplingParams, TokenArray, TokenLogprob


class TokenChooser:
    """Chooses the tokens of one continuation; owns its random numbers and its counts of past tokens."""

    def __init__(self, params: SamplingParams, prompt: TokenArray, index: int) -> None:
        self.params = params
        # A fixed seed gives each of the n choices a stream of its own; no seed, fresh entropy.
        entropy = None if params.seed is None else [params.seed & (2**64 - 1), index]
        self._random = np.random.default_rng(entropy)
        self._prompt = prompt
        self._counts: Counter[int] = Counter()

    @property
    def reads_logits_only(self) -> bool:
        """True when the choice is a plain argmax of the model's logits."""
        p = self.params
        return p.greedy and not p.logit_bias and not self._penalised and not self._held_back

    @property
    def _penalised(self) -> bool:
        p = self.params
        return p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1

    @property
    def _held_back(self) -> bool:
        return bool(self.params.stop_token_ids) and self._counts.total() < self.params.min_tokens

    def choose(self, logits: Tensor) -> int:
        """logits [V] float32 of the next token -> a token; counts it as generated."""
        if self.reads_logits_only:
            token = int(logits.argmax())
        else:
            adjusted = self._adjust(logits.clone())
            token = int(adjusted.argmax()) if self.params.greedy else self._draw(adjusted)
        self._counts[token] += 1
        return token

    def note(self, token: int) -> None:
        """Counts a token that was chosen elsewhere (the batched argmax)."""
        self._counts[token] += 1

    def _adjust(self, logits: Tensor) -> Tensor:
        """Applies bias, penalties and the hold on stop tokens to logits [V], in place."""
        p = self.params
        for token, bias in p.logit_bias.items():
            logits[token] += bias
        if p.repetition_penalty != 1:
            seen = torch.from_numpy(np.unique(np.concatenate([self._prompt, list(self._counts)])).astype(np.int64))
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if p.presence_penalty or p.frequency_penalty:
            for token, count in self._counts.items():
                logits[token] -= p.presence_penalty + p.frequency_penalty * count
        if self._held_back:
            logits[list(p.stop_token_ids)] = -torch.inf
        return logits

    def _draw(self, logits: Tensor) -> int:
        """One draw from logits [V] under temperature, min_p, top_k and top_p."""
        p = self.params
        values, tokens = _largest(logits, p.top_k)
        probs = torch.softmax(values.double() / p.temperature, dim=0)
        keep = probs >= p.min_p * probs[0]
        if p.top_p < 1:
            keep &= probs.cumsum(0) - probs < p.top_p  # the first token whose sum reaches top_p is kept
        kept = probs[: int(keep.sum())]  # probabilities fall, so what is kept is a prefix
        point = self._random.random() * float(kept.sum())
        rank = int(torch.searchsorted(kept.cumsum(0), point, right=True))
        return int(tokens[min(rank, len(kept) - 1)])


def _largest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits [V] in falling order and their tokens; all of them for k = 0."""
    if 0 < top_k < len(logits):
        values, tokens = torch.topk(logits, top_k)
        return values, tokens
    values, tokens = torch.sort(logits, descending=True, stable=True)
    return values, tokens


def choose_tokens(logits: Tensor, choosers: Sequence[TokenChooser]) -> list[int]:
    """logits [S, V] float32, one chooser a row -> one token a row. Plain argmax rows are done together."""
    plain = [i for i, c in enumerate(choosers) if c.reads_logits_only]
    best = dict(zip(plain, logits[plain].argmax(dim=1).tolist(), strict=True)) if plain else {}
    tokens = []
    for i, chooser in enumerate(choosers):
        if i in best:
            chooser.note(best[i])
        tokens.append(best[i] if i in best else chooser.choose(logits[i]))
    return tokens


def log_probability(logits: Tensor, token: int, num_top: int) -> TokenLogprob:
    """logits [V] -> the token's log-probability and the `num_top` most likely alternatives."""
    logprobs = torch.log_softmax(logits, dim=0)
    own = float(logprobs[token])
    if num_top == 0:
        return TokenLogprob(token, own)
    values, tokens = torch.topk(logprobs, min(num_top, len(logprobs)))
    return TokenLogprob(token, own, tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
