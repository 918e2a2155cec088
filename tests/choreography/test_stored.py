"""What is kept of messages and answers, and what a prompt that is put together makes of it: rows, states, windows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hybrid_cache.choreography.arrangement import Encoding, Fidelity, Positions, closed, message_id
from hybrid_cache.choreography.compiler import key_of
from hybrid_cache.choreography.plan import Action
from hybrid_cache.device.composition import MOST_TOGETHER, slide
from hybrid_cache.device.effects import Numbers
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.request import CacheMode, PromptOutput, TokenOutput
from tests.choreography.conductor import HEADER, Conductor, exact_logits, message
from tests.choreography.test_stage import ATTENTION, DELTA, HYBRID, MAMBA, MESSAGES, drain, step_by_step
from tests.engine.test_progress import steps_until_idle


@pytest.fixture
def hybrid(folder):
    return loading.load(folder(HYBRID), ops=dispatch.select())


def spoiled(conductor):
    """A conductor whose cache holds nothing but NaN, as freed memory may."""
    for layer in conductor.engine.worker.memory.tensors:
        for tensor in (layer.k, layer.v) if hasattr(layer, "k") else (layer.conv, layer.state):
            tensor.fill_(torch.nan)
    conductor.engine.worker.memory.numbers.fill_(torch.nan)
    return conductor


@pytest.mark.parametrize("seam", [0, 16])
@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("case", [HYBRID, DELTA], ids=str)
def test_nothing_is_read_that_nobody_wrote(folder, case, encoding, seam):
    model = loading.load(folder(case), ops=dispatch.select())
    found = []
    for conductor in (Conductor(model), spoiled(Conductor(model))):
        for messages in (MESSAGES, MESSAGES[::-1]):
            arrangement = conductor.arrangement(messages, encoding, seam=seam, closing=(7,), answer_start=148)
            found.append(conductor.run(messages, arrangement, max_tokens=20))
    for plain, other in zip(found[:2], found[2:], strict=True):
        assert torch.equal(plain[0], other[0])
        assert plain[2] == other[2]


def test_numbers_go_on_from_one_item_to_the_next():
    rows, values = torch.zeros(5, 8), torch.arange(1.0, 18.0)
    numbers = Numbers(rows, [3, 0, 4])
    numbers.write(5, values)
    assert torch.equal(torch.cat([rows[3, 5:], rows[0], rows[4, :6]]), values)
    assert torch.equal(numbers.read(5, 17), values)
    assert torch.equal(numbers.read(9, 3), values[4:7])
    assert rows.count_nonzero() == 17


def test_messages_shorter_than_a_window_leave_what_they_left_in_their_place(hybrid):
    conductor = spoiled(Conductor(hybrid))
    texts = [message(length, 20 + seed) for seed, length in enumerate((1, 2, 2, 70, 1, 2, 1))]
    arrangement = conductor.arrangement(texts, Encoding.IN_PLACE)
    conductor.run(texts, arrangement)
    found, told, _ = conductor.run(texts, arrangement)
    assert told.cached_tokens == 78  # the last one is not stored: it costs less than a step of its own
    torch.testing.assert_close(found, exact_logits(hybrid, texts), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("case", [HYBRID, DELTA, MAMBA], ids=str)
def test_a_message_computed_in_several_chunks_has_the_effect_of_all_of_them(folder, case):
    model = loading.load(folder(case), ops=dispatch.select())
    conductor = Conductor(model, max_tiles=1)
    texts = [message(70, 30), message(150, 31)]
    arrangement = conductor.arrangement(texts, Encoding.IN_PLACE)
    conductor.run(texts, arrangement)
    found, told, _ = conductor.run(texts, arrangement)
    assert told.cached_tokens == 220
    torch.testing.assert_close(found, exact_logits(model, texts), atol=2e-3, rtol=2e-3)


def test_a_matrix_of_an_answer_is_that_of_all_its_steps(folder):
    model = loading.load(folder(DELTA), ops=dispatch.select())
    conductor = Conductor(model)
    arrangement = conductor.arrangement(MESSAGES, Encoding.IN_PLACE, closing=(7, 8), answer_start=148)
    _, _, answer = conductor.run(MESSAGES, arrangement, max_tokens=20)
    whole = closed(np.concatenate([conductor.request(MESSAGES).prompt.tokens[148:], answer]), (7, 8))
    again = conductor.arrangement([*MESSAGES, whole], Encoding.IN_PLACE)
    found, told, _ = conductor.run([*MESSAGES, whole], again)
    assert told.plan.tokens(Action.COMPOSED) == 148 + len(whole)
    torch.testing.assert_close(found, exact_logits(model, [*MESSAGES, whole]), atol=2e-3, rtol=2e-3)


def test_a_message_is_stored_apart_for_each_seam(hybrid):
    conductor, other = Conductor(hybrid), Conductor(hybrid)
    conductor.run(MESSAGES, conductor.arrangement(MESSAGES, seam=8))
    found, told, _ = conductor.run(MESSAGES, conductor.arrangement(MESSAGES, seam=16))
    expected, told_first, _ = other.run(MESSAGES, other.arrangement(MESSAGES, seam=16))
    assert told.cached_tokens == told_first.cached_tokens
    torch.testing.assert_close(found, expected)
    assert conductor.engine.stats().cache.messages == 6


def test_the_rest_of_a_message_that_a_prefix_ends_in_is_not_the_message(hybrid):
    long = [message(300, 4), message(50, 5)]
    conductor = Conductor(hybrid)
    conductor.run([long[0]], None)
    arrangement = conductor.arrangement(long, Encoding.IN_PLACE)
    _, told, _ = conductor.run(long, arrangement)
    assert told.plan.prefix == 256
    assert [conductor.engine.is_stored(part.id) for part in arrangement.parts[:2]] == [False, True]


def test_what_an_answer_began_with_is_kept_though_the_cache_has_a_state_behind_it(hybrid):
    """The prefix that an arranged prompt starts from ends before the header of its answer."""
    texts = [message(100, 40), message(26, 41)]
    conductor = Conductor(hybrid)
    conductor.run([*texts, HEADER, message(40, 42)])
    whole_prompt = np.concatenate([*texts, HEADER])
    assert conductor.engine.cache.match(conductor.namespace, np.append(whole_prompt, 1).astype(np.int32)).length == 128
    arrangement = conductor.arrangement(texts, Encoding.IN_PLACE, closing=(7, 8), answer_start=126)
    _, told, answer = conductor.run(texts, arrangement, max_tokens=9)
    assert told.plan.prefix <= 126
    whole = closed(np.concatenate([HEADER, answer]), (7, 8))
    stored = conductor.engine.cache.messages.get(key_of(conductor.namespace, message_id(conductor.namespace, whole), 0))
    assert stored is not None
    assert (stored.start, stored.length) == (126, len(whole))


def test_an_answer_whose_beginning_was_not_recorded_is_not_kept(hybrid):
    """Where it began there was no room; later there is, which is too late."""
    conductor = Conductor(hybrid)
    lend = conductor.engine.cache.messages.lend_extra
    conductor.engine.cache.messages.lend_extra = lambda *asked: None if asked[2] == 148 else lend(*asked)
    arrangement = conductor.arrangement(MESSAGES, Encoding.IN_PLACE, closing=(7, 8), answer_start=148)
    conductor.run(MESSAGES, arrangement, max_tokens=30)
    assert conductor.engine.stats().cache.messages == 3
    assert conductor.engine.stats().cache.working_bytes == 0


@pytest.mark.parametrize("encoding", Encoding)
def test_siblings_at_one_place_are_the_same_in_one_chunk_and_in_several(folder, encoding):
    model = loading.load(folder(ATTENTION), ops=dispatch.select())
    found = []
    for conductor in (Conductor(model), step_by_step(Conductor(model))):
        options = {"fidelity": Fidelity.RELOCATED, "positions": Positions.LEFTMOST}
        arrangement = conductor.arrangement(MESSAGES, encoding, **options)
        found += [conductor.run(MESSAGES, arrangement, max_tokens=5) for _ in range(2)]
    for logits, _, answer in found[1:]:
        torch.testing.assert_close(logits, found[0][0], atol=2e-5, rtol=2e-5)
        assert answer == found[0][2]


def test_several_answers_to_siblings_at_one_place_have_the_positions_of_one(folder):
    model = loading.load(folder(ATTENTION), ops=dispatch.select())
    conductor = Conductor(model)
    arrangement = conductor.arrangement(MESSAGES, fidelity=Fidelity.RELOCATED, positions=Positions.LEFTMOST)
    _, _, alone = conductor.run(MESSAGES, arrangement, max_tokens=12)
    conductor.engine.submit(replace(conductor.request(MESSAGES, arrangement, max_tokens=12), n=3))
    answers = [[], [], []]
    for _, output in drain(conductor):
        if isinstance(output, TokenOutput):
            answers[output.index].append(output.token)
    assert answers == [alone] * 3


def test_what_a_broken_off_request_was_making_is_made_by_the_next(hybrid):
    conductor = Conductor(hybrid, max_tiles=1)
    arrangement = conductor.arrangement(MESSAGES, Encoding.IN_PLACE)
    request = conductor.request(MESSAGES, arrangement)
    conductor.engine.submit(request)
    conductor.engine.step()
    conductor.engine.abort(request.id)
    conductor.engine.submit(conductor.request(MESSAGES, arrangement))
    steps_until_idle(conductor.engine, 20)
    assert conductor.engine.stats().cache.messages == 3


def test_what_a_broken_off_request_has_held_may_go(hybrid):
    conductor = Conductor(hybrid, max_tiles=1)
    texts = [MESSAGES[0], message(300, 50), MESSAGES[1]]
    conductor.run([MESSAGES[1]], conductor.arrangement([MESSAGES[1]], Encoding.IN_PLACE))
    request = conductor.request(texts, conductor.arrangement(texts, Encoding.IN_PLACE))
    conductor.engine.submit(request)
    conductor.engine.step()
    conductor.engine.check()
    conductor.engine.cache.drop()
    assert conductor.engine.stats().cache.messages == 1  # it is still to be put in its place
    conductor.engine.abort(request.id)
    conductor.engine.cache.drop()
    conductor.engine.check()
    assert conductor.engine.stats().cache.messages == 0


def test_a_prompt_that_is_scored_is_computed_exactly(hybrid):
    conductor = Conductor(hybrid)
    conductor.run(MESSAGES, conductor.arrangement(MESSAGES))
    request = conductor.request(MESSAGES, conductor.arrangement(MESSAGES))
    conductor.engine.submit(replace(request, sampling=replace(request.sampling, prompt_logprobs=1)))
    told = next(o for _, o in drain(conductor) if isinstance(o, PromptOutput))
    assert told.plan.fidelity is Fidelity.EXACT
    assert len(told.logprobs) == 151


def test_arranged_prompts_and_messages_leave_nothing_in_the_prefix_tree(hybrid):
    conductor = Conductor(hybrid)
    texts = [message(length, 60 + length) for length in (100, 200, 90)]
    for encoding in Encoding:
        arrangement = conductor.arrangement(texts, encoding, closing=(7,), answer_start=390)
        conductor.run(texts, arrangement, max_tokens=70)
    stats = conductor.engine.stats()
    assert (stats.cache.nodes, stats.commit_tokens) == (0, 0)
    assert stats.cache.messages == 4


def test_an_arranged_request_that_wants_nothing_cached_starts_from_no_prefix(hybrid):
    conductor = Conductor(hybrid)
    texts = [message(300, 4), message(50, 5)]
    conductor.run(texts, None)
    request = conductor.request(texts, conductor.arrangement(texts))
    prefixes = []
    for mode in (CacheMode.IMPLICIT, CacheMode.EXPLICIT):  # nothing is marked
        conductor.engine.submit(replace(request, cache_mode=mode))
        prefixes += [o.plan.prefix for _, o in drain(conductor) if isinstance(o, PromptOutput)]
    assert prefixes == [320, 0]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_a_window_is_the_last_rows_of_all_that_came(length):
    rows = torch.arange(40.0).view(20, 2)
    before, message_rows, elsewhere = rows[:5], rows[5 : 5 + length], -rows[:5]
    window = before[-3:].clone()
    slide(window, torch.cat([elsewhere, message_rows])[-3:], length)
    assert torch.equal(window, torch.cat([before, message_rows])[-3:])


def test_what_follows_a_short_message_sees_an_empty_window_before_it(hybrid):
    conductor = spoiled(Conductor(hybrid))
    short, others = message(1, 70), [message(70, 71), message(70, 72)]
    for other in others:
        texts = [short, other]
        found, told, _ = conductor.run(texts, conductor.arrangement(texts, Encoding.IN_PLACE))
    assert told.cached_tokens == 1
    torch.testing.assert_close(found, exact_logits(hybrid, texts), atol=2e-3, rtol=2e-3)


def test_more_messages_than_are_looked_at_together_are_composed_one_after_the_other(hybrid):
    """Of one token each, so that the first have not faded when the last have come."""
    conductor = Conductor(hybrid)
    texts = [np.array([20 + i], np.int32) for i in range(MOST_TOGETHER + 3)]
    arrangement = conductor.arrangement(texts, Encoding.IN_PLACE)
    conductor.run(texts, arrangement)
    found, told, _ = conductor.run(texts, arrangement)
    assert told.cached_tokens == MOST_TOGETHER + 2
    torch.testing.assert_close(found, exact_logits(hybrid, texts), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", [HYBRID, DELTA, MAMBA], ids=str)
def test_an_effect_is_the_same_however_its_tokens_were_computed(folder, case):
    """As one of several messages of a chunk, in chunks of one tile, and token by token as an answer."""
    model = loading.load(folder(case), ops=dispatch.select())
    one, tiles, steps = Conductor(model), Conductor(model, max_tiles=1), Conductor(model)
    first = MESSAGES[0]
    arrangement = steps.arrangement([first], Encoding.IN_PLACE, closing=(7, 8), answer_start=70)
    _, _, answer = steps.run([first], arrangement, max_tokens=90)
    whole = closed(np.concatenate([HEADER, answer]), (7, 8))
    found = [steps.engine.effects(message_id(steps.namespace, whole))]
    for conductor in (one, tiles):
        arranged = conductor.arrangement([first, whole], Encoding.IN_PLACE)
        conductor.run([first, whole], arranged)
        found.append(conductor.engine.effects(arranged.parts[1].id))
    for other in found[1:]:
        for (p, s), (other_p, other_s) in zip(found[0], other, strict=True):
            torch.testing.assert_close(other_p, p, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(other_s, s, atol=1e-4, rtol=1e-4)


def test_a_message_that_comes_twice_is_recorded_once(hybrid):
    conductor = Conductor(hybrid)
    lend, asked = conductor.engine.cache.messages.lend_extra, []
    conductor.engine.cache.messages.lend_extra = lambda *args: asked.append(args[1]) or lend(*args)
    texts = [MESSAGES[0], MESSAGES[1], MESSAGES[0]]
    for _ in range(2):
        conductor.engine.submit(conductor.request(texts, conductor.arrangement(texts, Encoding.IN_PLACE)))
    drain(conductor)
    assert len(asked) == len(set(asked)) == 2


def test_what_an_answer_gives_up_is_free(hybrid):
    conductor = Conductor(hybrid)
    arrangement = conductor.arrangement(MESSAGES, Encoding.IN_PLACE, closing=(7,), answer_start=148)
    conductor.engine.submit(conductor.request(MESSAGES, arrangement, max_tokens=9))
    for _ in range(3):
        conductor.engine.step()
    (sequence,) = conductor.engine._scheduler.sequences()
    before = conductor.engine.stats().cache.working_bytes
    assert [conductor.engine._stage.forgo(sequence.prefill.program) for _ in range(2)] == [True, False]
    conductor.engine.check()
    assert conductor.engine.stats().cache.working_bytes < before
    drain(conductor)
    assert conductor.engine.stats().cache.working_bytes == 0
    assert conductor.engine.stats().cache.messages == 3


@pytest.mark.parametrize("encoding", Encoding)
def test_nothing_is_lent_when_all_is_done(hybrid, encoding):
    conductor = Conductor(hybrid)
    arrangement = conductor.arrangement(MESSAGES, encoding, seam=8, closing=(7,), answer_start=148)
    for _ in range(2):
        conductor.run(MESSAGES, arrangement, max_tokens=12)
        assert conductor.engine.stats().cache.working_bytes == 0
    assert conductor.engine.stats().cache.messages == 4


@pytest.mark.parametrize("refused", ["lend_extra", "reserve"])
def test_a_message_without_room_is_tried_once_and_computed_in_its_place(hybrid, refused):
    conductor = Conductor(hybrid)
    setattr(conductor.engine.cache.messages, refused, lambda *asked: None)
    conductor.engine.submit(conductor.request(MESSAGES, conductor.arrangement(MESSAGES), max_tokens=4))
    outputs = steps_until_idle(conductor.engine, 30)
    assert len([o for _, o in outputs if isinstance(o, TokenOutput)]) == 4
    assert conductor.engine.stats().cache.messages == 0
    assert conductor.engine.stats().cache.working_bytes == 0


def test_what_follows_siblings_at_one_place_stands_behind_the_longest(folder):
    """The header and the answer, in a chunk and in decode steps."""
    model, seen = loading.load(folder(ATTENTION), ops=dispatch.select()), {}
    forward = model.forward

    def watched(batch, cache):
        seen.update(zip(batch.layout.kv_rows.tolist(), batch.positions.tolist(), strict=True))
        return forward(batch, cache)

    model.forward = watched
    conductor = Conductor(model)
    arrangement = conductor.arrangement(MESSAGES, fidelity=Fidelity.RELOCATED, positions=Positions.LEFTMOST)
    conductor.engine.submit(conductor.request(MESSAGES, arrangement, max_tokens=4))
    while not (lease := next(conductor.engine._scheduler.sequences()).prefill.lease) or lease.released:
        conductor.engine.step()
    rows = lease.rows(148, 151 + 3)
    drain(conductor)
    assert [seen[row] for row in rows.tolist()] == list(range(70, 76))
