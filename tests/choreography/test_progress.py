"""Whatever the room, arranged requests come to their end."""

import pytest

from hybrid_cache.choreography.arrangement import Encoding
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.request import TokenOutput
from tests.choreography.conductor import Conductor, message
from tests.engine.test_progress import steps_until_idle
from tests.models.checkpoints import CASES


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("pages", [3, 4, 5])
def test_an_answer_that_is_to_be_kept_does_not_stand_in_its_own_way(folder, pages, slots):
    """What is noted of an answer takes room that its own sequence needs later on."""
    bamba = next(case for case in CASES if case.name.startswith("bamba"))
    model = loading.load(folder(bamba), ops=dispatch.select())
    spec = model.cache_spec
    conductor = Conductor(model, pages * spec.page_bytes + slots * (spec.slot_bytes + 1024))
    messages = [message(50, 1), message(40, 2)]
    arrangement = conductor.arrangement(messages, Encoding.IN_PLACE, closing=(7,), answer_start=90)
    request = conductor.request(messages, arrangement, max_tokens=80)
    if not conductor.engine.cache.fits(len(request.prompt.tokens) + 80):
        return
    conductor.engine.submit(request)
    outputs = steps_until_idle(conductor.engine, 3000)
    assert sum(isinstance(output, TokenOutput) for _, output in outputs) == 80
