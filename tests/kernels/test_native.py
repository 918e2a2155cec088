"""What the C code promises beyond `test_exactness.py`: bits do not depend on threads, nor on how rows lie in memory."""

from functools import partial

import pytest
import torch

from hybrid_cache.kernels import native_library, native_products
from hybrid_cache.kernels.native_ops import NativeOps
from hybrid_cache.kernels.native_products import NativeLinear
from hybrid_cache.kernels.ops import NormWeights, StateTensors
from hybrid_cache.kernels.parity import BATCHES, play
from hybrid_cache.kernels.problems import Mamba2Problem
from hybrid_cache.kernels.runs import Run, arrange
from hybrid_cache.kernels.torch_ops import TorchOps
from tests.kernels.compiler import compiler_needed

pytestmark = compiler_needed


class Views:
    """A problem whose rows come as parts of wider rows, or, with `turned`, with columns that lie apart."""

    def __init__(self, problem, turned):
        self._problem, self._turned = problem, turned
        self.name, self.inputs, self.cache = problem.name, problem.inputs, problem.cache

    def apply(self, ops, inputs, layout, cache):
        return self._problem.apply(ops, [self._view(x) for x in inputs], layout, cache)

    def _view(self, x):
        if self._turned:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bits(problem):
    """Outputs and cache; what nobody wrote is NaN, and then -1."""
    outputs, cache = play(NativeOps(), problem, BATCHES["prefill and decode"])
    return [x.nan_to_num(nan=-1.0) for x in (*outputs, *cache)]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_any_number_of_threads_gives_the_same_bits(problem, num_threads, monkeypatch):
    monkeypatch.setattr(native_products, "MIN_VALUES_FOR_THREADS", 0)
    num_threads(1)
    alone = bits(problem)
    num_threads(3)
    assert same(bits(problem), alone)


@pytest.mark.parametrize("turned", [False, True], ids=["parts", "turned"])
def test_rows_may_be_views(problem, turned):
    assert same(bits(Views(problem, turned)), bits(problem))


LEAST = 2.0**-126  # of normal numbers


class Scaled:
    """A problem with inputs so large or small that weights, decays or products are smaller than a normal number."""

    def __init__(self, problem, scale):
        self._problem, self._scale = problem, scale
        self.inputs, self.cache = problem.inputs, problem.cache

    def apply(self, ops, inputs, layout, cache):
        return self._problem.apply(ops, [self._scaled(x) for x in inputs], layout, cache)

    def _scaled(self, x):
        y = self._scale * x.double()
        return y.where(y.abs() > 1.01 * LEAST, 0).to(x.dtype)


@pytest.fixture
def flush():
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("scale", [30.0, 2.0**-64, 2.0**-123], ids=["large", "small", "least"])
def test_numbers_below_the_normal_ones_are_zero_whatever_the_thread_has_set(problem, scale, flush):
    flush(True)
    expected = bits(Scaled(problem, scale))
    assert torch.tensor(2.0**-100) * 2.0**-30 == 0  # its mode is as before
    flush(False)
    found = bits(Scaled(problem, scale))
    assert torch.tensor(2.0**-100) * 2.0**-30 > 0
    assert same(found, expected)
    assert not any(((x != 0) & (x.abs() < LEAST)).any() for x in found)


def test_rows_of_no_token_come_out_as_zeros(problem):
    """Padding behind a chunk of 70 tokens, and behind a decode row."""
    layout, _ = arrange([Run(0, 70, 0, 0, True, [0, 1], [])], [Run(0, 1, 64, 1, False, [2, 3], [])], packed=False)
    cache = problem.cache(4, 0.0)
    inputs = problem.inputs(layout.num_rows, torch.Generator().manual_seed(6))
    for x in inputs:
        x[70:128] = float("nan")
    out = problem.apply(NativeOps(), inputs, layout, cache)
    assert out[:70].isfinite().all()
    assert out[128].isfinite().all()
    assert not out[70:128].any()


HIDDEN = 72


def bfloat16(*shape):
    return torch.randn(shape).to(torch.bfloat16)


def linear(ops, inner, outer, bias=False):
    return ops.linear(bfloat16(outer, inner) / inner**0.5, bfloat16(outer) if bias else None)


