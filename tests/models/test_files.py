"""Every family from the files that people have: several shards, half precision."""

import pytest
import torch

from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from tests.models import checkpoints
from tests.models.driver import Driver

PROMPT = list(range(3, 73))


@pytest.fixture(scope="module", params=checkpoints.FIRST_CASES, ids=str)
def case(request):
    return request.param


def logits(folder):
    driver = Driver(loading.load(folder, dtype="float32", ops=dispatch.select()))
    _, hidden = driver.prefill(PROMPT)
    return driver.logits(hidden)


def test_shards_give_the_bits_of_one_file(case, folders, references, tmp_path):
    folder = checkpoints.save(references(case), tmp_path / "model", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert torch.equal(logits(folder), logits(folders(case)))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_files_hold_what_transformers_computes_from_them(case, references, tmp_path, stored):
    folder = checkpoints.save(references(case), tmp_path / "model", stored)
    rounded = type(references(case)).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        # What follows from the config is computed, not read: MiniMax's files hold its decays, rounded.
        for name, derived in references(case).named_buffers():
            if "decay" in name or "slope" in name:
                rounded.get_buffer(name).copy_(derived)
        expected = rounded(torch.tensor([PROMPT]), use_cache=False).logits[0]
    torch.testing.assert_close(logits(folder), expected, rtol=0, atol=1e-4)
