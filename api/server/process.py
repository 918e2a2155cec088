"""A server process: load, check, say hello, serve, drain."""

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from hybrid_cache import __version__
from hybrid_cache.api.server.addresses import bind
from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.budget import CONVERSATION_TOKENS, MemoryPlan, conversation_bytes, plan_memory
from hybrid_cache.api.server.connections import Connections, Listener, connection_limit
from hybrid_cache.api.server.ending import FLUSH_TIMEOUT_S, FORCE_S, SECOND_S, Deadline, end_by_force
from hybrid_cache.api.server.exposure import Exposure, check_keys, is_loopback
from hybrid_cache.api.server.kv_events.config import OFF, KVEventsConfig
from hybrid_cache.api.server.kv_events.publisher import Publisher, publishing
from hybrid_cache.api.server.launch import (
    Loaded,
    LoadedVariant,
    LoadOptions,
    apart,
    find_profiles,
    inexact_reasons,
    load,
    load_variant,
    profiles_in,
)
from hybrid_cache.api.server.logs import FIELDS, LogOptions, log_stream, logging_to
from hybrid_cache.api.server.protocol import ServerConfig
from hybrid_cache.api.server.recording.header import Origin
from hybrid_cache.api.server.recording.options import RecordOptions
from hybrid_cache.api.server.recording.recorder import Recorder
from hybrid_cache.api.server.response_store import memory_bytes
from hybrid_cache.api.server.serving import Variant
from hybrid_cache.api.server.settings import MAX_LOSS, ServerSettings
from hybrid_cache.api.server.tracing import Tracing
from hybrid_cache.api.text.alike import difference_of
from hybrid_cache.api.text.defaults import listed
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.async_engine import HUNG_AFTER_S, AsyncEngine
from hybrid_cache.errors import ConfigError, HybridCacheError, ModelError
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.names import CODED
from hybrid_cache.models import loading
from hybrid_cache.models.files import errors_begin_with
from hybrid_cache.models.folders import commit_of
from hybrid_cache.profile import Profile
from hybrid_cache.sizes import format_bytes, format_count
from hybrid_cache.spec import CacheSpec

logger = logging.getLogger("hybrid_cache.server")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """All options of `serve`."""

    load: LoadOptions
    engine: EngineConfig  # but for its budget
    budget_bytes: int | None  # of the cache; None for a share of what is free
    host: str
    port: int
    served_names: tuple[str, ...]  # empty: the folder's name
    api_keys: tuple[str, ...]
    shared_cache: bool
    special_tokens_in_content: bool
    keep_billing_header: bool
    tool_parser: str | None
    max_body_bytes: int
    message_book_bytes: int
    response_store: Path | None
    response_store_bytes: int
    response_life_s: float
    vllm_metrics: bool
    drain_timeout_s: float
    exposure: Exposure = field(default_factory=Exposure)
    hung_after_s: float = HUNG_AFTER_S
    operator_keys: tuple[str, ...] = ()  # beside these, for the whole cache
    profiles: tuple[Path, ...] = ()  # of what is lost between pairs of models, beside those in their folders
    profiled: bool = False  # what requests get that do not say
    max_loss: float = MAX_LOSS
    log: LogOptions = field(default_factory=LogOptions)
    kv_events: KVEventsConfig = OFF
    pages: bool = True  # for people
    otlp_endpoint: str | None = None  # of a collector of spans
    chat_template: Path | None = None  # in place of the model's own
    record: RecordOptions = field(default_factory=RecordOptions)

    def __post_init__(self) -> None:
        check_keys(self.api_keys, self.operator_keys, self.exposure.allow_origins)

    def settings(
        self, loaded: Loaded, inexact: list[str], beside_bytes: int, hosts: tuple[str, ...] = ()
    ) -> ServerSettings:
        return ServerSettings(
            served_names=self.served_names or (loaded.name,),
            inexact=tuple(inexact),
            backend=loaded.ops.name,
            model_path=str(loaded.path),
            adapter=loaded.adapter,
            fallbacks=getattr(loaded.ops, "reasons", {}),
            api_keys=tuple(dict.fromkeys((*self.api_keys, *self.operator_keys))),
            operator_keys=self.operator_keys,
            shared_cache=self.shared_cache,
            special_tokens_in_content=self.special_tokens_in_content,
            keep_billing_header=self.keep_billing_header,
            tool_parser=self.tool_parser,
            allowed_hosts=hosts,
            allowed_origins=self.exposure.allow_origins,
            body_timeout_s=self.exposure.patience.body_timeout_s,
            max_body_bytes=self.max_body_bytes,
            message_book_bytes=self.message_book_bytes,
            response_store=self.response_store,
            response_store_bytes=self.response_store_bytes,
            response_life_s=self.response_life_s,
            beside_bytes=beside_bytes,
            vllm_metrics=self.vllm_metrics,
            pages=self.pages,
            log_content=self.log.content,
            drain_timeout_s=self.drain_timeout_s,
            max_loss=self.max_loss if self.profiled else None,
            max_loss_asked=self.max_loss,
        )


