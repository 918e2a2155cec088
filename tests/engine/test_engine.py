"""The engine on a model with answers worked out by hand: the same tokens whatever the cache, the batch or the room."""

import random

import numpy as np
import pytest

from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import BadSampling, ContextTooLong, Overloaded, RequestError
from hybrid_cache.request import CacheMode, FinishReason, PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, BoundaryKind, Prompt, TokenArray
from tests.fakes import SumModel, sum_model_answer, tokens_of

BUDGET = 1 << 20


def make_request(
    name: str, tokens: TokenArray, max_tokens: int = 5, *, boundaries: tuple[int, ...] = (), n: int = 1, **more: object
) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    prompt = Prompt(tokens, tuple(Boundary(p) for p in boundaries))
    return Request(name, prompt, sampling, n=n, **more)  # type: ignore[arg-type]


def answers(outputs: Outputs, name: str, index: int = 0) -> list[int]:
    return [
        o.token
        for request_id, o in outputs
        if request_id == name and isinstance(o, TokenOutput) and o.index == index and o.token is not None
    ]


def prompt_output(outputs: Outputs, name: str) -> PromptOutput:
    (output,) = [o for request_id, o in outputs if request_id == name and isinstance(o, PromptOutput)]
    return output


def run(engine: Engine, *requests: Request) -> Outputs:
    for request in requests:
        engine.submit(request)
    outputs = engine.run_until_idle()
    engine.check()
    return outputs


def new_engine(budget_bytes: int = BUDGET, **config: object) -> tuple[Engine, SumModel]:
    model = SumModel()
    return Engine(model, EngineConfig(budget_bytes=budget_bytes, **config)), model  # type: ignore[arg-type]


def test_an_answer_is_the_one_worked_out_by_hand() -> None:
    engine, _ = new_engine()
    tokens = tokens_of(0, 150)
    outputs = run(engine, make_request("a", tokens, 7))
    assert answers(outputs, "a") == sum_model_answer(tokens, 7)
    assert outputs[-1][1] == TokenOutput(0, answers(outputs, "a")[-1], finish=FinishReason.LENGTH)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 200])
def test_an_exact_repeat_computes_no_prompt_token(length: int) -> None:
    engine, model = new_engine()
    tokens = tokens_of(length, length)
    first = run(engine, make_request("a", tokens))
    rows = model.rows_computed
    again = run(engine, make_request("b", tokens))
    assert answers(again, "b") == answers(first, "a")
    assert prompt_output(again, "b").cached_tokens == length
    assert model.rows_computed == rows + 4  # five tokens, the first from the kept hidden row


def test_the_next_turn_reuses_prompt_and_answer() -> None:
    engine, _ = new_engine()
    tokens = tokens_of(1, 100)
    answer = answers(run(engine, make_request("a", tokens, 100)), "a")
    longer = np.concatenate([tokens, np.array(answer, np.int32), tokens_of(2, 30)])
    outputs = run(engine, make_request("b", longer))
    assert prompt_output(outputs, "b").cached_tokens == 192  # the canonical commit reached the last full tile of 200
    assert answers(outputs, "b") == sum_model_answer(longer, 5)


def test_a_shared_system_prompt_is_found_at_its_message_end() -> None:
    engine, _ = new_engine()
    system = tokens_of(3, 300)
    one, two = (np.concatenate([system, tokens_of(seed, 50)]) for seed in (4, 5))
    run(engine, make_request("a", one, boundaries=(300, 350)))
    outputs = run(engine, make_request("b", two, boundaries=(300, 350)))
    assert prompt_output(outputs, "b").cached_tokens == 256
    assert answers(outputs, "b") == sum_model_answer(two, 5)


def test_a_branch_nobody_announced_is_kept_from_its_second_visit_on() -> None:
    engine, _ = new_engine()
    shared = tokens_of(6, 640)
    requests = [make_request(str(i), np.concatenate([shared[:333], tokens_of(10 + i, 100)])) for i in range(3)]
    run(engine, requests[0])
    run(engine, requests[1])
    assert prompt_output(run(engine, requests[2]), "2").cached_tokens == 320


def test_requests_that_share_a_prefix_in_one_batch_compute_it_once() -> None:
    engine, model = new_engine()
    system = tokens_of(7, 512)
    requests = [make_request(str(i), np.concatenate([system, tokens_of(20 + i, 40)]), 1) for i in range(6)]
    outputs = run(engine, *requests)
    assert model.rows_computed == 512 + 6 * 40
    for request in requests:
        assert answers(outputs, request.id) == sum_model_answer(request.prompt.tokens, 1)


def test_identical_requests_in_one_batch_compute_the_prompt_once() -> None:
    engine, model = new_engine()
    tokens = tokens_of(8, 200)
    outputs = run(engine, *(make_request(str(i), tokens, 1) for i in range(4)))
    assert model.rows_computed == 200
    assert all(answers(outputs, str(i)) == sum_model_answer(tokens, 1) for i in range(4))


