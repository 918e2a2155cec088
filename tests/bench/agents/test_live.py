"""`hybrid-cache bench agents --live`: sessions against a real server, and against one that misbehaves."""

import asyncio
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from typer.testing import CliRunner

from hybrid_cache.api.cli.main import app
from hybrid_cache.bench.agents.live.client import Answer, ChatClient, ToolCall
from hybrid_cache.bench.agents.live.player import CallLengths, Offer, Played, Player, _Talk
from hybrid_cache.bench.agents.live.run import LiveServer, run_live, scaled
from hybrid_cache.bench.agents.machine import MACHINES
from hybrid_cache.bench.agents.outcome import Served
from hybrid_cache.bench.agents.simulation import Setting, Simulation
from hybrid_cache.bench.agents.workload import AgentSession, Turn
from hybrid_cache.bench.common.http_client import ServerFailed, open_client
from hybrid_cache.bench.serving.scenarios import Vocabulary
from tests.bench.serving.test_serve import listening
from tests.soak.server import serve

SEARCH = AgentSession(
    "agent",
    0,
    (Turn(300, 0, 60, "search", 0.3), Turn(500, 360, 60, "run tests!", 0.2), Turn(640, 560, 20, "", None)),
)
PERSON = AgentSession("person", 0, (Turn(100, 0, 10, "", 0.2), Turn(220, 110, 12, "", None)))
EDITED = AgentSession("agent", 0, (Turn(400, 0, 60, "search", 0.1), Turn(420, 200, 16, "", None)))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(("--budget", "64MiB"), keys=()) as server:
        yield f"http://127.0.0.1:{server.port}"


def play(url: str, *sessions: AgentSession, **options: object) -> Played:
    async def played() -> Played:
        async with open_client(url) as http:
            player = Player(ChatClient(http, "embedded"), Vocabulary(tokens_per_word=1.35), "seed", **options)  # type: ignore[arg-type]
            return await player.play([(0.1 * i, session) for i, session in enumerate(sessions)])

    return asyncio.run(played())


def test_sessions_are_played_as_the_workload_has_them(url: str) -> None:
    done = []
    found = play(url, SEARCH, PERSON, on_done=lambda: done.append(1))
    (_, agent), (_, person) = found.arrivals
    assert [turn.tool for turn in agent.turns] == ["search", "run tests!", ""]
    assert [turn.output_tokens for turn in person.turns] == [10, 12]
    first, second, third = agent.turns
    assert first.kept_tokens == 0
    assert second.kept_tokens == first.prompt_tokens + first.output_tokens
    assert second.prompt_tokens - second.kept_tokens == pytest.approx(140, rel=0.5)
    assert third.pause_s is None
    assert second.pause_s == pytest.approx(0.2, abs=0.2)
    assert second.pause_s >= 0.2
    for turn in (first, second):
        assert 30 < turn.output_tokens < 120
    outcome = found.outcome
    assert len(done) == len(outcome.sessions) == 2
    assert outcome.num_returns == outcome.num_resident == 3
    assert outcome.computed_tokens is not None
    assert outcome.computed_tokens < outcome.prompt_tokens
    for ended in outcome.sessions:
        assert 0 < ended.first_token_s <= ended.longest_wait_s
        assert ended.arrival_s + ended.paused_s < ended.end_s


def test_the_server_knows_of_the_pauses(url: str) -> None:
    import httpx

    def counted(name: str) -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"hybrid_cache_{name}"))

    before = counted("tasks_resumed_total")
    play(url, SEARCH, hints=True)
    assert counted("tasks_resumed_total") == before + 2


def test_edited_history_is_left_out(url: str) -> None:
    found = play(url, EDITED)
    ((_, session),) = found.arrivals
    assert session.turns[1].kept_tokens == 0
    assert session.turns[1].prompt_tokens == pytest.approx(420, rel=0.5)


