"""The effects of several messages on one state, put together.

With h the state before them, and message i doing h -> P_i h + S_i:

    ordered       P_n ... P_1 h + sum of P_n ... P_{i+1} S_i: what one layer would compute for these inputs (CASO)
    rotations     the mean over the n rotations of the order (PICASO-R)
    permutations  the mean over all n! orders (PICASO-S); for transitions that commute
    mean          the mean of S_i + P_i h ("soup")
    last          S_n + P_n h: as if the last one were the only one

From PICASO (Liu et al. 2025, arXiv 2502.17605). All float32; products of decays are sums of logarithms.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybrid_cache.choreography.arrangement import Composition
from hybrid_cache.device.effects import Transition


def compose(
    how: Composition, transition: Transition, h: Tensor, ps: Tensor, sums: Sequence[Tensor], *, from_zero: bool = False
) -> None:
    """Takes h to the state after n messages, given in the order asked for.

    h [*state_shape]   ps [n, *p_shape] p of each, as the transition writes it   sums n times [*state_shape], S of each
    All float32. from_zero: h is taken to be zero, whatever it holds
    """
    if len(sums) == 1:
        how = Composition.ORDERED
    if from_zero and how is Composition.ORDERED:  # what the first message leaves in a state of zero
        h.copy_(sums[0])
        ps, sums = ps[1:], sums[1:]
        if not sums:
            return
    elif from_zero:
        h.zero_()
    _METHODS[how](transition, h, ps, sums)


def ordered(transition: Transition, h: Tensor, ps: Tensor, sums: Sequence[Tensor]) -> None:
    """h [*state_shape] -> P_n ... P_1 h + sum of P_n ... P_{i+1} S_i, in place; arguments as of `compose`."""
    transition.follow(h, ps, sums)


def rotations(transition: Transition, h: Tensor, ps: Tensor, sums: Sequence[Tensor]) -> None:
    """h [*state_shape] -> the mean of `ordered` over the n rotations, in place; arguments as of `compose`."""
    n = len(sums)
    rotated = (transition.follow(h.clone(), ps.roll(-i, 0), [*sums[i:], *sums[:i]]) for i in range(n))
    h.copy_(torch.stack(list(rotated)).mean(0))


def permutations(transition: Transition, h: Tensor, ps: Tensor, sums: Sequence[Tensor]) -> None:
    """h [*state_shape] -> the mean of `ordered` over all n! orders, in place; arguments as of `compose`.

    S_k is multiplied with the mean, over all orders, of the product of the P that come after it.

    Of n - 1 others, m come later in a share 1 / n of the orders, each set of m equally often, so that mean is
    1 / n sum over m of e_m(the others' P) / C(n - 1, m), with e_m the elementary symmetric polynomials.
    """
    assert transition.commutes
    ones = torch.ones_like(h)
    factors = [transition.apply(p, ones) for p in ps]
    h.mul_(torch.stack(factors).prod(0))
    for k, s in enumerate(sums):
        h.addcmul_(_mean_product(factors[:k] + factors[k + 1 :]), s)


def _mean_product(factors: list[Tensor]) -> Tensor:
    """The mean of e_m / C(n, m) over m = 0 .. n, with n factors, by the usual recurrence on means.

    The mean of e_m over sets of size m after one more factor x, mu'_m = ((n + 1 - m) mu_m + m x mu_{m-1}) / (n + 1):
    all terms lie in [0, 1], whatever n.
    """
    means = [torch.ones_like(factors[0])]
    for n, x in enumerate(factors):
        longer = [*means, torch.zeros_like(x)]
        means = [((n + 1 - m) * longer[m] + (m * x * means[m - 1] if m else 0.0)) / (n + 1) for m in range(len(longer))]
    return torch.stack(means).mean(0)


def mean(transition: Transition, h: Tensor, ps: Tensor, sums: Sequence[Tensor]) -> None:
    """h [*state_shape] -> the mean of S_i + P_i h, in place; arguments as of `compose`."""
    after = [transition.apply(p, h).add_(s) for p, s in zip(ps, sums, strict=True)]
    h.copy_(torch.stack(after).mean(0))


def last(transition: Transition, h: Tensor, ps: Tensor, sums: Sequence[Tensor]) -> None:
    """h [*state_shape] -> S_n + P_n h, in place; arguments as of `compose`."""
    transition.follow(h, ps[-1:], sums[-1:])


_METHODS: dict[Composition, Callable[[Transition, Tensor, Tensor, Sequence[Tensor]], None]] = {
    Composition.ORDERED: ordered,
    Composition.ROTATIONS: rotations,
    Composition.PERMUTATIONS: permutations,
    Composition.MEAN: mean,
    Composition.LAST: last,
}
