"""The command line. Nothing heavy is imported before a command runs, so that help comes at once."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperOption

from hybrid_cache import __version__
from hybrid_cache.api.cli import bench, cache, configured, help_page, models, translation, variants
from hybrid_cache.api.cli.configured import Config, ConfiguredCommand, HelpAliases, ShowConfig
from hybrid_cache.api.cli.foreign_options import MODEL, taken_as
from hybrid_cache.api.cli.help_page import Entry, SearchedCommand
from hybrid_cache.api.cli.options import (
    Adapter,
    AutoBudget,
    Backend,
    Context,
    Dtype,
    Fast,
    Json,
    KeyFile,
    Model,
    Revision,
    Threads,
    Weights,
    api_keys,
    read_api_keys,
)
from hybrid_cache.api.cli.panels import ELSEWHERE, NO_OPTIONS, panel_of, position_of
from hybrid_cache.api.cli.train import train_lora
from hybrid_cache.api.text.tool_formats import FORMATS
from hybrid_cache.errors import HybridCacheError

app = typer.Typer(
    name="hybrid-cache",
    help="Serve attention + state-space language models behind one exact prefix cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models.app, name="model")
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")
app.add_typer(variants.app, name="variants")


def main(args: list[str] | None = None) -> None:
    """Runs one command line, by default the process's own. Always ends in SystemExit."""
    try:
        app(args, prog_name="hybrid-cache")
    except HybridCacheError as error:
        print("error:", one_line(str(error)), file=sys.stderr)
        sys.exit(2)


