"""`python -m hybrid_cache.bench.quantized`: do matrix products with int8 or int4 weights pay on this CPU?

torch's own kernels for weights in int8 (one scale a row) and int4 (groups of 128) against the product that the server
uses for bfloat16, on one thread, in processor time. The three take turns, and a ratio compares neighbours; medians are
printed.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hybrid_cache.kernels.dispatch import select
from hybrid_cache.models.quantized import GROUP

ROWS = (1, 4, 16, 64, 512)
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one product; how many times as fast as ours the other two are, above 1 they win."""

    rows: int
    ours_us: float
    int8_us: float
    int4_us: float
    int8_ratio: float
    int4_ratio: float


def measure(out_features: int, in_features: int, rows: int, rounds: int, backend: str = "auto") -> Timing:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
    x = torch.randn(rows, in_features, generator=generator).bfloat16()
    products = _products(weight, backend)
    for product in products.values():  # warm, and near enough to be the same product
        torch.testing.assert_close(product(x).float(), x.float() @ weight.T, rtol=0, atol=0.6)
    times: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(rounds):
        for name, product in products.items():
            begin = time.process_time()
            product(x)
            times[name].append(1e6 * (time.process_time() - begin))
    ratios = {n: median(o / t for o, t in zip(times["ours"], times[n], strict=True)) for n in ("int8", "int4")}
    micros = {name: median(taken) for name, taken in times.items()}
    return Timing(rows, micros["ours"], micros["int8"], micros["int4"], ratios["int8"], ratios["int4"])


def _products(weight: Tensor, backend: str) -> Mapping[str, Product]:
    ours = select(backend).linear(weight.bfloat16())
    return {"ours": ours, "int8": _int8(weight), "int4": _int4(weight)}


def _int8(weight: Tensor) -> Product:
    scale = weight.abs().amax(dim=1) / 127
    codes = torch.round(weight / scale[:, None]).to(torch.int8)
    beside = scale.bfloat16()

    def product(x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, codes, beside)

    return product


def _int4(weight: Tensor) -> Product:
    """The kernel's weight is (code - 8) * scale + zero."""
    groups = weight.view(len(weight), -1, GROUP)
    low = groups.amin(dim=2)
    scale = (groups.amax(dim=2) - low) / 15
    codes = torch.round((groups - low[..., None]) / scale[..., None]).clamp(0, 15).to(torch.int32).view_as(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    beside = torch.stack([scale, low + 8 * scale], dim=2).transpose(0, 1).contiguous().bfloat16()

    def product(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, beside)  # type: ignore[no-any-return]

    return product


def quantized(
    out_features: Annotated[int, typer.Option(help="Rows of the matrix.")] = 4096,
    in_features: Annotated[int, typer.Option(help=f"Its columns, a multiple of {GROUP}.")] = 2048,
    rounds: Annotated[int, typer.Option(min=3, help="Products of each kind.")] = 50,
    backend: Annotated[str, typer.Option(help="auto, native or torch.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time matrix products with weights in bfloat16, int8 and int4, on one thread."""
    torch.set_num_threads(1)
    timings = [measure(out_features, in_features, rows, rounds, backend) for rows in ROWS]
    if as_json:
        typer.echo(json.dumps([asdict(timing) for timing in timings], indent=2))
        return
    table = Table(title=f"{out_features} x {in_features}, {select(backend).name}, microseconds", box=None)
    for name in ("rows", "ours", "int8", "int4", "int8 is faster by", "int4 is faster by"):
        table.add_column(name, justify="right")
    for t in timings:
        cells = (t.ours_us, t.int8_us, t.int4_us)
        table.add_row(str(t.rows), *(f"{us:,.0f}" for us in cells), f"{t.int8_ratio:.2f}x", f"{t.int4_ratio:.2f}x")
    Console(highlight=False).print(table)
