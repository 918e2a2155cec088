"""The adapter to mamba-ssm and causal-conv1d: with stand-ins, and with the packages where they and a card are there."""

import sys

import pytest
import torch

from hybrid_cache.kernels import dispatch, reference
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.mamba_ssm_ops import OPERATIONS, MambaSsmOps
from hybrid_cache.kernels.parity import BATCHES, SHAPES, difference, play
from hybrid_cache.kernels.problems import (
    ConvProblem,
    Mamba1Problem,
    Mamba2Problem,
    Piece,
    Stream,
    move,
    run_batch,
    token,
)
from tests.kernels import fake_mamba_ssm
from tests.kernels.quick import FEW_BATCHES, FIRST_SHAPES
from tests.kernels.test_off_the_grid import one_chunk

REASON = dispatch.available()["mamba_ssm"]
NAMES = [name for name in SHAPES if name.startswith(("mamba", "conv"))]

# Share of the output's root mean square. Products may be TF32 in float32, with 11 bits; in bfloat16 the output of the
# convolution, that of the scan and states between chunks are rounded, each at 2^-9.
TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 2e-2}


def assert_agrees(ops, name, dtype, expected, tolerance):
    problem = SHAPES[name](dtype, torch.Generator().manual_seed(0))
    move(problem, ops.device)
    for batch in BATCHES if name in FIRST_SHAPES else FEW_BATCHES:
        outputs, cache = play(ops, problem, BATCHES[batch], ops.device)
        right_outputs, right_cache = expected(name, dtype, batch)
        for found, right in zip([*outputs, *cache], [*right_outputs, *right_cache], strict=True):
            assert difference(found.cpu(), right) <= tolerance


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("name", NAMES)
def test_the_packages_agree_with_the_reference(name, dtype, expected):
    assert_agrees(dispatch.select("mamba_ssm"), name, dtype, expected, TOLERANCE[dtype])


@pytest.fixture
def calls(monkeypatch):
    return fake_mamba_ssm.install(monkeypatch)


@pytest.fixture
def adapter(calls):
    return MambaSsmOps(torch.device("cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_agrees_with_the_reference(name, dtype, adapter, expected):
    assert_agrees(adapter, name, dtype, expected, 1e-5 if dtype is torch.float32 else TOLERANCE[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_the_adapter_keeps_states_at_cuts(name, adapter):
    problem = SHAPES[name](torch.float32, torch.Generator().manual_seed(0))
    stream = Stream(problem.inputs(131, torch.Generator().manual_seed(1)), 0, [0, 1, 2])
    rows, cache = one_chunk(adapter, problem, stream, (0, 37, 120, 131))
    expected_rows, expected_cache = one_chunk(reference, problem, stream, (0, 37, 120, 131))
    for found, right in zip([rows, *cache], [expected_rows, *expected_cache], strict=True):
        assert difference(found, right) <= 1e-5


def streams_of(problem, num):
    return [Stream(problem.inputs(200, torch.Generator().manual_seed(i)), i, [0, 1, 2]) for i in range(num)]


@pytest.mark.parametrize("problem_type", [Mamba2Problem, Mamba1Problem, ConvProblem])
def test_a_chunk_is_one_call_and_all_decode_rows_are_one(problem_type, calls, adapter):
    problem = problem_type(torch.float32, torch.Generator().manual_seed(0))
    assert problem.name in OPERATIONS
    streams, cache = streams_of(problem, 5), problem.cache(8, 0.0)
    run_batch(adapter, problem, cache, [Piece(s, 0, 100) for s in streams[:2]], [token(s, 50) for s in streams[2:]])
    conv = {"causal_conv1d_fn": 2, "causal_conv1d_update": 1}
    expected = {
        "mamba2": {**conv, "mamba_chunk_scan_combined": 2, "selective_state_update": 1, "rmsnorm_fn": 1},
        "mamba1_scan": {"selective_scan_fn": 2, "selective_state_update": 1},
        "causal_conv": conv,
    }
    assert calls == expected[problem.name]
    assert adapter.reasons == {}


def test_a_captured_state_is_one_call_more(calls, adapter):
    problem = Mamba2Problem(torch.float32, torch.Generator().manual_seed(0))
    piece = Piece(streams_of(problem, 1)[0], 0, 150, ((TILE, 2), (2 * TILE, 3)))
    run_batch(adapter, problem, problem.cache(4, 0.0), [piece])
    assert calls["mamba_chunk_scan_combined"] == calls["causal_conv1d_fn"] == 3


@pytest.mark.parametrize(
    ("problem", "start", "decodes", "words"),
    [
        (lambda rng: Mamba1Problem(torch.float32, rng), TILE, [], "no initial state"),
        (lambda rng: Mamba1Problem(torch.float32, rng, d_state=257), 0, [], "up to 256 values of state, not 257"),
        (lambda rng: ConvProblem(torch.float32, rng, channels=7), 0, [], "multiple of 8 channels, not 7"),
        (lambda rng: ConvProblem(torch.float32, rng, width=5), 0, [], "2 to 4 taps, not 5"),
        (lambda rng: Mamba2Problem(torch.float32, rng, width=5), 0, [], "2 to 4 taps, not 5"),
        (lambda rng: Mamba2Problem(torch.float32, rng, dt_max=0.1), 0, [1], "does not clamp dt"),
    ],
)
def test_what_they_have_no_code_for_is_left_to_torch(problem, start, decodes, words, calls, adapter):
    problem = problem(torch.Generator().manual_seed(0))
    streams, results = streams_of(problem, 2), []
    for ops in (adapter, reference):
        cache = problem.cache(4, 0.0)
        results.append(
            run_batch(ops, problem, cache, [Piece(streams[0], start, 90)], [token(streams[i], 5) for i in decodes])
        )
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
    assert not calls
    assert words in adapter.reasons[problem.name]


def test_rows_on_another_device_are_left_to_torch(calls):
    problem = ConvProblem(torch.float32, torch.Generator().manual_seed(0))
    ops = MambaSsmOps(torch.device("meta"))
    run_batch(ops, problem, problem.cache(4, 0.0), [Piece(streams_of(problem, 1)[0], 0, 90)])
    assert not calls


@pytest.mark.usefixtures("calls")
def test_dispatch_takes_them_with_a_card_and_of_a_version(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.available()["mamba_ssm"] == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert dispatch.available()["mamba_ssm"] is None
    ops = dispatch.select("mamba_ssm")
    assert (ops.name, ops.device.type) == ("mamba_ssm", "cuda")
    assert "promise" in ops.inexact
    assert "mamba_ssm" not in dispatch.exact_backends()
    monkeypatch.setattr(sys.modules["mamba_ssm"], "__version__", "2.2.2")
    assert dispatch.available()["mamba_ssm"] == "mamba_ssm 2.2.2, needs 2.2.4"
