"""Replies of the server with a cache, compared with those of the one without to the same requests."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import httpx

from hybrid_cache.api.server.schemas.choreography import ChoreographyReport
from hybrid_cache.bench.common.http_client import ServerFailed, open_client
from hybrid_cache.bench.exactness.http.api import TEXT, Asked, Reply, ask, hang_up
from hybrid_cache.bench.exactness.http.mix import Mix
from hybrid_cache.bench.exactness.http.report import Counts, Difference, Json
from hybrid_cache.bench.exactness.http.servers import evictions_and_preemptions

BEHIND = 16  # requests that the server without a cache may be behind


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
    """Repeats on the server without a cache what the one with it has answered, and counts."""

    plain: httpx.AsyncClient
    tally: Tally

    async def check(self, number: int, asked: Asked, got: Reply) -> None:
        self.tally.counts.prompt_tokens += got.prompt_tokens
        self.tally.counts.cached_tokens += got.cached_tokens
        if got.report is not None and got.report.fidelity != "exact":
            self._check_label(number, asked, got.report)
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
        self.tally.mixed["choreography, exact" if got.report else "plain"] += 1
        self._compare(number, asked, asked.path, body, got.json(), want.json())

    def _check_label(self, number: int, asked: Asked, report: ChoreographyReport) -> None:
        self.tally.mixed[f"labelled {report.fidelity}"] += 1
        style = asked.body.get("choreography")
        wanted = style.get("fidelity") if isinstance(style, dict) else None
        if report.fidelity != wanted:
            what = f"the answer is {report.fidelity}, asked for was {wanted or 'exact'}"
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
        if got.report is None:
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
    if got.report is None or not all(got.report.messages):
        return given
    left = list(given)
    used = [item.message for item in got.report.plan.items if item.message]
    order = []
    for name in used:
        order.append(next(i for i in left if got.report.messages[i] == name))
        left.remove(order[-1])
    return order


async def drive_servers(
    cached_url: str, plain_url: str, mix: "Mix", num_requests: int, tally: Tally, advance: Callable[[], None]
) -> None:
    async with open_client(cached_url) as cached, open_client(plain_url) as plain:
        await drive(cached, plain, mix, num_requests, tally, advance)
        tally.counts.evictions, tally.counts.preemptions = await evictions_and_preemptions(cached)


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