def serve(options: ServeOptions) -> int:
    """Loads, greets and serves until a signal, or until the engine fails -> the status to leave with.

    A process in which something hangs does not get back here, but ends. Raises HybridCacheError when it cannot start.
    """
    tracing = None if options.otlp_endpoint is None else Tracing.to_collector(options.otlp_endpoint)
    with logging_to(log_stream(), options.log):
        return _serve(options, tracing)


@dataclass(frozen=True, slots=True)
class Assembled:
    """A model in memory with all that serves it, and what people want to know about that."""

    app: FastAPI  # starts the engine with itself, and ends it
    engine: AsyncEngine
    config: EngineConfig
    settings: ServerSettings
    loaded: Loaded
    memory: MemoryPlan
    text: TextModel
    variants: Sequence[Variant]
    others: Sequence[Path]  # profiles of other weights

    def without_variants(self) -> "Assembled":
        """The engine has them, and lets go of those that are unloaded."""
        return replace(self, loaded=replace(self.loaded, variants=()))


def assemble(
    options: ServeOptions,
    hosts: tuple[str, ...] = (),
    publisher: Publisher | None = None,
    tracing: Tracing | None = None,
    status: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Assembled:
    """Loads a model, checks it, and makes the app that serves it. Listens nowhere.

    hosts: that requests may name; empty for any   status: shows what is being done
    Raises HybridCacheError.
    """
    with status("loading the model"):
        loaded = load(options.load)
        text = TextModel.load(loaded.path)
        text = text.with_template(options.chat_template) if options.chat_template else text
        variants = [variant_of(each, loaded, text) for each in loaded.variants]
    with status("checking that cached and computed answers agree bit for bit"):
        inexact = inexact_reasons(loaded)
    memory = plan_memory(
        loaded,
        options.engine,
        options.budget_bytes,
        max_body_bytes=options.max_body_bytes,
        book_bytes=options.message_book_bytes,
        response_bytes=memory_bytes(options.response_store, options.response_store_bytes),
    )
    if options.engine.host_bytes and loaded.model.device.type == "cpu":
        raise ConfigError("--host-budget is for a GPU: on a CPU the cache is in host memory, see --budget")
    engine_config = replace(options.engine, budget_bytes=memory.budget_bytes)
    name = (options.served_names or (loaded.name,))[0]
    origin = Origin(
        name, loaded.model.fingerprint, loaded.info.shape, engine_config, loaded.model.device.type == "cuda"
    )
    recorder = Recorder(origin, options.record) if options.record.on else None
    models = {each.name: each.model for each in loaded.variants}
    profiles, others = find_profiles(loaded, options.profiles)
    engine = AsyncEngine(
        loaded.model, engine_config, hung_after_s=options.hung_after_s, variants=models, profiles=profiles
    )
    del models
    settings = options.settings(loaded, inexact, memory.beside_bytes, hosts)

    def load_adapter(name: str, folder: str, later_bytes: int) -> tuple[Variant, HybridModel, list[Profile]]:
        room = memory.room(loaded.model.device, later_bytes)
        variant = load_variant(loaded, name, adapter=folder, merges=options.load.merges, room=room)
        differences = variant.inexact_reasons(apart(loaded, variant.model))
        if differences and not inexact:
            raise ModelError(differences[0])
        return variant_of(variant, loaded, text), variant.model, profiles_in(variant.path)

    loader = load_adapter if options.load.shares else None
    app = create_app(engine, text, settings, variants, loader, tracing, recorder, publisher)
    assembled = Assembled(app, engine, engine_config, settings, loaded, memory, text, variants, others)
    loaded = assembled.without_variants().loaded  # what `load_adapter` keeps
    return assembled


def _serve(options: ServeOptions, tracing: Tracing | None) -> int:
    console = Console(stderr=True, quiet=options.log.format == "json")
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False) if not console.quiet else logger.info
    with closing(bind(options.host, options.port)) as bound, publishing(options.kv_events) as publisher:
        exposure = options.exposure
        hosts = exposure.hosts(options.host, bound)
        made = assemble(options, hosts, publisher, tracing, console.status)
        app, engine, settings, memory, text = made.app, made.engine, made.settings, made.memory, made.text
        url = url_of(bound, exposure.scheme)
        if console.quiet:
            logger.info("serving", extra={FIELDS: _facts(settings, made.loaded, memory, url)})
        console.print(hello(made.loaded, made.settings.inexact, made.config, memory, url, settings.served_names[0]))
        for variant in made.variants:
            if variant.text_difference.parts:
                line = f"variant {variant.name} {variant.text_difference}"
                say(line)
        for path in made.others:
            say(f"{path} is of other weights than these, and is not used")
        made = made.without_variants()
        if text.defaults.ignored:
            say(ignored_line(text.defaults.ignored))
        if not options.api_keys and not is_loopback(bound):
            warning = f"without an API key, whoever reaches {url} can use it"
            console.print(f"WARNING: {warning}", style="bold red")
            if console.quiet:
                logger.warning(warning)
        if publisher is not None:
            say(f"KV events at {publisher.endpoint}, replays at {publisher.replay_endpoint or 'no address'}")
            if not options.kv_events.is_local:
                say(
                    "WARNING: whoever reaches these reads the tokens of all prompts: keep them inside a private network"
                )
        if made.config.prefix_cache:
            console.print(SEND_TWICE)
        curl = curl_line(url, with_key=bool(options.api_keys), chats=bool(text.chat_templates))
        console.print(curl, soft_wrap=True, highlight=False)
        connections = Connections(connection_limit(exposure.max_connections))
        config = ServerConfig(
            app,
            connections,
            exposure.patience,
            timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
            log_level=options.log.uvicorn_level,
            **exposure.uvicorn_options(),
        )
        with Listener(bound, connections) as listener:
            run_server(DrainingServer(config, engine, options.drain_timeout_s, say), listener)
    if not engine.stopped:
        end_by_force()
    return int(engine.failed)


