"""The command that trains adapters. Nothing heavy is imported before it runs."""

from pathlib import Path
from typing import Annotated

import typer

from hybrid_cache.api.cli.options import Model, Threads


def train_lora(
    out: Annotated[Path, typer.Option(help="Folder for the adapter, its scores, and run/ with the checkpoint.")],
    model: Model = None,
    rank: Annotated[int, typer.Option(help="Of the factors.")] = 32,
    alpha: Annotated[float, typer.Option(help="The change counts alpha / rank.")] = 32.0,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 900,
    batch_size: Annotated[int, typer.Option(help="Dialogues in a step.")] = 8,
    dropout: Annotated[float, typer.Option(help="Of what goes into the factors.")] = 0.0,
    target: Annotated[
        list[str] | None, typer.Option(help="Last part of the names of linear modules; all if left out.")
    ] = None,
    save_module: Annotated[
        list[str] | None, typer.Option(help="Module to train as a whole, such as conv1d; may be given several times.")
    ] = None,
    reuse: Annotated[
        str, typer.Option(help="How training messages were encoded: alone, context or mixed, one way in each dialogue.")
    ] = "mixed",
    in_place: Annotated[float, typer.Option(help="Share of dialogues that are re-encoded as usual.")] = 0.15,
    seam: Annotated[int, typer.Option(help="Tokens at the start of each message that are computed again.")] = 0,
    distill: Annotated[
        float | None,
        typer.Option(help="Share of the loss that compares logits, not answers; by default 0, with --reads 1."),
    ] = None,
    stress: Annotated[
        bool, typer.Option("--stress", help="Longer dialogues, and more of those that the state has to carry.")
    ] = False,
    focus: Annotated[str, typer.Option(help="Kind of question that six in ten dialogues are about, too.")] = "",
    fewest: Annotated[int, typer.Option(help="Messages of a dialogue.")] = 1,
    anew: Annotated[float, typer.Option(help="Share of dialogues read in a new order.")] = 0.0,
    checked: Annotated[bool, typer.Option("--checked", help="Leave out what the model itself gets wrong.")] = False,
    reads: Annotated[
        str | None,
        typer.Option(help="Another model of this shape, whose cache entries are read: as in `variants profile`."),
    ] = None,
    transfer: Annotated[
        str | None,
        typer.Option(help="How, by layer, such as `take 0-1, project 2, take 3-5`; without it, all are taken."),
    ] = None,
    start: Annotated[str | None, typer.Option(help="Adapter of the same rank and modules to go on from.")] = None,
    seed: Annotated[int, typer.Option(help="Of data and factors.")] = 1,
    every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    eval_seeds: Annotated[int, typer.Option(help="Seeds of the evaluation, from 601 on; 0 leaves it out.")] = 3,
    eval_each: Annotated[int, typer.Option(help="Dialogues for each kind of question and seed.")] = 100,
    threads: Threads = 1,
) -> None:
    """Train a LoRA adapter with which a model reads messages that were encoded separately, from its own answers.

    With --reads, it learns to read the entries of another model instead, and to answer as it did from its own.
    For models like the embedded one: GraniteMoeHybrid without experts, with the embedded tokenizer.
    """
    from hybrid_cache.api.cli import train_lora as command
    from hybrid_cache.models.training.lora import LINEAR, Settings

    settings = Settings(
        rank=rank,
        alpha=alpha,
        lr=lr,
        steps=steps,
        batch_size=batch_size,
        dropout=dropout,
        targets=tuple(target or LINEAR),
        saved=tuple(save_module or ()),
        seed=seed,
        reuse=reuse,
        in_place=in_place,
        seam=seam,
        distill=float(reads is not None) if distill is None else distill,
        stress=stress,
        focus=focus,
        fewest=fewest,
        anew=anew,
        checked=checked,
        start=start,
        reads=reads,
        transfer=transfer,
    )
    command.run(model, out, settings, resume=resume, every=every, num_seeds=eval_seeds, each=eval_each, threads=threads)
