"""A real server on real sockets records what it serves: what a replay makes of that, and what is not in it."""

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.recording.header import Origin
from hybrid_cache.api.server.recording.options import RecordOptions
from hybrid_cache.api.server.recording.recorder import Recorder
from hybrid_cache.api.server.serving import Variant
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.bench.policy.cells import Setting, Speed
from hybrid_cache.bench.policy.from_server import replayed_tokens
from hybrid_cache.bench.traces.files import load_trace
from hybrid_cache.bench.traces.records import TraceError
from hybrid_cache.bench.traces.trace import Trace
from hybrid_cache.cache.books import Books
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.policies.signals import Finish
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.kernels import dispatch
from hybrid_cache.models.loading import describe, embedded_path, load, load_config
from tests.api.servers import over_the_wire
from tests.bench.policy.test_policy_command import error_of, run

BUDGET = 4 << 20
SECRETS = ("Pemberton", "orchard", "Zanzibar", "look_up_moons", "user-4711", "session-0815")
TOOL = {"type": "function", "function": {"name": "look_up_moons", "parameters": {"type": "object", "properties": {}}}}


@contextmanager
def recording(
    file: Path | None, policy: str = "lru", memory: int = 8 << 20, variants: bool = False, **settings: Any
) -> Iterator[httpx.Client]:
    model = load(embedded_path(), ops=dispatch.select("auto"))
    config = EngineConfig(budget_bytes=BUDGET, policy=policy, order="fcfs")
    text = TextModel.load(embedded_path())
    others = {"twin": load(embedded_path(), ops=dispatch.select("auto"))} if variants else {}
    engine = AsyncEngine(model, config, variants=others)
    origin = Origin("embedded", model.fingerprint, describe(load_config(embedded_path())).shape, config)
    recorder = Recorder(origin, RecordOptions(file, memory_bytes=memory)) if file or memory else None
    given = ServerSettings(served_names=("embedded",), backend="auto", model_path="embedded", **settings)
    served = [Variant(name, "", text) for name in others]
    app = create_app(engine, text, given, served, recorder=recorder)
    with over_the_wire(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        client.headers["Authorization"] = f"Bearer {given.api_keys[0]}" if given.api_keys else ""
        yield client


def settle(client: httpx.Client) -> None:
    """Waits until the engine has nothing more to compute."""
    last = None
    for _ in range(200):
        now = [line for line in client.get("/metrics").text.splitlines() if "_steps_total" in line]
        if now == last:
            return
        last = now
        time.sleep(0.05)


def talk(
    client: httpx.Client, rng: random.Random, turns: int, model: str = "embedded", patient: bool = True, **more: object
) -> None:
    """Conversations side by side, whose answers fill pages. patient: each request waits until the server is idle"""
    talks: list[list[dict[str, object]]] = [
        [{"role": "system", "content": f"{SECRETS[i % 2]} " + "counts boxes and pencils. " * (10 + 8 * (i % 2))}]
        for i in range(4)
    ]
    for turn in range(turns):
        number = rng.randrange(len(talks))
        words = " ".join(rng.choice(("box", "pencil", "red", "seven", "Zanzibar")) for _ in range(rng.randrange(5, 70)))
        talks[number].append({"role": "user", "content": words})
        body = {
            "model": model,
            "messages": talks[number],
            "max_tokens": rng.choice((4, 70)),
            "seed": turn,
            "ignore_eos": True,
            "user": "user-4711",
            "session_id": f"session-0815-{number}",
            **more,
        }
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        talks[number].append({"role": "assistant", "content": reply.json()["choices"][0]["message"]["content"] or "."})
        if patient:
            settle(client)


def setting_of(trace: Trace) -> Setting:
    assert trace.server is not None
    return Setting.of(trace, trace.server.model, Speed(0.0, 1e12))


def cached(trace: Trace) -> int:
    return sum(r.stay.cached_tokens for r in trace.requests if r.stay)


@pytest.mark.parametrize("policy", ["lru", "marconi"])
def test_a_replay_of_a_record_finds_what_the_server_found(policy: str, tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    with recording(file, policy) as client:
        talk(client, random.Random(1), 24)
        counted = client.get("/metrics").text
    trace = load_trace(file)
    assert trace.server is not None
    assert f"hybrid_cache_cached_tokens_total {float(cached(trace))}" in counted
    assert f"hybrid_cache_prompt_tokens_total {float(trace.num_prompt_tokens)}" in counted
    assert cached(trace) > 1000
    assert sum(len(request.turns) for request in trace.requests) > 3
    assert sum(float(line.rpartition(" ")[2]) for line in counted.splitlines() if "evictions_total{" in line) > 10
    again = replayed_tokens(setting_of(trace), trace.server)
    assert again is not None
    assert abs(again - cached(trace)) <= 0.01 * cached(trace)


def interrupted(trace: Trace) -> bool:
    """Whether a request came while what the server computed of its own was under way, and parts of that tell."""
    turns = [turn for request in trace.requests for turn in request.turns if turn.parts]
    begun = [request.arrival_s for request in trace.requests]
    cut = any(turn.computed < len(turn.pages) * 64 for turn in turns)
    return cut and any(turn.parts[0][1] < at < turn.end_s for turn in turns for at in begun)


def test_what_a_server_does_when_idle_is_interrupted_in_the_replay_where_it_was(tmp_path: Path) -> None:
    """Milliseconds decide whether it is, and, in a full cache, who comes first: one of some runs has to agree."""
    errors = list[float]()
    for seed in range(1, 13):
        file = tmp_path / f"traffic-{seed}.jsonl"
        with recording(file) as client:
            talk(client, random.Random(seed), 40, patient=False, n=2)
        trace = load_trace(file)
        if interrupted(trace):
            assert trace.server is not None
            errors.append(abs(replayed_tokens(setting_of(trace), trace.server) / cached(trace) - 1))
            if errors[-1] <= 0.05:
                break
    assert min(errors) <= 0.05


def test_choices_that_give_their_room_and_begin_again_do_so_in_the_replay(tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    with recording(file) as client:
        talk(client, random.Random(4), 4, n=7, max_tokens=200)
        talk(client, random.Random(5), 10)
    gaps = [gap for line in file.read_text().splitlines() for gap in json.loads(line).get("again", [])]
    assert gaps
    assert all(gave < back for _, gave, back in gaps)
    trace = load_trace(file)
    assert trace.server is not None
    assert replayed_tokens(setting_of(trace), trace.server) == cached(trace) > 0


def test_what_is_there_as_a_whole_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kept = tmp_path / "traffic.jsonl", list[int]()
    with recording(file) as client:
        for _ in range(3):
            client.post("/v1/completions", json={"prompt": "red pencil " * 30, "max_tokens": 2}).raise_for_status()
    publish_end = Books.publish_end

    def counted(books: Books, lease: Lease, row: int) -> bool:
        kept.append(1)
        return publish_end(books, lease, row)

    monkeypatch.setattr(Books, "publish_end", counted)
    trace = load_trace(file)
    assert trace.server is not None
    assert replayed_tokens(setting_of(trace), trace.server) == cached(trace) == 2 * trace.requests[0].num_prompt_tokens
    assert len(kept) == 1


def test_whichever_choice_ends_first_a_request_began_when_its_first_one_did(tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    with recording(file) as client:
        talk(client, random.Random(3), 8, n=4, temperature=1.5, stop=["e"], max_tokens=70)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    requests = [line for line in lines if "request" in line]
    assert any(line["ended"][0] > min(line["ended"]) for line in requests)
    for line in requests:
        assert line["arrived"] <= line["started"] < line["prompted"] <= min(line["ended"])
    assert len(load_trace(file).requests) == len(requests)


def test_a_record_says_what_lies_below_the_memory(tmp_path: Path) -> None:
    file = recorded_once(tmp_path)
    assert "below its memory" not in load_trace(file).note
    first, _, rest = file.read_text().partition("\n")
    file.write_text(json.dumps(json.loads(first) | {"host_bytes": 1 << 20, "disk_bytes": 2 << 30}) + "\n" + rest)
    note = load_trace(file).note
    assert "1 MiB of host memory (--host-budget) and 2 GiB of disk (--disk) below its memory, which is not repl" in note


def test_no_text_is_in_a_record(tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    with recording(file) as client:
        talk(client, random.Random(2), 4, tools=[TOOL])
        in_memory = client.get("/cache/traffic").content
    for data in (file.read_bytes(), in_memory):
        assert data.count(b"\n") > 4
        for secret in (*SECRETS, "pencil", "boxes"):
            assert secret.encode() not in data
    assert file.stat().st_mode & 0o777 == 0o600


def test_two_records_of_the_same_have_no_hash_in_common(tmp_path: Path) -> None:
    said = []
    for name in ("a", "b"):
        with recording(tmp_path / name) as client:
            talk(client, random.Random(2), 2)
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        said.append(
            {v for line in lines for k, v in line.items() if k in ("whole", "session", "pages", "salt_id") and v}
        )
    assert said[0]
    assert not said[0] & said[1]


def test_a_request_with_tools_choices_and_another_model_says_so(tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    with recording(file, variants=True) as client:
        talk(client, random.Random(3), 2, tools=[TOOL], n=3)
        talk(client, random.Random(3), 2, model="twin")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    requests = [line for line in lines if "request" in line]
    assert [len(line["output_tokens"]) for line in requests] == [3, 3, 1, 1]
    assert [line.get("tools", False) for line in requests] == [True, True, False, False]
    assert [line["model"] for line in requests] == ["embedded", "embedded", "twin", "twin"]
    assert len({line["template"] for line in requests}) == 4, "two system messages, with tools and without"
    assert requests[0]["user"] == requests[2]["user"]
    roles = [mark[1] for mark in requests[0]["marks"]]
    assert roles[0] == "system"
    assert roles[-1] == "user"
    trace = load_trace(file)
    assert [request.tools for request in trace.requests] == [True, True, False, False]
    assert trace.requests[0].user


def test_an_abort_is_recorded_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    with recording(file) as client:
        body = {"prompt": "red pencil " * 60, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as reply:
            next(reply.iter_lines())
        settle(client)
        talk(client, random.Random(3), 1)
    first = next(json.loads(line) for line in file.read_text().splitlines() if '"request"' in line)
    assert first["finish_reason"] == ["abort"]
    assert first["output_tokens"][0] < 900
    assert load_trace(file).requests[0].finish is Finish.GONE


def test_a_server_is_asked_and_answers_in_sentences(tmp_path: Path) -> None:
    with recording(None) as client:
        url, file = str(client.base_url), tmp_path / "rows.json"
        assert "nothing was served" in error_of("--from-server", url)
        talk(client, random.Random(4), 10)
        result = run("--from-server", url, "--policy", "lru,learned", "--capacity", "0.5x,1x,4x", "--json", file)
    assert result.exit_code == 0, result.stderr
    assert "The server saved" in result.stdout
    assert "Replayed as it ran" in result.stdout
    assert "(4x the budget)" in result.stdout
    rows = json.loads(file.read_text())
    assert {row["capacity_bytes"] for row in rows} == {BUDGET // 2, BUDGET, 4 * BUDGET}
    assert {row["server_policy"] for row in rows} == {"lru"}
    assert 0 < rows[0]["server_flops_saved"] < 1
    best = {row["capacity_bytes"]: row["flops_saved"] for row in rows if row["policy"] == "bound"}
    assert all(row["flops_saved"] <= best[row["capacity_bytes"]] + 1e-9 for row in rows if row["policy"] != "infinite")


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    assert "no connection, is the server running?" in error_of("--from-server", "http://127.0.0.1:9")
    assert "leave out" in error_of("--from-server", "http://127.0.0.1:9", "--workload", "chat")
    assert "says no budget" in error_of("--workload", "chat", "--scale", "0.1", "--capacity", "2x")
    with recording(None, memory=0) as client:
        assert "start it with --record-memory 64MiB" in error_of("--from-server", str(client.base_url))


def test_only_an_operator_gets_the_traffic_of_all(tmp_path: Path) -> None:
    keys = ("alice-key", "bob-key", "operator-key")
    with recording(None, api_keys=keys, operator_keys=keys[2:]) as client:
        talk(client, random.Random(5), 2)
        assert "API key is missing or wrong" in error_of("--from-server", str(client.base_url))
        seen = {}
        for key in keys:
            lines = client.get("/cache/traffic", headers={"Authorization": f"Bearer {key}"}).text.splitlines()
            seen[key] = sum('"request"' in line for line in lines)
    assert seen == {"alice-key": 2, "bob-key": 0, "operator-key": 2}


def test_a_line_that_broke_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    with recording(file) as client:
        talk(client, random.Random(6), 3)
    whole = file.read_bytes()
    requests = [i for i, line in enumerate(whole.splitlines()) if b'"request"' in line]
    cut = b"".join(whole.splitlines(keepends=True)[: requests[-1]]) + whole.splitlines()[requests[-1]][:50]
    file.write_bytes(cut)
    trace = load_trace(file)
    assert len(trace.requests) == len(requests) - 1
    assert "broke off" in trace.note
    with recording(file) as client:  # and the next server cuts it off
        talk(client, random.Random(6), 2)
    trace = load_trace(file)
    assert len(trace.requests) == len(requests) + 1
    assert "2 starts of the server" in trace.note
    assert "broke off" not in trace.note
    first, second = trace.requests[0].pages, trace.requests[-1].pages
    assert not set(first.tolist()) & set(second.tolist())
    assert trace.server is not None
    assert replayed_tokens(setting_of(trace), trace.server) is not None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"after": "00" * 8}, "expected a page of a line before"),
        ({"pages": "!"}, "names of 8 bytes each in base64"),
        ({"tokens": 100_000}, "for tokens 100000"),
        ({"marks": [[1 << 40, "user"]]}, "marks"),
        ({"ended": []}, "ended"),
        ({"whole": "x"}, "hexadecimal"),
        ({"started": -1.0}, "started"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused(change: dict[str, object], complaint: str, tmp_path: Path) -> None:
    file = recorded_once(tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    at = next(i for i, line in enumerate(lines) if "request" in line)
    lines[at] |= change
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(TraceError, match=complaint):
        load_trace(file)


_recorded: list[bytes] = []


def recorded_once(folder: Path) -> Path:
    file = folder / "traffic.jsonl"
    if not _recorded:
        with recording(file) as client:
            talk(client, random.Random(6), 2)
        _recorded.append(file.read_bytes())
    file.write_bytes(_recorded[0])
    return file
