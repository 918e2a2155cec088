"""Workflows with the embedded model."""

from pathlib import Path
from random import Random

import pytest

from hybrid_cache.api.workflow import open_workflow
from hybrid_cache.choreography.arrangement import SEAMS, Composition, Encoding, Fidelity, Order, Positions, Style
from hybrid_cache.choreography.plan import Action
from hybrid_cache.errors import RequestError, UnknownMessage
from hybrid_cache.request import Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from hybrid_cache.workflow import Call

FACTS = ["The code for the garage is 42.", "Anna likes to drink tea.", "The lamp is green now."]
ASK = "What is the code for the garage?"
COMPOSED = Style(Fidelity.COMPOSED)


@pytest.fixture
def workflow():
    return open_workflow(budget="64MiB", fidelity="composed")


def test_messages_are_encoded_once_and_read_in_any_order(workflow):
    facts = workflow.encode_all(FACTS)
    assert all(workflow.is_stored(fact) for fact in facts)
    for order in ((0, 1, 2), (2, 0, 1)):
        answer = workflow.generate(attend=[*(facts[i] for i in order), ASK])
        assert answer.text == "The code for the garage is 42."
        assert answer.plan.fidelity is Fidelity.COMPOSED
        assert answer.plan.tokens(Action.COMPOSED) == sum(len(fact.tokens) for fact in facts)
        assert [m.id for m in answer.attended[:3]] == [facts[i].id for i in order]
        assert 0 < answer.first_token_s <= answer.total_s
    workflow.engine.check()


def test_answers_can_be_attended_to(workflow):
    answer = workflow.generate(attend=[FACTS[0], ASK])
    assert workflow.is_stored(answer.message)
    more = workflow.generate(attend=[*answer.attended, answer.message, "Thank you."])
    actions = [item.action for item in more.plan.items]
    assert actions[:3] == [Action.COMPOSED, Action.COMPUTED, Action.COMPOSED]  # the short question was not stored
    assert more.text == "You are welcome."
    assert workflow.find(answer.message.id).text == answer.text


def test_a_short_last_message_is_stored_if_others_wait_for_it(workflow):
    facts = [workflow.encode(fact) for fact in FACTS]
    question = workflow.message(ASK, parents=facts)
    workflow.generate(attend=[*facts, question])
    assert not workflow.is_stored(question)
    workflow.parallel([Call([*facts, question])] * 9)
    assert workflow.is_stored(question)


def test_an_answer_has_the_role_asked_for(workflow):
    answer = workflow.generate("critic", attend=[FACTS[0], ASK])
    assert answer.message.role == "critic"
    assert "critic" in workflow.renderer.text(answer.message.tokens)
    assert workflow.plan("critic", attend=[*answer.attended, answer.message, ASK]).items[2].action is Action.COMPOSED


def test_a_message_may_stand_in_a_call_twice(workflow):
    fact = workflow.encode(FACTS[0])
    answer = workflow.generate(attend=[fact, FACTS[1], fact, ASK])
    assert [item.action for item in answer.plan.items[:3:2]] == [Action.COMPOSED] * 2
    assert answer.text == FACTS[0]


def test_a_message_behind_its_parents_is_another_message(workflow):
    fact = workflow.encode(FACTS[0])
    alone, behind = workflow.encode(FACTS[1]), workflow.encode(FACTS[1], parents=[fact])
    assert alone.id != behind.id
    assert workflow.is_stored(behind)
    plan = workflow.plan(attend=[fact, behind, ASK])
    assert [item.action for item in plan.items] == [Action.COMPOSED, Action.COMPOSED, Action.COMPUTED, Action.COMPUTED]


def test_calls_in_parallel_give_what_each_gives_alone(workflow):
    facts = workflow.encode_all(FACTS)
    calls = [Call([facts[1], facts[0], ASK]), Call([facts[0], ASK]), Call([*facts, "What colour is the lamp now?"])]
    together = [answer.tokens for answer in workflow.parallel(calls)]
    fresh = open_workflow(budget="64MiB", fidelity="composed")
    fresh_facts = fresh.encode_all(FACTS)
    by_id = {m.id: f for m, f in zip(facts, fresh_facts, strict=True)}
    for call, tokens in zip(calls, together, strict=True):
        attend = [item if isinstance(item, str) else by_id[item.id] for item in call.attend]
        assert fresh.generate(attend=attend).tokens == tokens


@pytest.mark.parametrize("style", [Style(), Style(order=Order.ANY)], ids=["given", "any"])
def test_exact_is_what_encoding_everything_gives(style):
    sampling = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3, stop_token_ids=(4,))
    cached = open_workflow(budget="64MiB", style=style)
    plain = open_workflow(budget="64MiB", prefix_cache=False)
    for turn in range(3):
        attend = [*FACTS[: turn + 1], ASK]
        found = cached.generate(attend=attend, sampling=sampling)
        expected = plain.generate(attend=[m.text for m in found.attended], sampling=sampling)
        assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)


