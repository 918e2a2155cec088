"""`hybrid-cache bench choreography`: what it saves and costs to encode messages once and read them in other orders.

Speed: workflows of several agents, see `workflows.py`. All contenders read and write the same tokens, because every
answer is forced, token by token. They take turns, each from an empty cache.

    no cache           every prompt is encoded again
    prefix cache       whole prompts on the exact prefix cache, which takes in answers between rounds, off the clock
    exact              the same through the workflow API; its bits are compared with those of no cache
    exact any order    neighbouring messages may change places where that finds a longer prefix
    composed           messages are moved, and what they do to the states is composed; a new message is encoded where it
                       first stands, an answer where it was given
    composed alone     every message, answers included, is encoded in isolation
    relocated          the same for a control of the same size with attention only, of random weights

Answers: generated dialogues with one question, see `quality.py`; only for a model that can answer them.

Times are those of a clock that runs while this process does (`--clock cpu`), or of the wall, for which the machine must
be quiet. Random weights show speed, never quality.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from hybrid_cache.api.server.launch import LoadOptions
from hybrid_cache.bench.choreography.models import GRANITE_150M, Subject, attention_only, open_subject
from hybrid_cache.bench.choreography.players import (
    ANY_ORDER,
    EXACT,
    NO_CACHE,
    PREFIX_CACHE,
    Clock,
    Contender,
    EnginePair,
    Performance,
    moved,
    tokenized,
)
from hybrid_cache.bench.choreography.quality import Examiner, Score, readings
from hybrid_cache.bench.choreography.report import (
    Aim,
    Check,
    WorkflowRow,
    aims,
    plot_png,
    quality_table,
    rows_of,
    speed_table,
)
from hybrid_cache.bench.choreography.texts import FILES, GENERATED, Writer, texts_from
from hybrid_cache.bench.choreography.workflows import WORKFLOWS, Script, Size, make_script
from hybrid_cache.bench.common.files import check_plot, target, write_whole
from hybrid_cache.bench.common.terminal import progress_bar
from hybrid_cache.choreography.arrangement import SEAMS, Composition, Fidelity
from hybrid_cache.errors import ConfigError, HybridCacheError
from hybrid_cache.models.training.dialogues import KINDS
from hybrid_cache.sizes import parse_bytes

DATA = Path("data")  # read without being asked for, if it is there
TOP = 5  # alternatives whose log-probabilities are compared
EXAM_SEEDS = 3
WIDTH = 160  # columns of the tables, where nobody can widen a window
CLOCKS: dict[str, Clock] = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What was asked for."""

    size: Size
    scripts: tuple[Script, ...]
    warm_up: Script  # played by everybody before anything is timed
    seams: tuple[int, ...]
    compositions: tuple[Composition, ...]
    only: tuple[str, ...]  # names of contenders; empty for all
    repeat: int
    budget_bytes: int
    clock: Clock

    def contenders(self, subject: Subject) -> list[Contender]:
        """In the order in which they take turns."""
        found = [NO_CACHE, PREFIX_CACHE, EXACT, ANY_ORDER]
        if "relocated" in subject.model.fidelities:
            found += moved(Fidelity.RELOCATED, self.seams, [])
        elif "composed" in subject.model.fidelities:
            ways = [w for w in self.compositions if subject.model.commutes or w is not Composition.PERMUTATIONS]
            found += moved(Fidelity.COMPOSED, self.seams, ways)
        return [contender for contender in found if not self.only or contender.name in self.only]


def show(
    console: Console,
    rows: Sequence[WorkflowRow],
    checks: Sequence[Check],
    scores: Sequence[Score],
    reached: Sequence[Aim],
    facts: str,
) -> None:
    for model in dict.fromkeys(row.model for row in rows):
        console.print(speed_table([row for row in rows if row.model == model], model))
    if scores:
        seeds = sorted({score.seed for score in scores})
        console.print(quality_table(scores, f"right answers, %; seeds {seeds[0]} to {seeds[-1]}"))
    for c in checks:
        if c.differing:
            console.print(f"{c.model}, {c.workflow}, {c.contender}: {c.differing} of {c.tokens} tokens differ")
    for aim in reached:
        console.print(f"{'reached' if aim.reached else 'MISSED ':8} {aim.text}: {aim.found}")
    console.print(facts, style="dim")


