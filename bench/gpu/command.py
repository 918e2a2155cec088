"""`python -m hybrid_cache.bench.gpu_check`: everything that only a GPU can show, in less than ten minutes.

Runs from a source checkout with torch, triton, transformers, numpy and safetensors only. Each part has a process of
its own and a time limit, so that one that hangs or crashes does not affect the others; the report is rewritten
after each. Ends with 1 if an operation is wrong or not exact, or if a part that decides about it was cut short.

On a CPU (`--device cpu --quick`) the same code runs at small sizes in one process, with torch in place of the kernels,
or with them in Triton's interpreter (`--backend triton`, TRITON_INTERPRET=1).
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import torch

from hybrid_cache.bench.gpu import correctness, kernel_speed, model_speed, second_tier
from hybrid_cache.bench.gpu.report import Section, as_json, markdown, section_of
from hybrid_cache.bench.gpu.setting import Setting

GRACE_S = 20  # after its limit, a part has this long to write what it has
PACKAGES = ("torch", "triton", "numpy", "transformers", "mamba-ssm", "causal-conv1d", "flash-attn")
NVIDIA_SMI = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


@dataclass(frozen=True, slots=True)
class ReportPart:
    """`decides`: without it, or with failures in it, the check fails."""

    run: Callable[[Setting, Section], None]
    limit_s: float
    decides: bool


def environment(setting: Setting, section: Section) -> None:
    """What runs here, and what it can do at best."""
    facts = section.table("what", "is")
    facts.add("date", datetime.now(UTC).isoformat(timespec="seconds"))
    facts.add("python", platform.python_version())
    for package in PACKAGES:
        try:
            facts.add(package, version(package))
        except PackageNotFoundError:
            facts.add(package, "not installed")
    if setting.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(setting.device)
        facts.add("card", f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} processors")
        facts.add("memory", f"{gpu.total_memory / 2**30:.0f} GiB, L2 {gpu.L2_cache_size / 2**20:.0f} MiB")
        facts.add("CUDA", torch.version.cuda)
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"]
        facts.add("nvidia-smi", subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip())
    section.notes.append(kernel_speed.ceilings_note(setting.ceilings()))


PARTS: Mapping[str, ReportPart] = {
    "environment": ReportPart(environment, 20, decides=False),
    "parity": ReportPart(correctness.parity, 120, decides=True),
    "exactness": ReportPart(correctness.exactness, 60, decides=True),
    "models": ReportPart(correctness.models, 60, decides=True),
    "second tier": ReportPart(second_tier.second_tier, 40, decides=True),
    "model speed": ReportPart(model_speed.whole_model, 110, decides=False),
    "sharing": ReportPart(kernel_speed.sharing, 45, decides=False),
    "kernels": ReportPart(kernel_speed.kernels, 70, decides=False),
}


def run_here(name: str, device: str, backend: str, quick: bool) -> Section:
    """Runs a part in this process."""
    begin, section = time.monotonic(), Section(name)
    setting = Setting(torch.device(device), backend, quick, begin + PARTS[name].limit_s)
    try:
        if device == "cuda":
            setting = Setting(torch.device("cuda", 0), backend, quick, setting.deadline)
        PARTS[name].run(setting, section)
    except Exception:
        section.error = traceback.format_exc()
    section.seconds = time.monotonic() - begin
    return section


def run_apart(name: str, options: Sequence[str], limit_s: float) -> Section:
    """Runs a part in a process of its own, which ends with its limit, whatever it does."""
    begin = time.monotonic()
    with TemporaryDirectory() as folder:
        out, log = Path(folder) / "section.json", Path(folder) / "log"
        command = [sys.executable, "-m", "hybrid_cache.bench.gpu_check", "--part", name, "--json", str(out), *options]
        with log.open("w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code: int | str = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = f"stopped after {limit_s:.0f} s"
                _ask_to_end(process)
            _end_all_of(process)
        if out.is_file():
            return section_of(json.loads(out.read_text()))
        words = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
    return Section(name, error=f"no result: {code}\n{words}", seconds=time.monotonic() - begin)


def _ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """It may still write down what it has, unless it waits for the device."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _stop(*_: object) -> NoReturn:
    raise TimeoutError("the part's time is over")


def _end_all_of(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and those that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    backend = options.backend or ("triton" if options.device == "cuda" else "torch")
    passed = ["--device", options.device, "--backend", backend, *(["--quick"] if options.quick else [])]
    if options.part:
        signal.signal(signal.SIGTERM, _stop)
        section = run_here(options.part, options.device, backend, options.quick)
        options.json.write_text(json.dumps(asdict(section)))
        return 0
    chosen = options.only.split(",") if options.only else list(PARTS)
    if unknown := [name for name in chosen if name not in PARTS]:
        print(f"no part is called {unknown[0]!r}; parts: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu --quick tries the check itself", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU"
    title = f"Check of {device}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    report = options.report or Path(os.environ.get("OUT", ".")) / "gpu_check.md"
    sections: list[Section] = []
    for name in chosen:
        if options.device == "cuda":
            sections.append(run_apart(name, passed, PARTS[name].limit_s + GRACE_S))
        else:
            sections.append(run_here(name, options.device, backend, options.quick))
        print(_progress(sections[-1]), flush=True)
        report.write_text(markdown(title, sections))
        if options.json:
            options.json.write_text(json.dumps(as_json(title, sections), indent=2) + "\n")
    print(f"report: {report}")
    return int(any(section.failures or (section.error and PARTS[section.name].decides) for section in sections))


def _progress(section: Section) -> str:
    verdict = "done"
    if section.error:
        verdict = f"broke off, {section.error.strip().splitlines()[-1]},"
    if section.failures:
        verdict = f"{len(section.failures)} FAILED, first {section.failures[0]},"
    return f"{section.name}: {verdict} in {section.seconds:.0f} s; " + " | ".join(section.notes[-3:])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check", description="Checks a GPU: parity, exactness, speed.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", choices=("triton", "torch"), help="triton on a GPU, torch on a CPU if left out")
    parser.add_argument("--quick", action="store_true", help="as little of everything as there can be")
    parser.add_argument("--only", help=f"parts, with commas, of: {', '.join(PARTS)}")
    parser.add_argument("--report", type=Path, help="Markdown; gpu_check.md in $OUT or here if left out")
    parser.add_argument("--json", type=Path, help="the same for programs")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    return parser
