import pytest
import torch

from hybrid_cache.kernels import dispatch
from tests.models import checkpoints


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Saves each checkpoint once."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = checkpoints.save(checkpoints.reference(case), tmp_path_factory.mktemp("checkpoint"))
        return made[case]

    return get


@pytest.fixture(scope="session", params=dispatch.exact_backends())
def ops(request):
    return dispatch.select(request.param)
