"""The command line. Nothing heavy is imported before a command runs, so that help comes at once."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from hybrid_cache import __version__
from hybrid_cache.errors import ConfigError, HybridCacheError

app = typer.Typer(
    name="hybrid-cache",
    help="Serve attention + state-space language models behind one exact prefix cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
model_app = typer.Typer(help="Facts about models.", no_args_is_help=True)
bench_app = typer.Typer(help="Measurements.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(bench_app, name="bench")

Model = Annotated[
    str | None, typer.Argument(help="A folder in Hugging Face format or a hub name; the embedded model if left out.")
]
Budget = Annotated[str, typer.Option(help="Memory for KV pages and states together, such as 2GiB.")]
Backend = Annotated[
    str,
    typer.Option(
        help="auto, native, torch, torch-compile (starts a minute later), triton (needs a GPU; new) or mamba_ssm "
        "(needs a GPU; to compare)."
    ),
]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast/--exact",
        help="Let bits depend on the batch where that is faster: cuBLAS with --backend triton, so far. "
        "The CPU backends have nothing of the kind.",
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Adapter = Annotated[
    str | None,
    typer.Option(help="LoRA adapter to merge: a folder in PEFT's layout, or embedded-choreo, which ships."),
]
Threads = Annotated[int, typer.Option(min=0, help="Threads that compute; 0 leaves it to torch.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeyFile = Annotated[Path | None, typer.Option(help="File with API keys, one a line.")]


def main(args: list[str] | None = None) -> None:
    """Runs one command line, by default the process's own. Always ends in SystemExit."""
    try:
        app(args, prog_name="hybrid-cache")
    except HybridCacheError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def read_api_keys(path: Path) -> tuple[str, ...]:
    """One key a line; empty lines and lines that begin with # are left out. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"API keys in {path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"{path} holds no API key, wanted one a line")
    return keys


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hybrid-cache {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


class _NamesPolicies(TyperCommand):
    """A command whose help names the policies, which are imported when it is asked for."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from hybrid_cache.cache.policies.registry import policy_names

        for option in self.params:
            if isinstance(option, TyperOption) and option.name == "policy":
                option.help = f"What the cache keeps: {', '.join(policy_names())}."
        super().format_help(ctx, formatter)


@app.command(cls=_NamesPolicies)
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_file: KeyFile = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model; may be given several times.")
    ] = None,
    budget: Budget = "2GiB",
    policy: Annotated[str, typer.Option(help="What the cache keeps.")] = "learned",
    backend: Backend = "auto",
    fast: Fast = False,
    dtype: Dtype = "auto",
    adapter: Adapter = None,
    threads: Threads = 0,
    max_running: Annotated[int, typer.Option(help="Sequences in one batch.")] = 32,
    max_waiting: Annotated[int, typer.Option(help="Requests in the queue; more are answered 503.")] = 256,
    max_tiles: Annotated[int, typer.Option(help="Prefill tiles in a step with nobody decoding.")] = 16,
    max_tiles_beside_decode: Annotated[int, typer.Option(help="The same beside decoding sequences.")] = 4,
    max_body: Annotated[str, typer.Option(help="Largest request body.")] = "10MiB",
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Reuse what earlier requests computed.")
    ] = True,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare cached pages and states with digests at each use; end if one has changed. For tests, slow.",
        ),
    ] = False,
    vllm_metrics: Annotated[bool, typer.Option("--vllm-metrics", help="Add vLLM's metric names.")] = False,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds that SIGTERM gives running requests.")] = 30,
) -> None:
    """Answer OpenAI's API over HTTP."""
    from hybrid_cache.api.server import process
    from hybrid_cache.api.server.launch import LoadOptions
    from hybrid_cache.config import EngineConfig, verify_by_default
    from hybrid_cache.sizes import parse_bytes

    process.serve(
        process.ServeOptions(
            load=LoadOptions(model, backend, fast, dtype, threads, adapter),
            engine=EngineConfig(
                budget_bytes=parse_bytes(budget),
                max_running=max_running,
                max_waiting=max_waiting,
                policy=policy,
                prefix_cache=prefix_cache,
                max_tiles=max_tiles,
                max_tiles_beside_decode=max_tiles_beside_decode,
                verify=verify or verify_by_default(),
            ),
            host=host,
            port=port,
            served_names=tuple(served_model_name or ()),
            api_keys=read_api_keys(api_key_file) if api_key_file else (),
            max_body_bytes=parse_bytes(max_body),
            vllm_metrics=vllm_metrics,
            drain_timeout_s=drain_timeout,
        )
    )


