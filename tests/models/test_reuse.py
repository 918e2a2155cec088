"""Every architecture in the real engine: what it reuses, and that reuse changes no bit."""

import numpy as np
import pytest

from hybrid_cache.bench.exactness.report import Report
from hybrid_cache.bench.exactness.run import compare
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.request import PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, Prompt
from tests.models.checkpoints import FIRST_CASES, ONE_OF_A_KIND


@pytest.fixture(scope="module", params=FIRST_CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture(scope="module", params=[pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def model(case, folders, request):
    return loading.load(folders(case), dtype=request.param, ops=dispatch.select())


def tokens(length, seed):
    return np.random.default_rng(seed).integers(0, 199, length, dtype=np.int32)


class Server:
    """An engine that answers one prompt after the other."""

    def __init__(self, model, **config):
        budget = 64 * (model.cache_spec.slot_bytes + 4 * model.cache_spec.page_bytes + 4096)
        self._engine = Engine(model, EngineConfig(budget_bytes=budget, **config))
        self._count = 0

    def answer(self, prompt, boundaries=()):
        """-> tokens and log-probabilities of a short answer, and how many prompt tokens were not computed."""
        self._count += 1
        sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=3)
        marks = tuple(Boundary(p) for p in boundaries)
        self._engine.submit(Request(str(self._count), Prompt(prompt, marks), sampling))
        outputs = [o for _, o in self._engine.run_until_idle()]
        self._engine.check()
        (start,) = [o for o in outputs if isinstance(o, PromptOutput)]
        return [o for o in outputs if isinstance(o, TokenOutput)], start.cached_tokens


def test_a_longer_conversation_goes_on_where_the_shorter_one_ended(model):
    served, plain = Server(model), Server(model, prefix_cache=False)
    turn = tokens(150, 1)
    longer = np.concatenate([turn, tokens(70, 2)])
    served.answer(turn, [150])
    answer, cached = served.answer(longer, [150, 220])
    assert cached == 128
    assert (answer, 0) == plain.answer(longer)


def test_an_edited_conversation_goes_on_from_the_last_message_that_is_the_same(model):
    served, plain = Server(model), Server(model, prefix_cache=False)
    shared = tokens(140, 3)
    for seed in (4, 5):
        edited = np.concatenate([shared, tokens(90, seed)])
        answer, cached = served.answer(edited, [140, 230])
        assert cached == (0 if seed == 4 else 128)
        assert (answer, 0) == plain.answer(edited)


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c in ONE_OF_A_KIND else pytest.mark.slow) for c in FIRST_CASES],
    ids=str,
    indirect=True,
)
def test_a_busy_server_gives_the_bits_of_a_plain_one(model):
    report = compare(model, Report("", "", seed=1), num_rows=1, requests_per_round=7)
    assert report.exact, report.findings
    assert report.rows > 100
