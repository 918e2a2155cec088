"""From logits to tokens, one row at a time so that a row's choice never depends on its neighbours.

Order: bias, penalties, then temperature, top_k, top_p and min_p as `Ops.sample` has them. A sampled choice uses exactly
one uniform number per token, so a seed gives the same tokens after a preemption, too.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybrid_cache.kernels.ops import Draws, Ops
from hybrid_cache.request import SamplingParams, TokenLogprob
from hybrid_cache.tokens import TokenArray

LEAST = 1e-6  # temperature or top_p: below, single precision has nothing but the most likely token left


class TokenChooser:
    """What one continuation asks of its tokens; owns its random numbers and its counts of past tokens."""

    def __init__(self, params: SamplingParams, prompt: TokenArray, index: int) -> None:
        self.params = params
        # A fixed seed gives each of the n choices a stream of its own; no seed, fresh entropy.
        entropy = None if params.seed is None else [params.seed & (2**64 - 1), index]
        self._random = np.random.default_rng(entropy)
        self._prompt = prompt
        self._counts: Counter[int] = Counter()
        self._seen: npt.NDArray[np.int64] | None = None  # each token of prompt and answer once, when asked for

    @property
    def adjusts(self) -> bool:
        """True when the choice is not from the model's logits as they are."""
        return bool(self.params.logit_bias) or self._penalised or self._held_back

    @property
    def _penalised(self) -> bool:
        p = self.params
        return p.presence_penalty != 0 or p.frequency_penalty != 0 or p.repetition_penalty != 1

    @property
    def _held_back(self) -> bool:
        return bool(self.params.stop_token_ids) and self._counts.total() < self.params.min_tokens

    def point(self) -> float:
        """Where the next token is drawn, in [0, 1)."""
        return 0.0 if self.params.greedy else self._random.random()

    def note(self, token: int) -> None:
        """Counts a token that was chosen."""
        self._counts[token] += 1
        if self._seen is not None and token not in self._seen:
            self._seen = np.append(self._seen, token)

    def adjust(self, logits: Tensor) -> None:
        """Applies bias, penalties and the hold on stop tokens to logits [V], in place."""
        p, device = self.params, logits.device
        if p.logit_bias:
            tokens, bias = torch.tensor(list(p.logit_bias), device=device), list(p.logit_bias.values())
            logits[tokens] += torch.tensor(bias, device=device)
        if p.repetition_penalty != 1:
            if self._seen is None:
                self._seen = np.union1d(self._prompt, list(self._counts)).astype(np.int64)
            seen = torch.from_numpy(self._seen).to(device)
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if self._counts and (p.presence_penalty or p.frequency_penalty):
            tokens, counts = torch.tensor(list(self._counts.items()), device=device).T
            logits[tokens] -= p.presence_penalty + p.frequency_penalty * counts
        if self._held_back:
            logits[list(p.stop_token_ids)] = -torch.inf


def choose_tokens(logits: Tensor, choosers: Sequence[TokenChooser], ops: Ops) -> list[int]:
    """logits [S, V] float32, one chooser a row -> one token a row, which its chooser has counted."""
    if any(chooser.adjusts for chooser in choosers):
        logits = logits.clone()
        for row, chooser in zip(logits, choosers, strict=True):
            if chooser.adjusts:
                chooser.adjust(row)
    tokens: list[int] = ops.sample(logits, _draws(choosers, logits.device)).tolist()
    for chooser, token in zip(choosers, tokens, strict=True):
        chooser.note(token)
    return tokens


def _draws(choosers: Sequence[TokenChooser], device: torch.device) -> Draws:
    params = [chooser.params for chooser in choosers]
    return Draws(
        torch.tensor([p.temperature and max(p.temperature, LEAST) for p in params], device=device),
        torch.tensor([p.top_k for p in params], device=device),
        torch.tensor([max(p.top_p, LEAST) for p in params], device=device),
        torch.tensor([p.min_p for p in params], device=device),
        torch.tensor([chooser.point() for chooser in choosers], dtype=torch.float64, device=device),
        greedy=all(p.greedy for p in params),
    )


def log_probabilities(logits: Tensor, tokens: Sequence[int], num_top: Sequence[int], ops: Ops) -> list[TokenLogprob]:
    """logits [S, V], a token of each row -> their log-probabilities, and those of the `num_top` most likely ones."""
    if not tokens:
        return []
    sums = ops.log_sum_exp(logits)
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0] - sums
    top: dict[int, tuple[tuple[int, float], ...]] = {}
    for count in set(num_top):  # which of equal logits comes first depends on how many are asked for
        rows = [row for row, n in enumerate(num_top) if n == count]
        chosen = logits if len(rows) == len(num_top) else logits[rows]
        most = torch.topk(chosen, min(count, logits.shape[1]))
        values, best = (most.values - sums[rows, None]).tolist(), most.indices.tolist()
        top |= {row: tuple(zip(best[i], values[i], strict=True)) for i, row in enumerate(rows)}
    own_values = own.tolist()
    return [TokenLogprob(token, own_values[row], top[row]) for row, token in enumerate(tokens)]
