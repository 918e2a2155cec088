"""What `hybrid-cache bench choreography` reports: rows of numbers, tables, which aims were reached, a picture."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from math import ceil
from statistics import fmean, median
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from hybrid_cache.bench.choreography.players import Performance
from hybrid_cache.bench.choreography.quality import Score
from hybrid_cache.bench.choreography.workflows import REORDERING
from hybrid_cache.choreography.plan import Action
from hybrid_cache.sizes import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AGAINST = ("no cache", "prefix cache")
MOVING = ("composed", "relocated")  # the contenders that the aims speak of


@dataclass(frozen=True, slots=True)
class WorkflowRow:
    """One contender in one workflow: medians over repetitions. TTFT of a repetition is that over its calls.

    Ratios say how many times less it takes than each of `AGAINST`: the median over repetitions, each against its own.
    """

    workflow: str
    model: str
    contender: str
    calls: int
    ttft_s: float
    ttft_p90_s: float
    total_s: float
    flops: float  # of all but decoding
    idle_flops: float  # between rounds, while nobody waits
    bytes: int  # kept at the end
    tokens: dict[str, int]  # of prompts by what became of them, and `stored`: computed only for the store
    ttft_ratio: dict[str, float]
    total_ratio: dict[str, float]
    flops_ratio: dict[str, float]


@dataclass(frozen=True, slots=True)
class Check:
    """Whether greedy tokens and log-probabilities have the bits of re-encoding, in one workflow."""

    workflow: str
    model: str
    contender: str
    tokens: int
    differing: int


@dataclass(frozen=True, slots=True)
class Aim:
    text: str
    found: str
    reached: bool


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share does not exceed."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def rows_of(workflow: str, model: str, played: Mapping[str, Sequence[Performance]]) -> list[WorkflowRow]:
    """played: the performances of each contender, in the order of the repetitions."""
    ttfts = {name: [median(r.first_s for r in p.replies) for p in shown] for name, shown in played.items()}
    totals = {name: [p.seconds for p in shown] for name, shown in played.items()}
    flops = {name: [p.flops for p in shown] for name, shown in played.items()}

    def ratios(of: Mapping[str, Sequence[float]], name: str) -> dict[str, float]:
        return {a: median(x / y for x, y in zip(of[a], of[name], strict=True)) for a in AGAINST if a in of}

    rows = []
    for name, shown in played.items():
        last = shown[-1]
        tokens = {action.value: last.tokens[action] for action in Action} | {"stored": last.stored}
        rows.append(
            WorkflowRow(
                *(workflow, model, name, len(last.replies)),
                ttft_s=median(ttfts[name]),
                ttft_p90_s=median(percentile([r.first_s for r in p.replies], 0.9) for p in shown),
                total_s=median(totals[name]),
                flops=last.flops,
                idle_flops=last.idle_flops,
                bytes=last.bytes,
                tokens=tokens,
                ttft_ratio=ratios(ttfts, name),
                total_ratio=ratios(totals, name),
                flops_ratio=ratios(flops, name),
            )
        )
    return rows


def aims(rows: Sequence[WorkflowRow], checks: Sequence[Check], *, branches: int, voters: int, agents: int) -> list[Aim]:
    """What was to be reached, as far as it was measured."""
    found = []
    if checks:
        wrong = sum(check.differing for check in checks)
        text = "exact has the bits of re-encoding"
        found.append(Aim(text, f"{wrong} of {sum(c.tokens for c in checks):,} tokens differ", not wrong))
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        exact = [row for row in own if row.contender == "exact" and AGAINST[1] in row.total_ratio]
        if exact:
            slower = {row.workflow: 1 / row.total_ratio[AGAINST[1]] - 1 for row in exact}
            said = f"{100 * fmean(slower.values()):+.1f} % in the mean, {100 * max(slower.values()):+.1f} % at most"
            text = f"{model}: exact takes at most 2 % longer than the prefix cache"
            found.append(Aim(text, said, fmean(slower.values()) <= 0.02))
        moving = [row for row in own if row.contender in MOVING and set(AGAINST) <= row.ttft_ratio.keys()]
        if not moving:
            continue
        name = moving[0].contender
        found.append(_least(f"{model}: {name}, first token 3 times sooner than re-encoding", moving, AGAINST[0], 3.0))
        debate = [row for row in moving if row.workflow == "parallel debate"]
        if debate and agents >= 3:
            text = f"{model}: {name}, 6 times sooner in a parallel debate of {agents} agents"
            found.append(_least(text, debate, AGAINST[0], 6.0))
        tree = [row for row in moving if row.workflow == "tree of thought"]
        if tree and (branches, voters) == (4, 16):
            ratio = tree[0].total_ratio[AGAINST[0]]
            text = f"{model}: {name}, 4 branches and 16 voters 2.3 times faster from end to end"
            found.append(Aim(text, f"{ratio:.2f}", ratio >= 2.3))
        reordering = [row for row in moving if row.workflow in REORDERING]
        if reordering:
            text = f"{model}: {name}, 1.5 times sooner than the prefix cache where messages change their order"
            found.append(_least(text, reordering, AGAINST[1], 1.5))
    return found


def _least(text: str, rows: Sequence[WorkflowRow], against: str, wanted: float) -> Aim:
    ratios = {row.workflow: row.ttft_ratio[against] for row in rows}
    said = ", ".join(f"{workflow} {ratio:.2f}" for workflow, ratio in ratios.items())
    return Aim(text, said, min(ratios.values()) >= wanted)


# For people


def speed_table(rows: Sequence[WorkflowRow], title: str) -> Table:
    """Rows of one model."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    headings = ("TTFT\nms", "p90\nms", "x no\ncache", "x prefix\ncache", "all\ns", "x no\ncache", "x prefix\ncache")
    for heading in (*headings, "GFLOP", "kept", "reused", "moved", "computed", "for the\nstore"):
        table.add_column(heading, justify="right", no_wrap=True)
    for workflow, group in groupby(rows, key=lambda row: row.workflow):
        here = list(group)
        table.add_section()
        table.add_row(f"{workflow}, {here[0].calls} calls", style="bold")
        for r in here:
            ttft, total = (
                [f"{of[a]:.2f}" if a in of else "-" for a in AGAINST] for of in (r.ttft_ratio, r.total_ratio)
            )
            tokens = [r.tokens["reused"], r.tokens["relocated"] + r.tokens["composed"], r.tokens["computed"]]
            table.add_row(
                *(f" {r.contender}", f"{1e3 * r.ttft_s:,.1f}", f"{1e3 * r.ttft_p90_s:,.1f}", *ttft),
                *(f"{r.total_s:.3f}", *total, f"{r.flops / 1e9:,.1f}", format_bytes(r.bytes)),
                *(f"{count:,}" for count in (*tokens, r.tokens["stored"])),
            )
    return table


