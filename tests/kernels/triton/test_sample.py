"""Tokens and sums of exponentials against the reference."""

from dataclasses import replace

import pytest
import torch

from hybrid_cache.kernels import reference, sampling
from hybrid_cache.kernels.problems import RULES, some_draws
from hybrid_cache.kernels.triton_kernels import sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GREEDY = RULES[:1]


def greedy(logits):
    return sample.sample(logits, some_draws(len(logits), DEVICE, GREEDY))


def part_of(draws, part):
    columns = ("temperature", "top_k", "top_p", "min_p", "point")
    return replace(draws, **{name: getattr(draws, name)[part] for name in columns})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [1, 300, 4096, 10000])
def test_tokens_and_sums_are_those_of_torch(vocab, dtype):
    logits = (5 * torch.randn(3, vocab)).to(dtype).to(DEVICE)
    assert torch.equal(greedy(logits), logits.argmax(1))
    torch.testing.assert_close(sample.log_sum_exp(logits), logits.float().logsumexp(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab", [1, 60, 5000])
def test_draws_are_those_of_the_reference(vocab, rule):
    logits = 3 * torch.randn(2, vocab, generator=torch.Generator().manual_seed(vocab))
    draws = some_draws(2, rules=[rule])
    tokens = sample.sample(logits.to(DEVICE), some_draws(2, DEVICE, [rule])).cpu()
    expected = reference.sample(logits, draws)
    torch.testing.assert_close(
        sampling.points(logits, draws, tokens), sampling.points(logits, draws, expected), rtol=0, atol=1e-6
    )


def test_a_token_that_no_rule_keeps_is_never_drawn():
    logits = torch.full((4, 5000), -30.0, device=DEVICE)
    logits[:, [7, 4200, 4999]] = torch.tensor([3.0, 2.0, 1.0], device=DEVICE)
    kept = {(1.0, 2, 1.0, 0.0): {7, 4200}, (1.0, 0, 0.5, 0.0): {7}, (1.0, 0, 1.0, 0.2): {7, 4200}}
    for rule, tokens in kept.items():
        draws = some_draws(6, DEVICE, [rule])
        assert set(sample.sample(logits[:1].expand(6, -1), draws).tolist()) == tokens


def test_of_equal_logits_the_first_wins():
    logits = torch.zeros(4, 9000, device=DEVICE)
    logits[1, [5, 8000, 4500]] = 1.0
    logits[2, [8000, 4500]] = 1.0
    logits[3] = -torch.inf
    assert greedy(logits).tolist() == [0, 5, 4500, 0]


@pytest.mark.parametrize("rule", [GREEDY[0], RULES[1]], ids=["greedy", "drawn"])
def test_infinite_logits_give_a_token(rule):
    logits = torch.zeros(4, 5000, device=DEVICE)
    logits[0, :4999] = -torch.inf
    logits[1, 17] = torch.inf
    logits[2, 4500] = torch.nan
    logits[3] = -torch.inf
    assert sample.sample(logits, some_draws(4, DEVICE, [rule])).tolist() == [4999, 17, 4500, 0]
    assert sample.log_sum_exp(logits)[0] == 0.0


def test_a_row_has_the_same_bits_in_any_company():
    logits = torch.randn(6, 5000).to(DEVICE)
    draws = some_draws(6, DEVICE)
    tokens, sums = sample.sample(logits, draws), sample.log_sum_exp(logits)
    for part in (slice(0, 1), slice(2, 5)):
        assert torch.equal(sample.sample(logits[part], part_of(draws, part)), tokens[part])
        assert torch.equal(sample.log_sum_exp(logits[part]), sums[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [1, 32, 300, 5001])
def test_masks_have_the_bits_of_the_reference(vocab, dtype):
    rng = torch.Generator().manual_seed(vocab)
    wide = torch.randn(5, vocab + 3, generator=rng).to(dtype)
    rows = torch.tensor([3, 0, 4])
    words = torch.randint(-(2**31), 2**31 - 1, (3, -(-vocab // 32)), generator=rng, dtype=torch.int32)
    words[0] = 0
    found, expected = wide.to(DEVICE), wide.clone()
    sample.mask_tokens(found[:, :vocab], rows.to(DEVICE), words.to(DEVICE))
    reference.mask_tokens(expected[:, :vocab], rows, words)
    bits = torch.int16 if dtype is torch.bfloat16 else torch.int32
    assert torch.equal(found.cpu().view(bits), expected.view(bits))


def test_no_rows_give_no_tokens():
    logits = torch.zeros(0, 100, device=DEVICE)
    assert (
        len(sample.sample(logits, part_of(some_draws(1, DEVICE), slice(0, 0)))) == len(sample.log_sum_exp(logits)) == 0
    )