def variant_of(variant: LoadedVariant, loaded: Loaded, text: TextModel) -> Variant:
    """What is served of a variant. text: that of the first model, whose files it has where its folder has none; an
    adapter's may have a chat template
    """
    own = text
    if variant.text_path != loaded.path:
        with errors_begin_with(variant.label):
            own = TextModel.load_variant(variant.text_path, loaded.path, text)
    if variant.adapter is not None:
        own = own.with_template_of(variant.path)
    facts = variant.adapter, difference_of(text, own), variant.own_bytes, variant.model.invocation
    return Variant(variant.name, str(variant.path), own, *facts)


def url_of(bound: socket.socket, scheme: str = "http") -> str:
    host, port = bound.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def hello(
    loaded: Loaded, inexact: Sequence[str], config: EngineConfig, memory: MemoryPlan, url: str, name: str
) -> Panel:
    """The panel that greets whoever started the server."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    info, spec = loaded.info, loaded.model.cache_spec
    layers = ", ".join(f"{count} {kind}" for kind, count in sorted(info.layers.items()))
    facts.add_row("url", f"{url}/v1")
    if commit := commit_of(loaded.path):
        facts.add_row("revision", commit)
    context = f"{info.max_length:,}" + (f" ({info.stretched})" if info.stretched else "")
    facts.add_row("model", f"{name}, {info.model_type}, {layers}, context {context}")
    if (stored := loading.stored_in(loaded.path)) is not None:
        facts.add_row("weights", "; ".join((stored.title, *stored.notes)))
    if loaded.weights in CODED:
        facts.add_row("rounded", f"{loaded.weights}, a scale for each 32 inputs")
    for each in loaded.variants:
        facts.add_row("variant", _variant_line(each, len(loaded.model.chain) - 1))
    facts.add_row("size", f"{format_count(info.num_parameters)} parameters in {loaded.dtype_name}")
    facts.add_row("backend", _backend_line(loaded.ops.name))
    facts.add_row("exact", f"NO: {inexact[0]} ({len(inexact)} reasons)" if inexact else "yes, checked just now")
    facts.add_row("cache", _cache_line(config, spec))
    facts.add_row("memory", str(memory))
    return Panel(facts, title=f"hybrid-cache {__version__}", title_align="left", expand=False)


def _variant_line(variant: LoadedVariant, num_layers: int) -> str:
    kind, equal = f"adapter {variant.adapter}" if variant.adapter else str(variant.path), variant.equal_layers
    if equal is None:
        depth = "its embedding differs"
    elif equal == num_layers:
        depth = "all layers are the model's"
    else:
        depth = f"differs from layer {equal} of {num_layers} on"
    if variant.model.invocation:
        depth = f"on from the tokens {[*variant.model.invocation]} in a prompt"
    return f"{variant.name}, {kind}: {depth}, {variant.shared:.0%} of its matrices are stored for others, too"


def _facts(settings: ServerSettings, loaded: Loaded, memory: MemoryPlan, url: str) -> dict[str, object]:
    """What the panel says, for machines."""
    return {
        "version": __version__,
        "url": f"{url}/v1",
        "model": settings.served_names[0],
        "model_type": loaded.info.model_type,
        "context": loaded.info.max_length,
        "dtype": loaded.dtype_name,
        "backend": settings.backend,
        "exact": settings.exact,
        "inexact": list(settings.inexact),
        "variants": [each.name for each in loaded.variants],
        "budget_bytes": memory.budget_bytes,
    }


def ignored_line(ignored: Sequence[str]) -> str:
    """What the model's own settings ask for in vain."""
    return f"not honoured of generation_config.json: {listed(ignored)}"


