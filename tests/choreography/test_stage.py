"""Arranged requests in the engine: what is stored, shared, evicted, given up."""

from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch

from hybrid_cache.choreography.arrangement import (
    Arrangement,
    Composition,
    Encoding,
    Fidelity,
    Order,
    Part,
    closed,
    message_id,
)
from hybrid_cache.choreography.plan import Action
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.request import CacheMode, PromptOutput, TokenOutput
from tests.choreography.conductor import Conductor, exact_logits, message
from tests.models.checkpoints import CASES

MESSAGES = [message(length, seed) for seed, length in enumerate((70, 45, 33))]
HYBRID = next(case for case in CASES if case.name.startswith("bamba"))
ATTENTION = next(case for case in CASES if case.name == "llama of one layer")
MAMBA = next(case for case in CASES if case.name == "mamba of one layer")
DELTA = next(case for case in CASES if case.name.startswith("qwen3 next") or "qwen3-next" in case.name)


@pytest.fixture
def hybrid(folder):
    return loading.load(folder(HYBRID), ops=dispatch.select())


def drain(conductor):
    outputs = conductor.engine.run_until_idle()
    conductor.engine.check()
    return outputs


def test_messages_are_stored_once_whoever_asks(hybrid):
    conductor = Conductor(hybrid)
    arrangement = conductor.arrangement(MESSAGES)
    for _ in range(3):
        conductor.engine.submit(conductor.request(MESSAGES, arrangement))
    told = [o for _, o in drain(conductor) if isinstance(o, PromptOutput)]
    assert [o.cached_tokens for o in told] == [78, 148, 148]  # the first message is computed in its place
    assert conductor.engine.stats().cache.messages == 3
    assert conductor.engine.stats().cache.admissions["message"] == 3


def step_by_step(conductor):
    """A conductor that ends a step with each message that it stores, as on a device that does not pack rows."""
    begin = conductor.engine._compiler.program

    def apart(*args, **options):
        program = begin(*args, **options)
        program.joins = False
        return program

    conductor.engine._compiler.program = apart
    return conductor


