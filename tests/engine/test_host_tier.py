"""What had to leave the device comes back from host memory with the same bytes: the sums of `SumModel` would notice."""

import random
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.host_memory import HostMemory
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.loading import embedded_path, load
from hybrid_cache.request import PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from tests.cache.test_lanes import Late
from tests.engine.test_engine import answers, make_request
from tests.fakes import PageSumModel, SumModel, sum_model_answer, tokens_of

MODELS = {"hybrid": SumModel, "attention": PageSumModel}


def room_for(model: SumModel | PageSumModel, slots: int, pages: int) -> int:
    """Bytes for so many states and pages."""
    return slots * (model.cache_spec.slot_bytes + 64) + pages * model.cache_spec.page_bytes


def new_engine(kind: str, slots: int = 6, pages: int = 24, host_bytes: int = 1 << 20, **config: object) -> Engine:
    model = MODELS[kind]()
    budget_bytes = room_for(model, slots, pages)
    return Engine(model, EngineConfig(budget_bytes, host_bytes=host_bytes, **config))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", MODELS)
def test_a_conversation_that_had_to_leave_comes_back_whole(kind: str) -> None:
    engine = new_engine(kind, policy="lru")
    prompts = [tokens_of(i, 10 * TILE + 5) for i in range(6)]
    for i, tokens in enumerate(prompts):
        engine.submit(make_request(f"first {i}", tokens, 3))
        engine.run_until_idle()
    assert engine.stats().cache.num_evictions > 0
    for i, tokens in enumerate(prompts):
        longer = np.concatenate([tokens, tokens_of(100 + i, 40)])
        engine.submit(make_request(f"next {i}", longer, 4))
        outputs = engine.run_until_idle()
        assert answers(outputs, f"next {i}") == sum_model_answer(longer, 4)
        (prompt,) = (o for _, o in outputs if isinstance(o, PromptOutput))
        assert prompt.cached_tokens == 10 * TILE
        engine.check()
    assert engine.stats().cache.host_loads > 0
    assert engine.stats().cache.host_bytes > 0


class Aside(Late):
    """The pass computes at once, as on a CPU; copies beside it come when they like, or when it waits for them."""

    def wait(self, mark: tuple[bool, int], *, aside: bool) -> None:
        if aside:
            return super().wait(mark, aside=True)
        while self._done[True] < mark[1]:
            self.some(1.0)

    def copy(self, target: Tensor, source: Tensor, *, aside: bool) -> None:
        if aside:
            return super().copy(target, source, aside=True)
        target.copy_(source)
        self.some(0.2)

    def mark(self, *, aside: bool) -> tuple[bool, int]:
        return super().mark(aside=True) if aside else (False, 0)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_copies_that_are_late_change_no_answer(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    lanes = Aside(rng)
    monkeypatch.setattr("hybrid_cache.device.memory.HostMemory", partial(HostMemory, lanes=lanes))
    engine = new_engine(kind, host_bytes=room_for(MODELS[kind](), 4, 60))
    prompts = [tokens_of(50 * seed + i, rng.randrange(70, 11 * TILE)) for i in range(7)]
    for i in range(60):
        tokens = np.concatenate([rng.choice(prompts), tokens_of(i, rng.randrange(40))])
        engine.submit(make_request(f"{i}", tokens, 3))
        assert answers(engine.run_until_idle(), f"{i}") == sum_model_answer(tokens, 3)
        engine.check()
    assert engine.stats().cache.host_loads > 0


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("host_pages", [3, 12, 400])
@pytest.mark.parametrize("seed", range(3))
def test_any_mixture_gives_the_answers_of_a_run_without_cache(kind: str, host_pages: int, seed: int) -> None:
    rng = random.Random(seed)
    model = MODELS[kind]()
    host_bytes = room_for(model, 1 + host_pages // 4, host_pages)
    engine = new_engine(kind, rng.choice([4, 7]), rng.choice([16, 30]), host_bytes, max_running=rng.choice([1, 4]))
    stems = [tokens_of(100 * seed + i, rng.randrange(1, 600)) for i in range(6)]
    expected, got = {}, []
    for i in range(40):
        stem = rng.choice(stems)
        tokens = np.concatenate([stem[: rng.randrange(1, len(stem) + 1)], tokens_of(i, rng.randrange(100))])
        request = make_request(f"{i}", tokens, rng.randrange(1, 60), boundaries=(len(tokens) // 2,))
        engine.submit(request)
        expected[request.id] = request
        for _ in range(rng.randrange(8)):
            got += engine.step()
            engine.check()
        if rng.random() < 0.1:
            engine.abort(request.id)
            del expected[request.id]
        if rng.random() < 0.05:
            engine.cache.drop()
    got += engine.run_until_idle()
    engine.check()
    for name, request in expected.items():
        assert answers(got, name) == sum_model_answer(request.prompt.tokens, request.sampling.max_tokens)
    assert engine.stats().cache.host_bytes <= host_bytes


def test_dropping_drops_both_tiers() -> None:
    engine = new_engine("hybrid")
    for i in range(6):
        engine.submit(make_request(f"{i}", tokens_of(i, 10 * TILE), 1))
        engine.run_until_idle()
    assert engine.stats().cache.host_bytes > 0
    engine.cache.drop()
    assert engine.stats().cache.host_bytes == 0
    assert engine.cached_tokens(make_request("again", tokens_of(0, 10 * TILE + 1), 1)) == 0
    engine.check()


def test_another_namespace_finds_nothing_in_the_second_tier() -> None:
    engine = new_engine("hybrid")
    tokens = tokens_of(1, 8 * TILE)
    engine.submit(make_request("a", tokens, 1, namespace="a"))
    engine.run_until_idle()
    for i in range(6):
        engine.submit(make_request(f"{i}", tokens_of(10 + i, 10 * TILE), 1))
        engine.run_until_idle()
    longer = np.concatenate([tokens, tokens_of(2, 10)])
    assert engine.cached_tokens(make_request("same", longer, 1, namespace="a")) == 8 * TILE
    assert engine.cached_tokens(make_request("other", longer, 1, namespace="b")) == 0


def test_a_negative_tier_is_refused() -> None:
    with pytest.raises(ConfigError, match="host_bytes is -1"):
        EngineConfig(host_bytes=-1)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 500)), min_size=1, max_size=25), st.sampled_from([*MODELS]))
