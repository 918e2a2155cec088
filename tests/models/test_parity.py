"""Our models compute what transformers computes."""

import pytest
import torch

from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models import loading
from tests.models.checkpoints import FIRST_CASES
from tests.models.driver import Chunk, Driver

SOME = 16  # tokens: one of the prompts goes on behind a tile, one reaches over a short window
LENGTHS = (1, 65, 130, 64, 7)
TOLERANCE = 1e-4  # of logits of size 1 to 10: different summation orders in float32, several layers deep


@pytest.fixture(scope="module")
def model(case, folders, ops):
    return loading.load(folders(case), ops=ops)


def prompts(vocab_size):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


@torch.no_grad()
def reference_logits(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def test_packed_prompts_of_unequal_lengths_give_the_logits_of_transformers(model, case, references):
    driver = Driver(model)
    texts = prompts(model.vocab_size)
    rows = driver.step([Chunk(driver.sequence(tokens), len(tokens)) for tokens in texts])
    for tokens, hidden in zip(texts, rows, strict=True):
        expected = reference_logits(references(case), tokens)
        assert expected.std() > 0.1
        torch.testing.assert_close(driver.logits(hidden), expected, rtol=0, atol=TOLERANCE)


def test_batched_decoding_chooses_the_tokens_that_transformers_would(model, case, ops, references):
    driver = Driver(model)
    sequences, rows = zip(*[driver.prefill(tokens) for tokens in prompts(model.vocab_size)], strict=True)
    num_tokens = TILE if case in FIRST_CASES and ops.name == dispatch.select().name else SOME
    new = driver.greedy(list(sequences), [hidden[-1] for hidden in rows], num_tokens)
    for sequence, tokens in zip(sequences, new, strict=True):
        expected = reference_logits(references(case), sequence.tokens)[-num_tokens - 1 : -1].argmax(-1)
        assert tokens == expected.tolist()


def test_logits_of_one_row_are_float32(model):
    driver = Driver(model)
    _, hidden = driver.prefill([5, 6, 7])
    logits = driver.logits(hidden[-1:])
    assert logits.dtype == torch.float32
    assert logits.shape == (1, model.vocab_size)
    assert torch.equal(logits, driver.logits(hidden)[-1:])
