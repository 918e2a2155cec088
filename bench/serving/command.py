"""`hybrid-cache bench serve`: how much of a conversation does an OpenAI-compatible server compute again?

Drives any server that speaks `/v1/completions` or `/v1/chat/completions` through the scenarios of
`scenarios.py` and reports, for each, the time to the first token and the time per further token (median and
95th percentile), and how many prompt tokens came from the cache by the server's own count: OpenAI's
`usage.prompt_tokens_details.cached_tokens`, or llama.cpp's `timings.cache_n`.

The same seed writes the same prompts for every server with the same vocabulary. Replies are never compared:
each server's own words become part of its conversations. Start the server afresh, or change the seed,
before a second run: otherwise nothing in it is cold.
"""

import asyncio
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import httpx
import typer
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.table import Table

from hybrid_cache.bench.common.http_client import (
    ServerFailed,
    Usage,
    first_model,
    message_of,
    open_client,
    server_url,
    streamed,
)
from hybrid_cache.bench.common.terminal import progress_bar
from hybrid_cache.bench.serving.scenarios import (
    ENGLISH,
    NEEDS,
    SCENARIOS,
    Conversation,
    Reply,
    Shape,
    Traffic,
    calibrate,
    one_token_words,
    play,
)
from hybrid_cache.errors import HybridCacheError


