"""Cache on against cache off over HTTP: two real servers, and a seeded mix of everything that the API takes.

    mix ── bursts of requests ──► server with a cache ── reply ──► the same, put plainly ──► server without ──► equal?
     ▲                                    │
     └── answers, ids of messages ◄───────┘

An answer that is not labelled as approximate must be equal in every choice: text, tool calls, finish, tokens, and all
log-probabilities as floats. Of a choreography whose reply says `exact`, the plain request has the same messages, in the
order that the reply used, with texts in place of references. What one server refuses, the other has to refuse.

The run has phases, each with a fresh server and budget, down to one that holds two sequences while a dozen come in.
What happens there (evictions, preemptions) is read from the server, and the report says what never happened.
"""

import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from rich import box
from rich.progress import Progress
from rich.table import Table

from hybrid_cache.api import schemas
from hybrid_cache.arena import Geometry, Kind
from hybrid_cache.bench.serve import Details, ServerFailed, refused, unreachable
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.layout import TILE
from hybrid_cache.models import loading
from hybrid_cache.models.training.dialogues import KINDS, SYSTEM, scenario

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SHOWN = 5  # differing requests in the report, in full
CROWD = 12
LISTS = 4  # of messages side by side that come back
LONG = 400  # characters of a message that fills a page
BEHIND = 16  # requests that the server without a cache may be behind
START_S = 600.0
STOP_S = 20.0
TAIL_LINES = 20

Json = dict[str, object]
T = TypeVar("T")


# What is reported


@dataclass(frozen=True, slots=True)
class Difference:
    """A request whose answer is not the one that the server without a cache gives. Bodies are as they were sent."""

    request: int  # from 0, in the order of sending
    phase: str
    what: str  # the first place in which they differ
    path: str
    body: Json
    plain_path: str
    plain_body: Json


@dataclass(slots=True)
class Counts:
    """Of one phase, or of all. An answer is one choice; tokens are those whose log-probabilities were compared."""

    name: str
    budget: str
    requests: int = 0
    compared: int = 0
    differing: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    evictions: int = 0
    preemptions: int = 0
    mixed: dict[str, int] = field(default_factory=dict)  # requests that had this, or ended so

    def __add__(self, other: "Counts") -> "Counts":
        sums = {name: getattr(self, name) + getattr(other, name) for name in NUMBERS}
        mixed = dict((Counter(self.mixed) + Counter(other.mixed)).most_common())
        return Counts(self.name, self.budget, **sums, mixed=mixed)


NUMBERS = {
    "requests": "requests",
    "compared": "answers compared",
    "differing": "answers that differ",
    "tokens": "tokens compared",
    "prompt_tokens": "prompt tokens",
    "cached_tokens": "of these cached",
    "evictions": "evictions",
    "preemptions": "preemptions",
}


@dataclass(frozen=True, slots=True)
class HttpReport:
    """What a run over HTTP gave. `replay` is all that the server with a cache was sent up to the first difference."""

    model: str
    dtype: str
    seed: int
    seconds: float
    total: Counts
    phases: tuple[Counts, ...]
    differences: tuple[Difference, ...] = ()  # the first few
    replay: tuple[Json, ...] = ()

    @property
    def exact(self) -> bool:
        return self.total.compared > 0 and not self.total.differing

    @property
    def untried(self) -> tuple[str, ...]:
        """What a run should meet and this one did not."""
        names = ("compared", "cached_tokens", "evictions", "preemptions")
        return tuple(NUMBERS[name] for name in names if not getattr(self.total, name))


def table(report: HttpReport) -> Table:
    """A column for each phase, and one for the whole run."""
    out = Table(title=f"over HTTP, cache on against cache off: {report.model} {report.dtype}, seed {report.seed}")
    out.box, out.caption = box.SIMPLE_HEAD, _verdict(report)
    columns = [*report.phases, report.total]
    out.add_column("")
    for column in columns:
        out.add_column(column.name, justify="right")
    out.add_row("budget", *(column.budget for column in columns))
    for name, shown in NUMBERS.items():
        out.add_row(shown, *(f"{getattr(c, name):,}" for c in columns), end_section=name == "preemptions")
    for name in report.total.mixed:
        out.add_row(name, *(f"{c.mixed.get(name, 0):,}" for c in columns))
    return out


def _verdict(report: HttpReport) -> str:
    lines = ["Every answer that was not labelled approximate is equal."]
    if not report.exact:
        lines = [f"NOT EXACT: {report.total.differing:,} answers differ.", *(d.what for d in report.differences[:1])]
    lines += [f"NOT TRIED: {name}, there were none." for name in report.untried]
    return "\n".join([*lines, f"{report.seconds:.0f} s"])


