"""What the checked backend leaves to torch: kernels that fail, that are wrong, that have no code for a shape."""

import pytest
import torch

from hybrid_cache.kernels.ops import KVTensors, Mamba1Weights
from hybrid_cache.kernels.problems import ConvProblem, Piece, Stream, run_batch, some_draws, token
from hybrid_cache.kernels.runs import Run, arrange
from hybrid_cache.kernels.torch_ops import LoopExperts, PackedLinear, PlainLinear, TorchOps
from hybrid_cache.kernels.triton_kernels import conv, matmul, rows, sample
from hybrid_cache.kernels.triton_ops import CheckedTritonOps, TritonOps, with_kernel
from hybrid_cache.kernels.unsupported import UnsupportedShape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of these tests lie on the CPU")
X = torch.randn(6, 40)
GAIN = torch.rand(40)


def use(monkeypatch, name, kernel):
    """Gives an operation another kernel."""
    monkeypatch.setattr(TritonOps, name, with_kernel(getattr(TorchOps, name), kernel))


def counted(kernel):
    """The kernel, and a list that grows with each call."""
    calls = []

    def call(*args):
        calls.append(args)
        return kernel(*args)

    return call, calls


def test_a_right_kernel_is_checked_once_for_each_kind_of_arguments(monkeypatch):
    kernel, calls = counted(rows.rms_norm)
    use(monkeypatch, "rms_norm", kernel)
    ops = CheckedTritonOps()
    expected = TorchOps().rms_norm(X, GAIN, 1e-5)
    torch.testing.assert_close(ops.rms_norm(X, GAIN, 1e-5), expected)
    assert len(calls) == 2
    ops.rms_norm(X[:3], GAIN, 1e-5)
    assert len(calls) == 3
    ops.rms_norm(X.bfloat16(), GAIN.bfloat16(), 1e-5)
    assert len(calls) == 5
    assert ops.reasons == {}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda right: right * 1.1, "differs from torch by 0.1"),
        (lambda right: torch.where(torch.arange(40) == 39, torch.nan, right), "differs from torch by nan"),
        (lambda right: right[:, :1], "has the shape (70, 1)"),
        (lambda right: right.double(), "has the shape (70, 40) and type torch.float64"),
    ],
    ids=["off by a tenth", "NaN in a column", "another shape", "another type"],
)
def test_a_wrong_kernel_is_replaced(monkeypatch, broken, reason):
    right = rows.rms_norm
    use(monkeypatch, "rms_norm", lambda *args: broken(right(*args)))
    ops = CheckedTritonOps()
    assert torch.equal(ops.rms_norm(X, GAIN, 1e-5), TorchOps().rms_norm(X, GAIN, 1e-5))
    assert ops.reasons["rms_norm"].startswith(reason)
    assert torch.equal(ops.silu_mul(X), rows.gated(X, "silu"))  # the others stay


def test_a_failing_kernel_is_replaced_and_not_tried_again(monkeypatch):
    def fail(*args):
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    kernel, calls = counted(fail)
    monkeypatch.setattr(rows, "gated", kernel)
    ops = CheckedTritonOps()
    for _ in range(3):
        assert torch.equal(ops.gelu_mul(X), TorchOps().gelu_mul(X))
    assert len(calls) == 1
    assert ops.reasons == {"gelu_mul": "RuntimeError: out of resource: shared memory"}


def test_a_shape_without_code_goes_to_torch_checked_or_not(monkeypatch):
    def refuse(*args):
        raise UnsupportedShape("head_dim 40 is no power of 2")

    use(monkeypatch, "rotary", refuse)
    x, positions, inv_freq = torch.randn(3, 2, 16), torch.arange(3), torch.rand(8)
    for ops in (TritonOps(), CheckedTritonOps()):
        assert torch.equal(ops.rotary(x, positions, inv_freq), TorchOps().rotary(x, positions, inv_freq))
        assert "head_dim 40 is no power of 2" in ops.reasons["rotary"]


def batches(ops, problem):
    """A prompt, a decode step -> outputs and the cache."""
    rng = torch.Generator().manual_seed(1)
    stream, cache = Stream(problem.inputs(80, rng), 1, [0, 1]), problem.cache(4, float("nan"))
    out = run_batch(ops, problem, cache, [Piece(stream, 0, 70, ((64, 2),))])
    return [*out, *run_batch(ops, problem, cache, [], [token(stream, 70)]), *cache]


def test_an_operation_on_tokens_is_checked_on_tensors_of_its_own(monkeypatch):
    """The real cache is not touched by a kernel that writes wrong states."""
    right = conv.causal_conv

    def wrong(x, weight, bias, layout, conv_state, activation=True):
        out = right(x, weight, bias, layout, conv_state, activation)
        conv_state[layout.chunk_slot] += 1.0
        return out

    problem = ConvProblem(torch.float32, torch.Generator().manual_seed(0))
    expected = batches(TorchOps(), problem)
    checked = CheckedTritonOps()
    torch.testing.assert_close(batches(checked, problem), expected, equal_nan=True)
    assert checked.reasons == {}
    use(monkeypatch, "causal_conv", wrong)
    replaced = CheckedTritonOps()
    for found, right_one in zip(batches(replaced, problem), expected, strict=True):
        assert torch.equal(found.nan_to_num(), right_one.nan_to_num())
    assert replaced.reasons["causal_conv"].startswith("differs from torch by")


