"""Stand-ins for mamba-ssm 2.3.2 and causal-conv1d 1.7.0, token by token in float32, with what their own code demands.

Signatures, shapes, types and strides are those of causal_conv1d_interface.py and causal_conv1d.cpp,
selective_scan_interface.py and selective_scan.cpp, selective_state_update.py, ssd_combined.py and layernorm_gated.py.
"""

import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
import torch.nn.functional as F

INFINITY = float("inf")


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    batch, channels, length = x.shape
    width = weight.shape[1]
    assert x.stride(1) == 1, "states need channel-last"
    assert x.stride(2) > 1
    assert channels % 8 == x.stride(2) % 8 == x.stride(0) % 8 == 0
    assert 2 <= width <= 4
    assert seq_idx is None
    for states in (initial_states, final_states_out):
        assert states.shape == (batch, channels, width - 1)
        assert states.stride(1) == 1
        assert states.dtype == x.dtype
    assert initial_states.data_ptr() != final_states_out.data_ptr(), "one block writes while another still reads"
    assert return_final_states
    rows = torch.cat([initial_states, x], dim=2)
    final_states_out.copy_(rows[:, :, length:])
    return _convolve(rows, weight, bias, activation), final_states_out


def causal_conv1d_update(
    x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None
):
    batch, channels = x.shape
    assert conv_state.shape[1:] == (channels, weight.shape[1] - 1)
    assert conv_state.dtype == x.dtype
    assert conv_state_indices.shape == (batch,)
    assert conv_state_indices.dtype == torch.int32
    assert cache_seqlens is None
    rows = torch.cat([conv_state[conv_state_indices], x[:, :, None]], dim=2)
    conv_state[conv_state_indices] = rows[:, :, 1:]
    return _convolve(rows, weight, bias, activation)[:, :, 0]


def _convolve(rows, weight, bias, activation):
    assert activation in (None, "silu", "swish")
    assert bias is None or bias.dtype == weight.dtype
    bias = None if bias is None else bias.float()
    y = F.conv1d(rows.float(), weight.float()[:, None], bias, groups=len(weight))
    return (y if activation is None else F.silu(y)).to(rows.dtype)


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    batch, channels, length = u.shape
    d_state = A.shape[1]
    assert delta.shape == z.shape == u.shape
    assert B.shape == C.shape == (batch, d_state, length)
    assert {t.dtype for t in (delta, B, C, z)} == {u.dtype}
    assert {t.dtype for t in (A, D, delta_bias)} == {torch.float32}
    assert d_state <= 256
    assert delta_softplus
    assert return_last_state
    h = torch.zeros(batch, channels, d_state)
    y = torch.zeros(u.shape)
    dt = F.softplus(delta.float() + delta_bias[:, None])
    for t in range(length):
        h = (dt[:, :, t, None] * A).exp() * h + (dt * u.float())[:, :, t, None] * B[:, None, :, t].float()
        y[:, :, t] = (h * C[:, None, :, t].float()).sum(-1)
    y = (y + D[:, None] * u.float()) * F.silu(z.float())
    return y.to(u.dtype), h


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None
):
    batch = len(x)
    assert state_batch_indices.shape == (batch,)
    assert dt_bias is not None, "its strides are looked at"
    assert dt_softplus
    if state.dim() == 3:  # one head
        heads = [None if t is None else t[:, None] for t in (x, dt, B, C, z)]
        shared = [t[None] for t in (A, D, dt_bias)]
        return _update(state[:, None], *heads, *shared, state_batch_indices)[:, 0]
    return _update(state, x, dt, B, C, z, A, D, dt_bias, state_batch_indices)


def _update(state, x, dt, B, C, z, A, D, dt_bias, slots):
    _, heads, size, d_state = state.shape
    assert x.shape == dt.shape == (len(x), heads, size)
    assert A.shape == (heads, size, d_state)
    assert D.shape == dt_bias.shape == (heads, size)
    assert heads % B.shape[1] == 0
    assert B.shape == C.shape == (len(x), B.shape[1], d_state)
    B, C = (t.float().repeat_interleave(heads // t.shape[1], dim=1)[:, :, None] for t in (B, C))
    dt = F.softplus(dt.float() + dt_bias)[..., None]
    h = (dt * A).exp() * state[slots] + dt * x.float()[..., None] * B
    state[slots] = h
    y = (h * C).sum(-1) + D * x.float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, INFINITY),
    return_final_states=False,
    return_varlen_states=False,
):
    batch, length, heads, size = x.shape
    groups, d_state = B.shape[2:]
    assert heads % groups == 0
    assert B.shape == C.shape == (batch, length, groups, d_state)
    assert dt.shape == (batch, length, heads)
    assert A.shape == D.shape == dt_bias.shape == (heads,)
    assert z is None or z.shape == x.shape
    assert initial_states is None or initial_states.shape == (batch, heads, size, d_state)
    assert chunk_size > 0
    assert seq_idx is None
    assert cu_seqlens is None
    assert not return_varlen_states
    assert dt_softplus
    assert return_final_states
    h = torch.zeros(batch, heads, size, d_state) if initial_states is None else initial_states.float()
    B, C = (t.float().repeat_interleave(heads // groups, dim=2) for t in (B, C))
    dt = F.softplus(dt.float() + dt_bias).clamp(*dt_limit)[..., None]
    y = torch.zeros(x.shape)
    for t in range(length):
        h = (dt[:, t, :, :, None] * A[:, None, None]).exp() * h + (dt * x.float())[:, t, ..., None] * B[:, t, :, None]
        y[:, t] = (h * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t].float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype), h


def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):
    assert bias is None
    assert x.shape == z.shape
    assert x.shape[1] == len(weight)
    assert x.shape[1] % group_size == 0
    gate = F.silu(z.float())
    wide = x.float() if norm_before_gate else x.float() * gate
    normed = F.rms_norm(wide.view(len(x), -1, group_size), (group_size,), None, eps).flatten(1) * weight.float()
    return (normed * gate if norm_before_gate else normed).to(x.dtype)


MODULES = {
    "causal_conv1d": [causal_conv1d_fn, causal_conv1d_update],
    "mamba_ssm": [],
    "mamba_ssm.ops": [],
    "mamba_ssm.ops.selective_scan_interface": [selective_scan_fn],
    "mamba_ssm.ops.triton": [],
    "mamba_ssm.ops.triton.selective_state_update": [selective_state_update],
    "mamba_ssm.ops.triton.ssd_combined": [mamba_chunk_scan_combined],
    "mamba_ssm.ops.triton.layernorm_gated": [rmsnorm_fn],
}


def install(monkeypatch):
    """Puts the stand-ins where the packages would be -> how often each function is called."""
    calls = Counter()

    def counted(function):
        def call(*args, **kwargs):
            calls[function.__name__] += 1
            return function(*args, **kwargs)

        return call

    for name, functions in MODULES.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__version__ = "9.0.0"
        for function in functions:
            setattr(module, function.__name__, counted(function))
        monkeypatch.setitem(sys.modules, name, module)
    return calls
