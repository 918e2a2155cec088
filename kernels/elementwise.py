"""Elementwise functions whose vector body and scalar tail round alike: a value's bits do not depend on its place.

torch's own `silu`, `sigmoid` and `softplus` have no such promise; where the tail begins depends on the number of rows.
All shapes are free; float32 comes out, whatever goes in.
"""

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    x = x.float()
    return x / (1.0 + torch.exp(-x))


def sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-x.float()))


def tanh(x: Tensor) -> Tensor:
    return 1.0 - 2.0 / (1.0 + torch.exp(2.0 * x.float()))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    x = x.float()
    return torch.where(x > 20.0, x, torch.log1p(torch.exp(x.clamp(max=20.0))))


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate), in the type of x; the shapes broadcast."""
    return (x.float() * sigmoid(gate)).to(x.dtype)


def add(hidden: Tensor, y: Tensor, multiplier: float = 1.0) -> Tensor:
    """hidden += multiplier * y, both of them in place, each [R, hidden] -> hidden.

    Two exact steps: a fused multiply-add may round differently at the end of a tensor than inside it.
    """
    if multiplier != 1.0:
        y *= multiplier
    hidden += y
    return hidden
