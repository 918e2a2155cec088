"""Sessions of agents, read from small files whose answers were worked out by hand, and when they begin."""

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import cast, get_args

import pytest

from hybrid_cache.bench.agents.files import FORMATS, load_workload
from hybrid_cache.bench.agents.generators import KINDS
from hybrid_cache.bench.agents.workload import AgentSession, Half, Turn, Workload, arrivals
from hybrid_cache.bench.traces.records import TraceError
from hybrid_cache.errors import ConfigError

DATA = Path(__file__).parents[3] / "../shared/data"
NEEDS_DATA = pytest.mark.skipif(not DATA.is_dir(), reason="the shared traces are not here")

Json = dict[str, object]


def write(path: Path, *lines: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def api(prompt: object, output: object, time: object, returned: object = 0) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": output, "api_time": time, "api_token_length": returned}


def mars(*calls: Json) -> Json:
    return {"session_id": "s", "calls": calls}


def sent(
    length: object, ids: object, kind: str = "text", *, output: object = 10, think: object = 1.5, t: object = 0
) -> Json:
    return {"t": t, "type": "n", "in": length, "out": output, "hash_ids": ids, "input_types": [kind]} | (
        {} if think is None else {"think_time": think}
    )


def coding(*requests: Json, block_size: object = 64) -> Json:
    return {"id": "s", "block_size": block_size, "requests": requests}


def says(role: object, content: object, *tools: object) -> Json:
    calls = [{"function": {"name": tool, "arguments": "{}"}} for tool in tools]
    return {"role": role, "content": content} | ({"tool_calls": calls} if tools else {})


def load(tmp_path: Path, format: str, *lines: object, **limits: float) -> Workload:
    return load_workload(write(tmp_path / "trace.jsonl", *lines), format, **limits)  # type: ignore[arg-type]


def test_mars_tools_are_classes_by_time(tmp_path: Path) -> None:
    calls = [
        api(100, 10, 0),
        api(115, 5, 0.0099),
        api(130, 5, 0.01),
        api(140, 5, 0.3, 60),
        api(150, 5, 4.9, -2),
        api(160, 5, 5.0, 60),
        api(170, 5, None, None),
    ]
    workload = load(tmp_path, "mars", mars(*calls))
    (session,) = workload.sessions
    assert (workload.name, session.kind, session.shared_tokens) == ("trace", "math", 0)
    assert [turn.tool for turn in session.turns] == ["math", "math", "ve", "qa", "gen", "gen", ""]
    assert session.turns[0] == Turn(100, 0, 10, "math", 0.0)
    assert session.turns[1] == Turn(115, 110, 5, "math", 0.0099)
    assert session.turns[-1] == Turn(170, 165, 5, "", None)


def test_mars_keeps_what_the_next_prompt_has_room_for(tmp_path: Path) -> None:
    (session,) = load(tmp_path, "mars", mars(api(100, 10, 1), api(105, 0, None))).sessions
    assert session.turns == (Turn(100, 0, 10, "gen", 1.0), Turn(105, 104, 1, "", None))


def test_the_pause_of_a_call_that_nothing_follows_is_dropped(tmp_path: Path) -> None:
    workload = load(tmp_path, "mars", mars(api(9, 2, 8), api(20, 2, 7)), mars(api(9, 2, None)))
    assert workload.sessions == (
        AgentSession("gen", 0, (Turn(9, 0, 2, "gen", 8.0), Turn(20, 11, 2, "", None))),
        AgentSession("no tool", 0, (Turn(9, 0, 2, "", None),)),
    )
    assert "1 sessions end in a call that nothing follows" in workload.note


def test_a_session_ends_before_a_limit_and_says_so(tmp_path: Path) -> None:
    line = mars(*(api(100 * i, 10, 50 * i) for i in range(1, 6)))
    whole = load(tmp_path, "mars", line).sessions[0].turns
    assert len(whole) == 5
    workload = load(tmp_path, "mars", line, max_calls=3)
    assert workload.sessions[0].turns == (*whole[:2], Turn(300, 210, 10, "", None))
    assert "1 sessions cut to 3 calls" in workload.note
    assert "nothing follows" not in workload.note, "it was the limit that ended it"
    by_tokens = load(tmp_path, "mars", line, mars(api(390, 10, None)), max_tokens=310)
    assert [s.turns for s in by_tokens.sessions] == [workload.sessions[0].turns]
    assert "1 sessions cut to 310 tokens" in by_tokens.note
    assert "1 sessions without a call within the limits left out" in by_tokens.note
    shorter = load(tmp_path, "mars", line, max_pause_s=120)
    assert [turn.pause_s for turn in shorter.sessions[0].turns] == [50, 100, 120, 120, None]
    assert "2 pauses cut to 120 s" in shorter.note


def test_what_lies_beyond_a_limit_is_not_looked_at(tmp_path: Path) -> None:
    line = coding(sent(200, [1, 2, 3]), sent(300, [1, 2, 3, 4]), sent("wrong", []), sent(400, []))
    assert len(load(tmp_path, "kv-cache-tester", line, max_calls=1).sessions[0].turns) == 1
    with pytest.raises(TraceError):
        load(tmp_path, "kv-cache-tester", line)


def test_coding_turns_keep_whole_contexts_or_the_blocks_in_front_of_an_edit(tmp_path: Path) -> None:
    requests = [
        sent(200, [1, 2, 3], think=99),
        sent(300, [1, 2, 3, 4], "tool_result", think=2.5),  # longer: all is kept, 200 + 10
        sent(205, [1, 2, 9], "tool_result"),  # edited behind two blocks
        sent(330, [1, 2, 8, 9, 10], think=60),  # the last block differs, which may be its end only: 205 + 10
        sent(200, [5, 6, 7]),  # nothing in common
        sent(202, [5, 6, 7], think=None),  # an answer that is not sent back
    ]
    workload = load(tmp_path, "kv-cache-tester", coding(*requests))
    (session,) = workload.sessions
    assert (session.kind, session.shared_tokens) == ("coding", 0)
    assert session.turns == (
        Turn(200, 0, 10, "tool", 2.5),
        Turn(300, 210, 10, "tool", 1.5),
        Turn(205, 128, 10, "", 60.0),
        Turn(330, 215, 10, "", 1.5),
        Turn(200, 0, 10, "", 0.0),
        Turn(202, 201, 10, "", None),
    )
    assert "1 pauses that the file does not have taken for none" in workload.note


def test_a_first_block_that_differs_leaves_nothing(tmp_path: Path) -> None:
    (session,) = load(tmp_path, "kv-cache-tester", coding(sent(100, [1]), sent(200, [2, 3, 4]))).sessions
    assert session.turns[1].kept_tokens == 0


def test_subagents_are_left_out_and_counted(tmp_path: Path) -> None:
    subagent = {"t": 1, "type": "subagent", "requests": []}
    lines = coding(sent(200, [1, 2, 3]), subagent, sent(300, [1, 2, 3, 4], t=2)), coding(subagent)
    workload = load(tmp_path, "kv-cache-tester", *lines)
    assert [len(s.turns) for s in workload.sessions] == [2]
    assert workload.sessions[0].turns[1].kept_tokens == 210
    assert "2 nested agents left out" in workload.note


def test_coding_sessions_have_limits_unless_told_otherwise(tmp_path: Path) -> None:
    line = coding(*(sent(200, [1, 2, 3], think=601) for _ in range(61)))
    turns = load(tmp_path, "kv-cache-tester", line).sessions[0].turns
    assert (len(turns), turns[0].pause_s) == (60, 600)
    turns = load(tmp_path, "kv-cache-tester", line, max_calls=1000, max_pause_s=1000).sessions[0].turns
    assert (len(turns), turns[0].pause_s) == (61, 601)


# Four characters are a token, with "role\n" before a message and "\n" behind it.
TALK = [
    says("system", "s" * 32),  # 40 / 4 = 10
    says("user", "u" * 14),  # 20 / 4 = 5
    says("assistant", "a" * 9),  # 20 / 4 = 5
    says("user", "u" * 2),  # 2
    says("assistant", None, "look", "book"),
    says("tool", "t" * 6),  # 3
    says("assistant", "a" * 1),  # 3
    says("user", "bye"),
]


def test_tau_bench_turns_are_the_messages_of_the_assistant(tmp_path: Path) -> None:
    other = [says("system", "S" * 32), *TALK[1:3]]
    workload = load(tmp_path, "tau-bench", *({"traj": talk} for talk in (TALK, other, TALK, TALK[1:3])))
    assert [(s.kind, s.shared_tokens) for s in workload.sessions] == [
        ("system prompt 1", 10),
        ("system prompt 2", 10),
        ("system prompt 1", 10),
        ("no system prompt", 0),
    ]
    first, second, third = workload.sessions[0].turns
    calls = len("assistant\n" + json.dumps(TALK[4]["tool_calls"], separators=(",", ":")) + "\n")
    assert (first.prompt_tokens, first.kept_tokens, first.output_tokens, first.tool) == (15, 0, 5, "")
    assert (second.prompt_tokens, second.kept_tokens, second.tool) == (22, 20, "look")
    assert second.output_tokens == math.ceil(calls / 4)
    assert third == Turn(25 + second.output_tokens, 22 + second.output_tokens, 3, "", None)


def test_tau_bench_counts_tokens_as_it_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", {"traj": TALK[:3]})
    (session,) = load_workload(file, "tau-bench", encode=lambda text: [0] * len(text)).sessions
    assert session.turns == (Turn(60, 0, 20, "", None),)


def test_tau_bench_times_come_from_the_seed_and_the_name_of_the_tool(tmp_path: Path) -> None:
    talk = [says("user", "u")]
    for i in range(600):
        talk += [says("assistant", "a", *([], ["fast"], ["slow"])[i % 3]), says("tool", "t")]
    file = write(tmp_path / "t.jsonl", {"traj": [*talk, says("assistant", "end")]})
    one, same, other = (load_workload(file, "tau-bench", seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.sessions != other.sessions
    assert "made-up times" in one.note
    medians = [
        {name: median(t.pause_s or 0 for t in w.sessions[0].turns if t.tool == name) for name in ("", "fast", "slow")}
        for w in (one, other)
    ]
    assert [m[""] for m in medians] == pytest.approx([20, 20], rel=0.25), "a person"
    assert abs(math.log(medians[0]["fast"] / medians[1]["fast"])) > 0.3, "a median of its own by seed"
    assert abs(math.log(medians[0]["fast"] / medians[0]["slow"])) > 0.3, "and by name"


def test_a_trajectory_that_ends_in_a_call_is_counted(tmp_path: Path) -> None:
    workload = load(tmp_path, "tau-bench", {"traj": TALK[:6]})
    assert workload.sessions[0].turns[-1].tool == ""
    assert "1 sessions end in a call that nothing follows" in workload.note


def test_packed_files_and_blank_lines_are_read(tmp_path: Path) -> None:
    file = write(tmp_path / "some.jsonl.gz", "", mars(api(9, 2, None)), " ", mars(api(9, 2, None)))
    workload = load_workload(file, "mars")
    assert (workload.name, len(workload.sessions)) == ("some", 2)


GOOD_CALL = api(9, 2, 1)
HOSTILE = [
    ("mars", {}, "calls missing: expected a list of objects"),
    ("mars", mars(), "calls []: expected at least one call"),
    ("mars", {"calls": [7]}, "calls [7]: expected a list of objects"),
    ("mars", mars(GOOD_CALL, api(0, 2, 1)), "calls[1].prompt_tokens 0: expected an integer from 1 to 2147483647"),
    ("mars", mars(api(True, 2, 1)), "calls[0].prompt_tokens true: expected an integer from 1"),
    ("mars", mars(api(2**31, 2, 1)), "calls[0].prompt_tokens 2147483648: expected an integer from 1"),
    ("mars", mars(api(9, -1, 1)), "calls[0].completion_tokens -1: expected an integer from 0"),
    ("mars", mars(api(9, 2.5, 1)), "calls[0].completion_tokens 2.5: expected an integer"),
    ("mars", mars(api(9, 2, -0.1)), "calls[0].api_time -0.1: expected a finite number, not negative"),
    ("mars", mars(api(9, 2, math.nan)), "calls[0].api_time NaN: expected a finite number"),
    ("mars", mars(api(9, 2, math.inf)), "calls[0].api_time Infinity: expected a finite number"),
    ("mars", mars(api(9, 2, "1")), 'calls[0].api_time "1": expected a finite number'),
    ("mars", mars(api(9, 2, 1e12)), "calls[0].api_time 1000000000000.0: expected at most 31536000 seconds"),
    ("mars", mars(api(9, 2, None), GOOD_CALL), "calls[0].api_time null: expected a finite number"),
    ("mars", mars(api(9, 2, 1, [3])), "calls[0].api_token_length [3]: expected an integer"),
    ("kv-cache-tester", {"id": "s"}, "requests missing: expected a list of objects"),
    ("kv-cache-tester", coding(block_size=32), "block_size 32: expected 64"),
    ("kv-cache-tester", coding(sent(200, [1])), "requests[0].hash_ids has 1 ids: expected 3 for in 200"),
    ("kv-cache-tester", coding(sent(200, [1, 2, -3])), "requests[0].hash_ids [1, 2, -3]: expected integers from 0"),
    ("kv-cache-tester", coding(sent(64, ["a"])), 'requests[0].hash_ids ["a"]: expected a list of integers'),
    ("kv-cache-tester", coding(sent(0, [])), "requests[0].in 0: expected an integer from 1"),
    ("kv-cache-tester", coding(sent(9, [], output=None)), "requests[0].out null: expected an integer"),
    ("kv-cache-tester", coding(sent(9, []), sent(9, [], think=-1)), "requests[1].think_time -1: expected a finite"),
    ("kv-cache-tester", coding(sent(9, []), sent(9, [], think=1e9)), "requests[1].think_time 1000000000.0: expected"),
    ("kv-cache-tester", coding(sent(9, [], t=5), sent(9, [])), "requests[1].t 0: expected at least 5"),
    ("kv-cache-tester", coding(sent(9, []), sent(9, []) | {"input_types": 3}), "requests[1].input_types 3: expected"),
    ("tau-bench", {"traj": "hello"}, 'traj "hello": expected a list of objects'),
    ("tau-bench", {"traj": [says("assistant", "a")]}, 'traj[0].role "assistant": expected a message of somebody else'),
    ("tau-bench", {"traj": [says(None, "a")]}, "traj[0].role null: expected a string"),
    ("tau-bench", {"traj": [says("user", ["a"])]}, 'traj[0].content ["a"]: expected a list of objects'),
    ("tau-bench", {"traj": [says("user", "u"), says("assistant", None, "")]}, 'tool_calls[0].function.name "": expect'),
    ("tau-bench", {"traj": [says("user", "u"), says("assistant", None, 5)]}, "tool_calls[0].function.name 5: expected"),
    ("tau-bench", {"traj": [says("user", "u"), says("assistant", "a") | {"tool_calls": 1}]}, "tool_calls 1: expected"),
]
GOOD = {"mars": mars(GOOD_CALL), "kv-cache-tester": coding(sent(9, [])), "tau-bench": {"traj": TALK}}


@pytest.mark.parametrize(("format", "line", "problem"), HOSTILE)
def test_a_field_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, format: str, line: Json, problem: str
) -> None:
    with pytest.raises(TraceError) as caught:
        load(tmp_path, format, GOOD[format], "", line)
    assert str(caught.value).startswith(f"{tmp_path}/trace.jsonl:3: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[]", "7", "\x00", '{"calls": 1e999999'])
@pytest.mark.parametrize("format", sorted(GOOD))
def test_lines_that_are_no_objects_are_named(tmp_path: Path, format: str, line: str) -> None:
    with pytest.raises(TraceError, match=re.escape(f"{tmp_path}/trace.jsonl:2: JSON ")):
        load(tmp_path, format, GOOD[format], line)


@pytest.mark.parametrize("format", sorted(GOOD))
def test_a_file_without_sessions_is_refused(tmp_path: Path, format: str) -> None:
    with pytest.raises(TraceError, match=re.escape(f"{tmp_path}/trace.jsonl:1: sessions: expected at least one")):
        load(tmp_path, format, "")
    with pytest.raises(TraceError, match=r"cannot be read: No such file"):
        load_workload(tmp_path / "none.jsonl", format)


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({"max_calls": 0}, "max_calls 0: expected 1 to 1e+06"),
        ({"max_tokens": 1}, "max_tokens 1: expected 2 to"),
        ({"max_tokens": 10**12}, "max_tokens 1000000000000: expected 2 to"),
        ({"max_pause_s": -1.0}, "max_pause_s -1.0: expected 0 to"),
        ({"max_pause_s": math.nan}, "max_pause_s nan: expected 0 to"),
        ({"max_pause_s": math.inf}, "max_pause_s inf: expected 0 to"),
    ],
)
def test_limits_out_of_bounds_are_refused(tmp_path: Path, limits: dict[str, float], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        load(tmp_path, "mars", mars(GOOD_CALL), **limits)


def test_formats_and_files_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"format csv: expected one of {', '.join(FORMATS)}"):
        load_workload(tmp_path, "csv")
    with pytest.raises(ConfigError, match="trace None: expected a file for format mars"):
        load_workload(None, "mars")
    with pytest.raises(ConfigError, match="x: expected none for format synthetic"):
        load_workload(Path("x"), "synthetic")


