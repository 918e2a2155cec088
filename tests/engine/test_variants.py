"""Several models of one shape in one engine: each answers for itself, out of one budget and in one queue."""

import random
from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from hybrid_cache.choreography.arrangement import Arrangement, Encoding, Fidelity, Part
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import ConfigError, RequestError
from hybrid_cache.request import FinishReason, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.spec import CacheSpec, PrefillCost
from hybrid_cache.tokens import Prompt, TokenArray
from tests.engine.test_engine import answers, make_request, prompt_output, run
from tests.engine.test_host_tier import room_for
from tests.fakes import SumModel, sum_model_answer, tokens_of

NAMES = {"": 1, "twice": 2, "thrice": 3}


class Times(SumModel):
    """Adds up multiples of the tokens: what it keeps and says is nobody else's."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor, self.fingerprint = factor, f"times-{factor}"
        self.num_passes = 0

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        self.num_passes += 1
        return super().forward(replace(batch, token_ids=self.factor * batch.token_ids), cache)

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden).roll(shift_of(self.factor), 1)


def shift_of(factor: int) -> int:
    """By how much a model's head says something else than another's."""
    return 10 * (factor - 1)


def answer_of(name: str, prompt: TokenArray, num_tokens: int) -> list[int]:
    """What the model of a name says after a prompt, worked out by hand."""
    tokens = prompt.tolist()
    for _ in range(num_tokens):
        tokens.append((NAMES[name] * sum(tokens) + len(tokens) + shift_of(NAMES[name])) % Times.vocab_size)
    return tokens[len(prompt) :]


def new_engine(budget_bytes: int = 1 << 20, **config: object) -> tuple[Engine, dict[str, Times]]:
    models = {name: Times(factor) for name, factor in NAMES.items()}
    variants = {name: model for name, model in models.items() if name}
    settings = EngineConfig(budget_bytes=budget_bytes, **config)  # type: ignore[arg-type]
    return Engine(models[""], settings, variants=variants), models


def test_each_answers_for_itself_and_finds_its_own_in_the_cache() -> None:
    engine, models = new_engine()
    tokens = tokens_of(1, 300)
    assert answer_of("", tokens, 5) == sum_model_answer(tokens, 5)
    for round_ in range(2):
        outputs = run(engine, *(make_request(name, tokens, 70, model=name) for name in NAMES))
        for name in NAMES:
            assert answers(outputs, name) == answer_of(name, tokens, 70)
            assert prompt_output(outputs, name).cached_tokens == (300 if round_ else 0)
    assert {name: model.rows_computed for name, model in models.items()} == {name: 300 + 2 * 69 + 64 for name in NAMES}
    assert len(engine.cache.tree.roots) == 3


def test_a_step_has_rows_of_all_of_them_each_computed_once() -> None:
    engine, models = new_engine(max_tiles=8)
    for number, name in enumerate([*NAMES, *NAMES]):
        engine.submit(make_request(str(number), tokens_of(number, 70), 3, model=name))
    outputs = engine.step()
    assert [model.num_passes for model in models.values()] == [1, 1, 1]
    outputs += engine.step()
    assert [model.num_passes for model in models.values()] == [2, 2, 2]
    outputs += engine.run_until_idle()
    for number, name in enumerate([*NAMES, *NAMES]):
        assert answers(outputs, str(number)) == answer_of(name, tokens_of(number, 70), 3)


def test_scores_and_choices_are_those_of_their_own_model() -> None:
    engine, _ = new_engine()
    tokens = tokens_of(3, 130)
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=1, prompt_logprobs=1)
    run(engine, *(Request(name, Prompt(tokens), sampling, n=2, model=name) for name in NAMES))
    found = {}
    for name in NAMES:
        engine.submit(Request(name, Prompt(tokens), sampling, n=2, model=name))
    outputs = engine.run_until_idle()
    for name in NAMES:
        likely = prompt_output(outputs, name).logprobs
        assert likely is not None
        found[name] = [score for score in likely if score is not None]
        sums = NAMES[name] * np.cumsum(tokens) + np.arange(1, 131) + shift_of(NAMES[name])
        assert [score.top[0][0] for score in found[name]] == (sums % Times.vocab_size)[:-1].tolist()
        for index in range(2):
            assert answers(outputs, name, index) == answer_of(name, tokens, 4)
        scores = [o.logprob for i, o in outputs if i == name and isinstance(o, TokenOutput)]
        assert all(score is not None and score.top[0][0] in answer_of(name, tokens, 4) for score in scores)


def test_a_paused_request_goes_on_with_its_own_model_and_so_does_what_comes_next() -> None:
    engine, models = new_engine()
    tokens = tokens_of(4, 200)
    for name in NAMES:
        engine.submit(make_request(name, tokens, 100, model=name))
    outputs = engine.step()
    for name in NAMES:
        engine.pause(name, "look")
        engine.resume(name, [1, 2, 3])
    outputs += engine.run_until_idle()
    for name in NAMES:
        said = answers(outputs, name)
        first = answer_of(name, tokens, 1)
        assert said == first + answer_of(name, np.array([*tokens, *first, 1, 2, 3], np.int32), 99)
    rows = {name: model.rows_computed for name, model in models.items()}
    engine.commit("", Prompt(tokens_of(5, 128)), model="twice")
    engine.run_until_idle()
    assert {name: model.rows_computed - rows[name] for name, model in models.items()} == {
        "": 0,
        "twice": 128,
        "thrice": 0,
    }
    asked = make_request("again", tokens_of(5, 140), 1, model="twice")
    assert engine.cached_tokens(asked) == 128
    assert engine.cached_tokens(replace(asked, model="")) == 0


def test_prompts_of_a_variant_enter_between_the_layers_of_another() -> None:
    engine, _ = new_engine(max_tiles=8)
    late, outputs = ["twice", "", "thrice"], []

    def come() -> None:
        if late:
            engine.submit(make_request(late[-1] or "base", tokens_of(9, 40), 2, model=late.pop()))
            outputs.extend(engine.step_between())

    engine.between_layers = come
    for name in NAMES:
        engine.submit(make_request(f"long {name}", tokens_of(8, 250), 2, model=name))
    outputs += engine.run_until_idle()
    for name in NAMES:
        assert answers(outputs, f"long {name}") == answer_of(name, tokens_of(8, 250), 2)
        assert answers(outputs, name or "base") == answer_of(name, tokens_of(9, 40), 2)
    engine.check()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_leaves_or_gives_way_answers_are_those_worked_out_by_hand(seed: int) -> None:
    """Few bytes, a second tier, tenants, choices, aborts, and prompts that begin alike."""
    rng = random.Random(seed)
    engine, _ = new_engine(room_for(SumModel(), 8, 30), host_bytes=1 << 20, verify=True, max_running=6, max_tiles=4)
    stems = [tokens_of(seed * 10 + i, 200) for i in range(3)]
    asked, outputs = dict[str, Request](), []
    for number in range(60):
        stem, more = rng.choice(stems), tokens_of(1000 + number, rng.choice((1, 30, 90)))
        tokens = np.concatenate([stem[: rng.choice((64, 130, 200))], more])
        request = make_request(
            str(number), tokens, rng.choice((1, 5, 70)), n=rng.choice((1, 1, 2)), model=rng.choice([*NAMES])
        )
        asked[request.id] = request = replace(request, tenant=rng.choice("ab"))
        engine.submit(request)
        for _ in range(rng.randrange(4)):
            outputs += engine.step()
        if rng.random() < 0.1:
            engine.abort(victim := rng.choice([*asked]))
            del asked[victim]
    outputs += engine.run_until_idle()
    engine.check()
    for name, request in asked.items():
        for index in range(request.n):
            expected = answer_of(request.model, request.prompt.tokens, request.sampling.max_tokens)
            assert answers(outputs, name, index) == expected
    stats = engine.stats()
    assert min(stats.cached_tokens, stats.cache.num_evictions, stats.cache.host_loads) > 0


def test_a_model_that_is_not_there_is_named() -> None:
    engine, _ = new_engine()
    for asked in (make_request("a", tokens_of(0, 5), model="other"),):
        with pytest.raises(RequestError, match="no variant 'other', only twice, thrice"):
            engine.submit(asked)
        with pytest.raises(RequestError, match="no variant"):
            engine.cached_tokens(asked)
    with pytest.raises(RequestError, match="no variant"):
        engine.commit("", Prompt(tokens_of(0, 200)), model="other")
    assert not engine.is_open("a")


class OtherShape(Times):
    cache_spec = CacheSpec(Times.cache_spec.layers[:1], 2, Times.cache_spec.hidden_dtype)


class LongerState(Times):
    cache_spec = CacheSpec(
        (Times.cache_spec.layers[0], replace(Times.cache_spec.layers[1], state_shape=(700,))),
        2,
        Times.cache_spec.hidden_dtype,
    )


class WiderRows(Times):
    cache_spec = CacheSpec(Times.cache_spec.layers, 3, Times.cache_spec.hidden_dtype)


class Dearer(Times):
    prefill_cost = PrefillCost(1001.0, 1.0)


class MoreWords(Times):
    vocab_size = 998


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (OtherShape, "it is a OtherShape, not a Times"),
        (SumModel, "it is a SumModel"),
    ],
)
def test_a_model_of_another_kind_is_no_variant(kind: type[SumModel], why: str) -> None:
    engine, _ = new_engine()
    with pytest.raises(ConfigError, match=why):
        engine.add_variant("new", kind(7) if issubclass(kind, Times) else kind())


@pytest.mark.parametrize(
    ("fact", "of", "why"),
    [
        ("vocab_size", MoreWords, "its vocab_size is 998, not 997"),
        ("cache_spec", OtherShape, "it keeps 1 layers, not 2"),
        ("cache_spec", WiderRows, "its rows are 3 numbers wide, not 2"),
        ("prefill_cost", Dearer, "its layers are of other widths, or in another order"),
        ("cache_spec", LongerState, r"cached layer 1 is StateSpec\(.*state_shape=\(700,\).*, not StateSpec"),
    ],
)
def test_a_model_of_another_shape_is_no_variant(fact: str, of: type[Times], why: str) -> None:
    engine, _ = new_engine()
    model = Times(7)
    setattr(model, fact, getattr(of, fact))
    with pytest.raises(ConfigError, match=f"'new' is no variant of this model: {why}"):
        engine.add_variant("new", model)
    with pytest.raises(RequestError, match="no variant 'new'"):
        engine.submit(make_request("a", tokens_of(0, 5), model="new"))


def test_names_are_taken_once() -> None:
    engine, _ = new_engine()
    for name in NAMES:
        with pytest.raises(ConfigError, match="is taken"):
            engine.add_variant(name, Times(9))


def test_a_variant_in_use_stays_and_one_that_goes_leaves_nothing() -> None:
    engine, _ = new_engine()
    tokens = tokens_of(6, 200)
    run(engine, *(make_request(name, tokens, 70, model=name) for name in ("", "twice")))
    engine.submit(make_request("paused", tokens, 9, model="twice"))
    engine.step()
    for state in ("runs", "is paused"):
        with pytest.raises(RequestError, match="'twice' is in use by 1 requests") as refused:
            engine.remove_variant("twice")
        assert refused.value.code == "model_in_use", state
        engine.pause("paused", "look")
    engine.abort("paused")
    engine.submit(make_request("turn", tokens_of(7, 100), 100, model="twice"))
    while not engine.idle:
        engine.step()
    engine.remove_variant("twice")  # while its last turn waits to be computed again
    assert not engine.has_work
    engine.check()
    assert [root for root in engine.cache.tree.roots if root.startswith("times-2")] == []
    with pytest.raises(RequestError, match="no variant 'twice'"):
        engine.submit(make_request("a", tokens, model="twice"))
    assert prompt_output(run(engine, make_request("a", tokens)), "a").cached_tokens == 200
    engine.add_variant("twice", Times(2))
    outputs = run(engine, make_request("b", tokens, model="twice"))
    assert prompt_output(outputs, "b").cached_tokens == 0
    assert answers(outputs, "b") == answer_of("twice", tokens, 5)
    with pytest.raises(RequestError, match="stays"):
        engine.remove_variant("")


def test_a_variant_that_goes_leaves_nothing_in_the_second_tier_either() -> None:
    engine, _ = new_engine(room_for(SumModel(), 4, 12), host_bytes=1 << 20)
    for number in range(6):
        run(
            engine, *(make_request(f"{name} {number}", tokens_of(number, 200), 2, model=name) for name in ("", "twice"))
        )
    assert engine.cache.pool.host is not None
    for number in range(10, 16):
        run(engine, make_request(f"{number}", tokens_of(number, 400), 2))
    assert {namespace.partition("/")[0] for namespace in engine.cache.tree.roots} == {"times-1"}
    before = {namespace.partition("/")[0] for namespace in engine.cache.pool.host.namespaces}
    assert before == {"times-1", "times-2"}
    engine.remove_variant("twice")
    assert {namespace.partition("/")[0] for namespace in engine.cache.pool.host.namespaces} == {"times-1"}
    engine.check()


def test_two_names_of_one_model_share_what_is_cached() -> None:
    engine, _ = new_engine()
    tokens = tokens_of(6, 200)
    engine.add_variant("two", Times(2))
    run(engine, make_request("a", tokens, model="two"))
    assert prompt_output(run(engine, make_request("b", tokens, model="twice")), "b").cached_tokens == 200
    engine.remove_variant("twice")
    outputs = run(engine, make_request("c", tokens, model="two"))
    assert prompt_output(outputs, "c").cached_tokens == 200
    assert answers(outputs, "c") == answer_of("twice", tokens, 5)
    assert next(o.finish for _, o in reversed(outputs) if isinstance(o, TokenOutput)) is FinishReason.LENGTH


class Storing(Times):
    fidelities = ("composed",)


def test_messages_of_a_variant_are_put_together_as_asked() -> None:
    engine = Engine(Storing(1), EngineConfig(budget_bytes=1 << 20), variants={"twice": Storing(2)})
    parts = (Part(30, "m0", Encoding.ALONE), Part(70, "m1", Encoding.ALONE), Part(3))
    asked = make_request("a", tokens_of(1, 103), 3, arrangement=Arrangement(parts, Fidelity.COMPOSED), model="twice")
    for request in (asked, replace(asked, model="")):
        assert engine.plan(request).fidelity is Fidelity.COMPOSED
