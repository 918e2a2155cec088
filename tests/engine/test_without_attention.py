"""A model of states alone in the whole engine: nothing has pages, and a prefix is reused from its state."""

import numpy as np
import pytest

from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.selfcheck import check_model
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models import loading
from hybrid_cache.request import PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, Prompt, TokenArray
from tests.models import checkpoints
from tests.models.cases.mamba2 import CASES

BACKENDS = dispatch.exact_backends()


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HybridModel:
    folder = checkpoints.save(checkpoints.reference(CASES[1]), tmp_path_factory.mktemp("mamba2"))
    return loading.load(folder, ops=dispatch.select(request.param))


def conversations(num_tokens: int) -> list[TokenArray]:
    """Three that share a beginning, each sent twice, in turns."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 199, 2 * TILE + 9, dtype=np.int32)
    own = [rng.integers(0, 199, num_tokens - len(shared), dtype=np.int32) for _ in range(3)]
    return [np.concatenate([shared, tail]) for tail in own] * 2


def serve(engine: Engine, prompts: list[TokenArray]) -> tuple[list[list[TokenOutput]], list[int]]:
    """One prompt after the other -> answers with log-probabilities, prompt tokens that were not computed."""
    answers, cached = [], []
    for i, tokens in enumerate(prompts):
        prompt = Prompt(tokens, (Boundary(2 * TILE + 9), Boundary(len(tokens))))
        engine.submit(Request(str(i), prompt, SamplingParams(temperature=0, max_tokens=5, logprobs=3)))
        outputs = [output for _, output in engine.run_until_idle()]
        engine.check()
        answers.append([o for o in outputs if isinstance(o, TokenOutput)])
        cached += [o.cached_tokens for o in outputs if isinstance(o, PromptOutput)]
    return answers, cached


def test_there_are_no_pages(model: HybridModel) -> None:
    assert model.cache_spec.page_bytes == 0
    assert model.cache_spec.slot_bytes > 0
    assert model.max_length == 1 << 20


@pytest.mark.parametrize("num_states", [2, 3, 5, 64])
def test_the_answers_are_the_same_with_and_without_the_cache(model: HybridModel, num_states: int) -> None:
    budget = num_states * model.cache_spec.slot_bytes + (1 << 12)
    prompts = conversations(200)
    plain, none = serve(Engine(model, EngineConfig(budget_bytes=budget, prefix_cache=False)), prompts)
    served, cached = serve(Engine(model, EngineConfig(budget_bytes=budget)), prompts)
    assert served == plain
    assert none == [0] * len(prompts)
    if num_states == 64:
        assert cached[2:] == [2 * TILE, 200, 200, 200]  # a branch is known from the second on; ends are kept whole


def test_the_start_up_check_passes(model: HybridModel) -> None:
    assert check_model(model) == []