def test_the_command_plays_measures_and_simulates(url: str, tmp_path: Path) -> None:
    trace, json_file = tmp_path / "trace.jsonl", tmp_path / "rows.json"
    calls = [
        {"prompt_tokens": 200, "completion_tokens": 40, "api_time": 0.2, "api_token_length": 5},
        {"prompt_tokens": 300, "completion_tokens": 20},
    ]
    trace.write_text((json.dumps({"calls": calls}) + "\n") * 3)
    options = ["--trace", trace, "--format", "mars", "--rate", "3", "--seconds", "2", "--seed", "5"]
    live = ["--live", f"{url}/v1", "--model", "embedded", "--memory", "64MiB", "--json", json_file]
    found = CliRunner().invoke(app, ["bench", "agents", *map(str, [*options, *live])])
    assert found.exit_code == 0, found.output
    rows = json.loads(json_file.read_text())["rows"]
    assert [row["policy"] for row in rows] == ["live", "learned"]
    for row in rows:
        assert row["model"] == "embedded"
        assert row["server_time_mean_s"] > 0
    assert rows[0]["sessions"] == rows[1]["sessions"]
    assert rows[0]["steps"] is None


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--memory", "1GB,2GB"), "one --memory"),
        (("--seed", "1,2"), "one --seed"),
        (("--model", "embedded"), "--memory"),
        (("--live", "http://127.0.0.1:9"), "no connection"),
        (("--model", "/nowhere", "--memory", "1GB"), "/nowhere"),
    ],
)
def test_what_cannot_be_played_is_refused(options: tuple[str, ...], word: str) -> None:
    given = options if "--live" in options else ("--live", "http://127.0.0.1:9", *options)
    found = CliRunner().invoke(app, ["bench", "agents", "--seconds", "2", *given])
    assert found.exit_code != 0
    assert word in found.output


def test_a_machine_is_scaled_until_sessions_take_as_long_as_they_did() -> None:
    machine = replace(MACHINES["hybrid-7b"], request_s=0.05)
    served = Served("m", "live", 20_000_000_000, 0, True, 0)
    slow = replace(
        machine,
        base_s=2 * machine.base_s,
        row_s=2 * machine.row_s,
        bytes_per_s=machine.bytes_per_s / 2,
        token_s=3 * machine.token_s,
        token_per_position_s=3 * machine.token_per_position_s,
        request_s=3 * machine.request_s,
    )
    come = [(0.3 * i, SEARCH) for i in range(20)]
    outcome = Simulation(Setting(slow, served.memory_bytes, "learned"), come).run()
    found = scaled(machine, served, Played(come, outcome), "learned")
    again = Simulation(Setting(found, served.memory_bytes, "learned"), come).run()
    assert again.waited_s == pytest.approx(outcome.waited_s, rel=0.05)
    assert again.decoded_s == pytest.approx(outcome.decoded_s, rel=0.05)
    assert found.base_s == pytest.approx(slow.base_s, rel=0.3)


def test_characters_of_calls_of_some_length() -> None:
    lengths = CallLengths(frame=20, per_character=0.5)
    assert lengths.characters(70) == 100
    assert lengths.characters(5) == 1


def test_an_edit_keeps_whole_turns() -> None:
    talk = _Talk(Offer("", {}, 10), random.Random(0))
    turns = Turn(100, 0, 10, "t", 1.0), Turn(200, 110, 10, "t", 1.0), Turn(300, 150, 10, "", None)
    played = Turn(130, 0, 12, "t", 1.0), Turn(230, 142, 12, "t", 1.0)
    assert talk.keep(turns[0]) == 90
    for turn, wanted in zip(played, turns[1:], strict=True):
        talk.say("text")
        talk.answered(Answer(0.0, calls=[ToolCall(f"call {len(talk.turns)}", "t", "{}")]))
        talk.turns.append(turn)
        lacking = talk.keep(wanted)
    assert lacking == 300 - 110
    assert talk.kept_tokens == 142
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    talk.say("other")
    assert talk.messages[-1] == {"role": "tool", "tool_call_id": "call 0", "content": "other"}


class Misbehaving:
    """Answers with text whatever is asked."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.complete)

    async def models(self) -> dict[str, object]:
        return {"data": [{"id": "fake"}]}

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        if self.fault == "status":
            return JSONResponse({"error": {"message": "no room"}}, 503)
        usage = {"prompt_tokens": 10, "completion_tokens": 1}
        events: list[object] = [{"choices": [{"delta": {"content": "x"}}]}]
        if self.fault == "error":
            events.append({"error": {"message": "the engine has failed"}})
        if self.fault == "event":
            events.append([1])
        if self.fault != "usage":
            events.append({"choices": [], "usage": usage})
        assert body["stream_options"] == {"include_usage": True}
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        return StreamingResponse(iter(lines), media_type="text/event-stream")


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("status", "no room"),
        ("error", "the engine has failed"),
        ("event", "not an event"),
        ("usage", "without `usage`"),
        ("no call", "calls no tool"),
    ],
)
def test_a_server_that_misbehaves_ends_the_run(fault: str, word: str) -> None:
    with listening(Misbehaving(fault).app) as url, pytest.raises(ServerFailed, match=word):
        run_live(LiveServer(url), [(0.0, SEARCH), (0.1, PERSON)], [], 0, "learned", lambda: None)
