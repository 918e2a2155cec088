import pytest
import torch

from hybrid_cache.kernels import dispatch
from tests.models import checkpoints

BACKENDS = dispatch.exact_backends()


def pytest_collection_modifyitems(items):
    """Exactness is tested on every backend for the first case of a family, on the usual one for the others."""
    usual = dispatch.select().name

    def wanted(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return (
            item.path.name != "test_exact.py"
            or params.get("ops", usual) == usual
            or params.get("case") in checkpoints.FIRST_CASES
        )

    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """These models are too small for more, and on a busy machine threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=BACKENDS)
def ops(request):
    return dispatch.select(request.param)


@pytest.fixture(scope="session", params=checkpoints.CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture(scope="session")
def references():
    """Builds each transformers model once."""
    made = {}

    def get(case):
        if case not in made:
            made[case] = checkpoints.reference(case)
        return made[case]

    return get


@pytest.fixture(scope="session")
def folders(references, tmp_path_factory):
    """Saves each checkpoint once."""
    made = {}

    def get(case, dtype=torch.float32):
        if (case, dtype) not in made:
            made[case, dtype] = checkpoints.save(references(case), tmp_path_factory.mktemp("model"), dtype)
        return made[case, dtype]

    return get
