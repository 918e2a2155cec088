"""From logits to tokens, one row at a time so that a row's choice never depends on its neighbours.

Order: bias, penalties, masks of constraints, then temperature, top_k, top_p and min_p as `Ops.sample` has them. A
sampled choice uses exactly one uniform number per token, so a seed gives the same tokens after a preemption, too.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.kernels.ops import Draws, Ops
from hybrid_cache.sampling import TokenChooser, TokenLogprob

LEAST = 1e-6  # temperature or top_p: below it, single precision leaves only the most likely token


def adjust(logits: Tensor, chooser: TokenChooser) -> None:
    """Applies bias, penalties and the hold on stop tokens to logits [V], in place."""
    p, device = chooser.params, logits.device
    if p.logit_bias:
        tokens, bias = torch.tensor(list(p.logit_bias), device=device), list(p.logit_bias.values())
        logits[tokens] += torch.tensor(bias, device=device)
    if p.repetition_penalty != 1:
        seen = torch.from_numpy(chooser.seen()).to(device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if chooser.counts and (p.presence_penalty or p.frequency_penalty):
        tokens, counts = torch.tensor(list(chooser.counts.items()), device=device).T
        logits[tokens] -= p.presence_penalty + p.frequency_penalty * counts
    if chooser.holds_back:
        logits[list(p.stop_token_ids)] = -torch.inf


def mask(logits: Tensor, choosers: Sequence[TokenChooser], ops: Ops) -> None:
    """Leaves the logits [S, V] of tokens that constraints allow, in place."""
    masks = {row: chooser.constraint.mask() for row, chooser in enumerate(choosers) if chooser.constraint is not None}
    if masks:
        words = torch.from_numpy(np.stack(list(masks.values()))).to(logits.device)
        ops.mask_tokens(logits, torch.tensor(list(masks), device=logits.device), words)


def choose_tokens(logits: Tensor, choosers: Sequence[TokenChooser], ops: Ops) -> list[int]:
    """logits [S, V] float32, one chooser a row -> one token a row, which its chooser has still to note."""
    if any(chooser.adjusts for chooser in choosers):
        logits = logits.clone()
        for row, chooser in zip(logits, choosers, strict=True):
            if chooser.adjusts:
                adjust(row, chooser)
        mask(logits, choosers, ops)
    tokens: list[int] = ops.sample(logits, _draws(choosers, logits.device)).tolist()
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
