"""`bench kernels` at sizes that take a second."""

import json

import pytest
from typer.testing import CliRunner

from hybrid_cache.api.cli import app
from hybrid_cache.bench.kernels import command
from hybrid_cache.bench.kernels.cases import Case
from tests.kernels.compiler import compiler_needed


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(command, "MATRIX", {"cpu": (64,)})
    monkeypatch.setattr(command, "BUFFER", {"cpu": 1 << 16})
    monkeypatch.setattr(command, "SHORT_S", 1e-5)


def run(*options):
    return CliRunner().invoke(
        app, ["bench", "kernels", "--prompt", "70", "--sequences", "3", "--context", "128", *options]
    )


def test_every_operation_is_timed_against_the_roofline(small, tmp_path):
    out = tmp_path / "kernels.json"
    result = run("--rounds", "1", "--json", str(out))
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["device"] == "cpu"
    assert all(value > 0 for value in report["ceilings"].values())
    rows = report["results"]
    assert {row["kernel"] for row in rows} == {
        *("linear", "rms_norm", "silu_mul", "mamba2", "mamba1_scan", "causal_conv", "gated_delta", "kimi_delta"),
        *("linear_attention", "rg_lru", "attention", "decode attention", "sample", "relocate_keys"),
    }
    for row in rows:
        assert row["ms"] > 0
        assert row["roofline"] > 0
        assert row["bound"] in ("memory", "arithmetic")
    assert "reads" in result.output


@compiler_needed
def test_other_backends_and_libraries_are_timed_in_the_same_rounds(small, tmp_path):
    out = tmp_path / "kernels.json"
    backends = ("--backend", "torch", "--against", "native,torch")
    result = run("--rounds", "1", *backends, "--only", "causal_conv", "--json", str(out))
    assert result.exit_code == 0, result.output
    for row in json.loads(out.read_text())["results"]:
        assert set(row["others_ms"]) == {"native", "transformers"}
        assert min(row["others_ms"].values()) > 0
        assert row["torch_ms"] is None  # it is the backend itself


def test_a_share_of_the_roofline_is_the_longer_of_bytes_and_flops():
    ceilings = command.Ceilings(gigabytes_per_s=10, gigaflops_per_s=1000)
    moves = Case("a", "", flops=1e9, bytes=1e9, build=lambda ops: lambda: None)
    computes = Case("b", "", flops=1e12, bytes=1e9, build=lambda ops: lambda: None)
    assert ceilings.seconds(moves) == pytest.approx(0.1)
    assert ceilings.seconds(computes) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--backend", "abacus"], "no such backend"),
        (["--against", "abacus"], "no such backend"),
        (["--only", "nothing"], "no operation is called nothing"),
    ],
)
def test_a_wrong_option_is_named(small, options, words):
    result = run(*options)
    assert result.exit_code != 0
    assert words in result.output.replace("\n", " ") + str(result.exception)
