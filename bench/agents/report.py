"""What `hybrid-cache bench agents` reports: rows, a table, a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from statistics import fmean

from rich.table import Table

from hybrid_cache.bench.agents.outcome import Outcome, Served
from hybrid_cache.sizes import format_bytes

NO_CACHE = " (no cache)"


@dataclass(frozen=True, slots=True)
class AgentRow:
    """One order on one workload and machine. Seconds, bytes and shares; means and quantiles over sessions.

    None: not seen from outside of a server.
    """

    trace: str
    model: str
    policy: str
    memory_bytes: int
    host_bytes: int
    rate: float
    seconds: float
    seed: int
    prefix_cache: bool
    sessions: int
    e2e_mean_s: float
    e2e_p50_s: float
    e2e_p99_s: float
    server_time_mean_s: float  # end to end without the pauses
    server_time_p50_s: float
    server_time_p99_s: float
    ttft_mean_s: float  # of the first turn
    ttft_p99_s: float
    ttft_after_pause_mean_s: float
    sessions_per_s: float
    recomputed_share: float | None  # of prompt tokens, those that an earlier turn had and were computed again
    resident_at_return: float | None  # share of turns after a pause whose state was still there
    longest_wait_s: float  # of any turn for its first token
    preemptions: int | None
    busy_share: float | None
    running_bytes_mean: float | None
    steps: int | None


def row_of(served: Served, found: Outcome, trace: str, rate: float, seconds: float) -> AgentRow:
    ended = found.sessions
    e2e = sorted(s.end_s - s.arrival_s for s in ended)
    server = sorted(s.end_s - s.arrival_s - s.paused_s for s in ended)
    first = sorted(s.first_token_s for s in ended)
    return AgentRow(
        **asdict(served),
        trace=trace,
        rate=rate,
        seconds=seconds,
        sessions=len(ended),
        e2e_mean_s=fmean(e2e),
        e2e_p50_s=_quantile(e2e, 0.5),
        e2e_p99_s=_quantile(e2e, 0.99),
        server_time_mean_s=fmean(server),
        server_time_p50_s=_quantile(server, 0.5),
        server_time_p99_s=_quantile(server, 0.99),
        ttft_mean_s=fmean(first),
        ttft_p99_s=_quantile(first, 0.99),
        ttft_after_pause_mean_s=fmean(found.first_tokens_s) if found.first_tokens_s else 0.0,
        sessions_per_s=len(ended) / found.end_s,
        recomputed_share=_recomputed(found),
        resident_at_return=_share(found.num_resident, max(found.num_returns, 1)),
        longest_wait_s=max(s.longest_wait_s for s in ended),
        preemptions=found.num_preemptions,
        busy_share=_share(found.busy_s, found.end_s),
        running_bytes_mean=_share(found.running_byte_s, found.end_s),
        steps=found.steps,
    )


def _recomputed(found: Outcome) -> float | None:
    if found.computed_tokens is None:
        return None
    return max(found.computed_tokens - found.new_tokens, 0) / found.prompt_tokens


def _share(part: float | None, whole: float) -> float | None:
    return None if part is None else part / whole


def _quantile(rising: Sequence[float], share: float) -> float:
    return rising[min(int(share * len(rising)), len(rising) - 1)]


def label(row: AgentRow) -> str:
    return row.policy + ("" if row.prefix_cache else NO_CACHE)


def rows_json(rows: Sequence[AgentRow], settings: dict[str, object]) -> str:
    return json.dumps({**settings, "rows": [asdict(row) for row in rows]}, indent=2) + "\n"


def table(rows: Sequence[AgentRow], title: str) -> Table:
    """Rows of one model, memory, rate and seed."""
    columns = "order", "end to end", "p50", "p99", "server", "p99", "first token", "after pause", "recomputed"
    report = Table(*columns, "resident", "longest wait", "sessions/s", title=title, caption="seconds and shares")
    for column in report.columns[1:]:
        column.justify = "right"
    report.columns[0].no_wrap = True
    for row in rows:
        times = row.e2e_mean_s, row.e2e_p50_s, row.e2e_p99_s, row.server_time_mean_s, row.server_time_p99_s
        more = row.ttft_mean_s, row.ttft_after_pause_mean_s
        shares = row.recomputed_share, row.resident_at_return
        report.add_row(
            label(row),
            *(_seconds(value) for value in (*times, *more)),
            *("-" if share is None else f"{share:.1%}" for share in shares),
            _seconds(row.longest_wait_s),
            f"{row.sessions_per_s:.2f}",
        )
    return report


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def title_of(row: AgentRow) -> str:
    host = f", {format_bytes(row.host_bytes)} of host memory" if row.host_bytes else ""
    memory = format_bytes(row.memory_bytes)
    return f"{row.trace}, {row.model}, {memory}{host}, {row.rate:g} sessions a second for {row.seconds:g} s"


def groups(rows: Sequence[AgentRow]) -> list[list[AgentRow]]:
    """Rows that may be compared with each other: means over seeds are for readers."""
    found: dict[tuple[object, ...], list[AgentRow]] = {}
    for row in rows:
        found.setdefault((row.trace, row.model, row.memory_bytes, row.host_bytes, row.rate, row.seed), []).append(row)
    return list(found.values())


def plot_png(rows: Sequence[AgentRow]) -> bytes:
    """Server time by order, a panel for each model and memory, mean over seeds; the dot is the 99th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells: dict[str, dict[str, list[AgentRow]]] = {}
    for row in rows:
        cells.setdefault(f"{row.model}, {format_bytes(row.memory_bytes)}", {}).setdefault(label(row), []).append(row)
    figure, panels = pyplot.subplots(1, len(cells), figsize=(4.2 * len(cells), 3.8), squeeze=False)
    for panel, (name, by_order) in zip(panels[0], cells.items(), strict=True):
        ranked = sorted(by_order, key=lambda order: -fmean(r.server_time_mean_s for r in by_order[order]))
        means = [fmean(r.server_time_mean_s for r in by_order[order]) for order in ranked]
        p99 = [fmean(r.server_time_p99_s for r in by_order[order]) for order in ranked]
        colors = ["#c44e52" if order == "learned" else "#8c9bb0" for order in ranked]
        panel.barh(ranked, means, color=colors)
        panel.plot(p99, ranked, "k.", label="99th percentile")
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("server time of a session, s")
        panel.tick_params(labelsize=8)
    panels[0][0].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()