def quality_table(scores: Sequence[Score], title: str) -> Table:
    """Percent right by kind, over the seeds; the last columns over all kinds."""
    kinds = list(dict.fromkeys(score.kind for score in scores))
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for heading in (*kinds, "same\nanswer", "KL\nfirst", "KL\nanswer", "tokens\ncomputed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for anew in sorted({score.anew for score in scores}):
        here = [score for score in scores if score.anew is anew]
        table.add_section()
        table.add_row("in a new order" if anew else "in the order told", style="bold")
        for reading in dict.fromkeys(score.reading for score in here):
            own = [score for score in here if score.reading == reading]
            right = [weighted([s for s in own if s.kind == kind], "right") for kind in kinds]
            table.add_row(
                *(f" {reading}", *(f"{100 * share:.1f}" for share in right), f"{100 * weighted(own, 'same'):.1f}"),
                *(f"{weighted(own, 'kl_first'):.1e}", f"{weighted(own, 'kl'):.3g}"),
                f"{100 * weighted(own, 'computed'):.0f} %",
            )
    return table


def weighted(scores: Sequence[Score], field: str) -> float:
    """The mean over dialogues."""
    return sum(score.num * float(getattr(score, field)) for score in scores) / sum(score.num for score in scores)


# Picture


def plot_png(rows: Sequence[WorkflowRow], scores: Sequence[Score]) -> bytes:
    """Speed-up of the first token, a panel for each model; then the share of right answers, by kind."""
    from matplotlib.figure import Figure

    by_model = [list(group) for _, group in groupby(rows, key=lambda row: row.model)]
    original_order = [score for score in scores if not score.anew]
    panels = len(by_model) + bool(original_order)
    figure = Figure(figsize=(11, 3.4 * panels), dpi=150, layout="constrained")
    axes = list(figure.subplots(panels, 1, squeeze=False).flat)
    for place, group in zip(axes, by_model, strict=False):
        values: dict[str, dict[str, float]] = defaultdict(dict)
        for row in group:
            if row.contender != AGAINST[0]:
                values[row.contender][row.workflow] = row.ttft_ratio[AGAINST[0]]
        bars(place, values, group[0].model, "TTFT, times sooner\nthan without a cache")
        place.axhline(1, color="0.3", linewidth=0.8)
    if original_order:
        values = defaultdict(dict)
        for reading in dict.fromkeys(score.reading for score in original_order):
            for kind in dict.fromkeys(score.kind for score in original_order):
                own = [s for s in original_order if (s.reading, s.kind) == (reading, kind)]
                values[reading][kind] = 100 * weighted(own, "right")
        bars(axes[-1], values, "answers, in the order told", "right, %")
    image = BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def bars(axes: "Axes", values: Mapping[str, Mapping[str, float]], title: str, label: str) -> None:
    """A group of bars for each place, a bar for each name."""
    from matplotlib import color_sequences

    places = list(dict.fromkeys(place for heights in values.values() for place in heights))
    width, colors = 0.85 / len(values), color_sequences["tab10" if len(values) <= 10 else "tab20"]
    for number, (name, heights) in enumerate(values.items()):
        xs = [i + (number - (len(values) - 1) / 2) * width for i in range(len(places))]
        color = colors[number % len(colors)]
        axes.bar(xs, [heights.get(place, 0.0) for place in places], width, label=name, color=color, zorder=2)
    axes.set_xticks(range(len(places)), places, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(label, fontsize=9)
    axes.grid(axis="y", color="0.9", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
