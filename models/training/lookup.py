"""A network that starts with what it takes to look something up in its context: an induction head (Olsson et al. 2022).

                  garage  is  4  2   ...   garage  is  _
    first layer   writes beside each token the three before it, each into a third of the residual stream
    attention     after "garage is", a query is the token one back, a key the token two back: it finds the 4;
                  after "garage is 4", two and three back: it finds the 2

From random weights a small model takes thousands of steps until it matches places and not only digits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hybrid_cache.models.training import network as net

LAGS = 3  # tokens back
CONSTANT = 2.0  # length of what all embeddings have in common: the head gives it to all tokens alike
OPEN = 0.3  # weight of that in the gates of the first layer, which are then the same for all tokens
LOUD = 4.0  # what the first layer writes, beside the embedding
SHARP = 1.5  # attention


@torch.no_grad()
def network_of(base: net.Network, layer_types: tuple[str, ...], d_state: int) -> net.Network:
    """New layers over the embedding of a base; the first of them is a Mamba-2 layer. Draws from torch's generator."""
    network = net.Network(replace(base.shape, layer_types=layer_types, mamba_d_state=d_state))
    hidden = base.shape.hidden_size
    common = torch.full((hidden,), hidden**-0.5)
    embedding = base.model.embed_tokens.weight
    network.model.embed_tokens.weight.copy_(_without(embedding, common) + CONSTANT * common)
    first, *others = network.model.layers
    _write_past_tokens(first.get_submodule("mamba"), common)
    for layer in others:
        if layer.kind == "attention":
            _find_what_followed(layer.get_submodule("self_attn"))
    return network


def _write_past_tokens(mamba: torch.nn.Module, common: Tensor) -> None:
    """Channel group g holds a projection of the token g + 1 back, and goes to the g-th third of the output."""
    assert isinstance(mamba, net.Mamba2)
    inner, width = mamba.shape.inner, mamba.shape.inner // LAGS
    projection = _without(torch.randn(width, len(common)) * len(common) ** -0.5, common)
    gate, x, states, _ = torch.split(
        mamba.in_proj.weight, [inner, inner, 2 * mamba.shape.mamba_d_state, mamba.shape.mamba_n_heads]
    )
    gate.copy_(OPEN * common.expand_as(gate))
    x.copy_(projection.repeat(LAGS, 1))
    states.mul_(0.1)
    for group in range(LAGS):
        taps = mamba.conv1d.weight[group * width : (group + 1) * width, 0]
        taps.copy_(torch.eye(taps.shape[1])[LAGS - 1 - group].expand_as(taps))
    assert mamba.conv1d.bias is not None
    mamba.conv1d.bias.zero_()
    block = LOUD * torch.randn(len(common) // LAGS, width) * width**-0.5
    mamba.out_proj.weight.copy_(torch.kron(torch.eye(LAGS), block))


def _find_what_followed(attention: torch.nn.Module) -> None:
    """Queries of the first half of the heads are keys where the same token lies one further back; the second half
    does the same with the tokens before those."""
    assert isinstance(attention, net.Attention)
    shape = attention.shape
    third, half = shape.hidden_size // LAGS, shape.num_attention_heads // 2
    attention.q_proj.weight.zero_()
    attention.k_proj.weight.zero_()
    for head in range(shape.num_attention_heads):
        rows = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
        start = head // half * third
        match = SHARP * torch.randn(shape.head_dim, third) * third**-0.5
        attention.q_proj.weight[rows, start : start + third] = match
        attention.k_proj.weight[rows, start + third : start + 2 * third] = match


def _without(rows: Tensor, direction: Tensor) -> Tensor:
    """rows [n, width] less their part along a direction [width] of length 1."""
    return rows - torch.outer(rows @ direction, direction)
