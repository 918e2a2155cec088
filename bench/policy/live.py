"""`hybrid-cache bench policy --live URL`: does the replay say what the server does?

Sends a trace's prompts as token ids to a running server, one after the other or a few at once, asks for one token each,
and compares the cached tokens that the server reports with those of a replay of the same requests, at the times at
which they were sent. The server must be fresh: the replay does not know what is in its cache.

The trace's ids become ordinary tokens of the model, and the last token of each message one that ends messages, which is
how a server sees messages in tokens. Prompts that the server cannot hold are left out.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ValidationError
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hybrid_cache.api.text.boundaries import prompt_of_tokens
from hybrid_cache.api.text.tokenizer import Tokenizer, load_tokenizer
from hybrid_cache.bench.common.files import write_whole
from hybrid_cache.bench.common.http_client import ServerFailed, Usage, open_client, refused, unreachable
from hybrid_cache.bench.policy.replay import Replay, Simulation
from hybrid_cache.bench.traces.trace import Mark, PageNames, Trace, TraceRequest
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.policies.registry import canonical_name, make_policy
from hybrid_cache.config import EngineConfig
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models import loading
from hybrid_cache.sizes import format_bytes, parse_bytes
from hybrid_cache.spec import CacheSpec, PrefillCost

SHOWN = 12  # differing requests in the report
EMBEDDED = "embedded"

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Asked:
    """The options that matter here."""

    url: str
    api_key_file: Path | None = None
    models: tuple[str, ...] = ()
    policy: str | None = None
    capacity: str | None = None
    concurrency: int = 1


# What is read of the server's answers.
class ListedModel(BaseModel):
    id: str
    max_model_len: int


class ListedModels(BaseModel):
    data: list[ListedModel]


class Health(BaseModel):
    dtype: str


class Choice(BaseModel):
    token_ids: list[int] | None = None


class Completion(BaseModel):
    usage: Usage
    choices: list[Choice]


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says of itself."""

    name: str
    max_length: int
    dtype: str
    budget_bytes: int
    pages: int
    page_bytes: int  # of all of them
    states: int
    state_bytes: int
    evictions: int


@dataclass(frozen=True, slots=True)
class Model:
    """What the replay must know of the server's model."""

    spec: CacheSpec
    cost: PrefillCost
    vocab_size: int
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Sent:
    """One request and its answer."""

    prompt: Ints
    at_s: float
    cached_tokens: int
    answer: tuple[int, ...] = ()  # if the server reports them


@dataclass(frozen=True, slots=True)
class Difference:
    """A request on which server and replay disagree."""

    request: int  # from 0, in the order of sending
    prompt_tokens: int
    live_cached_tokens: int
    simulated_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """All requests on the server and in the replay."""

    trace: str
    model: str
    policy: str
    capacity_bytes: int
    concurrency: int
    requests: int
    skipped: int  # too long for the server
    prompt_tokens: int
    live_cached_tokens: int
    simulated_cached_tokens: int
    relative_difference: float  # of the latter two, a fraction of the server's
    live_evictions: int  # pages and states
    simulated_evictions: int
    differing: tuple[Difference, ...]


def compare(asked: Asked, traces: Sequence[Trace], json_file: Path | None) -> Comparison:
    """Sends, replays and reports. Raises ConfigError, ModelError or ServerFailed."""
    if len(traces) != 1 or len(asked.models) > 1:
        raise ConfigError("--live takes one trace and one model, name them with --trace or --workload, and --model")
    comparison = asyncio.run(measure(asked, traces[0]))
    show(comparison)
    if json_file is not None:
        write_whole(json_file, (json.dumps(asdict(comparison), indent=1) + "\n").encode())
    return comparison