# The run


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run with a server of its own."""

    name: str
    share: float  # of all requests
    bursts: tuple[int, ...]  # requests in flight
    most_characters: int  # of a prompt, about
    answers: tuple[int, ...]  # tokens
    sequences: int = 0  # that the budget holds; 0 is the budget asked for
    tokens: int = 0  # of such a sequence
    crowds: bool = False  # at times all in flight have long answers, more than there is room for


PHASES = (
    Phase("roomy", 0.5, (1, 1, 1, 2, 3, 4, 6, 9, 12), 9000, (1, 2, 4, 8, 16, 24)),
    Phase("snug", 0.25, (1, 1, 2, 4, 8, 12), 6000, (1, 2, 4, 8, 16, 70), sequences=4, tokens=2048),
    Phase("tiny", 0.25, (1, 2, 4, 8, 12), 1600, (2, 8, 24, 70, 140), sequences=2, tokens=640, crowds=True),
)


@dataclass(frozen=True, slots=True)
class Options:
    """How the servers are started."""

    model: str | None = None  # the embedded one
    dtype: str = "auto"
    backend: str = "auto"
    policy: str = "ours"
    threads: int = 1

    def command(self, *more: str) -> list[str]:
        program = [sys.executable, "-c", PROGRAM, "serve", "--port", "0"]
        named = [] if self.model is None else [self.model]
        chosen = ["--dtype", self.dtype, "--backend", self.backend, "--threads", str(self.threads)]
        return [*program, *named, *chosen, "--drain-timeout", "0", *more]


def compare_http(
    model: str | None,
    num_requests: int,
    seed: int,
    *,
    dtype: str = "auto",
    backend: str = "auto",
    budget: str | None = None,
    policy: str = "ours",
    threads: int = 1,
    progress: Progress | None = None,
    phases: Sequence[Phase] = PHASES,
) -> HttpReport:
    """Starts the servers, sends and compares; all of them have ended when it returns or raises.

    budget: of the phase that is not short of memory. Raises ConfigError, ModelError or ServerFailed.
    """
    if num_requests < len(phases):
        raise ConfigError(f"{num_requests} requests, at least {len(phases)} are needed, one for each phase")
    started = time.monotonic()
    options = Options(model, dtype, backend, policy, threads)
    budgets = [_budget(options, phase, budget or "512MiB") for phase in phases]
    tallies: list[Tally] = []
    with ExitStack() as stack:
        plain = stack.enter_context(server(options.command("--no-prefix-cache")))
        for phase, size, number in zip(phases, budgets, _shares(phases, num_requests), strict=True):
            tally = Tally(Counts(phase.name, size), sum(t.counts.requests for t in tallies))
            with server(options.command("--budget", size, "--policy", policy)) as cached:
                advance = _advance(progress, f"over HTTP, {phase.name}", number)
                asyncio.run(
                    _drive(cached.url(), plain.url(), Mix(f"{seed} {phase.name}", phase), number, tally, advance)
                )
            tallies.append(tally)
    return _report(model, dtype, seed, tallies, time.monotonic() - started)


def compare_servers(
    cached_url: str, plain_url: str, num_requests: int, seed: int, *, progress: Progress | None = None
) -> HttpReport:
    """The same with two servers that run already, in one phase. Raises ServerFailed."""
    started, tally = time.monotonic(), Tally(Counts("given", ""))
    advance = _advance(progress, "over HTTP", num_requests)
    asyncio.run(_drive(cached_url, plain_url, Mix(f"{seed} given", PHASES[0]), num_requests, tally, advance))
    return _report(cached_url, "", seed, [tally], time.monotonic() - started)


def _advance(progress: Progress | None, name: str, total: int) -> Callable[[], None]:
    if progress is None:
        return lambda: None
    task = progress.add_task(name, total=total)
    return lambda: progress.advance(task)


def _shares(phases: Sequence[Phase], num_requests: int) -> list[int]:
    """Requests of each phase, at least one."""
    most = [max(1, int(phase.share / sum(p.share for p in phases) * num_requests)) for phase in phases[1:]]
    return [num_requests - sum(most), *most]


def _budget(options: Options, phase: Phase, asked: str) -> str:
    if not phase.sequences:
        return asked
    path = loading.embedded_path() if options.model is None else loading.resolve(options.model)
    spec = loading.describe(loading.load_config(path), dtype=options.dtype).cache_spec
    geometry = Geometry.of(spec, 1 << 50)
    pages = phase.tokens // TILE + 2
    one = pages * geometry.stride_bytes(Kind.PAGE) + geometry.stride_bytes(Kind.SLOT)
    return str(phase.sequences * one)


def _report(model: str | None, dtype: str, seed: int, tallies: Sequence["Tally"], seconds: float) -> HttpReport:
    found = sorted((d for t in tallies for d in t.differences), key=lambda d: d.request)
    first = next((t for t in tallies if t.differences), None)
    replayed = () if first is None else tuple(first.sent[: found[0].request - first.first + 1])
    name = "embedded" if model is None else model
    counts = tuple(replace(t.counts, mixed=dict(t.mixed)) for t in tallies)
    total = sum(counts, Counts("all", ""))
    return HttpReport(name, dtype, seed, seconds, total, counts, tuple(found[:SHOWN]), replayed)


# Servers

# A server ends with the pipe that it reads from, so it never outlives a run that was killed.
PROGRAM = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
from hybrid_cache.api.cli import main
main()
"""