@pytest.mark.parametrize("seam", [0, 8])
@pytest.mark.parametrize("case", [HYBRID, DELTA, ATTENTION, MAMBA], ids=str)
def test_messages_of_one_chunk_are_what_they_are_in_several(folder, case, seam):
    """Rows and states behind each, its effect, and the answer, bit for bit."""
    model = loading.load(folder(case), ops=dispatch.select())
    found, steps = [], []
    for conductor in (Conductor(model), step_by_step(Conductor(model))):
        fidelity = Fidelity(model.fidelities[-1])
        arrangement = conductor.arrangement(MESSAGES, Encoding.IN_PLACE, fidelity, seam=seam)
        logits, _, answer = conductor.run(MESSAGES, arrangement, max_tokens=4)
        effects = [conductor.engine.effects(part.id, seam) for part in arrangement.parts[:-1]]
        again = conductor.run(
            MESSAGES[::-1], conductor.arrangement(MESSAGES[::-1], Encoding.IN_PLACE, fidelity, seam=seam)
        )
        assert again[1].cached_tokens == 148 - 3 * seam
        found.append((logits, again[0], answer, effects))
        steps.append(conductor.engine.stats().steps)
    assert steps[0] < steps[1]
    (logits, again, answer, effects), other = found
    assert torch.equal(logits, other[0])
    assert torch.equal(again, other[1])
    assert answer == other[2]
    for mine, theirs in zip(effects, other[3], strict=True):
        assert len(mine) == len(theirs)
        assert all(torch.equal(a, b) for pair in zip(mine, theirs, strict=True) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize(("lent", "messages"), [([False, True], 3), ([False], 1)], ids=["every other", "none"])
def test_without_slots_for_states_between_messages_there_are_more_steps(hybrid, lent, messages):
    """Messages whose first states find no room are not stored."""
    plain, short = Conductor(hybrid), Conductor(hybrid)
    lend, asked = short.engine.cache.messages.lend_slot, cycle(lent)
    short.engine.cache.messages.lend_slot = lambda: lend() if next(asked) else None
    found = [one.run(MESSAGES, one.arrangement(MESSAGES, Encoding.IN_PLACE))[0] for one in (plain, short)]
    assert torch.equal(*found)
    assert plain.engine.stats().steps < short.engine.stats().steps
    assert plain.engine.stats().cache.messages == 3
    assert short.engine.stats().cache.messages == messages
    assert short.engine.stats().cache.working_bytes == 0


def test_calls_run_side_by_side_and_do_not_change_each_other(hybrid):
    orders = [(0, 1, 2), (2, 1, 0), (1, 2), (0, 2)]
    alone = []
    for order in orders:
        conductor = Conductor(hybrid)
        chosen = [MESSAGES[i] for i in order]
        alone.append(conductor.run(chosen, conductor.arrangement(chosen), max_tokens=6)[2])
    together = Conductor(hybrid)
    for order in orders:
        chosen = [MESSAGES[i] for i in order]
        together.engine.submit(together.request(chosen, together.arrangement(chosen), max_tokens=6))
    answers = {}
    for name, output in drain(together):
        if isinstance(output, TokenOutput):
            answers.setdefault(name, []).append(output.token)
    assert [answers[str(i)] for i in range(1, 5)] == alone


def test_an_answer_becomes_a_message(hybrid):
    conductor = Conductor(hybrid)
    arrangement = conductor.arrangement(MESSAGES, closing=(7, 8), answer_start=148)
    before = conductor.engine.stats().cache.messages
    conductor.run(MESSAGES, arrangement, max_tokens=9)
    assert conductor.engine.stats().cache.messages == before + 4
    assert conductor.engine.stats().cache.working_bytes == 0


@pytest.mark.parametrize("seam", [0, 16])
def test_an_answer_put_back_behind_its_context_gives_what_encoding_it_gives(hybrid, seam):
    """Its effect is that of the decode steps; with a seam the record begins in the middle of the answer."""
    conductor = Conductor(hybrid)
    context = [conductor.part(m, Encoding.IN_PLACE) for m in MESSAGES]
    arrangement = conductor.arrangement(MESSAGES, Encoding.IN_PLACE, seam=seam, closing=(7, 8), answer_start=148)
    _, _, answer = conductor.run(MESSAGES, arrangement, max_tokens=40)
    header = conductor.request(MESSAGES).prompt.tokens[148:]
    whole = closed(np.concatenate([header, answer]), (7, 8))
    assert len(whole) == 45
    name = message_id(conductor.namespace, whole)
    again = Arrangement((*context, Part(len(whole), name), Part(len(header))), Fidelity.COMPOSED, seam=seam)
    found, told, _ = conductor.run([*MESSAGES, whole], again)
    assert told.plan.tokens(Action.COMPOSED) == 148 + 45 - 4 * seam
    torch.testing.assert_close(found, exact_logits(hybrid, [*MESSAGES, whole]), atol=2e-3, rtol=2e-3)


def test_exact_has_the_bits_of_encoding_everything(hybrid):
    conductor = Conductor(hybrid)
    for fidelity in (Fidelity.COMPOSED, Fidelity.EXACT):
        found, told, _ = conductor.run(MESSAGES, conductor.arrangement(MESSAGES, fidelity=fidelity))
    assert told.plan.fidelity is Fidelity.EXACT
    assert torch.equal(found, exact_logits(hybrid, MESSAGES))


def test_what_a_model_cannot_give_is_exact_and_says_so(hybrid, folder):
    expected = exact_logits(hybrid, MESSAGES)
    conductor = Conductor(hybrid)
    found, told, _ = conductor.run(MESSAGES, conductor.arrangement(MESSAGES, fidelity=Fidelity.RELOCATED))
    assert torch.equal(found, expected)
    assert told.plan.fidelity is Fidelity.EXACT
    assert "recurrent states" in told.plan.why
    delta = loading.load(folder(DELTA), ops=dispatch.select())
    conductor = Conductor(delta)
    averaged = conductor.arrangement(MESSAGES, composition=Composition.PERMUTATIONS)
    found, told, _ = conductor.run(MESSAGES, averaged)
    assert torch.equal(found, exact_logits(delta, MESSAGES))
    assert "do not commute" in told.plan.why


def test_with_the_cache_off_everything_is_computed(hybrid):
    conductor = Conductor(hybrid, prefix_cache=False)
    for _ in range(2):
        _, told, _ = conductor.run(MESSAGES, conductor.arrangement(MESSAGES))
    assert told.plan.fidelity is Fidelity.EXACT
    assert told.plan.why == "the cache is off"
    assert conductor.engine.stats().cache.messages == 0


def test_unordered_messages_stand_where_the_cache_has_them(hybrid):
    first, second, question = message(130, 8), message(140, 9), message(20, 10)
    conductor = Conductor(hybrid)
    asked = [first, second, question]
    conductor.run(asked, conductor.arrangement(asked, fidelity=Fidelity.EXACT))
    turned = [second, first, question]
    _, told, _ = conductor.run(turned, conductor.arrangement(turned, fidelity=Fidelity.EXACT, order=Order.ANY))
    assert [item.end - item.start for item in told.plan.items] == [130, 140, 20, 3]
    assert told.cached_tokens == 293  # the very prompt of before
    assert "order was chosen" in told.plan.why
    for keeps_its_place in ([second, first, question], [second, question, first]):  # as asked; the last message stays
        order = Order.GIVEN if keeps_its_place[1] is first else Order.ANY
        arrangement = conductor.arrangement(keeps_its_place, fidelity=Fidelity.EXACT, order=order)
        _, told, _ = conductor.run(keeps_its_place, arrangement)
        assert told.cached_tokens < 130


def test_unordered_messages_of_calls_at_one_time_take_one_order(hybrid):
    first, second, question = message(130, 8), message(140, 9), message(20, 10)
    told = []
    for order in (Order.GIVEN, Order.ANY):
        conductor = Conductor(hybrid)
        for asked in ([first, second, question], [second, first, question]):
            arrangement = conductor.arrangement(asked, fidelity=Fidelity.EXACT, order=order)
            conductor.engine.submit(conductor.request(asked, arrangement))
        told.append([o.cached_tokens for _, o in drain(conductor) if isinstance(o, PromptOutput)])
    assert told == [[0, 0], [0, 293]]


def test_messages_of_different_roles_keep_their_order(hybrid):
    first, second, question = message(130, 8), message(140, 9), message(20, 10)
    conductor = Conductor(hybrid)
    conductor.run([first, second, question], None)
    turned = [second, first, question]
    asked = conductor.arrangement(turned, fidelity=Fidelity.EXACT, order=Order.ANY)
    roles = ("user", "assistant", "user", "")
    asked = replace(asked, parts=tuple(replace(p, role=role) for p, role in zip(asked.parts, roles, strict=True)))
    _, told, _ = conductor.run(turned, asked)
    assert told.cached_tokens == 0


def test_an_exact_prefix_goes_before_composed_messages(hybrid):
    long = [message(300, 4), message(50, 5)]
    conductor = Conductor(hybrid)
    conductor.run([long[0]], None)
    conductor.run([long[1]], conductor.arrangement([long[1]]))
    arrangement = conductor.arrangement(long, Encoding.IN_PLACE)
    _, told, _ = conductor.run(long, arrangement)
    assert told.plan.prefix == 256
    assert [item.computed for item in told.plan.items] == [44, 0, 3]


def test_an_aborted_request_leaves_nothing_behind(hybrid):
    for steps in range(6):
        conductor = Conductor(hybrid, max_tiles=1)
        arrangement = conductor.arrangement(MESSAGES, Encoding.IN_PLACE, seam=16, closing=(7,), answer_start=148)
        request = conductor.request(MESSAGES, arrangement, max_tokens=30)
        conductor.engine.submit(request)
        for _ in range(steps):
            conductor.engine.step()
            conductor.engine.check()
        conductor.engine.abort(request.id)
        drain(conductor)
        assert conductor.engine.stats().cache.working_bytes == 0
        found, _, _ = conductor.run(MESSAGES, arrangement)
        torch.testing.assert_close(found, exact_logits(hybrid, MESSAGES), atol=2e-3, rtol=2e-3)


def room(model, pages, slots):
    """A budget of so many pages and slots."""
    spec = model.cache_spec
    return pages * spec.page_bytes + slots * (spec.slot_bytes + 1024)


def test_too_little_room_means_computing(hybrid):
    """Whatever the budget, every request is answered, and never from a mixture."""
    for slots in (1, 2, 3, 4, 6):
        conductor = Conductor(hybrid, budget_bytes=room(hybrid, 4, slots) + (64 << 10))
        if not conductor.engine.cache.fits(160):
            continue
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 1, 2)):
            chosen = [MESSAGES[i] for i in order]
            arrangement = conductor.arrangement(chosen, Encoding.IN_PLACE, closing=(7,), answer_start=148)
            _, _, answer = conductor.run(chosen, arrangement, max_tokens=4)
            assert len(answer) == 4
        assert conductor.engine.stats().cache.working_bytes == 0


