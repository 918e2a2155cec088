"""Whose turn it is, who waits for whom, who gives up its room, and what is computed in which step."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from torch import Tensor

from hybrid_cache.cache import books
from hybrid_cache.cache.keys import Keys, Mark, keys_of
from hybrid_cache.cache.tree import Checkpoint
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.engine import sequence
from hybrid_cache.engine.canonical import DECODE_STEPS_A_TILE
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.engine.scheduler import Step
from hybrid_cache.engine.sequence import new_prefill
from hybrid_cache.errors import ContextTooLong, RequestError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import CacheMode, FinishReason, PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, BoundaryKind, Prompt, TokenArray
from tests.engine.test_engine import BUDGET, answers, make_request, new_engine, prompt_output, run
from tests.engine.test_out_of_memory import SmallDevice, SmallStage, arranged
from tests.fakes import VOCAB, SumModel, sum_model_answer, tokens_of

UNIT = SumModel.cache_spec.page_bytes  # a page is one unit of the budget, a state three


def steps(engine: Engine, most: int = 1000) -> Iterator[Outputs]:
    """The outputs of one step after the other, as long as there is work."""
    for _ in range(most):
        if not engine.has_work:
            return
        yield engine.step()
        engine.check()
    raise AssertionError(f"there is still work after {most} steps")


def finished(outputs: Outputs) -> list[str]:
    return [name for name, output in outputs if isinstance(output, TokenOutput) and output.finish is not None]


# Order of service


def test_requests_end_in_the_order_of_their_arrival_whoever_is_preempted() -> None:
    engine, _ = new_engine(budget_bytes=4 * SumModel.cache_spec.slot_bytes + 16 * UNIT)
    requests = [make_request(str(i), tokens_of(30 + i, 100), 150) for i in range(6)]
    outputs = run(engine, *requests)
    assert engine.stats().num_preemptions > 0
    assert finished(outputs) == [request.id for request in requests]
    for request in requests:
        assert prompt_output(outputs, request.id).cached_tokens == 0  # told once, of the first time
        assert answers(outputs, request.id) == sum_model_answer(request.prompt.tokens, 150)


def test_requests_end_in_the_order_of_their_arrival_when_memory_runs_out() -> None:
    engine = Engine(SmallDevice(decodes=2), EngineConfig(budget_bytes=1 << 22))
    outputs = run(engine, *(make_request(str(i), tokens_of(i, 20), 6) for i in range(7)))
    assert engine.stats().num_out_of_memory > 0
    assert finished(outputs) == [str(i) for i in range(7)]


def test_nobody_overtakes_a_prompt_that_waits_for_room() -> None:
    engine, _ = new_engine(budget_bytes=21 * UNIT, order="fcfs")
    engine.submit(make_request("first", tokens_of(0, 300), 20))
    outputs = engine.step()
    engine.submit(make_request("large", tokens_of(1, 1000)))
    engine.submit(make_request("small", tokens_of(2, 10)))
    outputs += engine.run_until_idle()
    told = [name for name, output in outputs if isinstance(output, PromptOutput)]
    assert told == ["first", "large", "small"]


@pytest.mark.parametrize(
    "more", [{"namespace": "x"}, {"cache_mode": CacheMode.OFF}], ids=["of another namespace", "that publishes nothing"]
)
def test_nobody_waits_for_a_prompt_whose_state_will_be_of_no_use(more: dict[str, object]) -> None:
    engine, model = new_engine()
    tokens = tokens_of(8, 200)
    engine.submit(make_request("other", tokens, 1, **more))
    engine.submit(make_request("mine", tokens, 1))
    assert finished(engine.step()) == ["other", "mine"]
    assert model.rows_computed == 400


def test_a_prompt_that_begins_another_goes_on_below_its_own_end() -> None:
    """At least one token has to be computed, so a state at its very end would be of no use to it."""
    engine, model = new_engine()
    tokens = tokens_of(8, 256)
    outputs = run(engine, make_request("long", tokens, 1), make_request("short", tokens[:128], 1))
    assert answers(outputs, "short") == sum_model_answer(tokens[:128], 1)
    assert model.rows_computed == 256 + 64


def test_choices_beyond_the_most_that_may_run_wait() -> None:
    engine, _ = new_engine(max_running=2)
    tokens = tokens_of(9, 130)
    engine.submit(make_request("a", tokens, 5, n=5))
    outputs: Outputs = []
    for more in steps(engine):
        outputs += more
        assert engine.stats().running <= 2
    assert all(answers(outputs, "a", i) == sum_model_answer(tokens, 5) for i in range(5))


@pytest.mark.parametrize("waits_for", ["room", "the prefix that another one computes"])
def test_keys_of_a_prompt_are_made_once_however_long_it_waits(monkeypatch: pytest.MonkeyPatch, waits_for: str) -> None:
    made = list[int]()

    def counted(namespace: str, tokens: TokenArray, mark: Mark | None = None) -> Keys:
        made.append(len(tokens))
        return keys_of(namespace, tokens, mark)

    for module in (books, sequence):
        monkeypatch.setattr(module, "keys_of", counted)
    engine, _ = new_engine(budget_bytes=24 * UNIT if waits_for == "room" else BUDGET, max_tiles=1)
    first, others = tokens_of(1, 1000), [tokens_of(seed, 1000) for seed in (2, 3)]
    if waits_for != "room":
        others = [np.concatenate([first[:960], tokens[:50]]) for tokens in others]
    for i, tokens in enumerate([first, *others]):
        engine.submit(make_request(str(i), tokens, 1))
    num_waited = sum(engine.stats().waiting == 2 for _ in steps(engine))
    assert num_waited > 10
    assert sorted(made) == sorted(len(tokens) for tokens in (first, *others))


# Sizes of steps


def test_a_prompt_takes_few_tiles_beside_a_decode() -> None:
    engine, model = new_engine(max_tiles=16, max_tiles_beside_decode=2)
    engine.submit(make_request("decodes", tokens_of(0, 10), 30))
    engine.step()
    engine.submit(make_request("a", tokens_of(1, 1000), 1))
    for expected in (128 + 1, 128 + 1):
        rows = model.rows_computed
        engine.step()
        assert model.rows_computed == rows + expected


def test_the_prompts_of_a_step_share_its_tiles() -> None:
    engine, model = new_engine(max_tiles=4)
    for i in range(3):
        engine.submit(make_request(str(i), tokens_of(i, 150), 1))
    for expected in (150 + 64, 86 + 64 + 64, 22):
        rows = model.rows_computed
        engine.step()
        assert model.rows_computed == rows + expected


def test_a_finished_answer_is_computed_again_one_tile_a_step() -> None:
    engine, model = new_engine()
    engine.submit(make_request("a", tokens_of(1, 100), 200))
    while not engine.idle:
        engine.step()
    rows = [model.rows_computed]
    for _ in steps(engine):
        rows.append(model.rows_computed)
    assert engine.cache.stats().working_bytes == 0
    assert np.diff(rows).tolist() == [64, 64, 64]  # from the prompt's last full tile to that of prompt and answer


def test_a_finished_answer_is_computed_again_beside_streams_that_have_no_end() -> None:
    """A tile each so many steps: within a bounded time, and hardly ever."""
    (engine, _), tiles = new_engine(), list[int]()
    engine.submit(make_request("turn", tokens_of(0, 70), 130))
    while not engine.idle:
        engine.step()
    stream = tokens_of(1, 20)
    engine.submit(make_request("stream", stream, 3 * DECODE_STEPS_A_TILE + 9))
    outputs: Outputs = []
    while not engine.idle:
        before = engine.stats().commit_tokens
        outputs += engine.step()
        if engine.stats().commit_tokens > before:
            tiles.append(engine.stats().generated_tokens)
    assert [b - a for a, b in pairwise(tiles)] == [DECODE_STEPS_A_TILE]
    assert engine.stats().commit_tokens == 128  # all of the turn that fills pages, and the prompt did not
    assert answers(outputs, "stream") == sum_model_answer(stream, 3 * DECODE_STEPS_A_TILE + 9)
    engine.check()


def test_what_the_cache_has_already_is_not_computed_again() -> None:
    engine, _ = new_engine()
    tokens = tokens_of(1, 100)
    run(engine, make_request("a", tokens, 100))
    committed = engine.stats().commit_tokens
    assert committed > 0
    steps = list[Step]()
    engine.watch = steps.append
    run(engine, make_request("b", tokens, 100))
    assert engine.stats().commit_tokens == committed
    assert steps
    assert all(chunk.sequence is not None for step in steps for chunk in step.chunks)


@pytest.mark.parametrize("mode", [CacheMode.OFF, CacheMode.EXPLICIT])
def test_the_answer_to_a_request_that_wants_no_caching_is_not_kept_either(mode: CacheMode) -> None:
    engine, _ = new_engine()
    run(engine, make_request("a", tokens_of(11, 100), 100, boundaries=(70,), cache_mode=mode))
    assert engine.stats().commit_tokens == 0
    assert engine.cache.stats().nodes == 0


def test_what_comes_next_is_computed_in_place_of_the_answer_as_it_was() -> None:
    """From the state before the part that another rendering changes, with states where its messages end."""
    engine, _ = new_engine()
    prompt = tokens_of(1, 300)
    run(engine, replace(make_request("a", prompt, 100, boundaries=(200,)), commits=False))
    assert engine.stats().commit_tokens == 0
    following = np.concatenate([prompt[:210], tokens_of(2, 300)])
    engine.commit("", Prompt(following, (Boundary(400),)))
    assert engine.stats().committing == 1
    engine.run_until_idle()
    engine.check()
    assert engine.stats().committing == 0
    assert engine.stats().commit_tokens == 448 - 192
    outputs = run(engine, make_request("b", np.concatenate([following[:401], tokens_of(3, 50)])))
    assert prompt_output(outputs, "b").cached_tokens == 384
    whole = np.concatenate([following, tokens_of(4, 50)])
    outputs = run(engine, make_request("c", whole))
    assert prompt_output(outputs, "c").cached_tokens == 448
    assert answers(outputs, "c") == sum_model_answer(whole, 5)
    other = run(engine, replace(make_request("d", whole), namespace="other"))
    assert prompt_output(other, "d").cached_tokens == 0


def test_what_comes_next_may_be_as_long_as_a_prompt_whose_end_is_kept() -> None:
    """Nothing goes on from the end of a prompt, which stands beside the grid."""
    engine, _ = new_engine()
    prompt = tokens_of(1, 128)
    run(engine, replace(make_request("a", prompt, 1), commits=False))
    for kept in [k for k in engine.cache.pool.slot_owner.values() if isinstance(k, Checkpoint)]:
        engine.cache.pool.evict(kept)
    engine.commit("", Prompt(np.concatenate([prompt, tokens_of(2, 10)])))
    engine.run_until_idle()
    outputs = run(engine, make_request("b", np.concatenate([prompt, tokens_of(3, 20)])))
    assert prompt_output(outputs, "b").cached_tokens == 128


def test_marks_are_all_that_is_kept_where_nothing_else_is_wanted() -> None:
    engine, _ = new_engine()
    mark, tokens = Boundary(130, BoundaryKind.EXPLICIT), tokens_of(1, 300)
    asked = Request("a", Prompt(tokens, (mark,)), SamplingParams(temperature=0, max_tokens=90))
    outputs = run(engine, replace(asked, cache_mode=CacheMode.EXPLICIT))
    assert prompt_output(outputs, "a").written_tokens == 128
    outputs = run(engine, replace(asked, id="b"))
    assert prompt_output(outputs, "b").cached_tokens == 128
    engine.check()


@pytest.mark.parametrize("mark", [130, 5])
@pytest.mark.parametrize("more", [0, 40])
def test_a_prompt_that_keeps_its_marks_only_keeps_no_more_for_others(mark: int, more: int) -> None:
    """Another prompt with the same beginning waits for a mark that it can use, and for nothing else."""
    engine, _ = new_engine(max_tiles=1)
    tokens, sampling = tokens_of(1, 500), SamplingParams(temperature=0, max_tokens=5)
    marks = (Boundary(mark, BoundaryKind.EXPLICIT),)
    engine.submit(Request("marked", Prompt(tokens, marks), sampling, cache_mode=CacheMode.EXPLICIT))
    engine.step()
    other = np.concatenate([tokens, tokens_of(2, more)])
    engine.submit(make_request("other", other))
    first: dict[str, int] = {}
    outputs: Outputs = []
    for number in range(60):
        outputs += engine.step()
        first |= {name: number for name, _ in outputs if name not in first}
        states = [k.num_tokens for k in engine.cache.pool.slot_owner.values()]
        if not first:
            assert set(states) <= {mark // TILE * TILE}
            assert engine.stats().running == (2 if number >= mark // TILE - 1 else 1), "beyond the mark nobody waits"
    assert answers(outputs, "marked") == sum_model_answer(tokens, 5)
    assert answers(outputs, "other") == sum_model_answer(other, 5)
    assert prompt_output(outputs, "other").cached_tokens == mark // TILE * TILE
    engine.check()


def test_turns_that_are_forgotten_do_not_come_back() -> None:
    engine = half_committed(units=12)
    engine.commit("other", Prompt(tokens_of(3, 130)))
    engine.forget_turns(lambda namespace: not namespace.endswith("/other"))
    assert engine.cache.stats().working_bytes == 0
    assert engine.stats().committing == 1
    engine.run_until_idle()
    engine.check()


def test_what_cannot_come_next_is_refused_or_forgotten() -> None:
    engine, _ = new_engine()
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine.commit("", Prompt(np.asarray([5, VOCAB], np.int32)))
    with pytest.raises(RequestError, match="0 tokens"):
        engine.commit("", Prompt(np.zeros(0, np.int32)))
    with pytest.raises(ContextTooLong, match="4097 tokens"):
        engine.commit("", Prompt(np.zeros(4097, np.int32)))
    engine.commit("", Prompt(tokens_of(1, 63)))
    assert not engine.has_work, "it fills no page"
    off = Engine(SumModel(), EngineConfig(budget_bytes=BUDGET, prefix_cache=False))
    off.commit("", Prompt(tokens_of(1, 200)))
    assert not off.has_work


# Room


def half_committed(units: int) -> Engine:
    """An engine without requests whose last answer has been computed again in part."""
    engine, _ = new_engine(budget_bytes=units * UNIT)
    engine.submit(make_request("answered", tokens_of(1, 100), 100))
    while not engine.idle:
        engine.step()
    engine.step()
    assert engine.has_work
    assert engine.cache.stats().working_bytes > 0
    return engine


def test_an_answer_that_is_computed_again_gives_its_room_to_a_prompt() -> None:
    engine, tokens = half_committed(units=10), tokens_of(2, 440)
    engine.submit(make_request("b", tokens))
    outputs = [output for more in steps(engine, 50) for output in more]
    assert answers(outputs, "b") == sum_model_answer(tokens, 5)


def test_an_answer_that_is_computed_again_gives_its_room_to_a_decode() -> None:
    engine, tokens = half_committed(units=12), tokens_of(2, 20)
    engine.submit(make_request("b", tokens, 400))
    outputs = [output for more in steps(engine) for output in more]
    assert answers(outputs, "b") == sum_model_answer(tokens, 400)
    assert engine.stats().num_preemptions == 0


def test_a_scored_prompt_that_is_preempted_is_scored_once() -> None:
    scored = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1)
    found = []
    for units in (17, 100):
        engine, _ = new_engine(budget_bytes=units * UNIT, max_tiles_beside_decode=1)
        engine.submit(make_request("older", tokens_of(0, 60), 100))
        outputs = engine.step()
        engine.submit(Request("a", Prompt(tokens_of(1, 600)), scored))
        outputs += engine.run_until_idle()
        found.append((prompt_output(outputs, "a").logprobs, engine.stats().num_preemptions))
    (preempted, times), (plain, never) = found
    assert (times > 0, never) == (True, 0)
    assert preempted == plain
    assert plain is not None
    assert len(plain) == 600


def test_what_a_prompt_computed_before_it_was_preempted_was_not_cached() -> None:
    engine, _ = new_engine(max_tiles_beside_decode=1)
    engine.submit(make_request("older", tokens_of(0, 60), 100))
    outputs = engine.step()
    boundary = Boundary(256, BoundaryKind.MESSAGE_END)
    engine.submit(Request("a", Prompt(tokens_of(1, 600), (boundary,)), SamplingParams(temperature=0, max_tokens=1)))
    for _ in range(6):
        outputs += engine.step()
    scheduler = engine._scheduler
    (half,) = (each for each in scheduler.sequences() if each.request.id == "a")
    assert 256 < half.prefill.computed < 600
    scheduler._preempt(half)
    assert engine.cache.match(half.prefill.namespace, half.prefill.tokens).length == 256
    outputs += engine.run_until_idle()
    told = prompt_output(outputs, "a")
    assert told.found is not None
    assert told.cached_tokens == told.found.matched == 0
    assert told.written_tokens == 576
    assert engine.stats().cached_tokens == 0


# Messages for the store


def test_no_more_messages_hold_room_than_a_step_computes() -> None:
    held: list[int] = []

    class Watched(SmallStage):
        def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
            held.append(engine.cache.stats().working_bytes)
            return super().forward(batch, cache)

    most = []
    for num_messages in (3, 12):
        engine = Engine(Watched(), EngineConfig(budget_bytes=1 << 22, max_tiles=3))
        engine.submit(arranged(30, *[40] * num_messages, 3))
        held.clear()
        while engine.stats().cache.messages < num_messages:
            engine.step()
            engine.check()
        most.append(max(held))
    assert most[0] == most[1]


# Ends of answers


def ends_of(engine: Engine, sampling: SamplingParams, stopper: Callable[[int], bool] | None = None) -> TokenOutput:
    """The last output of an answer to 100 tokens."""
    make = None if stopper is None else lambda: stopper
    outputs = run(engine, Request("a", Prompt(tokens_of(0, 100)), sampling, make_stopper=make))
    last = outputs[-1][1]
    assert isinstance(last, TokenOutput)
    assert len(answers(outputs, "a")) == sum(isinstance(output, TokenOutput) for _, output in outputs)
    return last


def test_an_answer_ends_with_a_stop_token() -> None:
    expected = sum_model_answer(tokens_of(0, 100), 10)
    engine, _ = new_engine()
    last = ends_of(engine, SamplingParams(temperature=0, max_tokens=10, stop_token_ids=(expected[3],)))
    assert last == TokenOutput(0, expected[3], finish=FinishReason.STOP)


def test_an_answer_ends_where_the_client_says_but_not_before_min_tokens() -> None:
    expected = sum_model_answer(tokens_of(0, 100), 10)
    for min_tokens, length in ((0, 1), (1, 1), (4, 4)):
        engine, _ = new_engine()
        params = SamplingParams(temperature=0, max_tokens=10, min_tokens=min_tokens)
        last = ends_of(engine, params, lambda token: True)
        assert last == TokenOutput(0, expected[length - 1], finish=FinishReason.STOP)


def test_an_answer_ends_where_the_context_does() -> None:
    class Short(SumModel):
        max_length = 104

    engine = Engine(Short(), EngineConfig(budget_bytes=1 << 20))
    last = ends_of(engine, SamplingParams(temperature=0, max_tokens=10))
    assert last == TokenOutput(0, sum_model_answer(tokens_of(0, 100), 4)[-1], finish=FinishReason.LENGTH)


# What a request lets the cache do


def test_a_request_with_marks_leaves_states_there_and_nowhere_else() -> None:
    engine, _ = new_engine()
    marks = (Boundary(70), Boundary(200, BoundaryKind.EXPLICIT))
    sampling = SamplingParams(temperature=0, max_tokens=1)
    run(engine, Request("a", Prompt(tokens_of(12, 300), marks), sampling, cache_mode=CacheMode.EXPLICIT))
    assert [node.num_tokens for node in engine.cache.tree.nodes() if node.checkpoint] == [192]


def test_a_namespace_is_one_tenants_and_one_models() -> None:
    requests = [make_request("a", tokens_of(0, 10), namespace=salt) for salt in ("", "x", "y")]
    names = [new_prefill(request, model, enabled=True).namespace for request in requests for model in ("one", "two")]
    assert len(set(names)) == 6
