"""What transformers computes for a case of `bench kernels`, with its own functions of torch.

The same inputs, weights and result, a prompt from the zero state to its final state, or one token of each sequence. Not
included: states in slots (theirs lie side by side, a step writes them in place or returns new ones), captured states,
and exactness. The names are those of transformers 5.23; where a version lacks them, there is no peer. With the
package `kernels` transformers may take compiled kernels instead.

Without a peer: lightning attention and RG-LRU, which sit in modules together with projections, and prompts of Kimi
delta, where it keeps the decay between any two tokens of a chunk for each column of the state, gigabytes of it.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hybrid_cache.kernels.problems import (
    ConvProblem,
    GatedDeltaProblem,
    KimiDeltaProblem,
    Mamba1Problem,
    Mamba2Problem,
    Problem,
)

Timed = Callable[[], Tensor]
SSD_CHUNK = 256  # as in their configs


def transformers_peers(problem: Problem, inputs: Sequence[Tensor], decode: bool) -> dict[str, Timed]:
    """A call by the name of the library, or nothing. Inputs [R, ...] are one prompt, or one row of each sequence."""
    call: Timed | None = None
    try:
        match problem:
            case ConvProblem():
                call = _conv(problem, inputs[0], decode)
            case Mamba2Problem():
                call = _mamba2_steps(problem, inputs[0]) if decode else _mamba2_prompt(problem, inputs[0])
            case Mamba1Problem():
                call = _mamba1(problem, inputs, decode)
            case GatedDeltaProblem():
                call = _delta("qwen3_next", "torch_{}_gated_delta_rule", inputs, decode)
            case KimiDeltaProblem() if decode:
                call = _delta("kimi_linear", "{}_kimi_delta_attention", inputs, decode)
    except (ImportError, AttributeError):  # an older version
        return {}
    return {} if call is None else {"transformers": call}


def _model(name: str) -> Any:
    return import_module(f"transformers.models.{name}.modeling_{name}")


def _conv(problem: ConvProblem, x: Tensor, decode: bool) -> Timed:
    model, weight, bias = _model("mamba2"), problem.weight, problem.bias
    if not decode:
        prompt = model.causal_conv1d_fn
        return lambda: prompt(x.T[None], weight, bias, activation="silu")[0].T
    step, window = model.causal_conv1d_update, _window(x, weight)
    return lambda: step(x[:, :, None], window, weight, bias, "silu")[:, :, 0]


def _window(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_zeros(len(x), weight.shape[0], weight.shape[1] - 1)


def _mamba2_prompt(problem: Mamba2Problem, zxbcdt: Tensor) -> Timed:
    model, w = _model("mamba2"), problem.weights
    inner, bc = w.num_heads * w.head_dim, w.num_groups * w.d_state
    conv, scan, norm = model.causal_conv1d_fn, model.mamba2_chunk_scan, _mamba2_norm(problem)

    def call() -> Tensor:
        z, conv_in, dt = zxbcdt[None].tensor_split([inner, 2 * inner + 2 * bc], dim=2)
        mixed = conv(conv_in.transpose(1, 2), w.conv_weight, w.conv_bias, activation="silu").transpose(1, 2)
        x, B, C = mixed.split([inner, bc, bc], dim=2)
        y, _ = scan(
            x.reshape(*x.shape[:2], w.num_heads, w.head_dim),
            dt,
            w.A,
            *(part.reshape(*part.shape[:2], w.num_groups, w.d_state) for part in (B, C)),
            chunk_size=SSD_CHUNK,
            D=w.D,
            dt_bias=w.dt_bias,
            dt_softplus=True,
            dt_limit=(w.dt_min, w.dt_max),
            return_final_states=True,
        )
        return norm(y.flatten(2), z)[0].to(zxbcdt.dtype)

    return call


def _mamba2_steps(problem: Mamba2Problem, zxbcdt: Tensor) -> Timed:
    model, w = _model("mamba2"), problem.weights
    heads = (w.num_heads, w.head_dim)
    inner, bc = w.num_heads * w.head_dim, w.num_groups * w.d_state
    conv, step, norm = model.causal_conv1d_update, model.mamba2_selective_state_update, _mamba2_norm(problem)
    window = _window(zxbcdt, w.conv_weight)
    state = torch.zeros(len(zxbcdt), *heads, w.d_state, device=zxbcdt.device)

    def call() -> Tensor:
        z, conv_in, dt = zxbcdt.tensor_split([inner, 2 * inner + 2 * bc], dim=1)
        mixed = conv(conv_in[:, :, None], window, w.conv_weight, w.conv_bias, "silu")[:, :, 0]
        x, B, C = mixed.split([inner, bc, bc], dim=1)
        y = step(
            state,
            x.view(-1, *heads),
            dt[:, :, None].expand(-1, *heads),
            w.A[:, None, None].expand(*heads, w.d_state),
            *(part.view(-1, w.num_groups, w.d_state) for part in (B, C)),
            D=w.D[:, None].expand(heads),
            dt_bias=w.dt_bias[:, None].expand(heads),
            dt_softplus=True,
        )
        return norm(y.flatten(1), z).to(zxbcdt.dtype)

    return call


def _mamba2_norm(problem: Mamba2Problem) -> Callable[[Tensor, Tensor], Tensor]:
    w = problem.weights
    assert w.norm_weight is not None
    norm = _model("mamba2").MambaRMSNormGated(w.num_heads * w.head_dim, w.norm_group, w.norm_eps)
    norm.weight = torch.nn.Parameter(w.norm_weight, requires_grad=False)
    call: Callable[[Tensor, Tensor], Tensor] = norm
    return call


def _mamba1(problem: Mamba1Problem, inputs: Sequence[Tensor], decode: bool) -> Timed:
    model, w = _model("mamba"), problem.weights
    x, dt, B, C, z = inputs
    if decode:
        step, state = model.mamba_selective_state_update, torch.zeros(len(x), *w.A.shape, device=x.device)
        return lambda: step(state, x, dt, w.A, B, C, D=w.D, dt_bias=w.dt_bias, dt_softplus=True, z=z)
    scan = model.mamba_selective_scan
    u, delta, b, c, gate = (part.T[None] for part in (x, dt, B, C, z))

    def call() -> Tensor:
        y, _ = scan(
            *(u, delta, w.A, b, c), D=w.D, z=gate, delta_bias=w.dt_bias, delta_softplus=True, return_last_state=True
        )
        rows: Tensor = y[0].T.to(x.dtype)
        return rows

    return call


def _delta(model: str, function: str, inputs: Sequence[Tensor], decode: bool) -> Timed:
    _, k, v, *_ = inputs
    delta = getattr(_model(model), function.format("recurrent" if decode else "chunk"))
    rows = [x[:, None] if decode else x[None] for x in inputs]
    state = torch.zeros(len(v), v.shape[1], k.shape[2], v.shape[2], device=v.device) if decode else None

    def call() -> Tensor:
        y, _ = delta(*rows, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
        out: Tensor = y.view(v.shape)
        return out

    return call
