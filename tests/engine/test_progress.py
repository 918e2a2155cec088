"""Sequences make room for each other in one order: whatever the room, one of them gets on."""

from tests.engine.test_engine import answers, make_request, new_engine
from tests.fakes import SumModel, sum_model_answer, tokens_of


def steps_until_idle(engine, most):
    outputs = []
    for _ in range(most):
        if not engine.has_work:
            return outputs
        outputs += engine.step()
        engine.check()
    raise AssertionError(f"not done after {most} steps: {engine.stats()}")


def test_choices_of_one_request_do_not_make_room_for_each_other_forever():
    """Two choices of one prompt hold two pages each, and both need a third where there are four."""
    spec = SumModel.cache_spec
    engine, _ = new_engine(budget_bytes=2 * spec.slot_bytes + 4 * spec.page_bytes)
    request = make_request("a", tokens_of(0, 63), 100, n=3)
    engine.submit(request)
    outputs = steps_until_idle(engine, 3000)
    assert engine.stats().num_preemptions > 0
    for index in range(3):
        assert answers(outputs, "a", index) == sum_model_answer(request.prompt.tokens, 100)