# The parts of a stream event that are read; everything else in it is ignored.
class Delta(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(BaseModel):
    text: str | None = None
    delta: Delta | None = None

    def content(self) -> str:
        return self.text or (self.delta and self.delta.content) or ""

    def thought(self) -> str:
        return (self.delta and self.delta.reasoning_content) or ""


class Timings(BaseModel):
    cache_n: int | None = None


class Event(BaseModel):
    choices: list[Choice] = []
    usage: Usage | None = None
    timings: Timings | None = None
    error: object = None


class Api(StrEnum):
    completions = "completions"
    chat = "chat"


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way to ask: the path, and the part of the request body that carries a conversation."""

    path: str
    prompt: Callable[[Conversation], dict[str, object]]


def marked_text(conversation: Conversation) -> str:
    """The conversation as one text with role markers, open for the assistant's next message."""
    return "".join(f"<|{role}|>{content}<|end|>" for role, content in conversation) + "<|assistant|>"


DIALECTS = {
    Api.completions: Dialect("/v1/completions", lambda c: {"prompt": marked_text(c)}),
    Api.chat: Dialect("/v1/chat/completions", lambda c: {"messages": [message._asdict() for message in c]}),
}


class Stopwatch:
    """Collects the events of one streamed reply."""

    def __init__(self) -> None:
        self.sent = time.perf_counter()
        self.stamps: list[float] = []  # one for each event that brought text
        self.text = ""
        self.usage = Usage()
        self.timings = Timings()

    def take(self, event: Event) -> None:
        """Notes one event and when it came. Raises ServerFailed if it is an error."""
        if event.error:
            raise ServerFailed(f"the server broke off: {message_of(event.error)}")
        self.usage = event.usage or self.usage
        self.timings = event.timings or self.timings
        if any(choice.content() or choice.thought() for choice in event.choices):
            self.stamps.append(time.perf_counter())
        self.text += "".join(choice.content() for choice in event.choices)

    def reply(self) -> Reply:
        done = time.perf_counter()
        details = self.usage.prompt_tokens_details
        cached = details.cached_tokens if details else None
        return Reply(
            text=self.text,
            sent=self.sent,
            first=self.stamps[0] if self.stamps else done,
            last=self.stamps[-1] if self.stamps else done,
            done=done,
            prompt_tokens=self.usage.prompt_tokens,
            cached_tokens=self.timings.cache_n if cached is None else cached,
            completion_tokens=max(len(self.stamps), self.usage.completion_tokens or 0),
        )


class Client:
    """Asks one server for greedy streamed replies and times them."""

    def __init__(self, http: httpx.AsyncClient, dialect: Dialect, model: str, ignore_eos: bool) -> None:
        self.http = http
        self.dialect = dialect
        self.options: dict[str, object] = {
            "model": model,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ignore_eos:
            self.options["ignore_eos"] = True

    async def ask(self, conversation: Conversation, max_tokens: int) -> Reply:
        """Sends one request and streams the reply. Raises ServerFailed."""
        body = self.options | {"max_tokens": max_tokens} | self.dialect.prompt(conversation)
        watch = Stopwatch()
        async for event in streamed(self.http, self.dialect.path, body, Event):
            watch.take(event)
        return watch.reply()


@dataclass(frozen=True, slots=True)
class ScenarioRow:
    """One scenario. Token counts are one number a request, in the order of sending; `None` was not reported."""

    contender: str
    scenario: str
    requests: int
    ttft_ms_median: float
    ttft_ms_p95: float
    tpot_ms_median: float | None
    tpot_ms_p95: float | None
    prompt_tokens: list[int | None]
    cached_tokens: list[int | None]
    wall_s: float  # median over the rounds, from the first request sent to the last reply done
    tokens_per_s: float  # new tokens of a round over its wall time, median over the rounds
    seed: int


def summarise(contender: str, scenario: str, rounds: Sequence[Sequence[Reply]], seed: int) -> ScenarioRow:
    replies = [reply for replies in rounds for reply in replies]
    ttft = [reply.ttft * 1e3 for reply in replies]
    tpot = [reply.tpot * 1e3 for reply in replies if reply.tpot is not None]
    walls = [max(r.done for r in replies) - min(r.sent for r in replies) for replies in rounds]
    tokens = [sum(reply.completion_tokens for reply in replies) for replies in rounds]
    return ScenarioRow(
        contender=contender,
        scenario=scenario,
        requests=len(replies),
        ttft_ms_median=round(statistics.median(ttft), 1),
        ttft_ms_p95=round(p95(ttft), 1),
        tpot_ms_median=round(statistics.median(tpot), 2) if tpot else None,
        tpot_ms_p95=round(p95(tpot), 2) if tpot else None,
        prompt_tokens=[reply.prompt_tokens for reply in replies],
        cached_tokens=[reply.cached_tokens for reply in replies],
        wall_s=round(statistics.median(walls), 3),
        tokens_per_s=round(statistics.median(n / wall for n, wall in zip(tokens, walls, strict=True)), 1),
        seed=seed,
    )


def p95(values: Iterable[float]) -> float:
    """The smallest value that at least 95 % of them do not exceed."""
    ordered = sorted(values)
    return ordered[math.ceil(0.95 * len(ordered)) - 1]


def share(row: ScenarioRow) -> str:
    """How much of the prompts came from the cache, over the requests for which the server said it."""
    known = [(c, p) for c, p in zip(row.cached_tokens, row.prompt_tokens, strict=True) if c is not None and p]
    return f"{sum(c for c, _ in known) / sum(p for _, p in known):.0%}" if known else "-"


def table(rows: Sequence[ScenarioRow]) -> Table:
    out = Table(title=f"{rows[0].contender}, seed {rows[0].seed}", box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("scenario", no_wrap=True)
    for heading in ("n", "TTFT ms", "p95", "ms/tok", "p95", "cached", "wall s", "tok/s"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(
            row.scenario,
            str(row.requests),
            f"{row.ttft_ms_median:.1f}",
            f"{row.ttft_ms_p95:.1f}",
            "-" if row.tpot_ms_median is None else f"{row.tpot_ms_median:.2f}",
            "-" if row.tpot_ms_p95 is None else f"{row.tpot_ms_p95:.2f}",
            share(row),
            f"{row.wall_s:.2f}",
            f"{row.tokens_per_s:.1f}",
        )
    return out


@dataclass(frozen=True, slots=True)
class TrafficOptions:
    """Everything that decides what is sent."""

    url: str
    label: str
    api: Api = Api.completions
    model: str | None = None  # the first that the server lists
    key: str | None = None
    words: tuple[str, ...] = ENGLISH
    scenarios: tuple[str, ...] = tuple(SCENARIOS)
    shape: Shape = field(default_factory=Shape)
    seed: int = 1
    repeat: int = 1
    ignore_eos: bool = True
    timeout: float = 600.0


async def measure(options: TrafficOptions, announce: Callable[[str], None] = lambda what: None) -> list[ScenarioRow]:
    """Drives the server and returns one row a scenario; `announce` hears the name of each part as it begins."""
    async with open_client(options.url, options.key, options.timeout) as http:
        model = options.model or (await first_model(http)).id
        client = Client(http, DIALECTS[options.api], model, options.ignore_eos)
        vocabulary = await calibrate(client.ask, options.words, str(options.seed))
        rounds: dict[str, list[list[Reply]]] = {}
        for number in range(options.repeat):
            traffic = Traffic(client.ask, vocabulary, options.shape, f"{options.seed} {number}")
            async for scenario, replies in play(traffic, options.scenarios, announce):
                rounds.setdefault(scenario, []).append(replies)
    return [summarise(options.label, scenario, replies, options.seed) for scenario, replies in rounds.items()]


def chosen_scenarios(names: str) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in chosen:
        if name not in SCENARIOS:
            raise typer.BadParameter(f"unknown scenario {name!r}, allowed: {', '.join(SCENARIOS)}")
    if not chosen:
        raise typer.BadParameter(f"no scenario, allowed: {', '.join(SCENARIOS)}")
    return chosen


def stream_counts(counts: str) -> tuple[int, ...]:
    try:
        chosen = tuple(int(count) for count in counts.split(","))
    except ValueError:
        raise typer.BadParameter(f"{counts!r}, wanted numbers with commas, such as 1,4") from None
    if min(chosen) < 1:
        raise typer.BadParameter(f"{min(chosen)} streams, wanted at least 1")
    return chosen


def watched(options: TrafficOptions) -> list[ScenarioRow]:
    """`measure` with a progress bar on the error stream."""
    num_parts = len(set(options.scenarios) | {NEEDS[name] for name in options.scenarios if name in NEEDS})
    with progress_bar() as progress:
        task = progress.add_task("calibrate", total=num_parts * options.repeat + 1)

        def announce(scenario: str) -> None:
            progress.update(task, description=scenario, advance=1)

        return asyncio.run(measure(options, announce))


def serve(
    url: Annotated[str, typer.Option(help="Where the server listens, such as http://127.0.0.1:8000.")],
    label: Annotated[str, typer.Option(help="Name of the contender in the report; the URL if left out.")] = "",
    api: Annotated[Api, typer.Option(help="Raw text with role markers, or chat messages.")] = Api.completions,
    model: Annotated[str, typer.Option(help="Model to ask for; the first that the server lists if left out.")] = "",
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the API key.", exists=True, dir_okay=False)
    ] = None,
    scenarios: Annotated[str, typer.Option(help="Which to run, with commas.")] = ",".join(SCENARIOS),
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Model folder: write prompts with its one-token words, not with English.", file_okay=False),
    ] = None,
    system_tokens: Annotated[int, typer.Option(min=1, help="Length of system prompts.")] = 1000,
    turn_tokens: Annotated[int, typer.Option(min=1, help="Length of user messages.")] = 100,
    reply_tokens: Annotated[int, typer.Option(min=1, help="New tokens a request.")] = 16,
    decode_tokens: Annotated[int, typer.Option(min=2, help="New tokens a request in `decode`.")] = 64,
    samples: Annotated[int, typer.Option(min=1, help="Requests in `cold`, `repeat` and `regenerate`.")] = 3,
    turns: Annotated[int, typer.Option(min=3, help="Turns in `grow`.")] = 6,
    conversations: Annotated[int, typer.Option(min=2, help="Conversations in `shared`, `burst`, `return`.")] = 6,
    streams: Annotated[str, typer.Option(help="Numbers of parallel requests in `decode`, with commas.")] = "1,4",
    repeat: Annotated[int, typer.Option(min=1, help="Rounds, each with new text.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the text.")] = 1,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos/--stop-at-eos", help="Ask for full-length replies (not an OpenAI field).")
    ] = True,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for the next byte.")] = 600,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Measure an OpenAI-compatible server on the prompts that a prefix cache meets.

    cold        prompts never seen before
    repeat      the same again
    grow        a conversation, turn by turn
    regenerate  its last turn again
    edit        one of its earlier messages replaced
    shared      conversations with one system prompt, one by one
    burst       more of them, all at once
    return      the old ones continue
    decode      long replies, one and several at once
    """
    shape = Shape(
        system=system_tokens,
        turn=turn_tokens,
        reply=reply_tokens,
        decode=decode_tokens,
        samples=samples,
        turns=turns,
        conversations=conversations,
        streams=stream_counts(streams),
    )
    try:
        options = TrafficOptions(
            url=server_url(url),
            label=label or url,
            api=api,
            model=model or None,
            key=api_key_file.read_text().strip() if api_key_file else None,
            words=one_token_words(tokenizer) if tokenizer else ENGLISH,
            scenarios=chosen_scenarios(scenarios),
            shape=shape,
            seed=seed,
            repeat=repeat,
            ignore_eos=ignore_eos,
            timeout=timeout,
        )
        rows = watched(options)
    except HybridCacheError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    Console().print(table(rows))
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