class Server:
    """A process that serves, and the file that it logs to."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self._log = log

    def url(self) -> str:
        """Waits until it listens. Raises ServerFailed when it ends before, or takes too long."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"^curl (http://\S+)/v1/", self._log.read_text(errors="replace"), re.MULTILINE):
                return found[1]
            time.sleep(0.05)
        raise ServerFailed("the server did not start")

    def tail(self) -> str:
        """How it fares, and the last lines that it has written."""
        code = self.process.poll()
        state = "runs" if code is None else f"has ended with code {code}"
        return "\n".join(
            [f"it {state}; its last words:", *self._log.read_text(errors="replace").splitlines()[-TAIL_LINES:]]
        )


@contextmanager
def server(command: Sequence[str]) -> Iterator[Server]:
    """Starts a process that is gone when the block ends, however it ends. A ServerFailed of the block gets its log."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
        started = Server(process, log)
        try:
            yield started
        except ServerFailed as error:
            raise ServerFailed(f"{error}\n{' '.join(command[3:])}: {started.tail()}") from error
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            finally:
                process.kill()
                process.wait()


async def _counts(http: httpx.AsyncClient) -> tuple[int, int]:
    """Evictions and preemptions of a server so far."""
    try:
        response = await http.get("/metrics")
    except httpx.TransportError as error:
        raise unreachable(http, error) from error
    sums = Counter[str]()
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            sums[sample.name] += int(sample.value)
    return sums["hybrid_cache_evictions_total"], sums["hybrid_cache_preemptions_total"]


# Requests and replies


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to the server with a cache."""

    path: str
    body: Json
    labels: tuple[str, ...]
    messages: tuple[Json, ...] = ()  # of a chat, with texts in place of references
    delay_s: float = 0.0  # from the start of its burst
    events: int | None = None  # read of a stream before the connection is dropped
    seconds: float | None = None  # the same by time

    @property
    def aborted(self) -> bool:
        return self.events is not None or self.seconds is not None

    @property
    def salt(self) -> str:
        return str(self.body.get("cache_salt", ""))

    def json(self) -> Json:
        """All that is needed to send it again."""
        how = {"delay_s": self.delay_s, "events": self.events, "seconds": self.seconds}
        return {"path": self.path, "body": self.body, **how}

    def plainly(self, order: Sequence[int]) -> Json:
        """The body for a server that knows of no choreography, with the messages in this order."""
        body = {k: v for k, v in self.body.items() if k not in ("choreography", "stream", "stream_options")}
        return {**body, "messages": [self.messages[i] for i in order]} if self.messages else body


class Call(BaseModel):
    function: schemas.FunctionOut


class Said(BaseModel):
    """A message, or what an event adds to it."""

    content: str | None = None
    tool_calls: list[Call] | None = None


class Logprobs(BaseModel):
    """In the form of chat, or that of text completions."""

    content: list[schemas.ChatLogprob] = []
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    def entries(self) -> list[Json]:
        rows = zip(self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset, strict=True)
        texts: list[Json] = [{"token": t, "logprob": p, "top": top, "offset": at} for t, p, top, at in rows]
        return texts + [entry.model_dump() for entry in self.content]


class Piece(BaseModel):
    """A choice, or what an event adds to it."""

    index: int
    text: str = ""
    message: Said | None = None
    delta: Said | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    prompt_tokens_details: Details | None = None


class Event(BaseModel):
    """A whole reply, or an event of a stream."""

    choices: list[Piece] = []
    usage: Usage | None = None
    choreography: schemas.ChoreographyReport | None = None
    prompt_token_ids: list[int] | None = None
    error: object = None


@dataclass(slots=True)
class Choice:
    """One answer, as it grows."""

    text: str = ""
    calls: list[Json] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    stop: str | int | None = None

    def take(self, piece: Piece) -> None:
        said = piece.message or piece.delta or Said()
        self.text += piece.text + (said.content or "")
        self.calls += [call.function.model_dump() for call in said.tool_calls or ()]
        self.logprobs += piece.logprobs.entries() if piece.logprobs else []
        self.tokens += piece.token_ids or []
        self.finish, self.stop = piece.finish_reason or self.finish, piece.stop_reason or self.stop

    def json(self) -> Json:
        said = {"text": self.text, "tool_calls": self.calls, "logprobs": self.logprobs, "tokens": self.tokens}
        return {**said, "finish": self.finish, "stop": self.stop}

    def core(self) -> Json:
        """What does not depend on whether the answer was asked for as chat or as text."""
        return {"tokens": self.tokens, "logprobs": [entry["logprob"] for entry in self.logprobs]}


@dataclass(slots=True)
class Reply:
    """What came back, whole or as events."""

    status: int
    error: str = ""
    choices: dict[int, Choice] = field(default_factory=dict)
    told: schemas.ChoreographyReport | None = None
    prompts: list[list[int]] = field(default_factory=list)  # tokens, where the server tells
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def take(self, event: Event) -> None:
        for piece in event.choices:
            self.choices.setdefault(piece.index, Choice()).take(piece)
            self.prompts += [piece.prompt_token_ids] if piece.prompt_token_ids else []
        self.prompts += [event.prompt_token_ids] if event.prompt_token_ids else []
        self.told = event.choreography or self.told
        self.error = str(event.error) if event.error else self.error
        if event.usage is not None:
            details = event.usage.prompt_tokens_details
            self.prompt_tokens = event.usage.prompt_tokens
            self.cached_tokens = (details.cached_tokens if details else None) or 0

    def json(self) -> Json:
        told: Json = {"status": self.status, "error": self.error}
        return told | {f"choice {i}": choice.json() for i, choice in sorted(self.choices.items())}

    def core(self) -> Json:
        return {f"choice {i}": choice.core() for i, choice in sorted(self.choices.items())}


async def ask(http: httpx.AsyncClient, path: str, body: Mapping[str, object]) -> Reply:
    """Raises ServerFailed where no answer comes, or the server says that it is broken."""
    try:
        async with http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                if response.status_code == 503:
                    raise refused(response)
                return Reply(response.status_code, error=response.text)
            reply = Reply(200)
            if not body.get("stream"):
                reply.take(Event.model_validate(json.loads(await response.aread())))
                return reply
            ended = False
            async for data in _events(response):
                ended = data == "[DONE]"
                reply.take(Event() if ended else Event.model_validate(json.loads(data)))
            reply.error = reply.error or ("" if ended else "the stream broke off")
            return reply
    except httpx.TransportError as error:
        raise unreachable(http, error) from error


async def hang_up(http: httpx.AsyncClient, asked: Asked) -> None:
    """Asks, and drops the connection before the end."""
    try:
        async with asyncio.timeout(asked.seconds), http.stream("POST", asked.path, json=asked.body) as response:
            left = asked.events
            async for _ in _events(response):
                left = None if left is None else left - 1
                if left is not None and left <= 0:
                    return
    except TimeoutError:
        return
    except httpx.TransportError as error:
        raise unreachable(http, error) from error


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield line.removeprefix("data:").strip()


# The comparison


@dataclass(slots=True)
class Tally:
    """What is known of one phase, as it goes."""

    counts: Counts
    first: int = 0  # number of its first request
    mixed: Counter[str] = field(default_factory=Counter)
    sent: list[Json] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    def note(self, asked: Asked) -> int:
        """Counts a request that is about to be sent -> its number."""
        self.sent.append(asked.json())
        self.counts.requests += 1
        self.mixed.update(asked.labels)
        return self.first + self.counts.requests - 1


@dataclass(slots=True)
class Comparison:
    """Puts what the server with a cache has answered to the one without, and counts."""

    plain: httpx.AsyncClient
    tally: Tally

    async def check(self, number: int, asked: Asked, got: Reply) -> None:
        self.tally.counts.prompt_tokens += got.prompt_tokens
        self.tally.counts.cached_tokens += got.cached_tokens
        if got.told is not None and got.told.fidelity != "exact":
            self._check_label(number, asked, got.told)
            return
        order = _order(asked, got)
        body = asked.plainly(order)
        if got.status != 200 and "choreography" in asked.body:
            body["choreography"] = asked.body["choreography"]
        want = await ask(self.plain, asked.path, body)
        if got.status != 200 or want.status != 200:
            self._check_refused(number, asked, body, got, want)
            return
        if list(order) != sorted(order):
            self.tally.mixed["order: any, reordered"] += 1
        elif got.prompts and want.prompts and got.prompts[0] != want.prompts[0]:
            await self._check_tokens(number, asked, body, got)
            return
        self.tally.mixed["choreography, exact" if got.told else "plain"] += 1
        self._compare(number, asked, asked.path, body, got.json(), want.json())

    def _check_label(self, number: int, asked: Asked, told: schemas.ChoreographyReport) -> None:
        self.tally.mixed[f"labelled {told.fidelity}"] += 1
        style = asked.body.get("choreography")
        wanted = style.get("fidelity") if isinstance(style, dict) else None
        if told.fidelity != wanted:
            what = f"the answer is {told.fidelity}, asked for was {wanted or 'exact'}"
            self._differs(number, asked, asked.path, {}, what, 1)

    def _check_refused(self, number: int, asked: Asked, body: Json, got: Reply, want: Reply) -> None:
        if got.status == 400 and want.status == 200 and "cache budget" in got.error:
            self.tally.mixed["too long for the budget"] += 1
        elif got.status == want.status:
            self.tally.mixed["refused by both"] += 1
        else:
            what = f"status {got.status} {got.error}, without a cache {want.status} {want.error}"
            self._differs(number, asked, asked.path, body, what[:500], 1)

    async def _check_tokens(self, number: int, asked: Asked, body: Json, got: Reply) -> None:
        """A choreography keeps the tokens of an answer, which may be others than those of its text: these are sent."""
        if got.told is None:
            self._differs(number, asked, asked.path, body, "the tokens of the prompt", len(got.choices))
            return
        self.tally.mixed["choreography, exact, by its tokens"] += 1
        skipped = ("messages", "tools", "tool_choice", "top_logprobs", "add_generation_prompt", "prompt_cache_options")
        body = {k: v for k, v in body.items() if k not in skipped}
        body |= {"prompt": got.prompts[0], "logprobs": asked.body.get("top_logprobs", 0), "return_token_ids": True}
        body["max_tokens"] = body.pop("max_completion_tokens", body.get("max_tokens"))
        want = await ask(self.plain, TEXT, body)
        self._compare(number, asked, TEXT, body, got.core(), want.core())

    def _compare(self, number: int, asked: Asked, path: str, body: Json, got: Json, want: Json) -> None:
        names = [name for name in got if name.startswith("choice")]
        self.tally.counts.compared += len(names)
        self.tally.counts.tokens += sum(len(c["logprobs"]) for n in names if isinstance(c := got[n], dict))
        if _same(got, want):
            return
        num = sum(not _same(got[name], want.get(name)) for name in names)
        self._differs(number, asked, path, body, next(_differences(got, want), "?"), max(1, num))

    def _differs(self, number: int, asked: Asked, path: str, body: Json, what: str, num: int) -> None:
        self.tally.counts.differing += num
        found = Difference(number, self.tally.counts.name, what, asked.path, asked.body, path, body)
        self.tally.differences.append(found)


def _same(a: object, b: object) -> bool:
    """Equal as JSON: floats in every bit, and NaN like NaN."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _differences(got: object, want: object, place: str = "") -> Iterator[str]:
    """Where two values differ, and how, from left to right."""
    if _same(got, want):
        return
    if isinstance(got, dict) and isinstance(want, dict):
        for key in [*got, *(k for k in want if k not in got)]:
            yield from _differences(got.get(key), want.get(key), f"{place} {key}".strip())
    elif isinstance(got, list) and isinstance(want, list) and len(got) == len(want):
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            yield from _differences(a, b, f"{place}[{i}]")
    else:
        yield f"{place}: {got!r:.200}, without a cache {want!r:.200}"


def _order(asked: Asked, got: Reply) -> Sequence[int]:
    """The order in which a reply has used the messages, by their place in the request."""
    given = range(len(asked.messages))
    if got.told is None or not all(got.told.messages):
        return given
    left = list(given)
    used = [item.message for item in got.told.plan.items if item.message]
    order = []
    for name in used:
        order.append(next(i for i in left if got.told.messages[i] == name))
        left.remove(order[-1])
    return order


async def _drive(
    cached_url: str, plain_url: str, mix: "Mix", num_requests: int, tally: Tally, advance: Callable[[], None]
) -> None:
    # A connection for each request: a request on a kept one can meet the server closing it, and is lost.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    timeout = httpx.Timeout(600, connect=5)
    async with (
        httpx.AsyncClient(base_url=cached_url, timeout=timeout, limits=limits) as cached,
        httpx.AsyncClient(base_url=plain_url, timeout=timeout, limits=limits) as plain,
    ):
        await drive(cached, plain, mix, num_requests, tally, advance)
        tally.counts.evictions, tally.counts.preemptions = await _counts(cached)


async def drive(
    cached: httpx.AsyncClient,
    plain: httpx.AsyncClient,
    mix: "Mix",
    num_requests: int,
    tally: Tally,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Sends bursts to the one while the other still answers those before. Raises ServerFailed."""
    comparison, room = Comparison(plain, tally), asyncio.Semaphore(BEHIND)

    async def send(asked: Asked) -> Reply | None:
        await asyncio.sleep(asked.delay_s)
        if not asked.aborted:
            return await ask(cached, asked.path, asked.body)
        await hang_up(cached, asked)
        return None

    async def check(number: int, asked: Asked, reply: Reply) -> None:
        try:
            await comparison.check(number, asked, reply)
        finally:
            room.release()
            advance()

    try:
        async with asyncio.TaskGroup() as checks:
            while tally.counts.requests < num_requests:
                burst = mix.burst(num_requests - tally.counts.requests)
                numbers = [tally.note(asked) for asked in burst]
                async with asyncio.TaskGroup() as sends:
                    replies = [sends.create_task(send(asked)) for asked in burst]
                for number, asked, task in zip(numbers, burst, replies, strict=True):
                    if (reply := task.result()) is None:
                        advance()
                        continue
                    mix.learn(asked, reply)
                    await room.acquire()
                    checks.create_task(check(number, asked, reply))
    except* ServerFailed as failures:
        raise _first(failures) from None


def _first(failures: BaseExceptionGroup[ServerFailed]) -> ServerFailed:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ServerFailed)
    return error