@pytest.mark.parametrize("num_messages", [12, pytest.param(48, marks=pytest.mark.slow)])
@pytest.mark.parametrize("budget", ["64MiB", "1500KiB"])
def test_random_calls_are_exact_where_they_say_so(budget, num_messages):
    """Of all styles, side by side, with room for everything and for next to nothing."""
    rng = Random(budget)
    sampling = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2, stop_token_ids=(4,))
    cached, plain = open_workflow(budget=budget), open_workflow(budget="64MiB", prefix_cache=False)
    known = [cached.message(fact) for fact in FACTS]
    kinds = set()
    for _ in range(num_messages):
        parents = rng.sample(known, rng.choice((0, 0, 1, 2)))
        known.append(cached.encode(" ".join(rng.choices(FACTS, k=rng.randint(1, 20))), parents))
        calls = []
        for _ in range(rng.randint(1, 4)):
            style = Style(
                rng.choice(list(Fidelity)),
                rng.choice((0, 0, *SEAMS)),
                rng.choice(list(Composition)),
                rng.choice(list(Positions)),
                rng.choice(list(Order)),
                rng.choice(list(Encoding)),
            )
            calls.append(Call([*rng.choices(known, k=rng.randint(1, 4)), ASK], style=style, sampling=sampling))
        for found in cached.parallel(calls):
            kinds.add(found.plan.fidelity)
            if found.plan.fidelity is Fidelity.EXACT:
                expected = plain.generate(attend=[m.text for m in found.attended], sampling=sampling)
                assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)
        cached.engine.check()
        assert cached.engine.stats().cache.working_bytes == 0
    assert kinds == {Fidelity.EXACT, Fidelity.COMPOSED}


def test_answers_reach_the_prefix_cache_when_nobody_waits():
    workflow = open_workflow(budget="64MiB")
    sampling = SamplingParams(temperature=0.0, max_tokens=70, min_tokens=70)
    answer = workflow.generate(attend=[*FACTS, ASK], sampling=sampling)
    attend = [*answer.attended, answer.message, "Thank you."]
    before = workflow.plan(attend=attend).prefix
    workflow.settle()
    assert workflow.plan(attend=attend).prefix >= before + 64


def test_plans_run_nothing(workflow):
    fact = workflow.encode(FACTS[0])
    before = workflow.engine.stats()
    plan = workflow.plan(attend=[fact, ASK])
    assert plan.tokens(Action.COMPOSED) == len(fact.tokens)
    assert workflow.engine.stats() == before
    assert "composed" in str(plan)


def test_a_call_may_name_its_fidelity(workflow):
    fact = workflow.encode(FACTS[0])
    assert workflow.generate(attend=[fact, ASK], fidelity="exact").plan.fidelity is Fidelity.EXACT
    assert workflow.plan(attend=[fact, ASK], fidelity="exact").tokens(Action.COMPOSED) == 0
    assert workflow.generate(attend=[fact, ASK]).plan.fidelity is Fidelity.COMPOSED
    with pytest.raises(RequestError, match="fidelity is 'best', must be one of exact, relocated, composed"):
        workflow.generate(attend=[fact, ASK], fidelity="best")


def test_effects_can_be_looked_at(workflow):
    fact = workflow.encode(FACTS[0])
    effects = workflow.effects(fact)
    assert len(effects) == 4
    assert all(p.shape == (6,) and s.shape == (6, 64, 32) for p, s in effects)
    assert all((p < 0).all() for p, _ in effects)
    with pytest.raises(RequestError, match="is not stored"):
        workflow.effects(workflow.message("Hello!"))


def test_workflows_of_one_namespace_share_and_others_do_not(workflow):
    fact = workflow.encode(FACTS[0])
    other = open_workflow(budget="64MiB")
    with pytest.raises(UnknownMessage, match=fact.id):
        other.generate(attend=[fact, ASK])


def test_styles(workflow):
    facts = workflow.encode_all(FACTS)
    for how in Composition:
        answer = workflow.generate(attend=[*facts, ASK], style=Style(Fidelity.COMPOSED, composition=how))
        assert answer.plan.fidelity is Fidelity.COMPOSED
    long = workflow.message(" ".join(FACTS * 2))
    style = Style(Fidelity.COMPOSED, seam=16, encoding=Encoding.ALONE)
    answers = [workflow.generate(attend=[long, ASK], style=style) for _ in range(2)]
    assert [answer.plan.items[0].computed for answer in answers] == [len(long.tokens), 16]


def test_bad_calls(workflow):
    with pytest.raises(RequestError, match=r"0 messages, must be in \[1, 1024\]"):
        workflow.generate(attend=[])


def test_nothing_is_left_in_use(workflow):
    workflow.parallel([Call([*FACTS, ASK]) for _ in range(4)])
    stats = workflow.engine.stats()
    assert stats.cache.working_bytes == 0
    assert stats.running == stats.waiting == 0


def test_the_example_of_the_documentation_runs(capsys):
    text = (Path(__file__).parents[2] / "docs/choreography.md").read_text()
    example = next(block for block in text.split("```python\n") if "open_workflow" in block).split("```")[0]
    exec(compile(example, "choreography.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("composed") >= 4
    assert "You are welcome." in printed


def test_more_calls_than_the_engine_takes_at_once_are_all_answered(workflow):
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    answers = workflow.parallel([Call([f"Hello {i}."], sampling=sampling) for i in range(300)])
    assert len(answers) == 300
    messages = workflow.encode_all([f"Number {i}." for i in range(300)])
    assert sum(workflow.is_stored(message) for message in messages) >= 50


def test_of_calls_with_a_bad_one_none_begins(workflow):
    good, bad = Call(["Hello."]), Call(["Hello."], sampling=SamplingParams(stop_token_ids=(10_000_000,)))
    with pytest.raises(RequestError):
        workflow.parallel([good, bad])
    assert workflow.engine.idle
    assert workflow.generate(attend=["Hello."], sampling=SamplingParams(temperature=0.0, max_tokens=2)).tokens


def test_what_others_asked_of_the_engine_is_kept_for_them(workflow):
    prompt = Prompt(workflow.renderer.message("user", "Hi."))
    workflow.engine.submit(Request("mine", prompt, SamplingParams(temperature=0.0, max_tokens=3)))
    assert workflow.generate(attend=["Hello."], sampling=SamplingParams(temperature=0.0, max_tokens=2)).tokens
    assert [name for name, _ in workflow.others] == ["mine"] * 4
