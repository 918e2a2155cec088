"""What the kernel tests run over: backends, dtypes, thread counts, and a table of shapes."""

from functools import cache
from pathlib import Path

import pytest
import torch

from hybrid_cache.kernels import dispatch, reference
from hybrid_cache.kernels.parity import BATCHES, SHAPES, play
from tests.kernels import quick

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pytest_collection_modifyitems(items):
    for item in quick.spared(item for item in items if item.path.parent == Path(__file__).parent):
        item.add_marker(pytest.mark.slow)


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


@pytest.fixture(scope="session")
def expected():
    """What the reference makes of a batch, by shape, dtype and the batch's name: it is slow, so each is played once."""

    @cache
    def get(shape, dtype, batch):
        return play(reference, SHAPES[shape](dtype, torch.Generator().manual_seed(0)), BATCHES[batch])

    return get


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
