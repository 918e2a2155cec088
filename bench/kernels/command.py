"""`hybrid-cache bench kernels`: every operation against the roofline, the portable backend and other libraries.

The ceilings are measured in the same run: reading a large buffer, the median of several times, and the fastest product
of two square matrices. The roofline of a case is the longer of the time to move its bytes and the time to do its FLOPs
at these rates. Contenders take turns and the median counts, so that a busy machine slows them alike; on a CPU each runs
on one thread unless --threads says otherwise.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hybrid_cache.bench.common.ceilings import Ceilings, measure_ceilings
from hybrid_cache.bench.common.timing import timed_in_turn
from hybrid_cache.bench.kernels.cases import Case, Timed, cases
from hybrid_cache.kernels import dispatch, mamba_ssm_ops
from hybrid_cache.kernels.ops import Ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WIDTH = 150  # columns of the table, on a narrow terminal too


@dataclass(frozen=True, slots=True)
class Result:
    """Times in milliseconds for one call; `roofline` is the share of what the machine could do."""

    kernel: str
    size: str
    backend: str
    ms: float
    roofline: float
    bound: str  # memory or arithmetic
    gigabytes_per_s: float
    gigaflops_per_s: float
    torch_ms: float | None
    others_ms: dict[str, float]


def measure(
    case: Case, ops: Ops, ceilings: Ceilings, device: torch.device, rounds: int, against: Sequence[Ops]
) -> Result:
    """against: other backends"""
    contenders: dict[str, Timed] = {"ours": case.build(ops)}
    contenders |= {other.name: case.build(other) for other in against if _has(other, case)}
    contenders |= case.others
    taken = dict(zip(contenders, timed_in_turn(list(contenders.values()), device, rounds), strict=True))
    seconds = {name: median(times) for name, times in taken.items()}
    ours = seconds.pop("ours")
    plain = seconds.pop("torch", None)
    return Result(
        kernel=case.name,
        size=case.size,
        backend=ops.name,
        ms=1e3 * ours,
        roofline=ceilings.seconds(case.bytes, case.flops) / ours,
        bound=ceilings.bound(case.bytes, case.flops),
        gigabytes_per_s=case.bytes / ours / 1e9,
        gigaflops_per_s=case.flops / ours / 1e9,
        torch_ms=None if plain is None else 1e3 * plain,
        others_ms={name: 1e3 * value for name, value in seconds.items()},
    )


def _has(ops: Ops, case: Case) -> bool:
    return ops.name != "mamba_ssm" or case.name in mamba_ssm_ops.OPERATIONS


def kernels(
    backend: Annotated[str, typer.Option(help="auto, native, torch, torch-compile or triton.")] = "auto",
    against: Annotated[
        str, typer.Option(help="More backends to time in the same rounds, with commas; mamba_ssm if it is there.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    only: Annotated[str, typer.Option(help="Operations to run, with commas; all if left out.")] = "",
    prompt: Annotated[int, typer.Option(min=64, help="Tokens of a prefill.")] = 1024,
    sequences: Annotated[int, typer.Option(min=2, help="Sequences that decode together.")] = 32,
    context: Annotated[int, typer.Option(min=64, help="Tokens that each of them attends to.")] = 8192,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each contender; the median counts.")] = 7,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each contender.")] = 1,
    portable: Annotated[bool, typer.Option(help="Time the portable torch backend as well.")] = True,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Time every operation against the roofline, the portable backend and other libraries."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it says of each function that it is torch's
    console = Console(highlight=False)
    torch.set_num_threads(threads)
    ops = _select(backend, "--backend")
    device = ops.device
    names = [name for name in ("torch" if portable else "", *against.split(",")) if name and name != ops.name]
    if device.type == "cuda" and dispatch.available()["mamba_ssm"] is None:
        names.append("mamba_ssm")
    others = [_select(name, "--against") for name in dict.fromkeys(names)]
    wanted = {name for name in only.split(",") if name}
    with torch.inference_mode():
        ceilings = measure_ceilings(DTYPES[dtype], device)
        chosen = [c for c in cases(DTYPES[dtype], device, prompt, sequences, context) if not wanted or c.name in wanted]
        if not chosen:
            raise typer.BadParameter(f"no operation is called {only}", param_hint="--only")
        results = [
            measure(case, ops, ceilings, device, rounds, others)
            for case in track(chosen, description="kernels", console=Console(stderr=True), transient=True)
        ]
    console = Console(highlight=False, width=max(console.width, WIDTH))
    console.print(_table(results, ceilings, dtype, device))
    if as_json is not None:
        facts = {"dtype": dtype, "device": _device_name(device), "threads": threads, "rounds": rounds}
        rows = [asdict(result) for result in results]
        as_json.write_text(json.dumps({**facts, "ceilings": asdict(ceilings), "results": rows}, indent=2) + "\n")


def _select(backend: str, option: str) -> Ops:
    try:
        return dispatch.select(backend)
    except dispatch.BackendUnavailable as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu"


def _table(results: Sequence[Result], ceilings: Ceilings, dtype: str, device: torch.device) -> Table:
    reads, computes = f"{ceilings.gigabytes_per_s:,.0f} GB/s", f"{ceilings.gigaflops_per_s:,.0f} GFLOP/s"
    table = Table(title=f"{_device_name(device)}, {dtype}: reads {reads}, multiplies {computes}", box=None)
    for name in ("kernel", "size"):
        table.add_column(name)
    for name in ("ms", "roofline", "bound", "GB/s", "GFLOP/s", "torch", "others"):
        table.add_column(name, justify="right")
    for r in results:
        others = ", ".join(f"{name} {ms / r.ms:.2f}x" for name, ms in r.others_ms.items())
        table.add_row(
            *(r.kernel, r.size, f"{r.ms:.3g}", f"{r.roofline:.0%}", r.bound),
            *(f"{r.gigabytes_per_s:,.1f}", f"{r.gigaflops_per_s:,.0f}"),
            *("" if r.torch_ms is None else f"{r.torch_ms / r.ms:.1f}x", others),
        )
    return table