def whole(sessions: Sequence[AgentSession]) -> None:
    """What every session promises."""
    for session in sessions:
        assert session.turns[0].kept_tokens == 0
        assert session.shared_tokens <= session.turns[0].prompt_tokens
        assert [turn.pause_s is None for turn in session.turns] == [False] * (len(session.turns) - 1) + [True]
        assert session.turns[-1].tool == ""
        for turn in session.turns:
            assert 0 <= turn.kept_tokens < turn.prompt_tokens
            assert turn.output_tokens >= 1
            assert turn.pause_s is None or 0 <= turn.pause_s < math.inf


def test_synthetic_agents_are_what_their_table_says() -> None:
    workload = load_workload(None, "synthetic", seed=3)
    assert workload.name == "synthetic"
    assert len(workload.sessions) == 1000
    whole(workload.sessions)
    kinds = Counter(session.kind for session in workload.sessions)
    assert set(kinds) == {kind.name for kind in KINDS}
    assert min(kinds.values()) > 250
    for kind in KINDS:
        sessions = [s for s in workload.sessions if s.kind == kind.name]
        assert {s.shared_tokens for s in sessions} == {kind.system_tokens}
        pauses = [turn for s in sessions for turn in s.turns[:-1]]
        assert {turn.tool for turn in pauses} == {tool.name for tool in kind.tools}
        for tool in kind.tools:
            times = sorted(turn.pause_s or 0 for turn in pauses if turn.tool == tool.name)
            assert times[len(times) // 2] == pytest.approx(tool.median_s, rel=0.35)
            if tool.stuck >= 0.05:
                assert times[-1] > 50 * tool.median_s, "a heavy tail"
        for session in sessions:
            for last, turn in pairwise(session.turns):
                assert turn.kept_tokens == last.prompt_tokens + last.output_tokens


def test_synthetic_agents_come_from_their_seed() -> None:
    one, same, other = (load_workload(None, "synthetic", seed=seed, max_calls=3) for seed in (1, 1, 2))
    assert one == same
    assert one.sessions != other.sessions


def numbered(count: int) -> Workload:
    return Workload("w", tuple(AgentSession(f"{i}", 0, (Turn(1, 0, 1, "", None),)) for i in range(count)), "")


def test_halves_share_no_session_and_leave_none_out() -> None:
    workload = numbered(1000)
    tuning, held_out = workload.half("tuning"), workload.half("held-out")
    assert set(tuning.sessions) | set(held_out.sessions) == set(workload.sessions)
    assert not set(tuning.sessions) & set(held_out.sessions)
    assert 450 < len(tuning.sessions) < 550
    assert tuning.note == f"the tuning half, {len(tuning.sessions)} of 1000 sessions"
    assert numbered(500).half("tuning").sessions == tuning.sessions[: len(numbered(500).half("tuning").sessions)]


def test_a_half_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="half 'other': expected one of tuning, held-out"):
        numbered(9).half(cast(Half, "other"))
    (full,) = [half for half in get_args(Half) if numbered(30).sessions[0] in numbered(30).half(half).sessions]
    (empty,) = set(get_args(Half)) - {full}
    assert numbered(1).half(full).sessions == numbered(1).sessions
    with pytest.raises(ConfigError, match="expected more than 1 sessions"):
        numbered(1).half(empty)


