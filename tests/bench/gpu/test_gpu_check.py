"""The check of a GPU, tried on a CPU at sizes that take seconds; and, with a GPU, a few of its parts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybrid_cache.bench.common.random_model import SMALL, random_model
from hybrid_cache.bench.gpu import command, correctness, timing
from hybrid_cache.bench.gpu.command import ReportPart, main, run_apart
from hybrid_cache.bench.gpu.report import Section, markdown, section_of
from hybrid_cache.bench.gpu.second_tier import second_tier
from hybrid_cache.bench.gpu.setting import Setting
from hybrid_cache.bench.kernels import cases
from hybrid_cache.engine.selfcheck import check_model
from hybrid_cache.kernels.parity import SHAPES
from hybrid_cache.kernels.torch_ops import TorchOps

ROOT = Path(command.__file__).resolve().parents[2]
CPU = Setting(torch.device("cpu"), "torch", True, deadline=1e12)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(timing, "TARGET_S", 1e-5)
    monkeypatch.setattr(timing, "MIN_REPEATS", 1)
    monkeypatch.setattr(cases, "transformers_peers", lambda *_: {})  # takes seconds to import


def test_all_parts_run_and_are_reported(small, tmp_path, capsys):
    report, as_json = tmp_path / "report.md", tmp_path / "report.json"
    assert main(["--device", "cpu", "--quick", "--report", str(report), "--json", str(as_json)]) == 0
    sections = [section_of(values) for values in json.loads(as_json.read_text())["sections"]]
    assert [section.name for section in sections] == list(command.PARTS)
    text, said = report.read_text(), capsys.readouterr().out
    for section in sections:
        assert not section.error
        assert section.tables[0].rows
        assert f"## {section.name}" in text
        assert f"{section.name}: done" in said
    assert "largest gain" in text
    assert "ceilings in this run" in text


def test_what_is_wrong_fails_the_check_and_the_rest_goes_on(small, monkeypatch, tmp_path, capsys):
    def wrong(self, x, weight, eps):
        return 1.1 * x

    def broken(setting, section):
        section.table("what").add("begun")
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(TorchOps, "rms_norm", wrong)
    monkeypatch.setitem(command.PARTS, "sharing", ReportPart(broken, 10, decides=False))
    report = tmp_path / "report.md"
    only = ["--only", "sharing,parity,environment", "--report", str(report)]
    assert main(["--device", "cpu", "--quick", *only]) == 1
    said, text = capsys.readouterr().out, report.read_text()
    assert "sharing: broke off, RuntimeError: an illegal memory access, in" in said
    assert "RuntimeError: an illegal memory access" in text
    assert "| begun |" in text
    assert "parity: 1 FAILED, first operations on rows in bfloat16:" in said
    assert "times what is tolerated" in text
    assert "environment: done" in said


def test_a_part_that_does_not_decide_fails_nothing(small, monkeypatch, tmp_path):
    def broken(setting, section):
        raise RuntimeError("no")

    for decides in (False, True):
        monkeypatch.setitem(command.PARTS, "sharing", ReportPart(broken, 10, decides=decides))
        arguments = ["--device", "cpu", "--quick", "--only", "sharing", "--report", str(tmp_path / "r.md")]
        assert main(arguments) == int(decides)


def test_an_unknown_part_is_named(capsys):
    assert main(["--device", "cpu", "--only", "colours"]) == 2
    assert "'colours'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_leak_between_rows_is_found(monkeypatch):
    def leaky(self, x):
        return x[:, : x.shape[1] // 2] * (1 + 0.1 * len(x))

    monkeypatch.setattr(TorchOps, "silu_mul", leaky)
    section = Section("exactness")
    correctness.exactness(CPU, section)
    assert any("silu_mul" in failure for failure in section.failures)


def test_no_part_begins_anything_when_it_is_late():
    section = Section("models")
    correctness.models(Setting(torch.device("cpu"), "torch", False, deadline=0.0), section)
    assert section.tables[0].rows == []
    assert "no time left" in section.notes[0]


def test_a_part_has_a_process_of_its_own(tmp_path):
    section = run_apart("environment", ["--device", "cpu", "--backend", "torch", "--quick"], limit_s=60)
    assert not section.error
    assert section.tables[0].rows
    assert "ceilings" in section.notes[0]
    late = run_apart("environment", ["--device", "cpu", "--backend", "torch"], limit_s=0.1)
    assert "stopped after 0 s" in late.error


def test_a_part_that_is_stopped_leaves_what_it_has(monkeypatch, tmp_path):
    def slow(setting, section):
        section.table("what").add("begun")
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 30)

    monkeypatch.setitem(command.PARTS, "sharing", ReportPart(slow, 10, decides=False))
    out, before = tmp_path / "section.json", signal.getsignal(signal.SIGTERM)
    try:
        assert main(["--device", "cpu", "--quick", "--part", "sharing", "--json", str(out)]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    section = section_of(json.loads(out.read_text()))
    assert section.tables[0].rows == [["begun"]]
    assert "TimeoutError: the part's time is over" in section.error


REFUSED = ("pytest", "typer", "rich", "pydantic", "prometheus_client", "fastapi", "uvicorn", "hypothesis", "matplotlib")
WITHOUT_PACKAGES = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {REFUSED!r}:
            raise ImportError(f"{{name}} is not here")

sys.meta_path.insert(0, Refuse())
from hybrid_cache.bench.gpu import command
sys.exit(command.main(["--device", "cpu", "--quick", "--only", "environment,parity", "--report", sys.argv[1]]))
"""