@app.command()
def chat(
    model: Model = None,
    url: Annotated[str | None, typer.Option(help="Talk to this server, such as http://127.0.0.1:8000.")] = None,
    api_key_file: KeyFile = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the model's own default if left out.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    budget: Budget = "2GiB",
    backend: Backend = "auto",
    fast: Fast = False,
    adapter: Adapter = None,
) -> None:
    """Talk to a model in the terminal. With --url, MODEL is the name that the server knows."""
    from hybrid_cache.api.cli import terminal

    asked = terminal.Asked(temperature=temperature, max_tokens=max_tokens, seed=seed)
    if url is not None:
        key = read_api_keys(api_key_file)[0] if api_key_file else None
        num_failed = terminal.run(terminal.ServerPartner(url, model, key, asked), system)
    else:
        from hybrid_cache.api.cli.local_chat import EnginePartner
        from hybrid_cache.api.server.launch import LoadOptions
        from hybrid_cache.config import EngineConfig
        from hybrid_cache.sizes import parse_bytes

        options = LoadOptions(model, backend, fast, adapter=adapter)
        config = EngineConfig(budget_bytes=parse_bytes(budget))
        num_failed = terminal.run(EnginePartner(options, config, asked), system)
    # A person has seen it; a script looks at the exit code.
    raise typer.Exit(0 if sys.stdin.isatty() or not num_failed else 1)


@model_app.command()
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder with a config.json, weights or not, such a file, or a name of `model list`; "
            "the embedded model if left out."
        ),
    ] = None,
    budget: Budget = "2GiB",
    dtype: Dtype = "auto",
    adapter: Adapter = None,
    as_json: Json = False,
) -> None:
    """What a model keeps in the cache, from its config alone. Exit code 1 if it is not supported."""
    from hybrid_cache.api.cli import model_info
    from hybrid_cache.sizes import parse_bytes

    report = model_info.examine(model, parse_bytes(budget), dtype, adapter)
    typer.echo(model_info.to_json(report)) if as_json else model_info.print_table(report)
    raise typer.Exit(0 if report.supported else 1)


@model_app.command("list")
def list_models(budget: Budget = "2GiB", as_json: Json = False) -> None:
    """Published models whose shapes are known: parameters, KV, checkpoints. With --json all that `model info` says."""
    from hybrid_cache.api.cli import model_info
    from hybrid_cache.sizes import parse_bytes

    reports = model_info.examine_presets(parse_bytes(budget))
    typer.echo(model_info.to_json(reports)) if as_json else model_info.print_list(reports)


@model_app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A folder in Hugging Face format or a hub name.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; it must not be there.")],
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
    from hybrid_cache.api.cli import model_convert
    from hybrid_cache.sizes import parse_bytes

    model_convert.run(source, out, dtype=dtype, quantize=quantize, shard_bytes=parse_bytes(shard_size))


@app.command("train-lora")
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
    distill: Annotated[float, typer.Option(help="Share of the loss that compares logits, not answers.")] = 0.0,
    stress: Annotated[
        bool, typer.Option("--stress", help="Longer dialogues, and more of those that the state has to carry.")
    ] = False,
    focus: Annotated[str, typer.Option(help="Kind of question that six in ten dialogues are about, too.")] = "",
    fewest: Annotated[int, typer.Option(help="Messages of a dialogue.")] = 1,
    anew: Annotated[float, typer.Option(help="Share of dialogues read in another order than they were told.")] = 0.0,
    checked: Annotated[bool, typer.Option("--checked", help="Leave out what the model itself gets wrong.")] = False,
    start: Annotated[str | None, typer.Option(help="Adapter of the same rank and modules to go on from.")] = None,
    seed: Annotated[int, typer.Option(help="Of data and factors.")] = 1,
    every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    eval_seeds: Annotated[int, typer.Option(help="Seeds of the evaluation, from 601 on; 0 leaves it out.")] = 3,
    eval_each: Annotated[int, typer.Option(help="Dialogues for each kind of question and seed.")] = 100,
    threads: Threads = 1,
) -> None:
    """Train a LoRA adapter with which a model reads messages that were encoded apart, from its own answers.

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
        distill=distill,
        stress=stress,
        focus=focus,
        fewest=fewest,
        anew=anew,
        checked=checked,
        start=start,
    )
    command.run(model, out, settings, resume=resume, every=every, num_seeds=eval_seeds, each=eval_each, threads=threads)


def _bench(name: str, module: str, summary: str) -> None:
    """Mounts `hybrid_cache.bench.MODULE:NAME`, which is imported when the command runs or is asked for help."""

    def run(context: typer.Context) -> None:
        command: Callable[..., None] = getattr(import_module(f"hybrid_cache.bench.{module}"), name)
        inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        inner.command()(command)
        raise typer.Exit(inner(context.args, prog_name=context.command_path, standalone_mode=False) or 0)

    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    bench_app.command(name, help=summary, add_help_option=False, context_settings=settings)(run)


_bench("serve", "serving.command", "Measure an OpenAI-compatible server on the prompts that a prefix cache meets.")
_bench("exactness", "exactness.command", "Count the bits in which cache on and cache off differ.")
_bench(
    "policy", "policy.command", "Replay traces through cache policies: what does each save, and what would be possible?"
)
_bench(
    "published",
    "policy.marconi_evaluation",
    "Repeat Marconi's evaluation on made-up trajectories, beside the published hit rates.",
)
_bench(
    "kernels", "kernels.command", "Time every operation against the roofline, the portable backend and other libraries."
)
_bench(
    "choreography",
    "choreography.command",
    "Time workflows whose agents read each other's messages, and count what reuse costs in answers.",
)
_bench(
    "decode", "engine.decode", "Time whole steps of a model, with shared prefixes, beside the rates of this machine."
)
_bench("bookkeeping", "engine.bookkeeping", "Time the cache's own work in large trees.")
