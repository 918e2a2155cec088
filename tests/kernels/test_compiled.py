"""The backend with torch.compile. Compiling takes seconds: these tests hold the way there, one compiles for real."""

import pytest
import torch

from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.compiled_ops import CompiledOps
from hybrid_cache.kernels.parity import BATCHES, play
from hybrid_cache.kernels.problems import ConvProblem, LinearAttentionProblem, Mamba1Problem, Mamba2Problem
from hybrid_cache.kernels.selfcheck import rows_agree
from hybrid_cache.kernels.torch_ops import TorchOps
from tests.kernels.compiler import compiler_needed
from tests.kernels.test_against_reference import assert_close


@pytest.mark.parametrize("make", [Mamba1Problem, ConvProblem, LinearAttentionProblem])
def test_what_is_traced_is_what_torch_does(make):
    problem, ops = make(torch.float32, torch.Generator().manual_seed(0)), CompiledOps("eager")
    calls = BATCHES["prefill and decode"]
    (outputs, cache), (expected, expected_cache) = play(ops, problem, calls), play(TorchOps(), problem, calls)
    for found, right in zip([*outputs, *cache], [*expected, *expected_cache], strict=True):
        assert_close(found, right)
    assert ops.reasons == {}


@compiler_needed
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler uses what torch has deprecated
def test_a_compiled_group_is_right_and_exact(dtype):
    ops, rng = CompiledOps(), torch.Generator().manual_seed(0)
    x = torch.randn(5 * 64, 2 * 104, generator=rng).to(dtype)
    assert rows_agree(lambda rows: ops.silu_mul(x[rows]))
    assert_close(ops.silu_mul(x), TorchOps().silu_mul(x))
    assert ops.reasons == {}


def no_compiler(graph, inputs):
    raise OSError("no C++ compiler found\nsee the manual")


def test_without_a_compiler_torch_stays_and_says_why():
    ops, x = CompiledOps(no_compiler), torch.randn(5, 8)
    weight = torch.rand(8)
    for _ in range(2):
        assert torch.equal(ops.rms_norm(x, weight, 1e-5), TorchOps().rms_norm(x, weight, 1e-5))
    assert "no C++ compiler found" in ops.reasons["rms_norm"]
    assert "\n" not in ops.reasons["rms_norm"]
    problem = Mamba2Problem(torch.float32, torch.Generator().manual_seed(0))
    (found,), (expected,) = (play(backend, problem, BATCHES["two tokens"])[0] for backend in (ops, TorchOps()))
    assert torch.equal(found, expected)
    assert set(ops.reasons) == {"rms_norm", "scan_tile", "gated_norm", "convolve", "silu", "time_steps"}


def test_an_error_of_the_operation_itself_comes_out():
    with pytest.raises(RuntimeError, match="size"):
        CompiledOps("eager").rms_norm(torch.randn(5, 8), torch.rand(7), 1e-5)


def test_it_is_taken_when_it_is_asked_for():
    ops = dispatch.select("torch-compile")
    assert (ops.name, ops.inexact) == ("torch-compile", "")  # the probes at start decide
    assert dispatch.select().name != "torch-compile"
    assert "torch-compile" not in dispatch.exact_backends()
