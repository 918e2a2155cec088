"""The commands about models. Nothing heavy is imported before one runs."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hybrid_cache.api.cli.help_page import SearchedCommand
from hybrid_cache.api.cli.options import Adapter, Budget, Context, Dtype, Json, Revision

app = typer.Typer(help="Facts about models.", no_args_is_help=True)


@app.command(cls=SearchedCommand)
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder with a config.json, weights or not, such a file, a GGUF file, a hub name, of which no "
            "weights are downloaded, or a name of `model list`; the embedded model if left out."
        ),
    ] = None,
    revision: Revision = None,
    budget: Budget = "2GiB",
    dtype: Dtype = "auto",
    adapter: Adapter = None,
    max_model_len: Context = None,
    as_json: Json = False,
) -> None:
    """What a model keeps in the cache, from its config only. Exit code 1 if it is not supported."""
    from hybrid_cache.api.cli import early
    from hybrid_cache.sizes import parse_bytes

    budget_bytes = parse_bytes(budget)
    early.check_words(dtype=dtype)
    found = early.find_config(model, revision)
    early.check_context(max_model_len)

    from hybrid_cache.api.cli import model_info

    report = model_info.examine(found, budget_bytes, dtype, adapter, max_model_len)
    report = replace(report, path=model or report.path)
    typer.echo(model_info.to_json(report)) if as_json else model_info.print_table(report)
    raise typer.Exit(0 if report.supported else 1)


@app.command("list", cls=SearchedCommand)
def list_models(budget: Budget = "2GiB", as_json: Json = False) -> None:
    """Published models whose shapes are known: parameters, KV, checkpoints. With --json all that `model info` says."""
    from hybrid_cache.api.cli import model_info
    from hybrid_cache.sizes import parse_bytes

    reports = model_info.examine_presets(parse_bytes(budget))
    typer.echo(model_info.to_json(reports)) if as_json else model_info.print_list(reports)


@app.command(cls=SearchedCommand)
def convert(
    source: Annotated[str, typer.Argument(help="A folder in Hugging Face format, a GGUF file or a hub name.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not be there.")],
    revision: Revision = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16, float32 or float16, for all weights but those stored in float32 that the model computes "
            "in float32, such as A_log; kept as it is if left out."
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="int8 (a scale for each row) or int4 (a scale and a zero for each 128 inputs; not embedding and "
            "head), for matrices with both sides of 32 or more. Saves disk and download, not memory: loading gives "
            "them back their dtype, because products with such weights are slower on a CPU from a few rows on."
        ),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
) -> None:
    """Write a model folder with another dtype or quantized weights.

    Weights that the text model does not use are left out. OUT appears when all of it is written.
    """
    from hybrid_cache.api.cli import early
    from hybrid_cache.sizes import parse_bytes

    shard_bytes = parse_bytes(shard_size)
    early.check_absent(out)
    early.check_place(out)
    early.check_words(stored=dtype)
    folder = early.find_model(source, revision)

    from hybrid_cache.api.cli import model_convert

    model_convert.run(folder, out, dtype=dtype, quantize=quantize, shard_bytes=shard_bytes)