class Residual:
    """A Mamba-2 layer between two products, added to its rows: in one call or, `stepwise`, in several."""

    name = "residual mamba2"

    def __init__(self, ops, problem, multiplier, stepwise):
        torch.manual_seed(0)
        w = self._weights = problem.weights
        inner = w.num_heads * w.head_dim
        self._norm, self._multiplier = NormWeights(bfloat16(HIDDEN), 1e-5), multiplier
        self._into = linear(ops, HIDDEN, 2 * inner + 2 * w.num_groups * w.d_state + w.num_heads)
        self._out = linear(ops, inner, HIDDEN)
        self._add = partial(TorchOps.add_mamba2, ops) if stepwise else ops.add_mamba2
        self.cache = problem.cache

    def inputs(self, num_tokens, rng):
        return [torch.randn(num_tokens, HIDDEN, generator=rng).to(torch.bfloat16)]

    def apply(self, ops, inputs, layout, cache):
        [hidden] = inputs
        tensors = StateTensors(conv=cache[0], state=cache[1])
        self._add(hidden, self._norm, self._multiplier, self._into, self._out, self._weights, layout, tensors)
        return hidden


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("multiplier", [1.0, 0.22])
@pytest.mark.parametrize("rows", [1, 4, 77])
def test_a_residual_mlp_in_one_call_has_the_bits_of_its_operations(rows, multiplier, threads, num_threads, monkeypatch):
    monkeypatch.setattr(native_products, "MIN_VALUES_FOR_THREADS", 0)
    num_threads(threads)
    torch.manual_seed(0)
    ops, hidden, norm = NativeOps(), bfloat16(rows, HIDDEN), NormWeights(bfloat16(HIDDEN), 1e-5)
    gate_up, down = linear(ops, HIDDEN, 176, bias=True), linear(ops, 88, HIDDEN, bias=True)
    expected = hidden.clone()
    TorchOps.add_gated_mlp(ops, expected, norm, multiplier, gate_up, down)
    assert not torch.equal(expected, hidden)
    ops.add_gated_mlp(hidden, norm, multiplier, gate_up, down)
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("multiplier", [1.0, 0.22])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_residual_mamba2_in_one_call_has_the_bits_of_its_operations(batch, multiplier):
    ops, problem = NativeOps(), Mamba2Problem(torch.bfloat16, torch.Generator().manual_seed(1))
    found, expected = (
        [
            x.nan_to_num(nan=-1.0)
            for part in play(ops, Residual(ops, problem, multiplier, way), BATCHES[batch])
            for x in part
        ]
        for way in (False, True)
    )
    assert same(found, expected)


def test_a_residual_part_is_one_call_into_c(monkeypatch):
    ops, hidden, norm = NativeOps(), bfloat16(2, HIDDEN), NormWeights(bfloat16(HIDDEN), 1e-5)
    if not isinstance(ops.linear(bfloat16(64, 64)), NativeLinear):
        pytest.skip("no AVX-512: products stay with torch")
    monkeypatch.setattr(TorchOps, "add_gated_mlp", None)
    ops.add_gated_mlp(hidden, norm, 1.0, linear(ops, HIDDEN, 176), linear(ops, 88, HIDDEN))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 5, 80])
def test_experts_in_one_call_give_what_each_gives_alone(rows, threads, num_threads, monkeypatch):
    monkeypatch.setattr(native_products, "MIN_VALUES_FOR_THREADS", 0)
    num_threads(threads)
    torch.manual_seed(0)
    ops, wide = NativeOps(), bfloat16(rows, 2 * HIDDEN)
    w_in, w_out = [bfloat16(80, HIDDEN) / 8 for _ in range(7)], [bfloat16(HIDDEN, 40) / 8 for _ in range(7)]
    shares, ids = torch.rand(rows, 5).topk(3)  # the last two experts are never chosen
    found = ops.experts(w_in, w_out)(wide[:, :HIDDEN], ids, shares)
    each = [ops.linear(o)(ops.silu_mul(ops.linear(i)(wide[:, :HIDDEN]))) for i, o in zip(w_in, w_out, strict=True)]
    for row in range(rows):
        expected = sum(share * each[expert][row].float() for share, expert in zip(shares[row], ids[row], strict=True))
        torch.testing.assert_close(found[row].float(), expected, rtol=2**-8, atol=1e-5)
        alone = ops.experts(w_in, w_out)(wide[row : row + 1, :HIDDEN], ids[row : row + 1], shares[row : row + 1])
        assert torch.equal(alone[0], found[row])


def test_the_library_has_threads_where_the_compiler_has_them():
    compiler = native_library.find_compiler()
    flags = (*native_library.FLAGS, *native_library.OPENMP)
    if not native_library.takes_openmp(compiler):
        pytest.skip("the compiler has no OpenMP")
    assert native_library.load()._name == str(native_library.build(compiler, flags, native_library.cache_folder()))


def test_sources_that_do_not_compile_with_threads_are_not_built_without(monkeypatch, tmp_path):
    compiler = native_library.find_compiler()
    if not native_library.takes_openmp(compiler):
        pytest.skip("the compiler has no OpenMP")
    loop = "#pragma omp parallel for\n    for (int i = 0; a && i < n; i++) a[i] = i;\n"
    (tmp_path / "loop.c").write_text(f"int run(int n, int *a) {{\n{loop}    return 0;\n}}\n")
    monkeypatch.setattr(native_library, "SOURCES", tmp_path)
    monkeypatch.setattr(native_library, "cache_folder", lambda: tmp_path)
    with pytest.raises(native_library.BuildError, match=r"loop\.c"):
        native_library.load.__wrapped__()
    monkeypatch.setattr(native_library, "takes_openmp", lambda compiler: False)
    assert native_library.load.__wrapped__().run(0, None) == 0
