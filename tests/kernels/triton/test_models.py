"""Small models on the checked backend: nothing falls back, and the rows are those of the portable backend."""

import numpy as np
import pytest
import torch

from hybrid_cache.choreography.arrangement import Style
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.torch_ops import TorchOps
from hybrid_cache.kernels.triton_kernels import rows, sample
from hybrid_cache.kernels.triton_ops import CheckedTritonOps, TritonOps, with_kernel
from hybrid_cache.models import loading
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.workflow import Workflow
from tests.models import checkpoints
from tests.models.driver import Chunk, Driver
from tests.models.test_bank import MixedDriver, adapted, tokens_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of these tests lie on the CPU")

# One layer of each kind. The server below has the one of attention.
ATTENTION = "bamba of one attention layer"
CASES = [
    pytest.param(ATTENTION, marks=pytest.mark.slow),
    "bamba of one Mamba-2 layer",
    "mamba of one layer",
    "minimax of one linear layer",
    "recurrent gemma of one recurrent layer",
    "lfm2 moe of one convolution with experts",
    "qwen3.5 of one delta layer",
]


class Letters:
    """A letter is a token."""

    closing = (0,)

    def message(self, role, text):
        return np.array([*text.encode(), 0], np.int32)

    def opening(self, role):
        return np.array([1], np.int32)

    def text(self, tokens):
        return " ".join(map(str, tokens))


def hidden_rows(folder, ops):
    """Of a prompt of two tiles and of a token behind it."""
    model = loading.load(folder, dtype="float32", ops=ops)
    driver = Driver(model)
    tokens = torch.randint(0, model.vocab_size, (67,), generator=torch.Generator().manual_seed(0)).tolist()
    sequence, rows = driver.prefill(tokens[:66])
    steps = []
    for token in tokens[66:]:
        sequence.tokens.append(token)
        steps += driver.step([], [sequence])
    return torch.cat([rows, *steps])


@pytest.mark.parametrize("name", CASES)
def test_a_layer_needs_no_fallback(name, tmp_path):
    case = next(case for case in checkpoints.CASES if str(case) == name)
    folder = checkpoints.save(checkpoints.reference(case), tmp_path, torch.float32)
    ops = CheckedTritonOps()
    found, expected = hidden_rows(folder, ops), hidden_rows(folder, TorchOps())
    assert ops.reasons == {}
    assert (found - expected).square().mean().sqrt() < 1e-5 * expected.square().mean().sqrt()


def test_rows_of_adapters_have_the_bits_that_they_have_alone(tmp_path):
    """In tiles that are padded."""
    case = next(case for case in checkpoints.CASES if str(case) == "bamba of one Mamba-2 layer")
    folder = checkpoints.save(checkpoints.reference(case), tmp_path, torch.float32)
    trunk = loading.load_trunk(folder, dtype="float32", ops=CheckedTritonOps())
    base = loading.load(folder, dtype="float32", ops=CheckedTritonOps())
    models = [adapted(trunk, 1), trunk, adapted(trunk, 4)]
    driver = MixedDriver(trunk)
    sequences = [driver.of(model, tokens_of(i, 9 + i)) for i, model in enumerate(models)]
    mixed = driver.step([Chunk(s, 8 + i) for i, s in enumerate(sequences)])
    mixed = [torch.cat(rows) for rows in zip(mixed, driver.step([], sequences), strict=True)]
    for i, model in enumerate((models[0], base, models[2])):
        alone = Driver(model)
        sequence = alone.sequence(tokens_of(i, 9 + i))
        expected = torch.cat([*alone.step([Chunk(sequence, 8 + i)]), *alone.step([], [sequence])])
        assert torch.equal(mixed[i], expected)


def test_a_server_chooses_tokens_and_moves_messages_with_kernels(tmp_path, monkeypatch):
    """The engine's own paths end in the backend, not in torch."""
    called = []

    def noted(name, kernel):
        return lambda *args: (called.append(name), kernel(*args))[1]

    for name, kernel in (("sample", sample.sample), ("log_sum_exp", sample.log_sum_exp)):
        monkeypatch.setattr(TritonOps, name, with_kernel(getattr(TorchOps, name), noted(name, kernel)))
    monkeypatch.setattr(rows, "relocate_keys", noted("relocate_keys", rows.relocate_keys))
    case = next(case for case in checkpoints.CASES if str(case) == ATTENTION)
    folder = checkpoints.save(checkpoints.reference(case), tmp_path, torch.float32)
    answers, checked = [], CheckedTritonOps()
    for ops in (checked, TorchOps()):
        engine = Engine(loading.load(folder, dtype="float32", ops=ops), EngineConfig(budget_bytes=1 << 22))
        sampling = SamplingParams(temperature=0.7, top_p=0.9, seed=3, max_tokens=2, logprobs=2, stop_token_ids=(0,))
        flow = Workflow(engine, Letters(), style=Style(engine.model.fidelities[0]), sampling=sampling)
        first, second = flow.encode_all(["tea", "and a biscuit"])
        answers.append(flow.generate(attend=[second, first, "now?"]).tokens)
    assert answers[0] == answers[1]
    assert checked.reasons == {}
    assert {"sample", "log_sum_exp", "relocate_keys"} <= set(called)
