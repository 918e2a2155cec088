"""Elementwise functions whose vector body and scalar tail round alike: a value's bits do not depend on where it
lies in a tensor.

torch's own `silu`, `sigmoid` and `softplus` have no such promise; where the tail begins depends on the number of rows.
Tensors have any shape [...]; the result is float32 unless said otherwise.
"""

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """x [...] -> x * sigmoid(x), [...] float32."""
    x = x.float()
    return x / (1.0 + torch.exp(-x))


def sigmoid(x: Tensor) -> Tensor:
    """x [...] -> 1 / (1 + exp(-x)), [...] float32."""
    return 1.0 / (1.0 + torch.exp(-x.float()))


def tanh(x: Tensor) -> Tensor:
    """x [...] -> tanh(x), [...] float32."""
    return 1.0 - 2.0 / (1.0 + torch.exp(2.0 * x.float()))


def softplus(x: Tensor) -> Tensor:
    """x [...] -> log(1 + exp(x)), [...] float32."""
    x = x.float()
    return torch.where(x > 20.0, x, torch.log1p(torch.exp(x.clamp(max=20.0))))


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x [...], gate [...], which broadcast -> x * sigmoid(gate) in the dtype of x."""
    return (x.float() * sigmoid(gate)).to(x.dtype)


def add(hidden: Tensor, y: Tensor, multiplier: float = 1.0) -> Tensor:
    """hidden += multiplier * y, both of them in place, each [R, hidden] -> hidden.

    Two exact steps: a fused multiply-add may round differently at the end of a tensor than inside it.
    """
    if multiplier != 1.0:
        y *= multiplier
    hidden += y
    return hidden
