"""`bench kernels` at sizes that take a second."""

import json

import pytest
from typer.testing import CliRunner

from hybrid_cache.api.cli.main import app
from hybrid_cache.bench.common import ceilings, timing
from tests.kernels.compiler import compiler_needed


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": ceilings.Sizes(1 << 16, (64,))})
    monkeypatch.setattr(timing, "SHORT_S", 1e-5)


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
        *("linear_attention", "rg_lru", "attention", "decode attention", "sample", "mask_tokens", "relocate_keys"),
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