def test_prefixes_of_few_texts_in_any_order(asked: list[tuple[int, int]], kind: str) -> None:
    engine = new_engine(kind, 4, 14, room_for(MODELS[kind](), 3, 10))
    for number, (text, length) in enumerate(asked):
        tokens = tokens_of(text, length)
        engine.submit(make_request(str(number), tokens, 2))
        assert answers(engine.run_until_idle(), str(number)) == sum_model_answer(tokens, 2)
        engine.check()


def test_an_answer_that_is_to_be_computed_again_and_is_in_the_second_tier_is_there() -> None:
    engine = new_engine("hybrid", policy="lru")
    tokens = tokens_of(1, 10 * TILE)
    engine.submit(make_request("a", tokens, 1))
    engine.run_until_idle()
    for i in range(6):
        engine.submit(make_request(f"{i}", tokens_of(10 + i, 10 * TILE), 1))
        engine.run_until_idle()
    assert engine.cache.tree.walk("sum-model/", [tokens[:TILE].tobytes()]) == ()
    engine.commit("", Prompt(tokens))
    assert engine.run_until_idle() == []
    assert engine.stats().commit_tokens == 0
    engine.check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_real_model_what_comes_back_gives_the_bits_of_a_run_without_cache(dtype: str) -> None:
    """Log-probabilities of 20 alternatives show bits that tokens do not; digests are compared on the way."""
    model = load(embedded_path(), dtype=dtype, ops=select("auto"))
    geometry = Geometry.of(model.cache_spec, 1 << 50)
    budget = 6 * geometry.stride_bytes(Kind.SLOT) + 26 * geometry.stride_bytes(Kind.PAGE)
    tight = Engine(model, EngineConfig(budget, host_bytes=8 * budget, verify=True))
    cold = Engine(model, EngineConfig(1 << 28, prefix_cache=False))
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, model.vocab_size, 600).astype(np.int32) for _ in range(5)]
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=20)
    for length in (300, 420, 600):
        for number, text in enumerate(texts):
            request = Request(f"{length}, {number}", Prompt(text[:length]), sampling)
            answers = []
            for engine in (tight, cold):
                engine.submit(request)
                answers.append([o for _, o in engine.run_until_idle() if isinstance(o, TokenOutput)])
            assert answers[0] == answers[1]
            tight.check()
    assert tight.stats().cache.host_loads >= 20
