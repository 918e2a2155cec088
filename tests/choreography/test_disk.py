"""Messages outlive the process: put together in another order, they give the bits that they gave before."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid_cache.choreography.arrangement import Encoding, Fidelity
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from tests.choreography.conductor import Conductor, message
from tests.choreography.test_stage import ATTENTION, DELTA, HYBRID, MAMBA, MESSAGES

WAYS = [("float32", 0), ("float32", 16), ("bfloat16", 0)]  # and tokens that are computed again
NUM_TOKENS = sum(map(len, MESSAGES))
FLUSH_S = 30.0


def opened(model: object, path: Path, **config: object) -> Conductor:
    return Conductor(model, disk=path, disk_bytes=64 << 20, verify=True, **config)  # type: ignore[arg-type]


def close(conductor: Conductor) -> None:
    assert conductor.engine.flush(FLUSH_S)
    conductor.engine.check()
    conductor.engine.close()


def disk_of(conductor: Conductor):
    return conductor.engine.stats().cache.disk


def leave(model: object, path: Path, fidelity: Fidelity, seam: int = 0) -> tuple[torch.Tensor, list[int]]:
    """Of a process that kept its messages: what it says to them in another order."""
    conductor = opened(model, path)
    options = {"encoding": Encoding.IN_PLACE, "fidelity": fidelity, "seam": seam}
    conductor.run(MESSAGES, conductor.arrangement(MESSAGES, **options))
    reversed_ = conductor.arrangement(MESSAGES[::-1], **options)
    logits, _, answer = conductor.run(MESSAGES[::-1], reversed_, 5)
    assert conductor.engine.stats().cache.messages == 3
    close(conductor)
    return logits, answer


@pytest.mark.parametrize(("dtype", "seam"), WAYS)
@pytest.mark.parametrize("case", [HYBRID, DELTA, MAMBA, ATTENTION], ids=str)
def test_the_next_process_puts_them_together_with_the_bits_of_this_one(folder, case, dtype, seam, tmp_path):
    model = loading.load(folder(case), dtype=dtype, ops=dispatch.select())
    fidelity = Fidelity.RELOCATED if case is ATTENTION else Fidelity.COMPOSED
    logits, answer = leave(model, tmp_path, fidelity, seam)
    conductor = opened(model, tmp_path)
    arrangement = conductor.arrangement(MESSAGES[::-1], Encoding.IN_PLACE, fidelity, seam=seam)
    found, told, said = conductor.run(MESSAGES[::-1], arrangement, 5)
    assert torch.equal(found, logits)
    assert said == answer
    assert told.cached_tokens == NUM_TOKENS - 3 * seam
    assert disk_of(conductor).loads == {"loaded": 3}
    assert disk_of(conductor).loaded_tokens == NUM_TOKENS - 3 * seam
    close(conductor)


@pytest.fixture
def hybrid(folder):
    return loading.load(folder(HYBRID), ops=dispatch.select())


def test_many_prompts_wait_for_one_load_of_each(hybrid, tmp_path):
    leave(hybrid, tmp_path, Fidelity.COMPOSED)
    conductor = opened(hybrid, tmp_path)
    for order in (MESSAGES, MESSAGES[::-1], MESSAGES[1:]):
        conductor.engine.submit(conductor.request(order, conductor.arrangement(order, Encoding.IN_PLACE)))
    conductor.engine.run_until_idle()
    assert disk_of(conductor).loads == {"loaded": 3}
    close(conductor)


def test_a_message_that_is_not_what_it_was_is_computed(hybrid, tmp_path):
    leave(hybrid, tmp_path, Fidelity.COMPOSED)
    for path in (tmp_path / "entries").iterdir():
        data = bytearray(path.read_bytes())
        data[-70] ^= 8
        path.write_bytes(data)
    conductor = opened(hybrid, tmp_path)
    fresh = Conductor(hybrid)
    found, said = ([], [])
    for each in (conductor, fresh):
        logits, told, answer = each.run(MESSAGES, each.arrangement(MESSAGES, Encoding.IN_PLACE), 5)
        found.append(logits)
        said.append(answer)
        assert told.cached_tokens == 0
    assert torch.equal(*found)
    assert said[0] == said[1]
    assert disk_of(conductor).refused == {"checksum": 3}
    close(conductor)


def test_a_message_that_was_dropped_while_it_loads_does_not_come_back(hybrid, tmp_path):
    leave(hybrid, tmp_path, Fidelity.COMPOSED)
    conductor = opened(hybrid, tmp_path)
    arrangement = conductor.arrangement(MESSAGES, Encoding.IN_PLACE)
    conductor.engine.submit(conductor.request(MESSAGES, arrangement))
    conductor.engine.step()
    conductor.engine.cache.drop()
    conductor.engine.run_until_idle()
    assert disk_of(conductor).loaded_tokens == 0
    close(conductor)


def test_another_tenant_finds_none(hybrid, tmp_path):
    leave(hybrid, tmp_path, Fidelity.COMPOSED)
    conductor = opened(hybrid, tmp_path)
    request = conductor.request(MESSAGES, conductor.arrangement(MESSAGES, Encoding.IN_PLACE))
    conductor.engine.submit(replace(request, namespace="other"))
    conductor.engine.run_until_idle()
    assert disk_of(conductor).loads == {}
    close(conductor)


def test_what_has_to_leave_memory_comes_back(hybrid, tmp_path):
    """More messages than memory holds, each twice."""
    conductor = opened(hybrid, tmp_path, budget_bytes=3 << 20)
    texts = [message(60, 90 + seed) for seed in range(40)]
    for _ in range(2):
        for first, second in zip(texts[::2], texts[1::2], strict=True):
            conductor.run([first, second], conductor.arrangement([first, second]))
            assert conductor.engine.flush(FLUSH_S)
    assert conductor.engine.stats().cache.evictions["message"] > 0
    assert disk_of(conductor).loads["loaded"] > 0
    close(conductor)
