"""What the kernel tests run over: backends, dtypes, thread counts, and a table of shapes."""

import pytest
import torch

from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.parity import SHAPES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=dispatch.exact_backends())
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