# The mix

ODD = (
    "",
    " ",
    "\n\n  \n",
    "\nYes.\n",
    "x",
    "Zoë 🐈‍⬛ naïve ﷽ \u202e abc \u0000 ünï ﬁ ﾊﾝ " * 4,
    "日本語のテキスト、とても短い。",
    "<|im_end|>\n<|im_start|>assistant\nI am<|im_end|>",
    "    indented\n\tand tabbed   ",
    "9999999999 0.1 -3e8",
)
STOPS = (".", " is", "the", "code for", " now", "e", " the box", "\n", "0", "know")
TOOLS: list[Json] = [
    {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"n": {}}}}},
]
CALL: Json = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "box"}'}}
MARK: Json = {"mode": "explicit"}
WRONG: tuple[Json, ...] = (
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
    {"structured_outputs": {"regex": "a+"}},
    {"tools": TOOLS, "tool_choice": "required"},
    {"choreography": {"seam": 7}},
    {"choreography": {"fidelity": "best"}},
    {"choreography": {"fidelity": "composed"}, "continue_final_message": True},
    {"n": 0},
    {"temperature": -1},
    {"logit_bias": {"2147483000": 1}},
    {"stop_token_ids": [-1]},
    {"best_of": 7},
    {"suffix": "the end"},
)
NARROWED: tuple[Json, ...] = ({"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.05})


class Texts:
    """A few texts that come back again and again: whole, shortened, with an end that others have too, edited."""

    def __init__(self, rng: random.Random, most_characters: int) -> None:
        self._rng = rng
        self._most = most_characters
        self._stock = [self._sentences() for _ in range(5)]

    def any(self) -> str:
        """The content of a message."""
        rng, kind = self._rng, self._rng.random()
        if rng.random() < 0.02:
            self._stock[rng.randrange(2, len(self._stock))] = self._sentences()
        if kind < 0.6:
            return " ".join(rng.choice(self._stock))
        if kind < 0.8:
            return self.varied(" ".join(rng.choice(self._stock)))
        return self.question() if kind < 0.93 else rng.choice(ODD)

    def new(self) -> str:
        return " ".join(self._sentences())

    def varied(self, text: str) -> str:
        """The text with another end, or its beginning, or one sentence of it changed."""
        rng, sentences = self._rng, text.split(". ")
        way = rng.choice(("longer", "longer", "shorter", "edited"))
        if way == "longer":
            return self.longer(text)
        if way == "shorter":
            return ". ".join(sentences[: rng.randint(1, len(sentences))])
        sentences[rng.randrange(len(sentences))] = rng.choice(("No", "The lamp is green", "It is 7 now"))
        return ". ".join(sentences)

    def longer(self, text: str) -> str:
        """The text and more, mostly the same as the last time."""
        return f"{text} {' '.join(self._stock[len(text) % 2][:4])}"

    def question(self) -> str:
        about = scenario(self._rng.choice(KINDS), self._rng)
        about.tell(self._rng)
        asked = about.ask(self._rng)
        return asked[0] if asked else "Who are you?"

    def _sentences(self) -> list[str]:
        """Sentences of one text."""
        rng, sentences = self._rng, list[str]()
        for _ in range(rng.choice((2, 8, 12, 12, 16, 16, 20, 40, 160))):
            about = scenario(rng.choice(KINDS), rng)
            sentences += [about.tell(rng) for _ in range(3 if sentences else 1)][: 1 + rng.randrange(3)]
            if sum(map(len, sentences)) > self._most // 3:
                break
        return sentences


class Mix:
    """Seeded requests that share, branch, repeat and grow. What they are depends on earlier answers as well."""

    def __init__(self, seed: str, phase: Phase) -> None:
        self.rng = random.Random(seed)
        self._phase = phase
        self._texts = Texts(self.rng, phase.most_characters)
        self._talks: list[tuple[Json, ...]] = []  # conversations, most of which end with an answer
        self._lists: list[tuple[list[Json], int | None]] = []  # messages side by side, as choreographies take them
        self._prompts: list[str] = []
        self._tokens: list[list[int]] = [list(range(20, 120))]  # prompts and their answers
        self._named: dict[str, dict[str, Json]] = {}  # by tenant and id: messages, or answers
        self._answers: set[str] = set()  # ids
        self._sent: list[Asked] = []

    def burst(self, most: int) -> list[Asked]:
        """The next requests, which are to be in flight together."""
        if self._phase.crowds and (not self._sent or self.rng.random() < 0.15):
            return [self._crowded(self._next()) for _ in range(min(most, CROWD))]
        number = min(most, self.rng.choice(self._phase.bursts))
        return [replace(self._next(), delay_s=self.rng.choice((0, 0, 0.005, 0.02, 0.06))) for _ in range(number)]

    def _crowded(self, asked: Asked) -> Asked:
        longest = max(self._phase.answers)
        body = {**asked.body, "max_tokens": longest, "min_tokens": longest, "ignore_eos": True}
        for name in ("max_completion_tokens", "stop", "stop_token_ids", "include_stop_str_in_output"):
            body.pop(name, None)
        return replace(asked, body=body, labels=(*asked.labels, "crowded"))

    def learn(self, asked: Asked, reply: Reply) -> None:
        """Takes what later requests can go on from."""
        if reply.status != 200 or 0 not in reply.choices:
            return
        first = reply.choices[0]
        if asked.messages:
            said = _message("assistant", first.text)
            _keep(self.rng, self._talks, (*asked.messages, said))
            self._learn_names(asked, reply, said)
        elif isinstance(prompt := asked.body["prompt"], str):
            _keep(self.rng, self._prompts, prompt + first.text)
        if reply.prompts and reply.prompts[0]:
            _keep(self.rng, self._tokens, reply.prompts[0] + first.tokens)

    def _learn_names(self, asked: Asked, reply: Reply, said: Json) -> None:
        if (told := reply.told) is None:
            return
        known = self._named.setdefault(asked.salt, {})
        for name, message in zip(told.messages, asked.messages, strict=True):
            if name is not None and name not in self._answers:
                known[name] = message
        if told.answer is not None:
            known[told.answer] = said
            self._answers.add(told.answer)

    # One request

    def _next(self) -> Asked:
        rng = self.rng
        makers = (self._talk, self._list, self._choreography, self._completion, self._wrong)
        if self._sent and rng.random() < 0.13:
            old = rng.choice(self._sent[-40:])
            asked = replace(old, labels=(*(n for n in old.labels if n != "aborted"), "exact repeat"))
            asked = replace(asked, events=None, seconds=None)
        else:
            (make,) = rng.choices(makers, (22, 27, 34, 14, 3))
            asked = make()
        asked = self._with_abort(asked) if rng.random() < 0.08 else asked
        self._sent.append(asked)
        return asked

    def _with_abort(self, asked: Asked) -> Asked:
        labels = (*asked.labels, "aborted")
        if self.rng.random() < 0.3:
            return replace(asked, labels=labels, seconds=self.rng.choice((0.001, 0.01, 0.03, 0.1)))
        body = {**asked.body, "stream": True, "max_tokens": max(self._phase.answers)}
        return replace(asked, body=body, labels=(*labels, "stream"), events=self.rng.choice((1, 1, 2, 3, 6, 12)))

    def _talk(self) -> Asked:
        """A conversation: a new one, or one that grows, is edited, branches, is asked again or is continued."""
        rng = self.rng
        way = rng.choice(("new", "grow", "grow", "grow", "edit", "branch", "again", "continue", "tools"))
        old = list(rng.choice(self._talks)) if self._talks else []
        size = sum(len(str(m.get("content"))) for m in old)
        if way == "new" or not old or size > self._phase.most_characters:
            return self._chat(self._opening(), ("new conversation",))
        if way == "again":
            return self._chat(old[:-1] or old, ("regenerated",))
        if way == "continue" and old[-1]["role"] == "assistant":
            old[-1] = {**old[-1], "content": str(old[-1]["content"])[: rng.randint(1, 12)]}
            return self._chat(old, ("continue_final_message",), continue_final_message=True)
        if way == "tools":
            called: list[Json] = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
            result: list[Json] = [{"role": "tool", "tool_call_id": "call_1", "content": self._texts.question()}]
            return self._chat([*old, *called, *result], ("tools", "tool results"), tools=TOOLS)
        if way == "edit":
            at = rng.randrange(len(old))
            old[at] = _message(str(old[at]["role"]), self._texts.varied(str(old[at].get("content") or "")))
            old = old if rng.random() < 0.5 else old[: at + 1]
        elif way == "branch":
            old = old[: rng.randint(1, len(old))]
        return self._chat([*old, _message("user", self._texts.any())], ("grown" if way == "grow" else f"{way}ed",))

    def _opening(self) -> list[Json]:
        rng = self.rng
        system = [_message("system", rng.choice((*SYSTEM, self._texts.any())))] if rng.random() < 0.6 else []
        return [*system, _message("user", self._texts.any())]

    def _list(self) -> Asked:
        """Messages side by side, as a choreography would have them, but exact."""
        return self._chat(self._side_by_side(exact=True), ("messages side by side",))

    def _side_by_side(self, *, exact: bool) -> list[Json]:
        """Messages of users, most of them as they stood side by side before, at times with a change.

        In most lists one message is longer for exact requests: it goes on where it ends for the others.
        """
        rng = self.rng
        if len(self._lists) < LISTS or rng.random() < 0.08:
            self._lists = [*self._lists, self._new_list()][-LISTS:]
        kept, at = rng.choice(self._lists)
        messages = list(kept)
        if at is not None and exact != (rng.random() < 0.03):
            messages[at] = _message("user", self._texts.longer(str(messages[at]["content"])))
        if rng.random() < 0.2:
            self._change(messages)
        return messages

    def _new_list(self) -> tuple[list[Json], int | None]:
        """-> messages, and which of them exact requests have longer."""
        rng = self.rng
        texts = [self._texts.any() for _ in range(rng.randint(1, 3))]
        texts[:0] = [self._texts.new()] if rng.random() < 0.7 else []
        while len(texts) > 1 and sum(map(len, texts)) > self._phase.most_characters:
            texts.pop()
        long = [i for i, text in enumerate(texts) if len(text) > LONG]
        at = rng.choice((long[0], *long)) if long and rng.random() < 0.85 else None
        return [_message("user", text) for text in texts], at

    def _change(self, messages: list[Json]) -> None:
        rng, at = self.rng, self.rng.randrange(len(messages))
        way = rng.choice(("shuffle", "vary", "swap", "more", "fewer", "role"))
        if way == "shuffle":
            rng.shuffle(messages)
        elif way == "vary":
            messages[at] = {**messages[at], "content": self._texts.varied(str(messages[at]["content"]))}
        elif way == "swap":
            messages[at] = _message("user", self._texts.any())
        elif way == "more":
            messages.append(_message("user", self._texts.question()))
        elif way == "fewer" and len(messages) > 1:
            del messages[at]
        elif way == "role":
            messages[at] = {**messages[at], "role": rng.choice(("system", "assistant", "user"))}

    def _choreography(self) -> Asked:
        rng = self.rng
        if rng.random() < 0.1:
            return self._chat(self._side_by_side(exact=True), ("choreography: by ids alone",), refer=1.0)
        fidelity = rng.choice((*["composed"] * 5, "exact", "exact", "relocated"))
        messages = self._side_by_side(exact=fidelity == "exact")
        style: Json = {"fidelity": fidelity, "encode": rng.choice(("alone", "alone", "in_place"))}
        style["seam"] = rng.choice((*[0] * 9, 8, 16, 32, 64))
        labels = [f"choreography: {fidelity}"]
        for name, share, values in (
            ("order", 0.5 if fidelity == "exact" else 0.1, ("any",)),
            ("composition", 0.3, ("rotations", "permutations", "mean", "last")),
            ("positions", 0.15, ("leftmost",)),
        ):
            if rng.random() < share:
                style[name] = rng.choice(values)
                labels.append(f"{name}: {style[name]}")
        return self._chat(messages, tuple(labels), refer=rng.choice((0.0, 0.0, 0.5, 1.0)), choreography=style)

    def _chat(self, messages: Sequence[Json], labels: tuple[str, ...], refer: float = 0.0, **fields: object) -> Asked:
        rng, salt = self.rng, rng_salt(self.rng)
        messages = list(messages)
        if "choreography" not in fields and not refer and rng.random() < 0.12:
            self._mark(messages)
            labels = (*labels, "marked parts")
        options, more = self._options()
        body: Json = {"logprobs": True, "top_logprobs": rng.choice((0, 1, 3, 5)), **options, **fields}
        if salt:
            body["cache_salt"], more = salt, (*more, "cache_salt")
        if "tools" not in fields and "choreography" not in fields and rng.random() < 0.05:
            body["tools"], more = TOOLS, (*more, "tools")
        if rng.random() < 0.1:
            body["max_completion_tokens"] = body.pop("max_tokens")
        sent, resolved = self._with_references(messages, salt, refer)
        if any("ref" in m for m in sent):
            more = (*more, "refs")
            body["return_token_ids"] = True
        return Asked(CHAT, {**body, "messages": sent}, (*labels, *more), tuple(resolved))

    def _with_references(self, messages: list[Json], salt: str, share: float) -> tuple[list[Json], list[Json]]:
        """-> the messages with ids in place of some that the server knows, at times others before them; and in full."""
        rng, known = self.rng, self._named.get(salt, {})
        if share and known and rng.random() < 0.3:
            messages = [known[rng.choice(list(known))] for _ in range(rng.randint(1, 2))] + messages
        names = {_key(message): name for name, message in known.items()}
        sent: list[Json] = []
        for message in messages:
            name = names.get(_key(message))
            sent.append({"ref": name} if name is not None and rng.random() < share else message)
        return sent, messages

    def _mark(self, messages: list[Json]) -> None:
        """Splits the text of one message in parts, the first of which ends with a cache breakpoint."""
        at = self.rng.randrange(len(messages))
        content = messages[at].get("content")
        if not isinstance(content, str) or messages[at]["role"] == "tool":
            return
        middle = len(content) // 2
        mark = {**MARK, "ttl": "1s"} if self.rng.random() < 0.2 else MARK
        first: Json = {"type": "text", "text": content[:middle], "prompt_cache_breakpoint": mark}
        messages[at] = {**messages[at], "content": [first, {"type": "text", "text": content[middle:]}]}

    def _completion(self) -> Asked:
        rng = self.rng
        prompt, label = self._raw_prompt()
        options, labels = self._options()
        body: Json = {**options, "prompt": prompt, "logprobs": rng.choice((0, 1, 3, 5))}
        if rng.random() < 0.2:
            body["echo"] = True
            labels = (*labels, "echo", "prompt logprobs")
            if rng.random() < 0.3:
                del body["logprobs"]
                labels = labels[:-1]
            elif rng.random() < 0.3:
                body["max_tokens"] = 0
        if "n" in body and rng.random() < 0.5:
            body["best_of"], labels = body["n"], (*labels, "best_of")
        if rng.random() < 0.1:
            body["add_special_tokens"] = False
        if salt := rng_salt(rng):
            body["cache_salt"], labels = salt, (*labels, "cache_salt")
        return Asked(TEXT, body, ("text completion", label, *labels))

    def _raw_prompt(self) -> tuple[object, str]:
        rng = self.rng
        way = rng.choice(("text", "text", "texts", "tokens", "tokens", "lists of tokens"))
        if way == "text":
            return self._text(), "prompt: text"
        if way == "texts":
            return [self._text() for _ in range(rng.randint(2, 3))], "prompt: several texts"
        if way == "tokens":
            return self._token_prompt(), "prompt: token ids"
        return [self._token_prompt() for _ in range(rng.randint(2, 3))], "prompt: several of token ids"

    def _text(self) -> str:
        if self._prompts and self.rng.random() < 0.6:
            text = self.rng.choice(self._prompts)[: self._phase.most_characters]
            return text if self.rng.random() < 0.5 else self._texts.varied(text)
        return self._texts.any() or "x"

    def _token_prompt(self) -> list[int]:
        """The tokens of an earlier request, or some of them, at times near the edge of a tile."""
        rng, tokens = self.rng, self.rng.choice(self._tokens)[: self._phase.most_characters // 4]
        kept = rng.choice((len(tokens), len(tokens), rng.randint(1, len(tokens)), 63, 64, 65, 127, 128, 129))
        return tokens[:kept] + tokens[: rng.choice((0, 0, 1, 9))]

    def _options(self) -> tuple[Json, tuple[str, ...]]:
        rng = self.rng
        body: Json = {"temperature": 0, "max_tokens": rng.choice(self._phase.answers)}
        labels = list[str]()
        for label, share, make in OPTIONS:
            if rng.random() < share:
                body |= make(self)
                labels.append(label)
        return body, tuple(labels)

    def some_tokens(self, most: int) -> list[int]:
        """Tokens that are likely to be met."""
        return [self.rng.choice(self.rng.choice(self._tokens)[-30:]) for _ in range(self.rng.randint(1, most))]

    def _wrong(self) -> Asked:
        """What has to be refused, with or without a cache."""
        rng, foreign = self.rng, [name for known in self._named.values() for name in known]
        unknown = rng.choice(("msg_0", *foreign[:3]))
        strange: Json = {"cache_salt": "nobody", "ref": unknown}
        fields = {**rng.choice((*WRONG, strange))}
        if "best_of" in fields or "suffix" in fields:
            return Asked(TEXT, {"prompt": self._text(), **fields}, ("to be refused",))
        messages = [{"ref": fields.pop("ref")}] if "ref" in fields else [_message("user", self._texts.any())]
        return Asked(CHAT, {**fields, "messages": messages}, ("to be refused",), tuple(messages))


def rng_salt(rng: random.Random) -> str:
    return rng.choice((*[""] * 12, "a", "b"))


def _message(role: str, content: str) -> Json:
    return {"role": role, "content": content}


def _key(message: Json) -> str:
    return json.dumps(message, sort_keys=True)


def _keep(rng: random.Random, kept: list[T], new: T, most: int = 12) -> None:
    """Adds one, in the place of another when there are too many."""
    if len(kept) == most:
        kept.pop(rng.randrange(most))
    kept.append(new)


Make = Callable[[Mix], Json]
# Name, share of requests, fields.
OPTIONS: tuple[tuple[str, float, Make], ...] = (
    ("n > 1", 0.1, lambda m: {"n": m.rng.randint(2, 4)}),
    ("temperature 1 with a seed", 0.3, lambda m: {"temperature": 1.0, "seed": m.rng.randrange(1 << 20)}),
    ("top_p, top_k or min_p", 0.1, lambda m: m.rng.choice(NARROWED)),
    ("presence_penalty", 0.05, lambda m: {"presence_penalty": m.rng.choice((-1.0, 0.5, 2.0))}),
    ("frequency_penalty", 0.05, lambda m: {"frequency_penalty": m.rng.choice((-0.5, 0.3, 1.5))}),
    ("repetition_penalty", 0.05, lambda m: {"repetition_penalty": m.rng.choice((0.8, 1.1, 1.5))}),
    ("stop strings", 0.1, lambda m: {"stop": m.rng.sample(STOPS, m.rng.randint(1, 4))}),
    ("stop_token_ids", 0.07, lambda m: {"stop_token_ids": m.some_tokens(3)}),
    ("include_stop_str_in_output", 0.06, lambda m: {"include_stop_str_in_output": True, "stop": [".", " is"]}),
    ("logit_bias", 0.07, lambda m: {"logit_bias": {str(t): m.rng.choice((-100, -3, 2, 9)) for t in m.some_tokens(4)}}),
    ("min_tokens", 0.07, lambda m: {"min_tokens": m.rng.randint(1, 20)}),
    ("ignore_eos", 0.12, lambda m: {"ignore_eos": True}),
    ("special tokens shown", 0.05, lambda m: {"skip_special_tokens": False}),
    ("token ids returned", 0.7, lambda m: {"return_token_ids": True}),
    ("stream", 0.3, lambda m: {"stream": True, "stream_options": {"include_usage": True}}),
    ("cache mode explicit", 0.1, lambda m: {"prompt_cache_options": {"mode": "explicit"}}),
    ("cache mode implicit", 0.05, lambda m: {"prompt_cache_options": {"mode": "implicit", "ttl": "1s"}}),
)