async def measure(asked: Asked, trace: Trace) -> Comparison:
    """Sends the prompts to the server and replays them. Raises ConfigError or ServerFailed."""
    key = asked.api_key_file.read_text().strip() if asked.api_key_file else None
    async with open_client(asked.url, key) as http:
        server = await look_at(http)
        if server.pages:
            raise ConfigError(f"{asked.url}: its cache holds {server.pages} pages, start the server afresh")
        name = asked.models[0] if asked.models else EMBEDDED
        model = model_of(name, server.dtype)
        capacity = server.budget_bytes if asked.capacity is None else parse_bytes(asked.capacity)
        policy = canonical_name(asked.policy or EngineConfig().policy)
        make_policy(policy, model.spec, model.cost, capacity)  # before anything is sent
        prompts = list(spoken(trace, model))
        geometry = Geometry.of(model.spec, capacity)
        fitting = [p for p in prompts if len(p) < server.max_length and geometry.fits(len(p) // TILE + 1, 1)]
        if not fitting:
            raise ConfigError(f"{trace.name}: no prompt fits into the {server.max_length} tokens and {capacity} bytes")
        sent = await send(http, server.name, fitting, asked.concurrency)
        after = await look_at(http)
    check_sizes(name, geometry, after)
    simulated = replayed(trace.name, sent, model, policy, capacity, asked.concurrency)
    return compared(trace.name, name, policy, capacity, asked.concurrency, len(prompts), sent, simulated, after)


# The server


async def look_at(http: httpx.AsyncClient) -> Server:
    """The server's facts and counters. Raises ServerFailed."""
    try:
        listed, health, metrics = [await http.get(path) for path in ("/v1/models", "/health", "/metrics")]
    except httpx.TransportError as error:
        raise unreachable(http, error) from error
    for response in (listed, health, metrics):
        if response.status_code != 200:
            raise refused(response)
    samples = {
        (sample.name, sample.labels.get("kind", "")): sample.value
        for family in text_string_to_metric_families(metrics.text)
        for sample in family.samples
    }
    prefix = "hybrid_cache_"
    try:
        model = ListedModels.model_validate_json(listed.content).data[0]
        return Server(
            name=model.id,
            max_length=model.max_model_len,
            dtype=Health.model_validate_json(health.content).dtype,
            budget_bytes=int(samples[prefix + "cache_budget_bytes", ""]),
            pages=int(samples[prefix + "cache_nodes", ""]),
            page_bytes=int(samples[prefix + "cache_bytes", "kv"]),
            states=int(samples[prefix + "cache_checkpoints", ""]),
            state_bytes=int(samples[prefix + "cache_bytes", "checkpoint"]),
            evictions=int(sum(v for (name, _), v in samples.items() if name == prefix + "evictions_total")),
        )
    except (ValidationError, IndexError, KeyError) as error:
        raise ServerFailed(f"{http.base_url}: not a server of ours, or not of this version ({brief(error)})") from error


async def send(http: httpx.AsyncClient, name: str, prompts: Sequence[Ints], concurrency: int) -> list[Sent]:
    """Sends the prompts in order, `concurrency` at once, with a progress bar on the error stream."""
    waiting, sent = iter(enumerate(prompts)), dict[int, Sent]()
    start = time.monotonic()
    columns = TextColumn("send"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(prompts))

        async def one_by_one() -> None:
            for i, prompt in waiting:
                at_s = time.monotonic() - start
                sent[i] = await ask(http, name, prompt, at_s)
                progress.advance(task)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(one_by_one())
        except* ServerFailed as failures:
            raise failures.exceptions[0] from None
    return [sent[i] for i in range(len(prompts))]


async def ask(http: httpx.AsyncClient, name: str, prompt: Ints, at_s: float) -> Sent:
    """Sends one prompt. Raises ServerFailed."""
    body = {"model": name, "prompt": prompt.tolist(), "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    try:
        response = await http.post("/v1/completions", json=body)
    except httpx.TransportError as error:
        raise unreachable(http, error) from error
    if response.status_code != 200:
        raise refused(response)
    try:
        reply = Completion.model_validate_json(response.content)
    except ValidationError as error:
        raise ServerFailed(f"{response.request.url}: not a completion ({brief(error)})") from error
    details = reply.usage.prompt_tokens_details
    if details is None or details.cached_tokens is None:
        raise ServerFailed(f"{response.request.url}: the reply does not say how many tokens were cached")
    return Sent(prompt, at_s, details.cached_tokens, tuple(reply.choices[0].token_ids or ()))


def brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# The model and its prompts


def model_of(name: str, dtype: str) -> Model:
    """The embedded model or that of a folder, as a server computes it in this dtype. Raises ConfigError."""
    folder = loading.embedded_path() if name == EMBEDDED else Path(name)
    if not folder.is_dir():
        raise ConfigError(f"model {name!r}: --live needs {EMBEDDED!r} or the folder that the server has loaded")
    info = loading.describe(loading.load_config(folder), dtype=dtype)
    return Model(info.cache_spec, info.prefill_cost, info.vocab_size, load_tokenizer(folder))


def spoken(trace: Trace, model: Model) -> Iterator[Ints]:
    """The prompts in the model's own tokens; equal tokens stay equal. Raises ConfigError for traces without tokens."""
    special = model.tokenizer.special_ids
    ordinary = np.array([i for i in range(model.vocab_size) if i not in special], np.int32)
    enders = sorted(special - {model.tokenizer.bos_id})
    ender = model.tokenizer.eos_id if model.tokenizer.eos_id in enders else next(iter(enders), None)
    for number, request in enumerate(trace.requests):
        if request.tokens is None:
            raise ConfigError(f"{trace.name}: request {number} has no tokens, --live needs a trace of text or tokens")
        tokens = ordinary[request.tokens % len(ordinary)]
        if ender is not None:
            tokens[[mark.position - 1 for mark in request.marks if mark.position > 0]] = ender
        yield tokens


# The replay


def replayed(name: str, sent: Sequence[Sent], model: Model, policy: str, capacity: int, concurrency: int) -> Replay:
    names = PageNames()
    requests = tuple(as_request(each, names, model.tokenizer) for each in sent)
    return Simulation(
        Trace(name, TILE, requests),
        model.spec,
        model.cost,
        capacity,
        make_policy(policy, model.spec, model.cost, capacity),
        concurrency,
        prompt_ends=True,
    ).run()


def as_request(sent: Sent, names: PageNames, tokenizer: Tokenizer) -> TraceRequest:
    known = np.concatenate([sent.prompt, np.array(sent.answer, np.int32)])
    _, whole = names.of(sent.prompt)
    pages, _ = names.of(known)
    return TraceRequest(
        arrival_s=sent.at_s,
        session="",
        pages=pages,
        num_prompt_tokens=len(sent.prompt),
        num_output_tokens=1,
        num_known_tokens=len(known),
        whole=whole,
        marks=tuple(Mark(b.position, b.role) for b in prompt_of_tokens(sent.prompt.tolist(), tokenizer).boundaries),
    )


def check_sizes(name: str, geometry: Geometry, server: Server) -> None:
    """Raises ConfigError if the server's pages or states are not as large as the model's."""
    for what, num, num_bytes, kind in (
        ("pages", server.pages, server.page_bytes, Kind.PAGE),
        ("states", server.states, server.state_bytes, Kind.SLOT),
    ):
        if num_bytes != num * geometry.stride_bytes(kind):
            raise ConfigError(
                f"the server's {what} take {num_bytes // num} bytes, those of {name} {geometry.stride_bytes(kind)}: "
                "name the server's model with --model"
            )


# The report


def compared(
    trace: str,
    model: str,
    policy: str,
    capacity: int,
    concurrency: int,
    num_prompts: int,
    sent: Sequence[Sent],
    replay: Replay,
    server: Server,
) -> Comparison:
    simulated = replay.hit_tokens.tolist()
    differing = tuple(
        Difference(i, len(each.prompt), each.cached_tokens, hit)
        for i, (each, hit) in enumerate(zip(sent, simulated, strict=True))
        if each.cached_tokens != hit
    )
    live, total = sum(each.cached_tokens for each in sent), sum(simulated)
    return Comparison(
        trace=trace,
        model=model,
        policy=policy,
        capacity_bytes=capacity,
        concurrency=concurrency,
        requests=len(sent),
        skipped=num_prompts - len(sent),
        prompt_tokens=sum(len(each.prompt) for each in sent),
        live_cached_tokens=live,
        simulated_cached_tokens=total,
        relative_difference=abs(total - live) / max(live, 1),
        live_evictions=server.evictions,
        simulated_evictions=replay.stats.num_evictions,
        differing=differing,
    )


def show(c: Comparison) -> None:
    console = Console()
    size = format_bytes(c.capacity_bytes)
    report = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
    report.add_column("server", justify="right")
    report.add_column("replay", justify="right")
    console.print(f"{c.trace} on {c.model}: {c.policy} in {size}", style="italic", highlight=False)
    report.add_row("requests", f"{c.requests:,}", f"{c.requests:,}")
    report.add_row("prompt tokens", f"{c.prompt_tokens:,}", f"{c.prompt_tokens:,}")
    report.add_row("cached tokens", f"{c.live_cached_tokens:,}", f"{c.simulated_cached_tokens:,}")
    report.add_row("evictions", f"{c.live_evictions:,}", f"{c.simulated_evictions:,}")
    console.print(report)
    if c.skipped:
        console.print(f"{c.skipped:,} prompts are too long for this server and were left out.")
    for d in c.differing[:SHOWN]:
        console.print(
            f"request {d.request} of {d.prompt_tokens:,} tokens: "
            f"{d.live_cached_tokens:,} cached, {d.simulated_cached_tokens:,} in the replay"
        )
    if len(c.differing) > SHOWN:
        console.print(f"and {len(c.differing) - SHOWN:,} more")
    console.print(
        f"The replay differs from the server by {100 * c.relative_difference:.2f} % of the cached tokens, "
        f"in {len(c.differing):,} of {c.requests:,} requests.",
        highlight=False,
    )
