"""What a comparison of fleets tells people: a table, and a sentence for each number of replicas."""

from collections.abc import Callable, Sequence
from itertools import groupby

from rich import box
from rich.table import Table

from hybrid_cache.bench.fleet.rows import MEMORY, ONE, FleetRow
from hybrid_cache.sizes import format_bytes, format_count

Column = tuple[str, Callable[[FleetRow], str]]

ALWAYS: tuple[Column, ...] = (
    ("hit\n%", lambda row: percent(row.token_hit_rate)),
    ("saved\n%", lambda row: percent(row.flops_saved)),
    ("lost\npoints", lambda row: "-" if row.router in (ONE, MEMORY) else points(row.lost)),
)
OF_FLEETS: tuple[Column, ...] = (
    ("busiest\nx mean", lambda row: f"{row.imbalance:.2f}"),
    ("for a\nwhile", lambda row: f"{row.window_imbalance:.2f}"),
    ("TTFT\nms", lambda row: f"{1e3 * row.ttft_p50_s:,.0f}"),
    ("p95\nms", lambda row: f"{1e3 * row.ttft_p95_s:,.0f}"),
)
OF_FAILURES: tuple[Column, ...] = (
    ("fail-\nures", lambda row: format_count(row.num_failures) if row.failures else "-"),
    ("lost\nbytes", lambda row: format_bytes(row.lost_bytes) if row.failures else "-"),
    ("cost\npoints", lambda row: cost_of_failures(row)),
)
OF_DISKS: tuple[Column, ...] = (
    ("read", lambda row: format_bytes(row.read_bytes)),
    ("written", lambda row: format_bytes(row.written_bytes)),
    ("moved", lambda row: format_bytes(row.moved_bytes)),
)


def table(rows: Sequence[FleetRow]) -> Table:
    """The rows of one trace, model, policy and budget."""
    first = rows[0]
    title = f"{first.trace} on {first.model}, {first.policy}: {first.num_requests:,} requests; each replica has "
    title += f"{format_bytes(first.capacity_bytes)} ({100 * first.capacity_share:.3g} % of what is unique)"
    if first.disk_bytes:
        title += f", {'all share' if first.disk_shared else 'and'} a disk of {format_bytes(first.disk_bytes)}"
    report = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0))
    columns = columns_of(rows)
    report.add_column("", no_wrap=True)
    for heading, _ in columns:
        report.add_column(heading, justify="right", no_wrap=True)
    for number, group in groupby(rows, key=lambda row: row.num_replicas):
        report.add_section()
        report.add_row(f"{number} replica{'s' * (number > 1)}", style="bold")
        for row in group:
            style = "dim" if row.router in (ONE, MEMORY) else None
            report.add_row(f" {row.router}", *(text(row) for _, text in columns), style=style)
    return report


def columns_of(rows: Sequence[FleetRow]) -> tuple[Column, ...]:
    """Those in which there is something to say."""
    columns = ALWAYS
    if any(row.num_replicas > 1 for row in rows):
        columns += OF_FLEETS
    if any(row.failures for row in rows):
        columns += OF_FAILURES
    return columns + OF_DISKS if any(row.disk_bytes for row in rows) else columns


def conclusions(rows: Sequence[FleetRow]) -> list[str]:
    """What the rows of a table say, for each number of replicas."""
    found = list[str]()
    for number, group in groupby(rows, key=lambda row: row.num_replicas):
        here = list(group)
        one = next((row for row in here if row.router == ONE), None)
        if one is not None and one.memory_flops_saved:
            share = one.flops_saved / one.memory_flops_saved
            found.append(
                f"{number} x memory with disk saves {percent(share)} % of what a memory as large as the disk saves."
            )
        fleets = sorted((row for row in here if row.router not in (ONE, MEMORY)), key=lambda row: -row.token_hit_rate)
        if fleets and one is not None:
            each = "; ".join(f"{row.router} loses {points(row.lost)}" for row in fleets)
            found.append(
                f"{number} replicas: of the {percent(one.token_hit_rate)} % that one cache finds, {each} points."
            )
    return found


def cost_of_failures(row: FleetRow) -> str:
    return "-" if row.whole_flops_saved is None else points(row.whole_flops_saved - row.flops_saved)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
