"""`hybrid-cache variants profile`: a search with a progress bar, then a table, a file and a picture."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.engine.family import difference_of
from hybrid_cache.errors import ConfigError, RequestError
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models import loading
from hybrid_cache.models.tools.pairs import Example, Measured, Pair
from hybrid_cache.models.tools.plans import Found, is_group, num_for, search
from hybrid_cache.models.tools.plans import Progress as Report
from hybrid_cache.models.training.paired import dialogues
from hybrid_cache.profile import Plan, Profile, file_name

FEWEST_EXAMPLES = 20
LEGEND = (
    "right answers by kind; kept: bytes a token; t: taken, p: projected, r: recomputed; bold: no other is cheaper and "
    "better; own: everything recomputed; without its states, and with attention blind to what is shared"
)


@dataclass(frozen=True, slots=True)
class Settings:
    """See the command's options."""

    data: Path | None
    num_examples: int
    num_context: int
    num_answer: int
    backend: str
    dtype: str
    seed: int
    merges: bool  # adapters are merged, as `serve --merge-adapters` does it


def run(sender: str, receiver: str, settings: Settings, *, out: Path | None, plot: Path | None, threads: int) -> None:
    """Loads, measures, writes and prints. Raises HybridCacheError."""
    if threads:
        torch.set_num_threads(threads)
    try:
        ops = dispatch.select(settings.backend)
    except dispatch.BackendUnavailable as error:
        raise ConfigError(str(error)) from error
    one, other = (
        loading.load_named(name, dtype=settings.dtype, ops=ops, merges=settings.merges) for name in (sender, receiver)
    )
    difference = difference_of(one.model, other.model)
    if difference:
        raise ConfigError(f"{receiver} is no variant of {sender}: {difference}")
    for named in (one, other):
        if named.model.invocation:
            reads = "reads what comes before its invocation as its base does, to the bit: profile the base"
            raise ConfigError(f"{named.title} {reads}")
    pair = Pair(one.model, other.model, examples_of(other, settings))
    with bars() as report:
        found = search(pair, report)
    num = len(pair.examples) - found.num_searched
    source = settings.data.name if settings.data else f"dialogues, seed {settings.seed}"
    what = f"{num} of {source}; chosen on {found.num_searched} others"
    layers = len(other.model.layers)
    profile = Profile(one.model.fingerprint, other.model.fingerprint, layers, what, found.plans)
    path = out or other.own_folder / file_name(one.title, one.model.fingerprint)
    profile.save(path)
    show(pair, found, one.title, other.title)
    Console(stderr=True).print(f"written to {path}", soft_wrap=True, highlight=False)
    if plot is not None:
        draw(pair, found, f"{one.title} to {other.title}", plot)


def examples_of(receiver: loading.Named, settings: Settings) -> list[Example]:
    """Plans are chosen on the first of them. Raises ConfigError for data that cannot be read, or too little of it."""
    num = num_for(settings.num_examples)
    if settings.data is None:
        return list(dialogues(loading.embedded_path(), num, settings.seed, receiver.own_folder))
    tokenizer = TextModel.load(receiver.folder).tokenizer
    try:
        text = settings.data.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{settings.data} cannot be read: {error}") from error
    if settings.data.suffix == ".jsonl":
        found = [
            _of_line(tokenizer.encode_literal, number, line) for number, line in enumerate(text.splitlines(), start=1)
        ]
    else:
        found = list(_pieces(tokenizer.encode_literal(text), settings))
    found = [each for each in found if each.shared][:num]
    if len(found) < FEWEST_EXAMPLES:
        need = f"needs at least {FEWEST_EXAMPLES} examples with {TILE} tokens of context"
        raise ConfigError(f"{settings.data} has {len(found)}, {need}")
    return found


