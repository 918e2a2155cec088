"""A peer of `bench kernels` has to compute what it is compared with."""

import pytest
import torch

from hybrid_cache.bench.kernels.peers import transformers_peers
from hybrid_cache.kernels.problems import (
    AttentionProblem,
    ConvProblem,
    GatedDeltaProblem,
    KimiDeltaProblem,
    LinearAttentionProblem,
    Mamba1Problem,
    Mamba2Problem,
    Piece,
    RgLruProblem,
    Stream,
    run_batch,
    token,
)
from hybrid_cache.kernels.torch_ops import TorchOps

PROBLEMS = {
    "mamba2": lambda rng: Mamba2Problem(torch.float32, rng, num_groups=2),
    "mamba1": lambda rng: Mamba1Problem(torch.float32, rng),
    "conv": lambda rng: ConvProblem(torch.float32, rng),
    "gated delta": lambda rng: GatedDeltaProblem(torch.float32),
    "kimi delta": lambda rng: KimiDeltaProblem(torch.float32),
}


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "kimi delta"])
def test_a_prompt_from_the_zero_state_gives_the_same(name):
    problem = PROBLEMS[name](torch.Generator().manual_seed(0))
    stream = Stream(problem.inputs(130, torch.Generator().manual_seed(1)), 0, [0, 1, 2])
    (expected,) = run_batch(TorchOps(), problem, problem.cache(1, 0.0), [Piece(stream, 0, 130)])
    found = transformers_peers(problem, stream.inputs, decode=False)["transformers"]()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_token_of_each_sequence_gives_the_same(name):
    problem = PROBLEMS[name](torch.Generator().manual_seed(0))
    inputs = problem.inputs(5, torch.Generator().manual_seed(1))
    streams = [Stream([x[i : i + 1] for x in inputs], i, [i]) for i in range(5)]
    expected = run_batch(TorchOps(), problem, problem.cache(5, 0.0), [], [token(stream, 0) for stream in streams])
    found = transformers_peers(problem, inputs, decode=True)["transformers"]()
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decode", [False, True])
def test_no_peer_is_claimed_where_there_is_none(decode):
    rng = torch.Generator().manual_seed(0)
    for problem in (
        AttentionProblem(torch.float32),
        LinearAttentionProblem(torch.float32, rng),
        RgLruProblem(torch.float32, rng),
    ):
        assert transformers_peers(problem, problem.inputs(5, rng), decode) == {}


@pytest.mark.parametrize("error", [ImportError, AttributeError])
def test_an_older_transformers_is_no_peer(error, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr("hybrid_cache.bench.kernels.peers.import_module", fail)
    problem = PROBLEMS["conv"](torch.Generator().manual_seed(0))
    assert transformers_peers(problem, problem.inputs(5, torch.Generator()), decode=False) == {}