def test_arrivals_come_from_their_seed() -> None:
    workload = numbered(50)
    assert arrivals(workload, 2, 100, 1) == arrivals(workload, 2, 100, 1)
    assert arrivals(workload, 2, 100, 1) != arrivals(workload, 2, 100, 2)


def test_arrivals_are_poisson_with_their_rate() -> None:
    came = arrivals(numbered(50), 4, 5_000, 7)
    times = [time for time, _ in came]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] <= 5_000
    assert len(came) == pytest.approx(20_000, abs=5 * math.sqrt(20_000))
    gaps = [b - a for a, b in pairwise(times)]
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(math.exp(-1), abs=0.02)
    counts = Counter(session.kind for _, session in came)
    assert len(counts) == 50
    assert all(300 < count < 500 for count in counts.values()), "drawn alike, with replacement"


def test_arrivals_of_one_half_are_of_that_half_only() -> None:
    workload = numbered(50)
    drawn = {session for _, session in arrivals(workload, 4, 500, 1, half="tuning")}
    assert drawn == set(workload.half("tuning").sessions)


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, 1e9])
def test_rates_and_times_out_of_bounds_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=f"rate {value}"):
        arrivals(numbered(2), value, 100, 0)
    with pytest.raises(ConfigError, match=re.escape(str(value))):
        arrivals(numbered(2), 100, value, 0)