SEND_TWICE = "Send this twice: the second answer has all of its prompt in cached_tokens."


def curl_line(url: str, *, with_key: bool, chats: bool) -> str:
    """What to type in another terminal. chats: the model has a chat template."""
    key = " -H 'Authorization: Bearer KEY'" if with_key else ""
    question = "The box has 4 pencils in it. How many pencils are in the box?"
    body = {"messages": [{"role": "user", "content": question}]} if chats else {"prompt": question}
    route = "chat/completions" if chats else "completions"
    return f"curl {url}/v1/{route} -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"


def _backend_line(name: str) -> str:
    reason = dispatch.available()["native"]
    threads = f"{torch.get_num_threads()} threads"
    return f"{name}, {threads}" if reason is None else f"{name}, {threads} (native is missing: {reason})"


def _cache_line(config: EngineConfig, spec: CacheSpec) -> str:
    budget_bytes, room = config.budget_bytes, list[str]()
    if spec.kv_bytes_per_token:
        room.append(f"{format_count(budget_bytes // spec.kv_bytes_per_token)} tokens of KV")
    if spec.slot_bytes:
        room.append(f"{format_count(budget_bytes // spec.slot_bytes)} checkpoints")
    room.append(f"{budget_bytes // conversation_bytes(spec):,} conversations of {CONVERSATION_TOKENS:,} tokens")
    line = f"{format_bytes(budget_bytes)}, room for {' or '.join(room)}"
    return line if config.prefix_cache else f"{line}; prefix cache OFF"


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT it still answers, with 503 to new requests, until the running ones have finished.

    A second signal aborts them. It also ends when the engine fails.
    """

    def __init__(self, config: uvicorn.Config, engine: AsyncEngine, grace_s: float, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._engine = engine
        self._grace_s = grace_s
        self._say = say
        self._deadline: Deadline  # from `startup` on
        self._num_signals = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline = Deadline(self._grace_s)
        self._deadline.watch_signals()
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        if self._engine.failed and self._drain is None:
            self._drain = asyncio.ensure_future(self._stop_engine(0))
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by Python between any two instructions of the main thread."""
        self._num_signals += 1
        if self._loop is None or not self.started:
            raise KeyboardInterrupt
        first = self._num_signals == 1
        self._deadline.within(self._grace_s + FORCE_S if first else SECOND_S)
        self._loop.call_soon_threadsafe(self._stop, first)

    def _stop(self, first: bool) -> None:
        if self._drain is not None:
            self._drain.cancel()
        self._drain = asyncio.ensure_future(self._stop_engine(self._grace_s if first else 0))
        self._say("finishing running requests, once more to abort" if first else "aborting")

    async def _stop_engine(self, grace_s: float) -> None:
        await self._engine.stop(grace_s)
        self._deadline.within(FORCE_S)
        self.should_exit = True


def run_server(server: DrainingServer, bound: socket.socket) -> None:
    """Serves until a signal. Raises HybridCacheError when it cannot start."""
    try:
        bound.listen(server.config.backlog)
    except OSError as error:
        raise ConfigError(f"cannot listen on {url_of(bound)}: {error.strerror or error}") from error
    try:
        server.run(sockets=[bound])
    except SystemExit as error:  # what uvicorn raises after it has logged why
        raise HybridCacheError("the server could not start") from error