def one_line(text: str) -> str:
    """Without what a terminal would obey: a message may quote a file."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


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


class _Serve(ConfiguredCommand):
    """It takes options of other servers. Its help has headings, and names policies and orders, which are imported when
    it is asked for."""

    def translated(self, args: list[str]) -> list[str]:
        return translation.arguments(args, self.by_option())

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from hybrid_cache.cache.policies.registry import policy_names
        from hybrid_cache.scheduling.registry import ORDERS

        names = {"policy": policy_names(), "order": ORDERS}
        for option in self.params:
            if isinstance(option, TyperOption) and option.name in names:
                option.help = f"{(option.help or '').rstrip('.')}: {', '.join(names[option.name])}."
        super().format_help(ctx, formatter)

    def sections(self, ctx: Any) -> dict[str, list[Entry]]:
        found = dict[str, list[Entry]]()
        for each in sorted(self.get_params(ctx), key=lambda parameter: position_of(str(parameter.name))):
            ours = [MODEL] if isinstance(each, TyperArgument) else [*each.opts, *each.secondary_opts]
            entry = help_page.entry(each, ctx, [name for option in ours for name in taken_as(option)])
            found.setdefault(panel_of(str(each.name)), []).extend([entry] if entry else [])
        return {**found, ELSEWHERE: NO_OPTIONS}


@app.command(cls=_Serve)
def serve(
    ctx: typer.Context,
    model: Model = None,
    config: Config = None,
    show_config: ShowConfig = False,
    help_aliases: HelpAliases = False,
    revision: Revision = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key that clients must send; may be given several times. Other users may see it in ps."),
    ] = None,
    api_key_file: KeyFile = None,
    operator_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with more API keys, one a line, whose owners may see and drop what all keys have cached; any "
            "other key is for its own."
        ),
    ] = None,
    shared_cache: Annotated[
        bool,
        typer.Option(
            "--shared-cache", help="All API keys share one cache; else each key is a tenant with a cache of its own."
        ),
    ] = False,
    keep_billing_header: Annotated[
        bool,
        typer.Option(
            help="Keep the billing header that Anthropic's clients put before the system prompt. It is dropped "
            "otherwise: it differs in each request, so that no two prompts would begin alike.",
        ),
    ] = False,
    tool_parser: Annotated[
        str,
        typer.Option(help=f"How the model writes tool calls: auto (by its chat template), {', '.join(FORMATS)}."),
    ] = "auto",
    special_tokens_in_content: Annotated[
        bool,
        typer.Option(
            "--special-tokens-in-content",
            help="Special tokens that clients write into messages act as such; else they are text.",
        ),
    ] = False,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model; may be given several times.")
    ] = None,
    max_model_len: Context = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="File with a chat template (Jinja) in place of the model's own; it runs in the same sandbox."
        ),
    ] = None,
    budget: AutoBudget = "auto",
    policy: Annotated[
        str,
        typer.Option(
            help="Cache policy, which says what is kept when the cache is full: package.module:Class for one of your "
            "own, or one of."
        ),
    ] = "learned",
    host_budget: Annotated[
        str, typer.Option(help="Host memory beside a GPU, for what has to leave its cache, such as 16GiB; 0: none.")
    ] = "0",
    disk: Annotated[
        Path | None,
        typer.Option(help="Folder for a tier of the cache that outlives the process; several servers may share it."),
    ] = None,
    disk_budget: Annotated[str, typer.Option(help="Bytes that all files of --disk take together at most.")] = "20GiB",
    order: Annotated[
        str, typer.Option(help="Order of the queue, and what is kept of agents' requests while their tools run.")
    ] = "learned",
    backend: Backend = "auto",
    fast: Fast = False,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="LoRA adapter, a folder in PEFT's layout or embedded-choreo, which ships. With a name: the model with "
            "the adapter is served beside the model itself, under that name; may be given several times. Without "
            "one, it is merged into the model.",
        ),
    ] = None,
    merge_adapters: Annotated[
        bool,
        typer.Option(
            "--merge-adapters",
            help="Merge adapters with a name into copies of the matrices that they change; each has passes of its own. "
            "Else their rows are computed together with the model's, and their products beside its.",
        ),
    ] = False,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="Several models in one server: another one of the same shape, such as a fine-tune, under a name, out "
            "of the same memory and queue; weights that are equal are stored once. A model folder, a delta (delta.json "
            "beside what it changes of its base), or embedded-style or embedded-half, which ship. May be given several "
            "times.",
        ),
    ] = None,
    profile: Annotated[
        list[Path] | None,
        typer.Option(
            help="What `variants profile` has measured of a pair of models that are served here, beside the files in "
            "their folders. May be given several times.",
        ),
    ] = None,
    sharing: Annotated[
        str,
        typer.Option(
            help="exact: entries of the cache go from model to model only where no bit changes. profiled: also where a "
            "profile expects a small loss; the reply says so. A request may say otherwise.",
        ),
    ] = "exact",
    max_loss: Annotated[
        float,
        typer.Option(min=0, help="What profiled sharing may lose where a request does not say: nats a token."),
    ] = 0.005,
    double_writing: Annotated[
        bool,
        typer.Option(
            "--double-writing/--no-double-writing",
            help="While a model reads a prompt, what others are expected to read of it with a loss is written at once: "
            "for models that read half of what it read before.",
        ),
    ] = True,
    allow_adapter_loading: Annotated[
        bool,
        typer.Option(
            "--allow-adapter-loading",
            help="LoRA adapters at run time: clients may load them from folders of this machine, and unload them, over "
            "HTTP; where there are operator's keys, with these only.",
        ),
    ] = False,
    threads: Threads = 0,
    max_running: Annotated[int, typer.Option(help="Most requests that run at once (concurrency); others wait.")] = 32,
    max_waiting: Annotated[int, typer.Option(help="Requests in the queue; more are answered 503.")] = 256,
    max_tiles: Annotated[
        int, typer.Option(help="Most tokens of prompts in one step, in tiles of 64, while no answer is being written.")
    ] = 16,
    max_tiles_beside_decode: Annotated[int, typer.Option(help="The same while answers are being written.")] = 4,
    max_step_ms: Annotated[
        float,
        typer.Option(
            min=0,
            help="Milliseconds that prompts may take of a step: so long does a long prompt keep the next token of "
            "other answers waiting (twice as long where short prompts come meanwhile). 0 for no bound.",
        ),
    ] = 100,
    max_body: Annotated[str, typer.Option(help="Largest request body.")] = "10MiB",
    message_book: Annotated[
        str, typer.Option(help="Memory for the text of messages that requests may refer to by id.")
    ] = "64MiB",
    response_store: Annotated[
        Path | None,
        typer.Option(help="SQLite file that keeps responses of /v1/responses; without it they are kept in memory."),
    ] = None,
    response_store_mb: Annotated[int, typer.Option(min=1, help="MiB of responses, in memory or in the file.")] = 64,
    response_ttl: Annotated[str, typer.Option(help="How long responses are kept after their last use.")] = "24h",
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Reuse what earlier requests computed; --no-prefix-cache turns the cache off.",
        ),
    ] = True,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare cached pages and states with digests at each use; end if one has changed. For tests, slow.",
        ),
    ] = False,
    log_level: Annotated[
        str, typer.Option(help="debug, info (a line for each request), warning or error: what is logged at least.")
    ] = "info",
    log_format: Annotated[str, typer.Option(help="text, or json: one object a line. Logs go to stderr.")] = "text",
    log_content: Annotated[
        bool,
        typer.Option(
            "--log-content", help="At level debug, log what requests and answers say, too; else nothing of it."
        ),
    ] = False,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            help="Collector that gets a span for each request (OTLP over HTTP), such as http://127.0.0.1:4318."
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            help="Write down what is served, without any text, to this file: hashes of tokens, times, lengths. For "
            "`bench policy --trace`; see docs/record.md."
        ),
    ] = None,
    record_key: Annotated[
        Path | None,
        typer.Option(
            help="File with a key for the hashes, so that those of several records are equal; keep it secret. Without "
            "one they are this process's own."
        ),
    ] = None,
    record_limit: Annotated[str, typer.Option(help="Where the file of --record ends.")] = "10GiB",
    record_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory for the latest of the same, for `bench policy --from-server`; 0: none.  [default: 64MiB with "
            "--record, else 0]",
            show_default=False,
        ),
    ] = None,
    vllm_metrics: Annotated[bool, typer.Option("--vllm-metrics", help="Add vLLM's metric names.")] = False,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Graceful shutdown: seconds that SIGTERM gives running requests.")
    ] = 30,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that the Host header may have, beside the loopback names and --host; may be given several "
            "times. Without it, a server on a loopback address answers to those, and any other server to all names."
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="CORS: origin whose web pages may use the server, such as https://chat.example; may be given several "
            "times. '*' is for all, and needs an API key."
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="TLS: file with a certificate chain (PEM); serve HTTPS.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(help="TLS: file with the certificate's key (PEM), no password.")
    ] = None,
    forwarded_allow_ips: Annotated[
        str | None,
        typer.Option(
            help="Behind a reverse proxy such as nginx: those whose X-Forwarded-For and -Proto count, addresses and "
            "networks with commas between, or '*'."
        ),
    ] = None,
    max_connections: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Open connections; the one idle longest makes room for a new one.  [default: 1024, or what the "
            "limit on open files leaves]",
            show_default=False,
        ),
    ] = None,
    kv_events_config: Annotated[
        str | None,
        typer.Option(
            help="KV events for routers, as vLLM publishes them (ZeroMQ): a JSON object such as "
            "'{\"enable_kv_cache_events\": true}'. Needs the extra `events`; see docs/kv-events.md."
        ),
    ] = None,
    pages: Annotated[
        bool,
        typer.Option("--pages/--no-pages", help="Pages for a browser at /, /cache and /docs; see docs/cache-page.md."),
    ] = True,
    header_timeout: Annotated[float, typer.Option(help="Seconds for the headers of a request.")] = 10,
    body_timeout: Annotated[float, typer.Option(help="Seconds for its body, and 1 more for each 64 KiB.")] = 30,
    reader_timeout: Annotated[float, typer.Option(help="Seconds that a client may take nothing of its answer.")] = 120,
    hung_after: Annotated[
        float,
        typer.Option(
            min=1,
            help="Seconds without the end of a step after which /health says that the engine hangs, and new requests "
            "are answered 503. More than a first step takes, which may compile kernels.",
        ),
    ] = 120,
) -> None:
    """Serve a model over HTTP to OpenAI's and Anthropic's clients.

    Options may stand in a file, too (--config), or in the environment (HYBRID_CACHE_*), and many that other servers
    have are known here (--help-aliases). To find one, `hybrid-cache serve --help | grep -i WORD` shows it whole.

    Leaves with 0 after a drain, and with 1 if the engine failed or did not end.
    """
    from hybrid_cache.api.cli import early
    from hybrid_cache.api.cli.options import named_folders
    from hybrid_cache.api.cli.outlet import unhindered
    from hybrid_cache.api.server.exposure import Exposure, check_keys
    from hybrid_cache.api.server.kv_events.config import parse as parse_kv_events
    from hybrid_cache.api.server.logs import LogOptions
    from hybrid_cache.api.server.protocol import Patience
    from hybrid_cache.api.server.recording.options import RecordOptions, memory_of_record
    from hybrid_cache.api.server.response_store import parse_life
    from hybrid_cache.api.server.settings import ServerSettings
    from hybrid_cache.config import EngineConfig, verify_by_default
    from hybrid_cache.sizes import parse_budget, parse_bytes

    if show_config:
        typer.echo(configured.show(ctx))
        raise typer.Exit
    for line in configured.warn_of_misspelt(ctx):
        typer.echo(f"WARNING: {line}", err=True)
    if sharing not in ("exact", "profiled"):
        raise typer.BadParameter(f"{sharing!r}, must be exact or profiled", param_hint="--sharing")
    merged, adapters = named_folders("--adapter", adapter or ())
    _, variants = named_folders("--variant", variant or (), all_named=True)
    keys = api_keys(api_key or (), api_key_file)
    operator_keys = read_api_keys(operator_key_file) if operator_key_file else ()
    engine = EngineConfig(
        max_running=max_running,
        max_waiting=max_waiting,
        policy=policy,
        order=order,
        host_bytes=0 if host_budget == "0" else parse_bytes(host_budget),
        disk=disk,
        disk_bytes=parse_bytes(disk_budget),
        prefix_cache=prefix_cache,
        double_writing=double_writing,
        max_tiles=max_tiles,
        max_tiles_beside_decode=max_tiles_beside_decode,
        max_step_ms=max_step_ms or None,
        verify=verify or verify_by_default(),
    )
    exposure = Exposure(
        allow_hosts=tuple(allow_host or ()),
        allow_origins=tuple(allow_origin or ()),
        tls_cert=tls_cert,
        tls_key=tls_key,
        trusted_proxies=forwarded_allow_ips,
        max_connections=max_connections,
        patience=Patience(header_timeout, body_timeout, reader_timeout),
    )
    budget_bytes, max_body_bytes, book_bytes = parse_budget(budget), parse_bytes(max_body), parse_bytes(message_book)
    life_s = parse_life(response_ttl)
    check_keys(keys, operator_keys, exposure.allow_origins)
    log = LogOptions(log_level, log_format, log_content)
    ServerSettings(  # checked when made
        served_names=tuple(served_model_name or ("its own",)),
        backend=backend,
        model_path="",
        api_keys=(*keys, *operator_keys),
        operator_keys=operator_keys,
        response_life_s=life_s,
        max_loss_asked=max_loss,
    )
    records = RecordOptions(
        record,
        record_key,
        parse_bytes(record_limit),
        memory_of_record(record_memory, on=record is not None),
    )
    early.check_words(backend=backend, dtype=dtype, weights=weights, tool_parser=tool_parser)
    early.check_files(chat_template=chat_template, record_key=record_key)
    for path in profile or ():
        early.check_files(profile=path)
    early.check_place(response_store or Path())
    early.check_place(record or Path())
    early.check_context(max_model_len)
    early.check_collector(otlp_endpoint)
    kv_events = parse_kv_events(kv_events_config)
    early.check_port(host, port)
    folder = early.find_model(model, revision)
    early.check_beside(variants.values(), (*adapters.values(), *filter(None, (merged,))))

    from hybrid_cache.api.server import process
    from hybrid_cache.api.server.launch import LoadOptions

    options = process.ServeOptions(
        load=LoadOptions(
            model,
            backend,
            fast,
            dtype,
            threads,
            merged,
            variants,
            adapters,
            allow_adapter_loading,
            merge_adapters,
            max_model_len,
            folder,
            weights,
        ),
        engine=engine,
        budget_bytes=budget_bytes,
        host=host,
        port=port,
        served_names=tuple(served_model_name or ()),
        api_keys=keys,
        exposure=exposure,
        shared_cache=shared_cache,
        special_tokens_in_content=special_tokens_in_content,
        keep_billing_header=keep_billing_header,
        tool_parser=None if tool_parser == "auto" else tool_parser,
        chat_template=chat_template,
        max_body_bytes=max_body_bytes,
        message_book_bytes=book_bytes,
        response_store=response_store,
        response_store_bytes=response_store_mb << 20,
        response_life_s=life_s,
        vllm_metrics=vllm_metrics,
        log=log,
        kv_events=kv_events,
        pages=pages,
        otlp_endpoint=otlp_endpoint,
        profiles=tuple(profile or ()),
        profiled=sharing == "profiled",
        max_loss=max_loss,
        drain_timeout_s=drain_timeout,
        hung_after_s=hung_after,
        operator_keys=operator_keys,
        record=records,
    )
    if ctx.obj is not None:  # a program that runs the server in another way
        ctx.obj(options)
        raise typer.Exit
    with unhindered():
        status = process.serve(options)
    raise typer.Exit(status)


@app.command(cls=ConfiguredCommand)
def chat(
    model: Model = None,
    revision: Revision = None,
    url: Annotated[str | None, typer.Option(help="Talk to this server, such as http://127.0.0.1:8000.")] = None,
    api_key_file: KeyFile = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt. The embedded model has one of its own; '' is for none.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; the model's own default if left out.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    budget: AutoBudget = "auto",
    backend: Backend = "auto",
    fast: Fast = False,
    adapter: Adapter = None,
) -> None:
    """Talk to a model in the terminal. With --url, MODEL is the name that the server knows."""
    from hybrid_cache.api.cli import terminal

    asked = terminal.Asked(temperature=temperature, max_tokens=max_tokens, seed=seed)
    if url is not None:
        keys = api_keys(path=api_key_file)
        num_failed = terminal.run(terminal.ServerPartner(url, model, keys[0] if keys else None, asked), system)
    else:
        from hybrid_cache.api.cli import early
        from hybrid_cache.sizes import parse_budget

        budget_bytes = parse_budget(budget)
        early.check_words(backend=backend)
        folder = early.find_model(model, revision)
        early.check_beside((), filter(None, (adapter,)))

        from hybrid_cache.api.cli.local_chat import EMBEDDED_SYSTEM, EnginePartner
        from hybrid_cache.api.server.launch import LoadOptions

        options = LoadOptions(model, backend, fast, adapter=adapter, path=folder)
        system = EMBEDDED_SYSTEM if model is None and system is None else system
        num_failed = terminal.run(EnginePartner(options, budget_bytes, asked), system)
    # A person has seen it; a script looks at the exit code.
    raise typer.Exit(0 if sys.stdin.isatty() or not num_failed else 1)


@app.command(cls=SearchedCommand)
def demo(model: Model = None, backend: Backend = "auto", as_json: Json = False) -> None:
    """Hold a conversation with the cache and without, and show what is computed of each prompt."""
    from hybrid_cache.api.cli import early

    early.check_words(backend=backend)
    early.find_model(model)

    from hybrid_cache.api.cli import demo

    demo.run(model, backend, as_json=as_json)


app.command("train-lora", cls=SearchedCommand)(train_lora)
