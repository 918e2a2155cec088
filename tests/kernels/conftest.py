"""What the kernel tests run over: backends, dtypes, thread counts, and a table of shapes."""

import pytest
import torch

from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.problems import (
    AttentionProblem,
    ConvProblem,
    GatedDeltaProblem,
    KimiDeltaProblem,
    LinearAttentionProblem,
    Mamba1Problem,
    Mamba2Problem,
    RgLruProblem,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

SHAPES = {
    "mamba2": lambda dtype, rng: Mamba2Problem(dtype, rng),
    "mamba2 head 64, state 128": lambda dtype, rng: Mamba2Problem(dtype, rng, head_dim=64, d_state=128, num_heads=3),
    "mamba2 head 128, state 64": lambda dtype, rng: Mamba2Problem(dtype, rng, head_dim=128, d_state=64, num_heads=2),
    "mamba2 state 16, groups 2": lambda dtype, rng: Mamba2Problem(dtype, rng, d_state=16, num_groups=2, norm_groups=2),
    "mamba2 head 24, width 3": lambda dtype, rng: Mamba2Problem(dtype, rng, head_dim=24, width=3, bias=False),
    "mamba2 clamped dt": lambda dtype, rng: Mamba2Problem(dtype, rng, dt_min=0.02, dt_max=0.1),
    "mamba2 state 20": lambda dtype, rng: Mamba2Problem(dtype, rng, d_state=20, head_dim=8, num_heads=5),
    "mamba2 without norm": lambda dtype, rng: Mamba2Problem(dtype, rng, head_dim=20, num_groups=2, norm=False),
    "mamba2 norm first": lambda dtype, rng: Mamba2Problem(dtype, rng, head_dim=12, norm_groups=2, norm_first=True),
    "conv": lambda dtype, rng: ConvProblem(dtype, rng),
    "conv width 2, no bias": lambda dtype, rng: ConvProblem(dtype, rng, width=2, channels=7, bias=False),
    "conv width 3, no activation": lambda dtype, rng: ConvProblem(dtype, rng, width=3, activation=False),
    "mamba1": lambda dtype, rng: Mamba1Problem(dtype, rng),
    "mamba1 state 128": lambda dtype, rng: Mamba1Problem(dtype, rng, channels=24, d_state=128),
    "mamba1 state 7": lambda dtype, rng: Mamba1Problem(dtype, rng, channels=9, d_state=7),
    "delta": lambda dtype, rng: GatedDeltaProblem(dtype),
    "delta head 128, state 128": lambda dtype, rng: GatedDeltaProblem(dtype, num_heads=2, head_dim=128, d_state=128),
    "delta one head, state 7": lambda dtype, rng: GatedDeltaProblem(dtype, num_heads=1, num_groups=1, d_state=7),
    "delta beta 2": lambda dtype, rng: GatedDeltaProblem(dtype, num_heads=6, head_dim=10, d_state=20, max_beta=2.0),
    "linear attention": lambda dtype, rng: LinearAttentionProblem(dtype, rng),
    "linear attention 3 heads, 7 to 20": lambda dtype, rng: LinearAttentionProblem(
        dtype, rng, num_heads=3, head_dim=20, d_state=7
    ),
    "rg_lru": lambda dtype, rng: RgLruProblem(dtype, rng),
    "rg_lru 13 channels": lambda dtype, rng: RgLruProblem(dtype, rng, channels=13),
    "kimi delta": lambda dtype, rng: KimiDeltaProblem(dtype),
    "kimi delta state 128": lambda dtype, rng: KimiDeltaProblem(dtype, num_heads=2, head_dim=128, d_state=128),
    "kimi delta forgets all": lambda dtype, rng: KimiDeltaProblem(dtype, head_dim=9, d_state=20, most=300.0),
    "attention": lambda dtype, rng: AttentionProblem(dtype),
    "attention one head each": lambda dtype, rng: AttentionProblem(dtype, num_heads=3, num_kv_heads=3, head_dim=16),
    "attention 12 to 4 of 64": lambda dtype, rng: AttentionProblem(dtype, num_heads=12, num_kv_heads=4, head_dim=64),
    "attention head 128": lambda dtype, rng: AttentionProblem(dtype, num_heads=4, num_kv_heads=2, head_dim=128),
    "attention 6 to 1 of 40": lambda dtype, rng: AttentionProblem(dtype, num_heads=6, num_kv_heads=1, head_dim=40),
    "attention window 20": lambda dtype, rng: AttentionProblem(dtype, window=20),
    "attention window 100": lambda dtype, rng: AttentionProblem(dtype, window=100, head_dim=64),
}


@pytest.fixture(params=[name for name, reason in dispatch.available().items() if reason is None])
def ops(request):
    return dispatch.select(request.param)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request):
    return request.param


@pytest.fixture(params=SHAPES.keys())
def shape(request):
    return request.param


@pytest.fixture
def problem(shape, dtype):
    return SHAPES[shape](dtype, torch.Generator().manual_seed(0))


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