def measure(options: BenchOptions, subject: Subject, progress: Progress) -> tuple[list[WorkflowRow], list[Check]]:
    """Each workflow: the exact contenders with log-probabilities, then all contenders in turn."""
    engines, rows, checks = EnginePair(subject, options.budget_bytes, options.clock), list[WorkflowRow](), list[Check]()
    contenders = options.contenders(subject)
    task = progress.add_task(subject.name, total=len(options.scripts) * len(contenders) * options.repeat)
    for contender in contenders:
        engines.perform(options.warm_up, tokenized(options.warm_up, subject), contender)
    for script in options.scripts:
        tokens = tokenized(script, subject)
        progress.update(task, description=f"{subject.name}, {script.name}")
        against = engines.perform(script, tokens, NO_CACHE, TOP)
        for contender in [c for c in contenders if c.is_exact and c is not NO_CACHE]:
            shown = engines.perform(script, tokens, contender, TOP)
            checks.append(check(script.name, subject.name, contender.name, shown, against))
        played: dict[str, list[Performance]] = {contender.name: [] for contender in contenders}
        for _ in range(options.repeat):
            for contender in contenders:
                played[contender.name].append(engines.perform(script, tokens, contender))
                progress.update(task, advance=1)
        rows += rows_of(script.name, subject.name, played)
    return rows, checks


def check(workflow: str, model: str, contender: str, shown: Performance, against: Performance) -> Check:
    """Compares log-probabilities: of the token that was forced, and of the most probable ones."""
    ours, theirs = ([score for reply in play.replies for score in reply.scores] for play in (shown, against))
    differing = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return Check(workflow, model, contender, len(ours), differing)


def examine(options: BenchOptions, subject: Subject, seed: int, each: int, progress: Progress) -> list[Score]:
    examiner, scores = Examiner(subject, options.budget_bytes), list[Score]()
    asked = {anew: readings(options.seams, tuple(Composition), anew=anew) for anew in (False, True)}
    task = progress.add_task("answers", total=sum(map(len, asked.values())) * len(KINDS) * EXAM_SEEDS)
    for anew, own in asked.items():
        for kind in KINDS:
            for number in range(seed, seed + EXAM_SEEDS):
                scores += examiner.scores(
                    kind, number, each, own, anew=anew, on_score=lambda: progress.update(task, advance=1)
                )
    return scores


