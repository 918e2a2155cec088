"""Small models on the checked backend: nothing falls back, and the rows are those of the portable backend."""

import pytest
import torch

from hybrid_cache.kernels.torch_ops import TorchOps
from hybrid_cache.kernels.triton_ops import CheckedTritonOps
from hybrid_cache.models import loading
from tests.models import checkpoints
from tests.models.driver import Driver

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of these tests lie on the CPU")

# One layer of each kind.
CASES = [
    "bamba of one attention layer",
    "bamba of one Mamba-2 layer",
    "mamba of one layer",
    "minimax of one linear layer",
    "recurrent gemma of one recurrent layer",
    "lfm2 moe of one convolution with experts",
    "qwen3.5 of one delta layer",
]


def hidden_rows(folder, ops):
    """Of a prompt of two tiles and of two tokens behind it."""
    model = loading.load(folder, dtype="float32", ops=ops)
    driver = Driver(model)
    tokens = torch.randint(0, model.vocab_size, (68,), generator=torch.Generator().manual_seed(0)).tolist()
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
