import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from hybrid_cache.bench.common.http_client import ServerFailed
from hybrid_cache.bench.serving.command import Api, ScenarioRow, TrafficOptions, marked_text, measure, serve, summarise
from hybrid_cache.bench.serving.scenarios import SCENARIOS, Reply, SentMessage, Shape, one_token_words
from hybrid_cache.errors import ConfigError

# A prompt of `cold` is <|system|> 30 words <|end|> <|user|> 10 words <|end|> <|assistant|> = 45 tokens;
# a further turn adds 4 words of reply <|end|> <|user|> 10 words <|end|> <|assistant|> = 18.
SHAPE = Shape(system=30, turn=10, reply=4, decode=8, samples=2, turns=4, conversations=3, streams=(1, 2))
FIRST, FURTHER = 45, 18


class FakeServer:
    """A token is a word or a marker. The cache holds every earlier prompt, in whole blocks of ten tokens."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.replies: list[str] = []
        self.running = self.most_running = 0
        self.delay = 0.0  # seconds before the first token
        self.tokens_per_word = 1
        self.failure: Response | None = None
        self.broken_stream = False
        self.llama_counts = False  # report cached tokens as llama.cpp does
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/completions")(self.complete)
        self.app.post("/v1/chat/completions")(self.complete)

    async def models(self) -> dict[str, object]:
        return {"object": "list", "data": [{"id": "fake"}]}

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        assert body["model"] == "fake"
        assert body["ignore_eos"] is True
        if self.failure:
            return self.failure
        chat = "messages" in body
        prompt = marked_text(tuple(SentMessage(**message) for message in body["messages"])) if chat else body["prompt"]
        cached = self.cached(prompt)
        words = [f" r{len(self.prompts)}w{n}" for n in range(body["max_tokens"])]
        self.prompts.append(prompt)
        self.replies.append("".join(words))
        usage = {"prompt_tokens": self.count(prompt), "completion_tokens": len(words)}
        counts: dict[str, object] = {"usage": usage | {"prompt_tokens_details": {"cached_tokens": cached}}}
        if self.llama_counts:
            counts = {"usage": usage, "timings": {"cache_n": cached}}
        return StreamingResponse(self.stream(chat, words, counts), media_type="text/event-stream")

    async def stream(self, chat: bool, words: list[str], counts: dict[str, object]) -> AsyncIterator[str]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(self.delay)
        if chat:
            yield event({"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": None})
        for word in words:
            yield event({"choices": [{"delta": {"content": word}} if chat else {"text": word}], "usage": None})
        if self.broken_stream:
            yield event({"error": {"message": "the engine has failed"}})
        self.running -= 1
        yield event({"choices": []} | counts)
        yield "data: [DONE]\n\n"

    def count(self, prompt: str) -> int:
        return sum(1 if token.startswith("<|") else self.tokens_per_word for token in tokens_of(prompt))

    def cached(self, prompt: str) -> int:
        return max((same_start(prompt, earlier) // 10 * 10 for earlier in self.prompts), default=0)


def event(data: object) -> str:
    return f"data: {json.dumps(data)}\n\n"


def tokens_of(prompt: str) -> list[str]:
    return re.findall(r"<\|\w+\|>|[^\s<]+", prompt)


def same_start(prompt: str, earlier: str) -> int:
    """Tokens that both begin with, at most all but one of the prompt's."""
    new, old = tokens_of(prompt), tokens_of(earlier)
    same = next((i for i, (a, b) in enumerate(zip(new, old, strict=False)) if a != b), min(len(new), len(old)))
    return min(same, len(new) - 1)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serves the app from a thread and gives its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def fake() -> FakeServer:
    return FakeServer()


@pytest.fixture
def url(fake: FakeServer) -> Iterator[str]:
    with listening(fake.app) as url:
        yield url


def rows_of(
    url: str, *scenarios: str, api: Api = Api.completions, seed: int = 1, repeat: int = 1
) -> dict[str, ScenarioRow]:
    run = TrafficOptions(
        url, "fake", api, scenarios=scenarios or tuple(SCENARIOS), shape=SHAPE, seed=seed, repeat=repeat
    )
    return {row.scenario: row for row in asyncio.run(measure(run))}


@pytest.mark.parametrize("api", list(Api))
@pytest.mark.parametrize("llama_counts", [False, True], ids=["usage", "timings"])
def test_rows_hold_the_servers_own_counts(fake: FakeServer, url: str, api: Api, llama_counts: bool) -> None:
    fake.llama_counts = llama_counts
    rows = rows_of(url, api=api)
    assert {name: (row.prompt_tokens, row.cached_tokens) for name, row in rows.items()} == {
        "cold": ([FIRST] * 2, [0, 0]),
        "repeat": ([FIRST] * 2, [40, 40]),  # all but the last token of 45
        "grow": ([63, 81, 99], [40, 60, 80]),  # all of the turn before: 45, 63, 81
        "regenerate": ([99, 99], [90, 90]),
        "edit": ([81, 63], [60, 50]),  # up to the word after <|user|>: 69 and 51
        "shared": ([FIRST] * 2, [30, 30]),  # the system prompt, 33 with the next marker
        "burst": ([FIRST] * 3, [30, 30, 30]),
        "return": ([63] * 3, [40, 40, 40]),
        "decode x1": ([33], [0]),
        "decode x2": ([33, 33], [0, 0]),
    }
    assert {row.requests == len(row.prompt_tokens) for row in rows.values()} == {True}


@pytest.mark.parametrize("api", list(Api))
def test_a_growing_conversation_sends_back_what_the_server_said(fake: FakeServer, url: str, api: Api) -> None:
    rows_of(url, "grow", api=api)
    turns = list(zip(fake.prompts, fake.replies, strict=True))[2:]  # two prompts calibrate
    assert len(turns) == SHAPE.turns
    for (prompt, reply), (following, _) in pairwise(turns):
        assert following.startswith(f"{prompt}{reply}<|end|><|user|> ")


