"""Commands for models that share a base. Nothing heavy is imported before they run."""

from pathlib import Path
from typing import Annotated

import typer

from hybrid_cache.api.cli.help_page import SearchedCommand
from hybrid_cache.api.cli.options import Threads

app = typer.Typer(no_args_is_help=True, help="Models of one shape: what they can take from each other's cache.")


@app.command(cls=SearchedCommand)
def profile(
    sender: Annotated[str, typer.Argument(help="Whose entries are used: a folder, `embedded`, or + and an adapter.")],
    receiver: Annotated[str, typer.Argument(help="Who uses them. `DIR+ADAPTER` is a model with an adapter.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="A text (.txt), cut into contexts and answers, or a file (.jsonl) of {context, answer} in each line. "
            "Without it, dialogues of the embedded model's kind."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The profile; by default `sharing-SENDER.json` in the receiver's folder.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture (.png) of critical layers and of the frontier.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Dialogues, or pieces of a text.")] = 1200,
    context: Annotated[int, typer.Option(min=64, help="Tokens of context in a piece of a text.")] = 512,
    answer: Annotated[int, typer.Option(min=1, help="Tokens after it that are scored.")] = 64,
    backend: Annotated[str, typer.Option(help="As in `serve`.")] = "auto",
    dtype: Annotated[str, typer.Option(help="As in `serve`.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the dialogues.")] = 1,
    merge_adapters: Annotated[
        bool, typer.Option("--merge-adapters", help="As in `serve`: the numbers, and so the profile, are others.")
    ] = False,
    threads: Threads = 1,
) -> None:
    """Measure what is lost when one model makes its cache entries from another's, layer by layer.

    Writes what `serve` reads: the plans that no other beats in loss (nats a token of the answer, from the receiver
    alone) and in FLOPs. The two directions of a pair are two profiles; they may differ tenfold.
    """
    from hybrid_cache.api.cli import variant_profile as command

    settings = command.Settings(data, examples, context, answer, backend, dtype, seed, merge_adapters)
    command.run(sender, receiver, settings, out=out, plot=plot, threads=threads)