def test_prompts_that_end_in_one_step_are_kept_each_with_its_own_row() -> None:
    engine, model = new_engine(max_tiles=8)
    prompts = [tokens_of(seed, length) for seed, length in ((1, 70), (2, 100), (3, 128))]
    for _ in range(2):
        outputs = run(engine, *(make_request(str(i), tokens, 1) for i, tokens in enumerate(prompts)))
        assert [answers(outputs, str(i)) for i in range(3)] == [sum_model_answer(tokens, 1) for tokens in prompts]
    assert model.rows_computed == sum(map(len, prompts))


def test_n_choices_share_one_prompt() -> None:
    engine, model = new_engine()
    tokens = tokens_of(9, 130)
    outputs = run(engine, make_request("a", tokens, 3, n=4))
    assert model.rows_computed == 130 + 4 * 2
    assert all(answers(outputs, "a", i) == sum_model_answer(tokens, 3) for i in range(4))
    assert not engine.is_open("a")


@pytest.mark.parametrize("mode", [CacheMode.OFF, CacheMode.EXPLICIT])
def test_a_request_that_wants_no_caching_leaves_and_takes_nothing(mode: CacheMode) -> None:
    engine, _ = new_engine()
    tokens = tokens_of(11, 200)
    for name in "ab":
        outputs = run(engine, make_request(name, tokens, boundaries=(100,), cache_mode=mode))
        assert prompt_output(outputs, name) == PromptOutput(cached_tokens=0, written_tokens=0)
    assert engine.cache.stats().nodes == 0
    run(engine, make_request("another's", tokens, boundaries=(100,)))
    outputs = run(engine, make_request("c", tokens, boundaries=(100,), cache_mode=mode))
    assert prompt_output(outputs, "c") == PromptOutput(cached_tokens=0, written_tokens=0)


def test_explicit_breakpoints_are_kept_where_they_are_marked() -> None:
    engine, _ = new_engine()
    tokens = tokens_of(12, 300)
    marked = Prompt(tokens, (Boundary(64), Boundary(200, BoundaryKind.EXPLICIT)))
    sampling = SamplingParams(temperature=0, max_tokens=1)
    run(engine, Request("a", marked, sampling, cache_mode=CacheMode.EXPLICIT))
    changed = np.concatenate([tokens[:250], tokens_of(13, 60)])
    outputs = run(engine, make_request("b", changed))
    assert prompt_output(outputs, "b").cached_tokens == 192


def test_another_namespace_shares_nothing() -> None:
    engine, _ = new_engine()
    tokens = tokens_of(14, 200)
    run(engine, make_request("a", tokens, namespace="x"))
    assert prompt_output(run(engine, make_request("b", tokens, namespace="y")), "b").cached_tokens == 0


def test_without_prefix_cache_everything_is_computed() -> None:
    engine, model = new_engine(prefix_cache=False)
    tokens = tokens_of(15, 100)
    run(engine, make_request("a", tokens, 1), make_request("b", tokens, 1))
    run(engine, make_request("c", tokens, 1))
    assert model.rows_computed == 300


def test_an_abort_frees_everything_but_the_finished_prefix() -> None:
    engine, _ = new_engine()
    tokens = tokens_of(16, 3000)
    engine.submit(make_request("a", tokens))
    engine.step()
    engine.abort("a")
    engine.check()
    assert engine.idle
    assert engine.cache.stats().working_bytes == 0
    outputs = run(engine, make_request("b", tokens))
    assert 0 < prompt_output(outputs, "b").cached_tokens <= 1024
    assert answers(outputs, "b") == sum_model_answer(tokens, 5)


