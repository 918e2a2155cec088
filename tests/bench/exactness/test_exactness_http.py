"""Cache on against cache off over HTTP: nothing differs on real servers, and what does differ is found."""

import asyncio
import json
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace

import httpx
import pytest
from rich.console import Console

from hybrid_cache.bench.common.http_client import ServerFailed
from hybrid_cache.bench.exactness.http.check import Tally, drive
from hybrid_cache.bench.exactness.http.compare import Options, compare_http
from hybrid_cache.bench.exactness.http.mix import PHASES, Mix
from hybrid_cache.bench.exactness.http.report import NUMBERS, Counts, HttpReport, table
from hybrid_cache.bench.exactness.http.servers import server

Json = dict[str, object]
Change = Callable[[Json, Json], Json]  # of a request's answer


@pytest.mark.slow
def test_two_servers_give_equal_answers() -> None:
    roomy, tiny = replace(PHASES[0], most_characters=2000), replace(PHASES[-1], answers=(2, 8, 70))
    report = compare_http(None, 40, seed=3, phases=(roomy, tiny))
    assert report.exact, report.differences
    total = report.total
    assert total.requests == 40
    assert total.compared > 20
    assert total.tokens > 200
    assert 0 < total.cached_tokens < total.prompt_tokens
    assert total.evictions > 0
    assert set(report.untried) <= {NUMBERS["preemptions"]}  # whether so few requests meet depends on the machine
    assert total.mixed["plain"] > 0
    assert total.mixed["labelled composed"] > 0
    assert len(total.mixed) > 20
    assert "answers compared" in shown(report)
    json.dumps(asdict(report))


class Fake:
    """A server without a model: an answer is made from the messages, its log-probability from the answer."""

    def __init__(self, change: Change = lambda asked, body: body) -> None:
        self._change = change
        self.answered = 0

    async def handle(self, request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        if any("ref" in message for message in asked.get("messages", ())):
            return httpx.Response(404, json={"error": {"message": "there is no such message"}})
        said = zlib.crc32(json.dumps(asked.get("messages", asked.get("prompt"))).encode())
        entry = {"token": str(said), "logprob": -1 / (1 + said), "bytes": [], "top_logprobs": []}
        content = {"role": "assistant", "content": str(said)}
        choice = {"index": 0, "message": content, "logprobs": {"content": [entry]}, "finish_reason": "stop"}
        self.answered += 1
        body = self._change(asked, {"choices": [choice], "usage": {"prompt_tokens": 9}})
        if not asked.get("stream"):
            return httpx.Response(200, json=body)
        return httpx.Response(200, text=f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n")

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self.handle), base_url="http://fake")


def compared(cached: Fake, plain: Fake, num_requests: int = 60) -> Tally:
    async def run() -> Tally:
        tally = Tally(Counts("fake", ""))
        async with cached.client() as one, plain.client() as other:
            await drive(one, other, Mix("seed", PHASES[0]), num_requests, tally)
        return tally

    return asyncio.run(run())


def nudged(asked: Json, body: Json) -> Json:
    """Adds the smallest amount to the log-probability of some answers."""
    text = json.dumps(body)
    value = json.loads(text)["choices"][0]["logprobs"]["content"][0]["logprob"]
    changed: Json = json.loads(text.replace(repr(value), repr(value * (1 + 2**-52))))
    return changed if zlib.crc32(text.encode()) % 4 == 0 else body


def test_equal_servers_show_no_difference() -> None:
    tally = compared(Fake(), Fake())
    assert tally.counts.requests == 60
    assert tally.counts.compared > 40
    assert not tally.differences
    assert not tally.counts.differing


def test_one_bit_of_a_log_probability_is_found_and_can_be_sent_again() -> None:
    tally = compared(Fake(nudged), Fake())
    assert 0 < tally.counts.differing == len(tally.differences) < tally.counts.compared
    for found in tally.differences:
        assert "logprob" in found.what
        assert tally.sent[found.request]["body"] == found.body
        json.dumps(asdict(found))


def relabelled(asked: Json, body: Json) -> Json:
    plan: Json = {"items": [], "prefix_tokens": 0, "computed_tokens": 0, "flops": 0, "flops_of_encoding": 0}
    messages = asked.get("messages")
    if not isinstance(messages, list):
        return body
    told: Json = {"fidelity": "composed", "asked": "composed", "why": "", "answer": None, "plan": plan}
    return {**body, "choreography": {**told, "messages": [None] * len(messages)}}


def test_an_approximation_that_nobody_asked_for_is_found() -> None:
    tally = compared(Fake(relabelled), Fake())
    assert any("asked for was exact" in found.what for found in tally.differences)
    assert tally.mixed["labelled composed"] > tally.counts.differing > 0  # some did ask


def test_a_request_that_only_one_server_refuses_is_found() -> None:
    class Refusing(Fake):
        async def handle(self, request: httpx.Request) -> httpx.Response:
            answer = await super().handle(request)
            return httpx.Response(400, text="no") if self.answered > 5 else answer

    tally = compared(Refusing(), Fake())
    assert tally.differences
    assert all(found.what.startswith("status 400 no, without a cache 200") for found in tally.differences)


def test_a_run_that_met_no_eviction_says_so() -> None:
    counts = Counts("all", "", requests=1, compared=1, cached_tokens=1)
    report = HttpReport("m", "auto", 0, 1.0, counts, (counts,))
    assert report.untried == ("evictions", "preemptions")
    assert "NOT TRIED: evictions" in shown(report)


def test_the_same_seed_asks_the_same() -> None:
    first, again = (compared(Fake(), Fake()).sent for _ in range(2))
    assert first == again


def test_a_server_that_dies_early_shows_its_log() -> None:
    with pytest.raises(ServerFailed, match="no-such-folder"), server(Options("no-such-folder").command()) as started:
        started.url()


def test_a_server_is_gone_when_its_block_ends_in_an_error() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(KeyboardInterrupt), server(command) as started:
        raise KeyboardInterrupt
    assert started.process.returncode == -signal.SIGTERM


def test_a_server_ends_with_the_run_that_was_killed() -> None:
    command = Options().command()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as made:
        assert made.stdin is not None
        made.stdin.close()  # as when the process that holds it dies
        assert made.wait(30) == 1


def shown(report: HttpReport) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table(report))
    return capture.get()