def test_editing_keeps_everything_before_the_edited_message(fake: FakeServer, url: str) -> None:
    rows_of(url, "grow", "edit")
    turns, edits = fake.prompts[2:6], fake.prompts[6:]
    for original, edited in zip([turns[2], turns[1]], edits, strict=True):
        kept = original.rindex("<|user|>")
        assert edited[:kept] == original[:kept]
        assert edited[kept:] != original[kept:]


def test_returning_conversations_are_the_old_ones_in_their_order(fake: FakeServer, url: str) -> None:
    rows_of(url, "shared", "return")
    for old, reply, again in zip(fake.prompts[2:5], fake.replies[2:5], fake.prompts[5:], strict=True):
        assert again.startswith(f"{old}{reply}<|end|>")


def test_a_burst_is_sent_all_at_once(fake: FakeServer, url: str) -> None:
    fake.delay = 0.2
    row = rows_of(url, "burst")["burst"]
    assert fake.most_running == SHAPE.conversations
    assert row.ttft_ms_median >= 200
    assert row.wall_s < 0.55


def test_needed_scenarios_run_without_being_reported(fake: FakeServer, url: str) -> None:
    assert list(rows_of(url, "regenerate")) == ["regenerate"]
    assert len(fake.prompts) == 2 + SHAPE.turns + SHAPE.samples


def test_the_seed_decides_the_prompts_and_scenarios_do_not_disturb_each_other(fake: FakeServer, url: str) -> None:
    rows_of(url, "cold", "shared")
    both = fake.prompts.copy()
    fake.prompts.clear()
    rows_of(url, "shared")
    assert fake.prompts == both[:2] + both[2 + SHAPE.samples :]
    fake.prompts.clear()
    rows_of(url, "shared", seed=2)
    assert not set(fake.prompts) & set(both)


def test_further_rounds_have_new_prompts_and_share_a_row(fake: FakeServer, url: str) -> None:
    row = rows_of(url, "cold", repeat=3)["cold"]
    assert row.requests == 3 * SHAPE.samples
    assert row.cached_tokens == [0] * row.requests
    assert len(set(fake.prompts)) == 2 + row.requests


def test_prompt_lengths_follow_the_servers_count_of_tokens(fake: FakeServer, url: str) -> None:
    fake.tokens_per_word = 2
    assert rows_of(url, "cold")["cold"].prompt_tokens == [FIRST] * SHAPE.samples


def test_a_round_is_summarised_by_median_p95_and_wall_time() -> None:
    def reply(sent: float, ttft: float, tpot: float) -> Reply:
        first = sent + ttft
        return Reply("", sent, first, first + 4 * tpot, first + 4 * tpot, 10, None, 5)

    rounds = [[reply(0, 1, 0.25), reply(2, 3, 0.5)], [reply(100, 2, 1)]]
    row = summarise("us", "cold", rounds, 7)
    assert (row.ttft_ms_median, row.ttft_ms_p95) == (2000, 3000)
    assert (row.tpot_ms_median, row.tpot_ms_p95) == (500, 1000)
    assert row.wall_s == 6.5  # between 7 and 6
    assert row.tokens_per_s == pytest.approx((10 / 7 + 5 / 6) / 2, abs=0.1)
    assert row.cached_tokens == [None] * 3


def test_the_command_writes_its_rows_as_json(fake: FakeServer, url: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    status, output = invoke(
        "--url", f"{url}/v1", "--scenarios", "cold,repeat", "--system-tokens", "30", "--json", str(path)
    )
    assert status == 0, output
    assert "repeat" in output
    rows = json.loads(path.read_text())
    assert [row["scenario"] for row in rows] == ["cold", "repeat"]
    assert set(rows[0]) == set(ScenarioRow.__dataclass_fields__)


def test_a_refused_connection_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        status, output = invoke("--url", url)
    assert status == 1
    assert f"error: {url}: no connection" in output


def test_the_servers_refusal_is_repeated(fake: FakeServer, url: str) -> None:
    fake.failure = JSONResponse({"error": {"message": "9000 tokens, limit 4096"}}, status_code=400)
    with pytest.raises(ServerFailed, match=r"/v1/completions: HTTP 400: 9000 tokens, limit 4096"):
        rows_of(url, "cold")


def test_an_error_in_the_middle_of_a_stream_ends_the_run(fake: FakeServer, url: str) -> None:
    fake.broken_stream = True
    with pytest.raises(ServerFailed, match="the engine has failed"):
        rows_of(url, "cold")


def test_an_unknown_scenario_is_answered_with_the_allowed_ones() -> None:
    status, output = invoke("--url", "http://127.0.0.1:1", "--scenarios", "cold,warm")
    assert status == 2
    assert "unknown scenario 'warm'" in output
    assert "regenerate" in output


@pytest.mark.parametrize("url", ["nonsense", "http://host:port", "ftp://host"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    status, output = invoke("--url", url)
    assert status == 2
    assert url in output


def test_words_of_one_token_come_from_the_vocabulary(tmp_path: Path) -> None:
    words = [f"{a}{b}{c}" for a in "bcdfg" for b in "aeiou" for c in "lmnr"]
    vocab = {token: n for n, token in enumerate(["\u0120ab", "xyz", "\u0120Big", *(f"\u0120{word}" for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="xyz"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert one_token_words(tmp_path) == tuple(sorted(words))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: no such file"):
        one_token_words(tmp_path)


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit status and output of the command."""
    app = typer.Typer()
    app.command()(serve)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output