def _of_line(encode: Callable[[str], list[int]], number: int, line: str) -> Example:
    try:
        values = json.loads(line)
        texts = [values["context"], values["answer"]]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("both must be text")
        context, answer = map(encode, texts)
    except (ValueError, KeyError, TypeError, RequestError) as error:
        raise ConfigError(f"line {number} is not {{context, answer}}: {type(error).__name__}: {error}") from error
    if not answer:
        raise ConfigError(f"line {number} has no answer")
    return Example(np.array(context + answer, np.int32), len(context), len(answer))


def _pieces(tokens: Sequence[int], settings: Settings) -> Iterator[Example]:
    size = settings.num_context + settings.num_answer
    for start in range(0, len(tokens) - size + 1, size):
        piece = np.array(tokens[start : start + size], np.int32)
        yield Example(piece, settings.num_context, settings.num_answer)


@contextmanager
def bars() -> Iterator[Report]:
    """A progress bar for each thing that is measured."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield report


def show(pair: Pair, found: Found, sender: str, receiver: str) -> None:
    """Tables of critical layers and of plans."""
    console = Console()
    layers = Table("layer", "kind", "loss if taken alone", "agreement", title=f"{receiver}, from {sender}")
    for index, (layer, measured) in enumerate(zip(pair.receiver.layers, found.alone, strict=True)):
        layers.add_row(str(index), layer.kind or "none", f"{measured.kl:.5f}", f"{measured.agreement:.2%}")
    layers.caption = f"{found.num_searched} examples, on which plans were chosen"
    console.print(layers)
    own, zeroed, blind = found.controls
    kinds = [kind for kind in own.by_kind if kind]
    plans = Table("faster", "loss", "agreement", *kinds, "kept", "layers", "")
    best = {plan.transfer for plan in found.plans}
    for plan, measured in _ordered(pair, found):
        note = "drawn" if plan.transfer in found.random else "group" if is_group(plan.transfer) else ""
        cells = f"{plan.input_bytes:,}", plan.transfer.letters, note
        faster = "all" if not plan.flops else f"{1 / plan.flops:.1f}x"
        plans.add_row(faster, *_cells(measured, kinds), *cells, style="bold" if plan.transfer in best else "")
    plans.add_row("1.0x", *_cells(own, kinds), "", "own")
    plans.add_row("", *_cells(zeroed, kinds), "", "no states")
    plans.add_row("", *_cells(blind, kinds), "", "blind")
    plans.caption = f"{own.num_examples} other examples; {LEGEND}"
    console.print(plans)


def _cells(measured: Measured, kinds: Sequence[str]) -> Iterator[str]:
    yield from (f"{measured.kl:.5f}", f"{measured.agreement:.2%}")
    yield from (f"{measured.by_kind[kind]:.1%}" for kind in kinds)


def _ordered(pair: Pair, found: Found) -> list[tuple[Plan, Measured]]:
    plans = [(pair.plan(transfer, measured), measured) for transfer, measured in found.measured.items()]
    return sorted(plans, key=lambda each: each[0].flops)


def draw(pair: Pair, found: Found, title: str, path: Path) -> None:
    """Critical layers, by kind, beside what each plan costs and loses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(layer.kind for layer in pair.receiver.layers))
    for kind in kinds:
        numbers = [index for index, layer in enumerate(pair.receiver.layers) if layer.kind == kind]
        left.bar(numbers, [found.alone[index].kl for index in numbers], label=kind or "no entries")
    left.set(title=f"{title}: one layer taken, the others own", xlabel="layer", ylabel="nats a token")
    left.legend()
    for label, marker, shown in (("projected or mixed", "o", False), ("contiguous groups", "s", True)):
        some = [plan for plan, _ in _ordered(pair, found) if is_group(plan.transfer) is shown]
        right.scatter([plan.flops for plan in some], [plan.loss for plan in some], marker=marker, label=label)
    front = sorted(found.plans, key=lambda plan: plan.flops)
    right.step([p.flops for p in front], [p.loss for p in front], where="post", color="grey", linewidth=1)
    right.set(title="plans", xlabel="FLOPs, of computing everything", ylabel="nats a token", ylim=(0, None))
    right.legend()
    figure.savefig(path, dpi=120)
