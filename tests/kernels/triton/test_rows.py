"""Kernels for rows, pages and slots against `kernels/reference.py`."""

import pytest
import torch

from hybrid_cache.kernels import reference
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.kernels.problems import pool
from hybrid_cache.kernels.triton_kernels import rows
from tests.kernels.test_against_reference import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [6, 200, 1536, 5000])
def test_norms_and_gates_agree_with_the_reference(width, dtype):
    rng = torch.Generator().manual_seed(width)
    x = (3 * torch.randn(9, width, generator=rng)).to(dtype)
    weight = torch.rand(width, generator=rng).to(dtype)
    view = torch.cat([x, x], dim=1)[:, 3 : 3 + width]
    for rows_in, gain in ((x, weight), (x, weight.float()), (view, weight)):
        found = rows.rms_norm(rows_in.to(DEVICE), gain.to(DEVICE), 1e-5).cpu()
        assert_close(found, reference.rms_norm(rows_in, gain, 1e-5))
    for kind in ("silu", "gelu", "gelu_tanh"):
        assert_close(rows.gated(x.to(DEVICE), kind).cpu(), getattr(reference, f"{kind}_mul")(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [2, 20, 128])
def test_rotary_agrees_with_the_reference(head_dim, dtype):
    rng = torch.Generator().manual_seed(head_dim)
    x = torch.randn(7, 5, head_dim, generator=rng).to(dtype)[:, :4]
    positions = torch.randint(0, 5000, (7,), generator=rng)
    inv_freq = 1e4 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    found = rows.rotary(*(t.to(DEVICE) for t in (x, positions, inv_freq)))
    assert_close(found.cpu(), reference.rotary(x, positions, inv_freq))


def test_a_row_has_the_same_bits_in_any_company():
    x = torch.randn(70, 208).to(DEVICE)
    weight = torch.rand(208).to(DEVICE)
    heads, positions, inv_freq = x[:, :192].view(70, 6, 32), torch.arange(70).to(DEVICE), torch.rand(16).to(DEVICE)
    for probe in (
        lambda part: rows.rms_norm(x[part], weight, 1e-5),
        lambda part: rows.gated(x[part], "silu"),
        lambda part: rows.rotary(heads[part], positions[part], inv_freq),
    ):
        together = probe(slice(None))
        for part in (slice(0, 1), slice(5, 10), slice(16, 32), slice(67, 70)):
            assert torch.equal(probe(part), together[part])


def test_a_row_of_nan_stays_alone():
    x = torch.randn(6, 40).to(DEVICE)
    weight = torch.rand(40).to(DEVICE)
    clean = rows.rms_norm(x, weight, 1e-5)
    x[2] = torch.nan
    found = rows.rms_norm(x, weight, 1e-5)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


def test_no_rows_give_no_rows():
    x = torch.zeros(0, 40, device=DEVICE)
    assert rows.rms_norm(x, torch.ones(40), 1e-5).shape == (0, 40)
    assert rows.gated(x, "gelu").shape == (0, 20)


def pages_with(num_heads, head_dim, dtype):
    """Some rows are written, the rest is NaN."""
    pages = pool(4, (64, num_heads, head_dim), dtype, float("nan"))
    pages[1, :5] = torch.randn(5, num_heads, head_dim).to(dtype)
    pages[2, 60:] = torch.randn(4, num_heads, head_dim).to(dtype)
    return pages


# heads, head_dim, number of frequencies, first turned value
RELOCATIONS = {
    "all of a head": (2, 32, 16, 0),
    "the first values": (3, 24, 4, 0),
    "the last values": (1, 40, 8, 24),
    "no positions": (2, 16, None, 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", RELOCATIONS.values(), ids=RELOCATIONS.keys())
def test_relocated_keys_agree_with_the_reference(case, dtype):
    num_heads, head_dim, num_frequencies, first = case
    kv = KVTensors(pages_with(num_heads, head_dim, dtype), pages_with(num_heads, head_dim, dtype))
    inv_freq = None if num_frequencies is None else 100.0 ** -torch.arange(num_frequencies)
    sources = torch.tensor([64, 67, 2 * 64 + 61, 2 * 64 + 63, 65])
    targets = torch.tensor([3 * 64 + 2, 5, 6, 3 * 64 + 63, -1])
    delta = torch.tensor([0, 7, -300, 64, 1])
    found = KVTensors(pool(4, kv.k.shape[1:], dtype, 0.0).to(DEVICE), pool(4, kv.v.shape[1:], dtype, 0.0).to(DEVICE))
    found.k.copy_(kv.k)
    found.v.copy_(kv.v)
    rows.relocate_keys(
        found,
        *(t.to(DEVICE) for t in (sources, targets, delta)),
        inv_freq if inv_freq is None else inv_freq.to(DEVICE),
        first,
    )
    before = kv.k.clone()
    reference.relocate_keys(kv, sources, targets, delta, inv_freq, first)
    assert_close(found.k.cpu(), kv.k)
    assert torch.equal(found.v.cpu().nan_to_num(), kv.v.nan_to_num())
    assert torch.equal(found.k.cpu()[3, 2], before[1, 0])
    assert torch.equal(found.k.cpu()[1:3].nan_to_num(), before[1:3].nan_to_num())


def test_a_key_turned_further_is_the_key_of_the_later_position():
    """What makes pages of one place usable at another."""
    key, inv_freq = torch.randn(1, 2, 32), 1e4 ** -(torch.arange(16) / 16)
    kv = KVTensors(pool(2, (64, 2, 32), torch.float32, 0.0), pool(2, (64, 2, 32), torch.float32, 0.0))
    kv.k[0, 0] = reference.rotary(key, torch.tensor([10]), inv_freq)[0]
    reference.relocate_keys(kv, torch.tensor([0]), torch.tensor([64]), torch.tensor([90]), inv_freq)
    assert_close(kv.k[1, 0], reference.rotary(key, torch.tensor([100]), inv_freq)[0])
