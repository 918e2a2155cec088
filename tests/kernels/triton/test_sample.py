"""The most likely tokens and log-probabilities against torch."""

import pytest
import torch

from hybrid_cache.kernels.triton_kernels import sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [1, 300, 4096, 10000])
def test_tokens_and_log_probabilities_are_those_of_torch(vocab, dtype):
    logits = (5 * torch.randn(3, vocab)).to(dtype).to(DEVICE)
    tokens, log_probs = sample.greedy(logits)
    assert torch.equal(tokens, logits.argmax(1))
    expected = logits.float().log_softmax(1)
    torch.testing.assert_close(log_probs, expected.gather(1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    others = torch.randint(0, vocab, (3,)).to(DEVICE)
    found = sample.log_probabilities(logits, others)
    torch.testing.assert_close(found, expected.gather(1, others[:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_of_equal_logits_the_first_wins():
    logits = torch.zeros(4, 9000, device=DEVICE)
    logits[1, [5, 8000, 4500]] = 1.0
    logits[2, [8000, 4500]] = 1.0
    logits[3] = -torch.inf
    tokens, _ = sample.greedy(logits)
    assert tokens.tolist() == [0, 5, 4500, 0]


def test_infinite_logits_give_a_token():
    logits = torch.zeros(3, 5000, device=DEVICE)
    logits[0, :4999] = -torch.inf
    logits[1, 17] = torch.inf
    logits[2, 4500] = torch.nan
    tokens, log_probs = sample.greedy(logits)
    assert tokens.tolist() == [4999, 17, 4500]
    assert log_probs[0] == 0.0


def test_a_row_has_the_same_bits_in_any_company():
    logits = torch.randn(6, 9000).to(DEVICE)
    tokens, log_probs = sample.greedy(logits)
    for part in (slice(0, 1), slice(2, 5)):
        found = sample.greedy(logits[part])
        assert torch.equal(found[0], tokens[part])
        assert torch.equal(found[1], log_probs[part])


def test_no_rows_give_no_tokens():
    tokens, log_probs = sample.greedy(torch.zeros(0, 100, device=DEVICE))
    assert len(tokens) == len(log_probs) == 0