@NEEDS_DATA
def test_the_real_mars_sessions_have_the_counts_that_are_known_of_them() -> None:
    workload = load_workload(DATA / "traces/mars/augmented_calls.shared.jsonl.gz", "mars")
    whole(workload.sessions)
    turns = [turn for session in workload.sessions for turn in session.turns]
    assert (len(workload.sessions), len(turns)) == (237, 1254)
    assert "112 sessions end in a call that nothing follows" in workload.note
    tools = Counter(turn.tool for turn in turns if turn.tool)
    assert tools == {"math": 179, "ve": 143, "qa": 121, "gen": 574}
    assert sum(turn.pause_s or 0 for turn in turns) / 237 == pytest.approx(49.6, abs=0.05)
    assert max(turn.prompt_tokens + turn.output_tokens for turn in turns) == 2067
    assert len(workload.half("tuning").sessions) + len(workload.half("held-out").sessions) == 237
    assert len(arrivals(workload, 4, 1800, 1)) == 7163


@NEEDS_DATA
def test_the_real_coding_sessions_are_read() -> None:
    workload = load_workload(
        DATA / "traces/kv-cache-tester/traces.small24.jsonl.gz", "kv-cache-tester", max_calls=10**6, max_tokens=10**9
    )
    whole(workload.sessions)
    assert (len(workload.sessions), sum(len(s.turns) for s in workload.sessions)) == (24, 321)


@NEEDS_DATA
def test_the_real_trajectories_are_read() -> None:
    workload = load_workload(DATA / "agents/tau-bench/gpt-4o-airline.task00-29.jsonl.gz", "tau-bench")
    whole(workload.sessions)
    turns = [turn for session in workload.sessions for turn in session.turns]
    assert (len(workload.sessions), len(turns)) == (120, 1698)
    assert {(s.kind, s.shared_tokens) for s in workload.sessions} == {("system prompt 1", math.ceil(6163 / 4))}
    assert sum(bool(turn.tool) for turn in turns) == 810 - 22, "22 trajectories end in a call"
