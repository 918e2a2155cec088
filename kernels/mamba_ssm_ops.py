"""The adapter to mamba-ssm and causal-conv1d: their kernels for our operations, for parity and comparison on a GPU.

Written for mamba-ssm 2.2.4 to 2.3.2 and causal-conv1d 1.5 to 1.7. They return no state from within a chunk and take no
initial states for packed sequences, so a chunk is a call of its own, and one more for each state that is captured.
`TorchOps` does what they have no code for, on the same device.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import Mamba1Weights, Mamba2Weights, StateTensors
from hybrid_cache.kernels.runs import Run
from hybrid_cache.kernels.torch_ops import TorchOps

OPERATIONS = ("mamba2", "mamba1_scan", "causal_conv")
SSD_CHUNK = 256  # what their Mamba-2 layer takes
MAX_CONV_WIDTH = 4
CONV_ALIGNMENT = 8  # channels
MAX_SCAN_STATE = 256


class MambaSsmOps(TorchOps):
    """See the module. `dispatch` knows whether the packages are there.

    reasons: operation -> why it is left to torch, for the latest such call; empty where their kernels do everything
    """

    name = "mamba_ssm"
    inexact = "mamba-ssm, causal-conv1d and cuBLAS promise no bits"

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.reasons: dict[str, str] = {}
        conv, scan, step, ssd, norm = (import_module(name) for name in _MODULES)
        self._conv_chunk: Callable[..., Tensor] = conv.causal_conv1d_fn
        self._conv_step: Callable[..., Tensor] = conv.causal_conv1d_update
        self._scan: Callable[..., tuple[Tensor, Tensor]] = scan.selective_scan_fn
        self._step: Callable[..., Tensor] = step.selective_state_update
        self._ssd: Callable[..., tuple[Tensor, Tensor]] = ssd.mamba_chunk_scan_combined
        self._norm: Callable[..., Tensor] = norm.rmsnorm_fn

    def causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: RowLayout,
        conv: Tensor,
        activation: bool = True,
    ) -> Tensor:
        if self._is_left("causal_conv", x, _conv_problem(weight)):
            return super().causal_conv(x, weight, bias, layout, conv, activation)
        return self._convolved(x, weight, bias, layout, conv, "silu" if activation else None)

    def mamba2(self, zxbcdt: Tensor, weights: Mamba2Weights, layout: RowLayout, cache: StateTensors) -> Tensor:
        w = weights
        clamps = layout.num_decode and (w.dt_min > 0.0 or w.dt_max < float("inf"))
        problem = "selective_state_update does not clamp dt" if clamps else _conv_problem(w.conv_weight)
        if self._is_left("mamba2", zxbcdt, problem):
            return super().mamba2(zxbcdt, weights, layout, cache)
        inner, bc = w.num_heads * w.head_dim, w.num_groups * w.d_state
        z, conv_in, dt = zxbcdt.tensor_split([inner, 2 * inner + 2 * bc], dim=1)
        mixed = self._convolved(conv_in, w.conv_weight, w.conv_bias, layout, cache.conv, "silu")
        x = mixed[:, :inner].view(-1, w.num_heads, w.head_dim)
        B, C = (part.view(-1, w.num_groups, w.d_state) for part in mixed[:, inner:].chunk(2, dim=1))
        gate = z.view(-1, w.num_heads, w.head_dim) if w.norm_weight is None else None
        y = torch.zeros_like(x)
        for run in self._runs(layout).chunks:
            h = None if run.fresh else cache.state[run.slot][None]
            for rows, slots in _pieces(run):
                out, h = self._ssd(
                    *(part[None, rows] for part in (x, dt)),
                    w.A,
                    *(part[None, rows] for part in (B, C)),
                    chunk_size=SSD_CHUNK,
                    D=w.D,
                    z=None if gate is None else gate[None, rows],
                    dt_bias=w.dt_bias,
                    initial_states=h,
                    dt_softplus=True,
                    dt_limit=(w.dt_min, w.dt_max),
                    return_final_states=True,
                )
                y[rows] = out[0]
                cache.state[slots] = h
        if layout.num_decode:
            rows = slice(layout.decode_row, layout.decode_row + layout.num_decode)
            heads = (w.num_heads, w.head_dim)
            y[rows] = self._step(
                cache.state,
                x[rows],
                dt[rows, :, None].expand(-1, *heads),
                w.A[:, None, None].expand(*heads, w.d_state),
                B[rows],
                C[rows],
                D=w.D[:, None].expand(heads),
                z=None if gate is None else gate[rows],
                dt_bias=w.dt_bias[:, None].expand(heads),
                dt_softplus=True,
                state_batch_indices=layout.decode_slot.int(),
            )
        flat = y.flatten(1)
        if w.norm_weight is None:
            return flat
        groups = {"eps": w.norm_eps, "group_size": w.norm_group, "norm_before_gate": w.norm_first}
        return self._norm(flat, w.norm_weight, None, z=z, **groups)

    def mamba1_scan(
        self,
        x: Tensor,
        dt: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor,
        weights: Mamba1Weights,
        layout: RowLayout,
        state: Tensor,
    ) -> Tensor:
        w, chunks = weights, self._runs(layout).chunks
        problem = None
        if not all(run.fresh and len(_pieces(run)) == 1 for run in chunks):
            problem = "selective_scan_fn takes no initial state"
        elif w.A.shape[1] > MAX_SCAN_STATE:
            problem = f"selective_scan_fn takes up to {MAX_SCAN_STATE} values of state, not {w.A.shape[1]}"
        if self._is_left("mamba1_scan", x, problem):
            return super().mamba1_scan(x, dt, B, C, z, weights, layout, state)
        y = torch.zeros_like(x)
        for run in chunks:
            ((rows, slots),) = _pieces(run)
            u, delta, b, c, gate = (part[rows].T[None] for part in (x, dt, B, C, z))
            out, h = self._scan(
                *(u, delta, w.A, b, c),
                D=w.D,
                z=gate,
                delta_bias=w.dt_bias,
                delta_softplus=True,
                return_last_state=True,
            )
            y[rows] = out[0].T
            state[slots] = h
        if layout.num_decode:
            rows = slice(layout.decode_row, layout.decode_row + layout.num_decode)
            y[rows] = self._step(
                *(state, x[rows], dt[rows], w.A, B[rows], C[rows]),
                D=w.D,
                z=z[rows],
                dt_bias=w.dt_bias,
                dt_softplus=True,
                state_batch_indices=layout.decode_slot.int(),
            )
        return y

    def _convolved(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, layout: RowLayout, conv: Tensor, activation: str | None
    ) -> Tensor:
        if x.stride(0) != x.shape[1]:  # the stride of one row counts, too
            x = x.clone(memory_format=torch.contiguous_format)
        out = torch.zeros_like(x)
        for run in self._runs(layout).chunks:
            window = torch.zeros_like(conv[run.slot]) if run.fresh else conv[run.slot].clone()
            for rows, slots in _pieces(run):
                end = torch.empty_like(window)
                y, _ = self._conv_chunk(
                    x[rows].T[None],
                    weight,
                    bias,
                    initial_states=window.T[None],
                    return_final_states=True,
                    final_states_out=end.T[None],
                    activation=activation,
                )
                out[rows] = y[0].T
                conv[slots] = end
                window = end
        if layout.num_decode:
            rows = slice(layout.decode_row, layout.decode_row + layout.num_decode)
            slots_of_rows = layout.decode_slot.int()
            out[rows] = self._conv_step(
                *(x[rows], conv.transpose(1, 2), weight, bias), activation=activation, conv_state_indices=slots_of_rows
            )
        return out

    def _is_left(self, name: str, x: Tensor, problem: str | None) -> bool:
        """Whether torch has to do it."""
        if problem is not None:
            self.reasons[name] = problem
        return problem is not None or x.device.type != self.device.type


_MODULES = (
    "causal_conv1d",
    "mamba_ssm.ops.selective_scan_interface",
    "mamba_ssm.ops.triton.selective_state_update",
    "mamba_ssm.ops.triton.ssd_combined",
    "mamba_ssm.ops.triton.layernorm_gated",
)


def _conv_problem(weight: Tensor) -> str | None:
    """What keeps causal-conv1d from a weight [channels, K]."""
    channels, width = weight.shape
    if not 2 <= width <= MAX_CONV_WIDTH:
        return f"causal_conv1d takes 2 to {MAX_CONV_WIDTH} taps, not {width}"
    if channels % CONV_ALIGNMENT:
        return f"causal_conv1d takes a multiple of {CONV_ALIGNMENT} channels, not {channels}"
    return None


def _pieces(run: Run) -> list[tuple[slice, list[int]]]:
    """The rows of a chunk up to each state that is kept, and the slots that get it."""
    kept: dict[int, list[int]] = {run.length: [run.slot]}
    for num_tokens, slot in run.captures:
        kept.setdefault(num_tokens, []).append(slot)
    ends = sorted(kept)
    return [(slice(run.row + i, run.row + end), kept[end]) for i, end in zip([0, *ends], ends, strict=False)]
