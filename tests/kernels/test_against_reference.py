"""Each backend against `kernels/reference.py`, over a table of batches and a table of shapes."""

from dataclasses import replace

import pytest
import torch

from hybrid_cache.kernels import reference, sampling
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.kernels.parity import BATCHES, TOLERANCE, difference, play
from hybrid_cache.kernels.problems import RULES, pool, some_draws
from tests.kernels.quick import FEW_BATCHES, FIRST_SHAPES


def assert_close(found, expected):
    assert difference(found, expected) <= TOLERANCE[found.dtype]


def assert_agrees(ops, problem, batch, expected):
    outputs, cache = play(ops, problem, BATCHES[batch])
    expected_outputs, expected_cache = expected
    for found, right in zip([*outputs, *cache], [*expected_outputs, *expected_cache], strict=True):
        assert_close(found, right)


def test_a_backend_agrees_with_the_reference(ops, problem, shape, dtype, expected):
    for batch in BATCHES if shape in FIRST_SHAPES else FEW_BATCHES:
        assert_agrees(ops, problem, batch, expected(shape, dtype, batch))


@pytest.mark.slow
def test_a_backend_agrees_with_the_reference_in_all_batches(ops, problem, shape, dtype, expected):
    for batch in BATCHES:
        assert_agrees(ops, problem, batch, expected(shape, dtype, batch))


ROWS = 70