def test_weights_of_another_shape_are_checked_anew(monkeypatch):
    def scan_16(x, dt, B, C, z, weights, layout, state):
        assert weights.A.shape == (8, 4)
        return TorchOps().mamba1_scan(x, dt, B, C, z, weights, layout, state)

    use(monkeypatch, "mamba1_scan", scan_16)
    ops = CheckedTritonOps()
    layout, _ = arrange([Run(0, 5, 0, 0, True, [0], [])], [])
    for d_state in (4, 7):
        weights = Mamba1Weights(-torch.rand(8, d_state), torch.rand(8), torch.rand(8))
        x, dt, z = (torch.randn(layout.num_rows, 8) for _ in range(3))
        B, C = (torch.randn(layout.num_rows, d_state) for _ in range(2))
        ops.mamba1_scan(x, dt, B, C, z, weights, layout, torch.zeros(8, 8, d_state))
    assert list(ops.reasons) == ["mamba1_scan"]


def test_a_linear_that_is_wrong_is_replaced(monkeypatch):
    weight = torch.randn(24, 40)
    assert isinstance(CheckedTritonOps().linear(weight), matmul.TritonLinear)
    right = matmul.multiply
    monkeypatch.setattr(matmul, "multiply", lambda *args: right(*args) + 1.0)
    ops = CheckedTritonOps()
    assert isinstance(ops.linear(weight), PackedLinear | PlainLinear)
    assert ops.reasons["linear"].startswith("differs from torch")


def test_experts_that_fail_are_replaced(monkeypatch):
    w_in, w_out = [torch.randn(32, 24) for _ in range(3)], [torch.randn(24, 16) for _ in range(3)]
    assert isinstance(CheckedTritonOps().experts(w_in, w_out), matmul.TritonExperts)

    def fail(*args):
        raise ValueError("no map")

    monkeypatch.setattr(matmul, "_map_blocks", fail)
    ops = CheckedTritonOps()
    assert isinstance(ops.experts(w_in, w_out), LoopExperts)
    assert ops.reasons == {"experts": "ValueError: no map"}


def test_fast_leaves_products_to_torch():
    assert isinstance(TritonOps(fast=True).linear(torch.randn(8, 8)), PackedLinear | PlainLinear)
    assert isinstance(CheckedTritonOps(fast=True).linear(torch.randn(8, 8)), PackedLinear | PlainLinear)


def test_tensors_out_of_reach_go_to_torch(monkeypatch):
    backends = TritonOps(), CheckedTritonOps()
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    use(monkeypatch, "rms_norm", None)
    for ops in backends:
        assert torch.equal(ops.rms_norm(X, GAIN, 1e-5), TorchOps().rms_norm(X, GAIN, 1e-5))
        assert isinstance(ops.linear(X), PackedLinear | PlainLinear)
        assert isinstance(ops.experts([X], [X.T]), LoopExperts)
        assert ops.reasons == {}


def test_wrong_tokens_are_replaced(monkeypatch):
    logits, draws = 3 * torch.randn(4, 300), some_draws(4)
    expected = TorchOps().sample(logits, draws)
    checked = CheckedTritonOps()
    assert torch.equal(checked.sample(logits, draws), expected)
    assert checked.reasons == {}
    right = sample.sample
    use(monkeypatch, "sample", lambda logits, draws: (right(logits, draws) + 1) % 300)
    replaced = CheckedTritonOps()
    assert torch.equal(replaced.sample(logits, draws), expected)
    assert replaced.reasons["sample"].startswith("differs from torch by")


def test_a_wrong_mask_is_replaced(monkeypatch):
    words, rows_of = torch.tensor([[5] * 10, [-7] * 10], dtype=torch.int32), torch.tensor([1, 3])

    def masked(ops):
        logits = torch.ones(4, 300)
        ops.mask_tokens(logits, rows_of, words)
        return logits

    expected, right = masked(TorchOps()), sample.mask_tokens
    checked = CheckedTritonOps()
    assert torch.equal(masked(checked), expected)
    assert checked.reasons == {}
    monkeypatch.setattr(sample, "mask_tokens", lambda logits, rows, words: right(logits, rows, ~words))
    replaced = CheckedTritonOps()
    assert torch.equal(masked(replaced), expected)
    assert replaced.reasons["mask_tokens"].startswith("differs from torch by")


def test_wrongly_moved_keys_are_replaced_before_they_touch_the_cache(monkeypatch):
    def turned_back(kv, sources, targets, delta, inv_freq, first):
        right(kv, sources, targets, -delta, inv_freq, first)

    def moved(ops):
        rng = torch.Generator().manual_seed(0)
        kv = KVTensors(torch.randn(3, 64, 2, 16, generator=rng), torch.randn(3, 64, 2, 16, generator=rng))
        ops.relocate_keys(
            kv, torch.tensor([3, 4]), torch.tensor([130, 131]), torch.tensor([0, 9]), torch.rand(8, generator=rng)
        )
        return kv

    expected, right = moved(TorchOps()), rows.relocate_keys
    checked = CheckedTritonOps()
    torch.testing.assert_close(moved(checked).k, expected.k)
    assert checked.reasons == {}
    monkeypatch.setattr(rows, "relocate_keys", turned_back)
    replaced = CheckedTritonOps()
    found = moved(replaced)
    assert torch.equal(found.k, expected.k)
    assert torch.equal(found.v, expected.v)
    assert replaced.reasons["relocate_keys"].startswith("differs from torch by")