def test_preempted_requests_begin_again(hybrid):
    budget = room(hybrid, 10, 4)
    conductor = Conductor(hybrid, budget_bytes=budget)
    requests = []
    for order in ((0, 1), (1, 0), (0, 2), (2, 1)):
        chosen = [MESSAGES[i] for i in order]
        start = sum(map(len, chosen))
        arrangement = conductor.arrangement(chosen, closing=(7,), answer_start=start)
        requests.append(conductor.request(chosen, arrangement, max_tokens=80))
        conductor.engine.submit(requests[-1])
    answers = {}
    while conductor.engine.has_work:
        for name, output in conductor.engine.step():
            if isinstance(output, TokenOutput):
                answers.setdefault(name, []).append(output.token)
        conductor.engine.check()
    assert conductor.engine.stats().num_preemptions > 0
    assert {len(tokens) for tokens in answers.values()} == {80}
    assert conductor.engine.stats().cache.working_bytes == 0


def test_evicted_messages_are_computed_again(hybrid):
    conductor = Conductor(hybrid)
    first, _, _ = conductor.run(MESSAGES, conductor.arrangement(MESSAGES))
    assert conductor.engine.cache.drop() > 0
    assert conductor.engine.stats().cache.messages == 0
    again, told, _ = conductor.run(MESSAGES, conductor.arrangement(MESSAGES))
    assert told.cached_tokens == 78  # encoded alone once more, the first in its place, then composed
    torch.testing.assert_close(again, first)


def test_several_answers_to_one_arranged_prompt(hybrid):
    conductor = Conductor(hybrid)
    arrangement = conductor.arrangement(MESSAGES, closing=(7,), answer_start=148)
    request = replace(conductor.request(MESSAGES, arrangement, max_tokens=5), n=3)
    conductor.engine.submit(request)
    answers = [[], [], []]
    for _, output in drain(conductor):
        if isinstance(output, TokenOutput):
            answers[output.index].append(output.token)
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 5


def test_requests_may_leave_the_cache_alone(hybrid):
    conductor = Conductor(hybrid)
    request = replace(conductor.request(MESSAGES, conductor.arrangement(MESSAGES)), cache_mode=CacheMode.OFF)
    conductor.engine.submit(request)
    told = next(o for _, o in drain(conductor) if isinstance(o, PromptOutput))
    assert told.plan.fidelity is Fidelity.EXACT
    assert conductor.engine.stats().cache.messages == 0
