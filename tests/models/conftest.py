import pytest
import torch

from hybrid_cache.kernels import dispatch
from tests.models import checkpoints

DTYPES = ("float32", "bfloat16")
BACKENDS = dispatch.exact_backends()


def pytest_collection_modifyitems(items):
    """Parity and exactness of a family's first case run on all backends, of the others on the usual one. Exactness has
    both dtypes for a first case on the usual backend, and else one, the next case the other; all else is slow."""
    usual = dispatch.select().name
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        swept = item.path.name in ("test_exact.py", "test_parity.py") and "case" in params
        if not swept or (params["ops"] == usual and params["case"] in checkpoints.FIRST_CASES):
            continue
        another_dtype = params.get("dtype") == DTYPES[checkpoints.CASES.index(params["case"]) % 2]
        if another_dtype or (params["case"] not in checkpoints.FIRST_CASES and params["ops"] != usual):
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
