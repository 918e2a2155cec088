import pytest
import torch

from hybrid_cache.kernels import dispatch
from tests.models import checkpoints

BACKENDS = dispatch.exact_backends()


def pytest_collection_modifyitems(items):
    """Parity and exactness run on the usual backend, and on others for the first case of a family; all else is slow."""
    usual = dispatch.select().name
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend_matters = item.path.name in ("test_exact.py", "test_parity.py") and params.get("ops", usual) != usual
        if backend_matters and params.get("case") not in checkpoints.FIRST_CASES:
            item.add_marker(pytest.mark.slow)


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