@pytest.mark.parametrize("width", [6, 64, 200, 1536])
def test_operations_on_rows_agree_with_the_reference(ops, dtype, width):
    rng = torch.Generator().manual_seed(width)
    x = (3 * torch.randn(ROWS, width, generator=rng)).to(dtype)
    weight = torch.rand(width, generator=rng).to(dtype)
    assert_close(ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    assert_close(ops.silu_mul(x), reference.silu_mul(x))
    assert_close(ops.gelu_mul(x), reference.gelu_mul(x))
    assert_close(ops.gelu_tanh_mul(x), reference.gelu_tanh_mul(x))
    view = torch.cat([x, x], dim=1)[:, 3 : 3 + width]
    assert_close(ops.rms_norm(view, weight, 1e-5), reference.rms_norm(view, weight, 1e-5))


@pytest.mark.parametrize("head_dim", [2, 16, 20, 64, 128])
def test_rotary_agrees_with_the_reference(ops, dtype, head_dim):
    rng = torch.Generator().manual_seed(head_dim)
    x = torch.randn(ROWS, 5, head_dim, generator=rng).to(dtype)[:, :4]
    positions = torch.randint(0, 5000, (ROWS,), generator=rng)
    inv_freq = 1e4 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    found = ops.rotary(x, positions, inv_freq)
    assert_close(found, reference.rotary(x, positions, inv_freq))


@pytest.mark.parametrize(("inv_freq", "first"), [(None, 0), (100.0 ** -torch.arange(8), 0), (torch.rand(4), 6)])
def test_relocated_keys_agree_with_the_reference(ops, dtype, inv_freq, first):
    rng = torch.Generator().manual_seed(5)
    pages = [pool(4, (TILE, 3, 16), dtype, 0.0) for _ in "kv"]
    for page in pages:
        page[:2] = torch.randn(2, TILE, 3, 16, generator=rng).to(dtype)
    found, expected = (KVTensors(*(page.clone() for page in pages)) for _ in "ab")
    sources, targets = torch.tensor([3, 4, 70, 127]), torch.tensor([130, 190, 191, 200])
    delta = torch.tensor([0, 7, -300, 1])
    ops.relocate_keys(found, sources, targets, delta, inv_freq, first)
    reference.relocate_keys(expected, sources, targets, delta, inv_freq, first)
    assert_close(found.k, expected.k)
    assert torch.equal(found.v, expected.v)
    assert torch.equal(found.k[:2], expected.k[:2])


@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
@pytest.mark.parametrize("vocab", [1, 50, 1024, 1025, 5000])
def test_drawn_tokens_are_those_of_the_reference(ops, vocab, scale):
    rng = torch.Generator().manual_seed(vocab)
    logits = scale * torch.randn(5 * len(RULES), vocab, generator=rng)
    draws = some_draws(len(logits))
    found, expected = ops.sample(logits, draws), reference.sample(logits, draws)
    apart = sampling.points(logits, draws, found) - sampling.points(logits, draws, expected)
    assert apart.abs().max() < 1e-6
    assert (found == expected).float().mean() > 0.95
    torch.testing.assert_close(ops.log_sum_exp(logits), reference.log_sum_exp(logits), rtol=1e-5, atol=1e-5)


def some_words(count, vocab, rng):
    """All bits, no bit, one bit, and any."""
    words = torch.randint(-(2**31), 2**31 - 1, (count, -(-vocab // 32)), generator=rng, dtype=torch.int32)
    words[0], words[1] = -1, 0
    words[2] = 0
    words[2, (vocab - 1) // 32] = 1 << (vocab - 1) % 32 if vocab % 32 else -(2**31)
    return words


@pytest.mark.parametrize("vocab", [1, 31, 32, 1000, 4099])
def test_masks_leave_the_bits_of_what_may_come_and_of_other_rows(ops, dtype, vocab):
    rng = torch.Generator().manual_seed(vocab)
    wide = torch.randn(9, vocab + 5, generator=rng).to(dtype)
    wide[:, 0], wide[4] = torch.nan, torch.inf
    rows, words = torch.tensor([7, 0, 3, 4, 8]), some_words(5, vocab, rng)
    found, expected = wide.clone(), wide.clone()
    ops.mask_tokens(found[:, :vocab], rows, words)
    reference.mask_tokens(expected[:, :vocab], rows, words)
    bits = torch.int16 if dtype is torch.bfloat16 else torch.int32
    assert torch.equal(found.view(bits), expected.view(bits))
    assert found[0, :vocab].isneginf().all()
    assert found[3, :vocab].isneginf().sum() == vocab - 1
    untouched = [1, 2, 5, 6, 7]
    assert torch.equal(found[untouched].view(bits), wide[untouched].view(bits))


def test_among_equal_logits_all_that_rules_keep_are_drawn(ops):
    logits = torch.zeros(400, 3000)
    logits[:, 7] = -1e30
    kept = {(1.0, 5, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (1.0, 0, 1.0, 1.0)}
    for rule in kept:
        assert ops.sample(logits, some_draws(400, rules=[rule])).unique().numel() > 300
    assert 7 not in ops.sample(logits, some_draws(400)).tolist()


@pytest.mark.parametrize("rule", [(0.0, 0, 1.0, 0.0), (1.0, 3, 0.9, 0.0)], ids=["greedy", "drawn"])
def test_infinite_logits_give_a_token(ops, rule):
    logits = torch.zeros(5, 2500)
    logits[0, :2499] = -torch.inf
    logits[1, 17] = torch.inf
    logits[2, 2400] = torch.nan
    logits[3] = -torch.inf
    logits[4, 30] = 3e38
    assert ops.sample(logits, some_draws(5, rules=[rule])).tolist() == [2499, 17, 2400, 0, 30]


def test_a_row_is_drawn_the_same_in_any_company(ops):
    logits, draws = torch.randn(9, 3000), some_draws(9)
    tokens, sums = ops.sample(logits, draws), ops.log_sum_exp(logits)
    for part in (slice(0, 1), slice(4, 9)):
        columns = {name: getattr(draws, name)[part] for name in ("temperature", "top_k", "top_p", "min_p", "point")}
        assert torch.equal(ops.sample(logits[part], replace(draws, **columns)), tokens[part])
        assert torch.equal(ops.log_sum_exp(logits[part]), sums[part])


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_agrees_with_the_reference(ops, dtype, with_bias):
    rng = torch.Generator().manual_seed(1)
    x, weight = torch.randn(ROWS, 100, generator=rng).to(dtype), torch.randn(36, 100, generator=rng).to(dtype)
    bias = torch.randn(36, generator=rng).to(dtype) if with_bias else None
    linear = ops.linear(weight, bias)
    assert (linear.in_features, linear.out_features) == (100, 36)
    assert_close(linear(x), reference.linear(x, weight, bias))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_experts_agree_with_the_reference(ops, dtype, k):
    rng = torch.Generator().manual_seed(k)
    x = torch.randn(ROWS, 48, generator=rng).to(dtype)
    w_in = [0.2 * torch.randn(2 * 40, 48, generator=rng).to(dtype) for _ in range(6)]
    w_out = [0.2 * torch.randn(48, 40, generator=rng).to(dtype) for _ in range(6)]
    shares, ids = torch.rand(ROWS, 6, generator=rng).topk(k)
    found = ops.experts(w_in, w_out)(x, ids, shares)
    assert_close(found, reference.experts(x, ids, shares, w_in, w_out))


def test_experts_with_another_activation_agree_with_the_reference(ops, dtype):
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 48, generator=rng).to(dtype)
    w_in = [0.2 * torch.randn(40, 48, generator=rng).to(dtype) for _ in range(6)]
    w_out = [0.2 * torch.randn(48, 40, generator=rng).to(dtype) for _ in range(6)]
    shares, ids = torch.rand(ROWS, 6, generator=rng).topk(2)
    found = ops.experts(w_in, w_out, torch.relu)(x, ids, shares)
    assert_close(found, reference.experts(x, ids, shares, w_in, w_out, torch.relu))