def choreography(
    model: Annotated[
        str | None,
        typer.Option(
            help=f"A folder, or {GRANITE_150M}: random weights, for speed only. The embedded model if left out."
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="A LoRA adapter to merge into it: a folder, or the name of one that ships."),
    ] = None,
    workflows: Annotated[str, typer.Option(help=f"With commas: {', '.join(WORKFLOWS)}. All if left out.")] = "",
    branches: Annotated[int, typer.Option(min=2, help="Proposals, parts or questions.")] = 4,
    voters: Annotated[int, typer.Option(min=1, help="Who read all proposals, each in an order of its own.")] = 16,
    agents: Annotated[int, typer.Option(min=2, help="Of a debate.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Of a debate.")] = 2,
    requests: Annotated[int, typer.Option(min=1, help="Of the retrieval.")] = 12,
    message_tokens: Annotated[int, typer.Option(min=8, help="Length of a long message.")] = 128,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer that is not such a message.")] = 16,
    contenders: Annotated[str, typer.Option(help="Names of a table's lines, with commas. All if left out.")] = "",
    seams: Annotated[
        str, typer.Option(help="Tokens at the start of a moved message that are computed again.")
    ] = "0,16",
    compositions: Annotated[
        str, typer.Option(help=f"To be timed, with commas: {', '.join(Composition)}.")
    ] = Composition.ORDERED.value,
    control: Annotated[bool, typer.Option(help="Time a model with attention only as well.")] = True,
    speed: Annotated[bool, typer.Option(help="Time the workflows.")] = True,
    questions: Annotated[
        int | None, typer.Option(min=0, help="Dialogues of each kind and seed; 0, or 5 for the embedded model.")
    ] = None,
    question_seed: Annotated[int, typer.Option(help=f"The first of {EXAM_SEEDS} seeds of dialogues.")] = 601,
    data: Annotated[Path | None, typer.Option(help="Folder with real texts; ./data if it is there.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Times that each contender is timed; medians count.")] = 2,
    seed: Annotated[int, typer.Option(help="Of texts, orders and draws.")] = 0,
    budget: Annotated[str, typer.Option(help="Memory of each cache.")] = "512MiB",
    backend: Annotated[str, typer.Option(help="auto, native or torch.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="That compute.")] = 1,
    clock: Annotated[str, typer.Option(help="cpu or wall; cpu only for one thread on a CPU.")] = "cpu",
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG there.")] = None,
) -> None:
    """Time workflows whose agents read each other's messages, and count what reuse costs in answers."""
    if clock not in CLOCKS:
        raise typer.BadParameter(f"{clock!r} is not one of {', '.join(CLOCKS)}", param_hint="--clock")
    torch.set_num_threads(threads)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, WIDTH))
    try:
        if plot is not None:
            check_plot(plot)
        subject = open_subject(LoadOptions(model, backend, threads=threads, adapter=adapter))
        if subject.ops.device.type != "cpu" or threads > 1:
            clock = "wall"
        size = Size(branches, voters, agents, rounds, requests, message_tokens, answer_tokens)
        texts = texts_from(data or DATA, seed)
        if data is not None and texts.note == GENERATED:
            raise ConfigError(f"{data}: there is no file {', '.join(FILES)} below it")
        writer = Writer(texts, subject.num_tokens)
        options = BenchOptions(
            size,
            tuple(make_script(name, writer, size, seed) for name in chosen("--workflows", workflows, WORKFLOWS)),
            make_script("two questions", writer, Size(branches=2, message_tokens=8, answer_tokens=2), seed),
            tuple(int(s) for s in chosen("--seams", seams, list(map(str, SEAMS)))),
            tuple(Composition(c) for c in chosen("--compositions", compositions, list(Composition))),
            tuple(name.strip() for name in contenders.split(",") if name.strip()),
            repeat,
            parse_bytes(budget),
            CLOCKS[clock],
        )
        subjects = [subject, *([attention_only(subject)] if control and subject.has_states else [])]
        chosen(
            "--contenders", contenders, [c.name for one in subjects for c in replace(options, only=()).contenders(one)]
        )
        files = [target(path) for path in (as_json, plot) if path is not None]
    except HybridCacheError as error:
        raise typer.BadParameter(str(error)) from error
    each = questions if questions is not None else 5 if model is None else 0
    rows, checks, scores = list[WorkflowRow](), list[Check](), list[Score]()
    with progress_bar() as progress:
        for one in subjects if speed else ():
            found = measure(options, one, progress)
            rows += found[0]
            checks += found[1]
        if each and subject.has_states:
            scores = examine(options, subject, question_seed, each, progress)
    reached = aims(rows, checks, branches=branches, voters=voters, agents=agents)
    facts = f"texts: {writer.texts.note}; seed {seed}; {clock} clock, {threads} thread{'s' * (threads > 1)}"
    show(console, rows, checks, scores, reached, facts)
    if as_json is not None:
        said = {
            "rows": [asdict(row) for row in rows],
            "checks": [asdict(one) for one in checks],
            "scores": [asdict(score) for score in scores],
            "aims": [asdict(aim) for aim in reached],
        }
        settings = {"model": subject.name, "size": asdict(size), "repeat": repeat, "facts": facts}
        write_whole(files[0], (json.dumps({**settings, **said}, indent=1) + "\n").encode())
    if plot is not None:
        write_whole(files[-1], plot_png(rows, scores))


def chosen(option: str, given: str, known: Iterable[str]) -> list[str]:
    """Names between commas, all if none is given. Raises ConfigError."""
    every = list(known)
    names = [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in every]
    if unknown:
        raise ConfigError(f"{option}: {unknown[0]!r} is not one of {', '.join(every)}")
    return names or every