def test_it_needs_no_more_than_torch_and_its_like(tmp_path):
    command = [sys.executable, "-c", WITHOUT_PACKAGES, str(tmp_path / "report.md")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_report_is_the_same_from_json_and_before():
    section = Section("a", notes=["b"], failures=["c"], error="d")
    table = section.table("x", "y", title="t")
    table.add(12345.6, None)
    table.add(True, "a|b")
    values = {"name": "a", "notes": ["b"], "failures": ["c"], "error": "d", "seconds": 0.0}
    again = section_of({**values, "tables": [{"columns": ["x", "y"], "rows": table.rows, "title": "t"}]})
    text = markdown("title", [again])
    assert text == markdown("title", [section])
    assert "| 12,346 |  |" in text
    assert "| yes | a/b |" in text


@pytest.mark.parametrize("name", SMALL)
def test_models_of_random_weights_are_exact(name):
    model, num_bytes = random_model(SMALL[name], TorchOps(), torch.bfloat16)
    assert num_bytes > 100_000
    assert check_model(model) == []


def test_what_comes_back_from_host_memory_is_compared(monkeypatch):
    section = Section("second tier")
    second_tier(CPU, section)
    assert section.failures == []
    ((_name, exact, stored, loaded),) = section.tables[0].rows
    assert exact
    assert stored > loaded > 0
    monkeypatch.setattr("hybrid_cache.device.host_memory.HostMemory.run", lambda self, command: None)
    section = Section("second tier")
    second_tier(CPU, section)
    assert any("differ" in failure for failure in section.failures)


gpu_needed = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def gpu():
    return Setting(torch.device("cuda", 0), "triton", False, deadline=1e12)


@pytest.mark.gpu
@gpu_needed
@pytest.mark.parametrize("dtype", correctness.DTYPES, ids=str)
@pytest.mark.parametrize("name", [correctness.ROW_OPERATIONS, *SHAPES])
def test_a_gpu_agrees_with_the_reference(gpu, name, dtype):
    found = correctness.compare(gpu, name, dtype)
    assert found.worst <= 1, found.reason


@pytest.mark.gpu
@gpu_needed
@pytest.mark.parametrize(
    "part", [correctness.exactness, correctness.models, second_tier], ids=["operations", "models", "second tier"]
)
def test_a_gpu_is_exact(gpu, part):
    """Of the models: a replayed decode step has the bits of one that is launched."""
    section = Section("exact")
    part(gpu, section)
    assert section.failures == []
