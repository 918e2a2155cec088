"""The next token of each row of logits, in torch: what `Ops.sample` says, one row at a time."""

from functools import cache

import torch
from torch import Tensor

from hybrid_cache.kernels.ops import Draws

WORD = 32  # tokens


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """logits [S, V] -> [S] int64, see `Ops.sample`."""
    tokens = logits.argmax(1)
    columns = (draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.point)
    for row, values in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        temperature, top_k, top_p, min_p, point = values
        best = logits[row, tokens[row]]
        if temperature > 0 and bool(best.isfinite()):
            weights = ((logits[row] - best) / temperature).exp_()
            tokens[row] = _token_at(weights, max(_least(weights, top_k, top_p), min_p), point)
    return tokens


def mask_tokens(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    """See `Ops.mask_tokens`."""
    check_words(logits, rows, words)
    bits = _bits(logits.device).index_select(0, words.view(torch.uint8).view(-1).int())
    barred = bits.view(torch.bool).view(len(words), -1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill_(barred, -torch.inf)


def check_words(logits: Tensor, rows: Tensor, words: Tensor) -> None:
    assert words.shape == (len(rows), -(-logits.shape[1] // WORD))
    assert words.is_contiguous()
    assert logits.stride(1) == 1


@cache
def _bits(device: torch.device) -> Tensor:
    """For each byte, which of its bits are not set: eight of bool, the lowest first, in one int64. [256]"""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return (bits == 0).view(torch.int64).view(-1).to(device)


def log_sum_exp(logits: Tensor) -> Tensor:
    """logits [S, V] -> [S]."""
    return torch.stack([row.logsumexp(0) for row in logits]) if len(logits) else logits.new_empty(0)


def points(logits: Tensor, draws: Draws, tokens: Tensor) -> Tensor:
    """The points nearest to those of `draws` at which these tokens would be drawn, to see how wrong they are.

    For a row without a temperature: 0, or 1 for a token that is not the most likely one.
    logits [S, V], tokens [S] int64 -> [S] float32
    """
    found = []
    columns = (tokens, draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.point)
    for row, *values in zip(logits.double(), *(column.tolist() for column in columns), strict=True):
        token, temperature, top_k, top_p, min_p, point = values
        if temperature == 0:
            found.append(float(token != int(row.argmax())))
            continue
        weights = ((row - row.max()) / temperature).exp_()
        weights[weights < max(_least(weights, top_k, top_p), min_p)] = 0
        end = float(weights[: token + 1].sum() / weights.sum())
        start = end - float(weights[token] / weights.sum())
        found.append(min(max(point, start), end))
    return torch.tensor(found)


def _least(weights: Tensor, top_k: int, top_p: float) -> float:
    """The smallest of weights [V] that stays."""
    least = float(torch.topk(weights, top_k).values[-1]) if 0 < top_k < len(weights) else 0.0
    if top_p == 1:
        return least
    falling = weights[weights >= least].sort(descending=True).values
    sums = falling.cumsum(0, dtype=torch.float64)
    reached = int(torch.searchsorted(sums, top_p * sums[-1]))
    return float(falling[min(reached, len(falling) - 1)])


def _token_at(weights: Tensor, least: float, point: float) -> Tensor:
    """Where the sum over the weights [V] that stay exceeds `point` of it."""
    sums = torch.where(weights >= least, weights, 0.0).cumsum(0, dtype=torch.float64)
    token = torch.searchsorted(sums, point * sums[-1:], right=True)
    return torch.minimum(token, (sums < sums[-1]).sum())[0]