def test_preemption_changes_no_token() -> None:
    model = SumModel()
    slot, page = model.cache_spec.slot_bytes, model.cache_spec.page_bytes
    engine, _ = new_engine(budget_bytes=4 * slot + 16 * page)
    requests = [make_request(str(i), tokens_of(30 + i, 100), 150) for i in range(6)]
    outputs = run(engine, *requests)
    assert engine.stats().num_preemptions > 0
    for request in requests:
        assert answers(outputs, request.id) == sum_model_answer(request.prompt.tokens, 150)


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_of_requests_gives_the_answers_of_a_run_without_cache(seed: int) -> None:
    rng = random.Random(seed)
    engine, _ = new_engine(budget_bytes=rng.choice([40_000, 100_000, BUDGET]), max_running=rng.choice([1, 3, 16]))
    stems = [tokens_of(100 * seed + i, rng.randrange(1, 400)) for i in range(5)]
    expected, got, aborted = {}, [], set()
    for i in range(40):
        stem = rng.choice(stems)
        tokens = np.concatenate([stem[: rng.randrange(1, len(stem) + 1)], tokens_of(i, rng.randrange(100))])
        request = make_request(
            f"{i}", tokens, rng.randrange(1, 40), boundaries=(len(tokens) // 2,), n=rng.choice([1, 1, 3])
        )
        try:
            engine.submit(request)
        except ContextTooLong:
            continue
        expected[request.id] = request
        for _ in range(rng.randrange(4)):
            got += engine.step()
            engine.check()
        if rng.random() < 0.1:
            aborted.add(request.id)
            engine.abort(request.id)
    got += engine.run_until_idle()
    engine.check()
    for name, request in expected.items():
        for index in range(request.n if name not in aborted else 0):
            want = sum_model_answer(request.prompt.tokens, request.sampling.max_tokens)
            assert answers(got, name, index) == want, f"request {name}, choice {index}"


def test_a_prompt_that_the_model_or_the_budget_cannot_hold_is_refused_with_both_numbers() -> None:
    engine, _ = new_engine()
    with pytest.raises(ContextTooLong, match=r"4096 tokens, the context holds 4096"):
        engine.submit(make_request("a", tokens_of(17, 4096)))
    small, _ = new_engine(budget_bytes=20_000)
    with pytest.raises(ContextTooLong, match="20000 bytes"):
        small.submit(make_request("a", tokens_of(17, 4000)))


def test_bad_requests_are_refused_with_the_value_and_the_bound() -> None:
    engine, _ = new_engine()
    with pytest.raises(RequestError, match="0 tokens"):
        engine.submit(make_request("a", tokens_of(0, 0)))
    with pytest.raises(RequestError, match=r"token 997 is outside the vocabulary \[0, 997\)"):
        engine.submit(make_request("a", np.array([1, 997], np.int32)))
    with pytest.raises(BadSampling, match="n is 0"):
        engine.submit(make_request("a", tokens_of(0, 3), n=0))


def test_a_full_queue_is_overloaded() -> None:
    engine, _ = new_engine(max_waiting=2)
    for i in range(2):
        engine.submit(make_request(str(i), tokens_of(i, 10)))
    with pytest.raises(Overloaded, match="2 requests wait, limit 2"):
        engine.submit(make_request("2", tokens_of(2, 10)))


def test_zero_tokens_with_prompt_logprobs_scores_the_prompt() -> None:
    engine, _ = new_engine()
    tokens = np.array([5, 6, 13, 27], np.int32)  # 5 + 1 = 6, (5 + 6) + 2 = 13, (5 + 6 + 13) + 3 = 27
    sampling = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=2)
    outputs = run(engine, Request("a", Prompt(tokens), sampling, cache_mode=CacheMode.OFF))
    scores = prompt_output(outputs, "a").logprobs
    assert scores is not None
    assert scores[0] is None
    assert [s.top[0][0] for s in scores[1:] if s] == [6, 13, 27]
    assert all(s.logprob == s.top[0][1] for s in scores[1:] if s)
    assert outputs[-1][1] == TokenOutput(0, None, finish=FinishReason.LENGTH)


def test_a_scored_prompt_is_computed_whole_whatever_the_cache_has() -> None:
    engine, _ = new_engine()
    tokens = tokens_of(3, 200)
    run(engine, Request("a", Prompt(tokens), SamplingParams(temperature=0, max_tokens=1)))
    sampling = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=1)
    found = [
        prompt_output(run(engine, Request(name, Prompt(tokens), sampling, cache_mode=mode)), name)
        for name, mode in (("b", CacheMode.IMPLICIT), ("c", CacheMode.OFF))
    ]
    assert [output.cached_tokens for output in found] == [0, 0]
    assert found[0].logprobs == found[1].logprobs
    assert found[0].logprobs is not None
    assert len(found[0].logprobs) == 200


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    engine, _ = new_engine()
    engine.submit(make_request("a", tokens_of(0, 70)))
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.submit(make_request("a", tokens_of(1, 70)))
    assert answers(engine.run_until_idle(), "a") == sum_model_answer(tokens_of(0, 70), 5)
    assert answers(run(engine, make_request("a", tokens_of(1, 70))), "a") == sum_model_answer(tokens_of(1, 70), 5)


def test_a_plan_is_made_for_arranged_requests_only() -> None:
    engine, _ = new_engine()
    with pytest.raises(RequestError, match="names no messages"):
        engine.plan(make_request("a", tokens_of(0, 70)))


def test_a_boundary_behind_the_prompt_is_refused() -> None:
    engine = Engine(SumModel(), EngineConfig(budget_bytes=1 << 22))
    prompt = Prompt(tokens_of(1, 100), (Boundary(100), Boundary(101)))
    with pytest.raises(RequestError, match="a boundary at 101, the prompt has 100 tokens"):
        engine.submit(Request("a", prompt, SamplingParams(temperature=0, max_tokens=1)))
