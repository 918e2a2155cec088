"""How fast are operations? Each against the roofline and other libraries; and decode rows that share a prefix."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from hybrid_cache.bench.common.ceilings import Ceilings
from hybrid_cache.bench.gpu.report import Section
from hybrid_cache.bench.gpu.setting import Setting
from hybrid_cache.bench.gpu.timing import Clock, random
from hybrid_cache.bench.kernels.cases import Case, cases
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.layout import RowLayout
from hybrid_cache.kernels.ops import KVTensors, Ops
from hybrid_cache.kernels.runs import Run, arrange
from hybrid_cache.kernels.shared_prefix import schedule_shared
from hybrid_cache.kernels.torch_ops import TorchOps

BF16 = torch.bfloat16
APART = 1 << 30  # rows that would have to share before anything is shared
QUICK_KERNELS = ("rms_norm", "decode attention")
MAMBA_SSM = ("mamba2", "mamba1_scan", "causal_conv")  # what the package has


def kernels(setting: Setting, section: Section) -> None:
    """Each case of `bench kernels`, recorded as a graph where it can be; our portable backend as it is launched."""
    clock = Clock(setting.device)
    ceilings = setting.ceilings()
    section.notes.append(ceilings_note(ceilings))
    section.notes.append("times are medians by the device's clock, with L2 overwritten before each call")
    table = section.table("operation", "size", "ms", "roofline", "bound by", "GB/s", "TFLOP/s", "others")
    ops = setting.ops()
    sizes = (64, 2, 128) if setting.quick else (4096, 64, 8192)
    with torch.inference_mode():
        for case in cases(BF16, setting.device, *sizes):
            if setting.quick and case.name not in QUICK_KERNELS:
                continue
            if setting.late:
                section.notes.append(f"no time left for {case.name} and what follows it")
                break
            seconds, how = _time(clock, case.build(ops))
            others = [f"{name} {taken / seconds:.2f}x" for name, taken in _time_others(clock, case)]
            share = ceilings.seconds(case.bytes, case.flops) / seconds
            rates = case.bytes / seconds / 1e9, case.flops / seconds / 1e12
            bound = ceilings.bound(case.bytes, case.flops)
            table.add(case.name, case.size + how, 1e3 * seconds, share, bound, *rates, ", ".join(others))
    reasons: Mapping[str, str] = getattr(ops, "reasons", {})
    section.notes += [f"{name} is left to torch: {reason}" for name, reason in reasons.items()]


def _time(clock: Clock, call: Callable[[], object]) -> tuple[float, str]:
    try:
        return clock.seconds_as_graph(call), ""
    except RuntimeError:  # torch took over, and reads what no graph may read
        return clock.seconds(call), " (launched)"


def _time_others(clock: Clock, case: Case) -> Iterator[tuple[str, float]]:
    """How long each contender takes that works here."""
    yield "torch", clock.seconds(case.build(TorchOps()))
    contenders: dict[str, Callable[[], object]] = dict(case.others)
    if case.name in MAMBA_SSM and find_spec("mamba_ssm") and dispatch.available()["mamba_ssm"] is None:
        contenders["mamba_ssm"] = case.build(dispatch.select("mamba_ssm"))
    for name, call in contenders.items():
        try:
            yield name, _time(clock, call)[0]
        except (RuntimeError, ValueError, TypeError) as error:
            yield f"{name} ({type(error).__name__})", float("nan")


def sharing(setting: Setting, section: Section) -> None:
    """Decode attention of rows that share a prefix: its pages read once for all, or by each row, with the same bits."""
    clock, ops = Clock(setting.device), setting.ops()
    section.notes.append("both read the same pages; `apart` computes each row on its own, with the same kernels")
    table = section.table("heads", "rows", "prefix", "shared ms", "apart ms", "gain", "same bits")
    prefixes, batches = ((256,), (2, 4)) if setting.quick else ((1024, 4096, 16384), (2, 4, 8, 32, 128, 512, 1024))
    gains: dict[tuple[str, int], float] = {}
    with torch.inference_mode():
        for heads, kv_heads, size in ((4, 2, 16),) if setting.quick else ((16, 16, 128), (32, 8, 128)):
            label = f"{heads} to {kv_heads} of {size}"
            for prefix in prefixes:
                for rows in batches:
                    if setting.late:
                        section.notes.append("no time left for the larger ones")
                        return
                    run = _decode_over_prefix(setting, ops, rows, prefix, heads, kv_heads, size)
                    shared, apart = (_time(clock, partial(run, least))[0] for least in (2, APART))
                    same = torch.equal(run(2), run(APART))
                    table.add(label, rows, prefix, 1e3 * shared, 1e3 * apart, apart / shared, same)
                    section.failures += [] if same else [f"{label}, {rows} rows over {prefix}: sharing changes bits"]
                    gains[f"{label} over {prefix:,}", rows] = apart / shared
    for name in dict.fromkeys(name for name, _ in gains):
        pays = [rows for (n, rows), gain in gains.items() if n == name and gain > 1.02]
        section.notes.append(f"{name}: pays from {min(pays)} rows" if pays else f"{name}: does not pay")
    section.notes.append(f"largest gain: {max(gains.values()):.1f} times")


def _decode_over_prefix(
    setting: Setting, ops: Ops, rows: int, prefix: int, heads: int, kv_heads: int, size: int
) -> Callable[[int], Tensor]:
    """-> attention of rows with `prefix` tokens in common and one page each; takes how many rows make a group."""
    pages = list(range(prefix // TILE))
    runs = [Run(0, 1, prefix + 5, 0, False, [*pages, len(pages) + i], []) for i in range(rows)]
    host, _ = arrange([], runs)
    tables, lengths = host.page_table.numpy(), host.decode_len.numpy()
    num_pages = len(pages) + rows
    kv = KVTensors(*(random(setting.device, BF16, num_pages, TILE, kv_heads, size) for _ in range(2)))
    q, k, v = (random(setting.device, BF16, host.num_rows, n, size) for n in (heads, kv_heads, kv_heads))
    layouts: dict[int, RowLayout] = {}

    def run(min_rows: int) -> Tensor:
        if min_rows not in layouts:
            schedule = schedule_shared(tables, lengths, min_rows=min_rows)
            layouts[min_rows] = replace(host, decode_schedule=schedule).to(setting.device)
        return ops.attention(q, k, v, size**-0.5, layouts[min_rows], kv)

    return run


def ceilings_note(ceilings: Ceilings) -> str:
    reads, multiplies = f"{ceilings.gigabytes_per_s:,.0f} GB/s", f"{ceilings.gigaflops_per_s / 1e3:,.3g} TFLOP/s"
    return f"ceilings in this run: a read moves {reads}, a bf16 product runs at {multiplies}"
