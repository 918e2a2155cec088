import gzip
import json
import lzma
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from hybrid_cache.bench.traces.files import FORMATS, TraceError, four_characters, load_trace
from hybrid_cache.bench.traces.trace import Mark, PageNames, Trace
from hybrid_cache.cache.policies.signals import Finish, Origin
from hybrid_cache.errors import ConfigError

DATA = Path(__file__).parents[3] / "../shared/data/traces"

Json = dict[str, object]


def write(path: Path, *lines: object) -> Path:
    """Objects as JSON, text as it is; packed as the name says."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    if path.suffix == ".gz":
        text = gzip.compress(text)
    elif path.suffix == ".xz":
        text = lzma.compress(text)
    path.write_bytes(text)
    return path


def mooncake(timestamp: object = 0, length: object = 1100, ids: object = (1, 2, 3), output: object = 5) -> Json:
    return {"timestamp": timestamp, "input_length": length, "output_length": output, "hash_ids": ids}


def call(t: float = 0.0, length: int = 200, ids: Sequence[int] = (1, 2, 3), kind: str = "text") -> Json:
    return {"t": t, "type": "n", "in": length, "out": 7, "hash_ids": ids, "input_types": [kind]}


def session(name: str, *requests: Json, tools: int = 60, system: int = 40) -> Json:
    sizes = {"block_size": 64, "hash_id_scope": "local", "tool_tokens": tools, "system_tokens": system}
    return {"id": name, **sizes, "requests": requests}


def subagent(t: float, *requests: Json) -> Json:
    return {"t": t, "type": "subagent", "tool_tokens": 10, "system_tokens": 20, "requests": requests}


TABLES = {
    "1_sys_prompt": ("sys_prompt_id", {1: 64, 2: 30}),
    "2_passages": ("passage_id", {10: 100, 11: 50}),
    "3_history": ("history_id", {20: 5}),
    "4_user_input": ("user_input_id", {30: 9, 31: 9}),
    "5_web_search": ("web_search_id", {40: 70}),
}


def rag(
    time: object = "0", length: object = 300, output: object = 3, who: object = "a", **parts: Sequence[int]
) -> Json:
    ids = {part: parts.get(part, []) for part in ("sys_prompt", "passages_ids", "history", "web_search", "user_input")}
    return {"timestamp": time, "input_length": length, "output_length": output, "hash_ids": ids, "session_id": who}


def ragpulse(folder: Path, *lines: object, **tables: Sequence[object]) -> Path:
    for name, (key, lengths) in TABLES.items():
        rows = [{key: number, "token_length": length} for number, length in lengths.items()]
        write(folder / f"{name}.jsonl.gz", *tables.get(name[2:], [rows[0], "", *rows[1:]]))
    return write(folder / "0_trace.jsonl.gz", *lines)


def message(role: str, content: str) -> Json:
    return {"role": role, "content": content}


def chat(*contents: str, **more: object) -> Json:
    return {"messages": [message(role, c) for role, c in zip(("system", "user") * 9, contents, strict=False)], **more}


def pages(trace: Trace) -> list[list[int]]:
    return [r.pages.tolist() for r in trace.requests]


def hit_rate(trace: Trace, partial: bool = False) -> float:
    """Of an infinite cache: leading pages that came before; with `partial`, also the rest of an exact repeat."""
    seen, wholes, hits = set[int](), set[int](), 0
    for r in trace.requests:
        names = r.pages[: r.num_prompt_tokens // trace.page_tokens].tolist()
        hit = next((i for i, name in enumerate(names) if name not in seen), len(names)) * trace.page_tokens
        hits += r.num_prompt_tokens if partial and r.whole in wholes else hit
        seen.update(names)
        wholes.add(r.whole)
    return hits / trace.num_prompt_tokens


def test_mooncake_pages_are_the_ids_of_full_blocks(tmp_path: Path) -> None:
    lines = mooncake(0), mooncake(1500), mooncake(3000, 1101), mooncake(3000, 1024, [1, 2])
    trace = load_trace(write(tmp_path / "some.log.jsonl", *lines))
    assert (trace.name, trace.page_tokens, trace.note) == ("some.log", 512, "")
    assert pages(trace) == [[1, 2]] * 4
    first, same, longer, full = trace.requests
    assert first.whole == same.whole
    assert len({first.whole, longer.whole, full.whole}) == 3
    assert [r.arrival_s for r in trace.requests] == [0, 1.5, 3, 3]
    assert (first.num_prompt_tokens, first.num_known_tokens, first.num_output_tokens) == (1100, 1100, 5)
    assert first.marks == (Mark(1100, ""),)
    assert (first.session, first.tokens) == ("", None)


def blocks(size: int, *prompts: int) -> list[Json]:
    """Prompts that all begin with the same blocks of a size."""
    return [mooncake(i, n, list(range(-(-n // size)))) for i, n in enumerate(prompts)]


@pytest.mark.parametrize(("size", "page", "pages_of"), [(16, 64, 4), (64, 64, 1), (1024, 1024, 1)])
def test_the_size_of_a_block_is_found_in_the_data(tmp_path: Path, size: int, page: int, pages_of: int) -> None:
    trace = load_trace(write(tmp_path / "t.jsonl", *blocks(size, 5000, 4999, 20)))
    assert (trace.page_tokens, trace.note) == (page, f"a hash id stands for {size} tokens")
    assert pages(trace)[0] == list(range(5000 // size))[pages_of - 1 :: pages_of]
    assert pages(trace)[2] == []


def test_the_size_of_a_block_may_be_given(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", *blocks(48, 1000, 30))
    assert load_trace(file, block_tokens=48).page_tokens == 192
    with pytest.raises(TraceError, match=r"1: hash_ids has 21 ids: expected 2 for input_length 1000$"):
        load_trace(file)
    with pytest.raises(TraceError, match="expected 63 for input_length 1000 in blocks of 16"):
        load_trace(file, block_tokens=16)
    with pytest.raises(ConfigError, match="block_tokens 16: expected none, tokens does not leave it open"):
        load_trace(write(tmp_path / "u.jsonl", {"prompt": [1]}), block_tokens=16)


def test_qwen_bailian_has_blocks_of_sixteen_tokens_and_conversations(tmp_path: Path) -> None:
    def chat(number: int, parent: int, ids: Sequence[int]) -> Json:
        return {**mooncake(number / 2, 16 * len(ids), ids), "chat_id": number, "parent_chat_id": parent}

    lines = chat(1, -1, [7, 8, 9, 7]), chat(2, 1, [7, 8, 9, 7, 5]), chat(3, 2, [8, 8, 9, 7]), chat(4, 99, [7, 8])
    trace = load_trace(write(tmp_path / "t.jsonl", *lines))
    assert trace.page_tokens == 64
    assert [r.arrival_s for r in trace.requests] == [0.5, 1.0, 1.5, 2.0]
    assert [r.session for r in trace.requests] == ["1", "1", "1", "4"]
    first, second, third, fourth = pages(trace)
    assert first == second != third, "an id names a block only together with those before it"
    assert fourth == []


def test_marconis_traces_are_tokens_with_times(tmp_path: Path) -> None:
    line: Json = {"session_id": 4, "turn_id": 0, "num_input_tokens": 3, "num_output_tokens": 2}
    lines = [{**line, "ts": ts, "input_tokens": [1, 2, 3], "output_tokens": [4, 5]} for ts in (10.5, 11.0)]
    trace = load_trace(write(tmp_path / "t.jsonl", *lines))
    assert [r.arrival_s for r in trace.requests] == [0.0, 0.5]
    first = trace.requests[0]
    assert (first.session, first.num_prompt_tokens, first.num_known_tokens) == ("4", 3, 5)
    assert first.whole == trace.requests[1].whole


@pytest.mark.parametrize("indent", [None, 1])
def test_share_gpt_is_one_array_of_conversations(tmp_path: Path, indent: int | None) -> None:
    def turns(*texts: str) -> Json:
        speakers = ("human", "gpt") * (len(texts) // 2)
        return {"conversations": [{"from": who, "value": t} for who, t in zip(speakers, texts, strict=True)]}

    text = json.dumps([turns("Hello there", "Hi", "And?", "Well"), turns("Hello there", "Yes")], indent=indent)
    trace = load_trace(write(tmp_path / "sg.json", text))
    assert len(trace.requests) == 3
    assert len({r.session for r in trace.requests}) == 2
    assert [m.role for r in trace.requests if len(r.marks) == 3 for m in r.marks] == ["user", "assistant", "user"]
    bad = write(tmp_path / "bad.json", json.dumps([turns("a", "b"), {"conversations": [{"from": "human"}]}]))
    with pytest.raises(TraceError, match=re.escape(":1: [1].conversations[0].value missing: expected a string")):
        load_trace(bad)


def test_times_may_be_moments_in_iso_8601(tmp_path: Path) -> None:
    moments = "2026-05-01T10:00:00Z", "2026-05-01T12:00:01.5+02:00", "2026-05-01 10:00:03"
    traces = [
        load_trace(write(tmp_path / "m.jsonl", *(mooncake(moment) for moment in moments))),
        load_trace(write(tmp_path / "c.jsonl", *(chat("x", timestamp=moment) for moment in moments))),
        load_trace(write(tmp_path / "a.jsonl", *({"prompt": [1], "arrival_s": moment} for moment in moments))),
    ]
    assert [[r.arrival_s for r in trace.requests] for trace in traces] == [[0.0, 1.5, 3.0]] * 3


def test_unsorted_files_are_sorted_on_request(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "m.jsonl", mooncake(2000), mooncake(1000)),
        write(tmp_path / "c.jsonl", chat("x", arrival_s=2), chat("y", arrival_s=1)),
        write(tmp_path / "t.jsonl", {"prompt": [1], "arrival_s": 2}, {"prompt": [2], "arrival_s": 1}),
        write(tmp_path / "i.jsonl", {"input_tokens": [1], "ts": 2}, {"input_tokens": [2], "ts": 1}),
    ]
    for file in files:
        with pytest.raises(TraceError, match="the time before it, unless sorted with --sort"):
            load_trace(file)
        times = [r.arrival_s for r in load_trace(file, sort=True).requests]
        assert times[1] - times[0] == 1.0


def test_parts_of_a_message_are_its_text(tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:x"}}
    parts = [{"type": "text", "text": "Look"}, {"type": "text", "text": "here"}]
    whole, same, other = load_trace(
        write(
            tmp_path / "t.jsonl",
            *({"messages": [{"role": "user", "content": c}]} for c in ("Look\nhere", parts, [*parts, image])),
        )
    ).requests
    assert whole.whole == same.whole != other.whole
    assert other.num_prompt_tokens > same.num_prompt_tokens


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_packed_files_and_blank_lines_are_read(tmp_path: Path, suffix: str) -> None:
    trace = load_trace(write(tmp_path / f"trace.jsonl{suffix}", "", mooncake(), " \t", mooncake()))
    assert len(trace.requests) == 2
    assert trace.name == "trace"


def test_files_of_a_folder_are_one_trace(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl.gz", mooncake(1000, ids=[1, 2, 4]))
    write(tmp_path / "a.jsonl", mooncake(0), mooncake(2000))
    (tmp_path / "README.md").write_text("not a trace")
    trace = load_trace(tmp_path)
    assert trace.name == tmp_path.name
    assert [r.arrival_s for r in trace.requests] == [0, 1, 2]


def test_kv_cache_tester_blocks_are_those_of_their_session(tmp_path: Path) -> None:
    first = session("a", call(0, 200), call(9, 256, [1, 2, 3, 7], "tool_result"))
    trace = load_trace(write(tmp_path / "t.jsonl", first, session("b", call(0, 200))), rate=1e-9)
    assert trace.page_tokens == 64
    one, two, other = pages(trace)
    assert two[:3] == one
    assert not set(two) & set(other)
    a, b, c = trace.requests
    assert [r.session for r in trace.requests] == ["a", "a", "b"]
    assert len({a.whole, b.whole, c.whole}) == 3
    assert a.marks == (Mark(100, "system"), Mark(200, "user"))
    assert b.marks == (Mark(100, "system"), Mark(256, "tool"))
    assert (a.num_output_tokens, a.num_known_tokens) == (7, 200)


def test_a_subagent_shares_its_sessions_blocks_and_counts_time_from_its_own_start(tmp_path: Path) -> None:
    nested = subagent(2.5, call(0, 80, [9]), call(4, 130, [9, 10]))
    line = session("a", call(0), nested, call(5, 140, [1, 2]), tools=150)
    trace = load_trace(write(tmp_path / "t.jsonl", line), "kv-cache-tester")
    assert [r.arrival_s for r in trace.requests] == [0, 2.5, 5, 6.5]
    assert [len(p) for p in pages(trace)] == [3, 1, 2, 2]
    assert trace.requests[1].marks[0] == Mark(30, "system")
    assert trace.requests[2].marks == (Mark(140, "user"),)  # the tools alone are longer


def test_sessions_without_common_times_start_at_random_but_always_the_same(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", *(session(f"s{i}", call(0), call(100)) for i in range(400)))
    trace, again, other = (load_trace(file, seed=seed) for seed in (1, 1, 2))
    times = [[r.arrival_s for r in t.requests] for t in (trace, again, other)]
    assert times[0] == times[1] != times[2]
    assert times[0] == sorted(times[0])
    assert times[0][0] == 0
    assert times[0][-1] == pytest.approx(100 + 399 * 100 / 8, rel=0.15)  # eight sessions at a time
    assert "0.08 sessions a second" in trace.note
    assert "seed 1" in trace.note
    assert load_trace(file, rate=2).requests[-1].arrival_s == pytest.approx(300, rel=0.15)


def test_a_sample_holds_whole_sessions_and_depends_on_the_seed(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", *(session(f"s{i}", call(0), call(1)) for i in range(50)))
    drawn = [{r.session for r in load_trace(file, sessions=5, seed=seed).requests} for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    trace = load_trace(file, sessions=5)
    assert len(trace.requests) == 10
    assert "5 sessions drawn with seed 0" in trace.note


def test_ragpulse_prompts_are_made_of_their_segments(tmp_path: Path) -> None:
    parts = {"sys_prompt": [1, 2], "passages_ids": [10, 11], "history": [20], "web_search": [40], "user_input": [30]}
    lines = rag("5", 335, who="b", **parts), rag("2.5", 330, **{**parts, "user_input": [31]})
    file = ragpulse(tmp_path, *lines)
    trace = load_trace(file)
    assert pages(load_trace(tmp_path)) == pages(trace)
    later, first = trace.requests[1], trace.requests[0]  # the file is not sorted
    assert (first.arrival_s, first.session, later.arrival_s, later.session) == (2.5, "a", 5, "b")
    assert later.marks == (
        Mark(94, "system"),
        Mark(194, "tool"),
        Mark(244, "tool"),
        Mark(249, "assistant"),
        Mark(319, "tool"),
        Mark(335, "user"),
    )
    assert first.tokens is not None
    assert later.tokens is not None
    np.testing.assert_array_equal(first.tokens[:319], later.tokens[:319])
    assert not set(first.tokens[319:].tolist()) & set(later.tokens[319:].tolist())
    assert len(set(later.tokens.tolist())) == later.num_prompt_tokens == 335
    assert (first.pages == later.pages).tolist() == [True] * 4 + [False]
    assert "assumed order of a prompt's parts: sys_prompt, passages_ids, history" in trace.note


def test_an_empty_part_of_a_ragpulse_prompt_has_no_mark(tmp_path: Path) -> None:
    trace = load_trace(ragpulse(tmp_path, rag("0", 64, sys_prompt=[1]), rag("1", 75, sys_prompt=[1])))
    assert trace.requests[0].marks == (Mark(64, "system"),)
    assert trace.requests[1].marks == (Mark(64, "system"), Mark(75, "user"))


def by_letter(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_messages_are_tokens_one_after_the_other_with_marks_at_their_ends(tmp_path: Path) -> None:
    line = chat("Be brief.", "Hi", output="Ho", arrival_s=4, session="me", max_tokens=99)
    (request,) = load_trace(write(tmp_path / "t.jsonl", line), encode=by_letter).requests
    prompt = "system\nBe brief.\nuser\nHi\n"
    assert request.tokens is not None
    assert request.tokens.tolist() == by_letter(prompt)
    assert request.marks == (Mark(17, "system"), Mark(25, "user"))
    assert (request.num_prompt_tokens, request.num_known_tokens) == (25, 25 + len("assistant\nHo\n"))
    assert (request.num_output_tokens, request.arrival_s, request.session) == (13, 4, "me")


def test_an_answer_that_comes_back_is_found_in_the_pages_of_its_request(tmp_path: Path) -> None:
    turns = [message("user", "u" * 300), message("assistant", "a" * 400), message("user", "more")]
    lines = {"messages": turns[:1], "output": "a" * 400}, {"messages": turns}
    first, second = load_trace(write(tmp_path / "t.jsonl", *lines)).requests
    assert len(first.pages) == (77 + 103) // 64 == 2
    assert first.pages.tolist() == second.pages[:2].tolist()


@pytest.mark.parametrize(
    ("more", "expected"), [({}, 0), ({"max_tokens": 9}, 9), ({"output_tokens": 4, "max_tokens": 9}, 4)]
)
def test_an_output_without_text_has_only_a_length(tmp_path: Path, more: Json, expected: int) -> None:
    (request,) = load_trace(write(tmp_path / "t.jsonl", chat("Hi", **more))).requests
    assert request.num_output_tokens == expected
    assert request.num_known_tokens == request.num_prompt_tokens


def test_timestamps_of_messages_count_from_the_first(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", chat("x", timestamp=1_700_000_010), chat("y", timestamp=1_700_000_012.5))
    write(tmp_path / "b.jsonl", chat("z", timestamp=1_700_000_008))
    assert [r.arrival_s for r in load_trace(tmp_path).requests] == [0, 2, 4.5]


def test_messages_without_times_come_once_a_second_on_average(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", *(chat(str(i)) for i in range(400)))
    trace = load_trace(file, seed=3)
    assert trace.requests[-1].arrival_s == pytest.approx(400, rel=0.15)
    assert load_trace(file, seed=3, rate=10).requests[-1].arrival_s == pytest.approx(40, rel=0.15)
    assert trace.note == "made-up Poisson process that starts 1 requests a second; seed 3"


def test_each_answer_of_a_trajectory_is_a_request(tmp_path: Path) -> None:
    tools = [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    turns = [
        message("system", "S"),
        message("user", "Hi"),
        {"role": "assistant", "content": None, "tool_calls": tools},
        message("tool", "42"),
        message("assistant", "It is 42."),
        message("user", "Bye"),
    ]
    file = write(tmp_path / "tau.jsonl", {"task_id": 0, "traj": turns}, {"task_id": 0, "traj": turns})
    trace = load_trace(file, encode=by_letter, rate=1e-9)
    first, second = trace.requests[:2]
    assert len(trace.requests) == 4
    assert [r.session for r in trace.requests] == ["tau.jsonl:1"] * 2 + ["tau.jsonl:2"] * 2
    assert [m.role for m in second.marks] == ["system", "user", "assistant", "tool"]
    assert second.tokens is not None
    text = "".join(map(chr, second.tokens.tolist()))
    assert text.endswith(f"assistant\n{json.dumps(tools, separators=(',', ':'))}\ntool\n42\n")
    assert first.num_known_tokens == second.num_prompt_tokens - len("tool\n42\n")
    assert 0 < second.arrival_s < 60
    assert trace.requests[2].whole == first.whole
    assert "pauses within a session, exponential with a mean of 5 s" in trace.note


def test_few_shot_files_are_mixed_but_each_stays_in_order(tmp_path: Path) -> None:
    for task in ("a", "b"):
        outputs = [{"input": f"{task}{i:02}", "prediction": "So the answer is 1.", "target": "1"} for i in range(20)]
        write(tmp_path / f"{task}.json.gz", {"canary": "", "outputs": outputs})
    trace, other = (load_trace(tmp_path, encode=by_letter, seed=seed) for seed in (0, 1))
    orders = [["".join(map(chr, r.tokens[5:8])) for r in t.requests if r.tokens is not None] for t in (trace, other)]
    assert orders[0] != orders[1]
    for order in orders:
        assert order != sorted(order)
        for task in "ab":
            assert [name for name in order if name[0] == task] == [f"{task}{i:02}" for i in range(20)]
    assert "files mixed at random" in trace.note
    assert trace.requests[0].num_output_tokens == len("assistant\nSo the answer is 1.\n")


def log(time_us: int, text: str, output: str, who: str = "s") -> Json:
    return {"timestamp": time_us, "input": text, "output": output, "session_id": who}


def test_outputs_are_put_back_into_the_prompts_of_agent_logs(tmp_path: Path) -> None:
    lines = log(3_500_000, "task|result", "B"), log(1_000_000, "task|", "A"), log(4_000_000, "new", "C")
    trace = load_trace(write(tmp_path / "t.jsonl.xz", *lines), encode=by_letter)
    prompts = ["".join(map(chr, r.tokens)) for r in trace.requests if r.tokens is not None]
    assert prompts == ["user\ntask|\n", "user\ntask|\nassistant\nA\ntool\nresult\n", "user\nnew\n"]
    assert [r.arrival_s for r in trace.requests] == [0, 2.5, 3]
    assert [m.role for m in trace.requests[1].marks] == ["user", "assistant", "tool"]
    assert "outputs put back" in trace.note


def test_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    marks = [{"position": 64, "role": "system", "explicit": True}, {"position": 90}]
    full = {"prompt": [*range(100)], "output": [*range(28)], "arrival_s": 1.5, "session": "a", "marks": marks}
    first, second = load_trace(
        write(tmp_path / "t.jsonl", full, {"prompt": [7], "output_tokens": 3, "arrival_s": 2})
    ).requests
    assert first.tokens is not None
    assert first.tokens.tolist() == [*range(100)]
    assert first.marks == (Mark(64, "system", True), Mark(90, ""), Mark(100, ""))
    assert (len(first.pages), first.num_prompt_tokens, first.num_known_tokens) == (2, 100, 128)
    assert (first.num_output_tokens, first.arrival_s, first.session) == (28, 1.5, "a")
    assert (len(second.pages), second.num_output_tokens, second.num_known_tokens) == (0, 3, 1)


def test_the_default_encoder_makes_a_stable_token_of_every_four_characters() -> None:
    assert four_characters("") == []
    assert four_characters("The cat sat") == [
        *four_characters("The "),
        *four_characters("cat "),
        *four_characters("sat"),
    ]
    assert four_characters("héé\ud800") != four_characters("héé?")
    assert four_characters("cache") == [1791066013, 180775726]
    texts = [f"{i:04}" for i in range(10_000)]
    assert len(set(four_characters("".join(texts)))) == 10_000


def random_prompts(rng: np.random.Generator, unit: int) -> list[list[int]]:
    """Sequences that share starts of any length, in numbers that stand for `unit` tokens each."""
    prompts = [rng.integers(0, 1 << 30, 12 * 512 // unit).tolist()]
    for _ in range(12):
        old = prompts[rng.integers(len(prompts))]
        keep = int(rng.integers(0, len(old) + 1))
        prompts.append([*old[:keep], *rng.integers(0, 1 << 30, rng.integers(1, 6 * 512 // unit)).tolist()])
    return prompts


def as_mooncake(prompts: list[list[int]]) -> list[Json]:
    names = PageNames()
    return [mooncake(i, 512 * len(p), names.of_blocks(p).tolist()) for i, p in enumerate(prompts)]


def as_session(prompts: list[list[int]]) -> list[Json]:
    names = PageNames()
    return [session("a", *(call(i, 64 * len(p), names.of_blocks(p).tolist()) for i, p in enumerate(prompts)))]


def as_tokens(prompts: list[list[int]]) -> list[Json]:
    return [{"prompt": p, "arrival_s": i} for i, p in enumerate(prompts)]


def as_messages(prompts: list[list[int]]) -> list[Json]:
    """A message of 64 tokens for each number."""
    return [{"messages": [message("user", f"{n:<249}") for n in p], "arrival_s": i} for i, p in enumerate(prompts)]


SHARING = [(as_mooncake, 512), (as_session, 64), (as_messages, 64), (as_tokens, 1)]


@pytest.mark.parametrize("page_tokens", [None, 1024])
@pytest.mark.parametrize(("write_as", "unit"), SHARING)
def test_prompts_that_share_k_pages_of_tokens_share_exactly_k_page_numbers(
    tmp_path: Path, write_as: Callable[[list[list[int]]], list[Json]], unit: int, page_tokens: int | None
) -> None:
    prompts = random_prompts(np.random.default_rng(unit), unit)
    trace = load_trace(write(tmp_path / "t.jsonl", *write_as(prompts)), page_tokens=page_tokens)
    numbers = trace.page_tokens // unit
    assert [len(p) for p in pages(trace)] == [len(p) // numbers for p in prompts]
    for one, its_pages in zip(prompts, pages(trace), strict=True):
        for other, other_pages in zip(prompts, pages(trace), strict=True):
            same = [a == b for a, b in zip(one, other, strict=False)]
            shared = same.index(False) if False in same else len(same)
            assert [a == b for a, b in zip(its_pages, other_pages, strict=False)] == [
                i < shared // numbers for i in range(min(len(its_pages), len(other_pages)))
            ]


def test_larger_pages_are_the_last_small_ones_of_each(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", session("a", call(0, 64 * 7, [*range(7)]), call(1, 64 * 3, [0, 1, 2])))
    small, large = load_trace(file), load_trace(file, page_tokens=128)
    assert large.page_tokens == 128
    assert pages(large) == pages(small.coarsened(128)) == [[1, 3, 5], [1]]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"format": "csv"}, "format csv: expected one of mooncake, qwen-bailian, kv-cache-tester, ragpulse, "),
        ({"page_tokens": 64}, "page_tokens 64: expected a multiple of 512"),
        ({"page_tokens": 0}, "page_tokens 0: expected a multiple of 512"),
        ({"sessions": 2}, "sessions 2: expected 1 to 0"),
        ({"rate": 1.0}, "rate 1.0: expected none"),
        ({"rate": -1.0}, "rate -1.0: expected a finite number above 0"),
        ({"rate": float("nan")}, "rate nan: expected a finite number above 0"),
    ],
)
def test_an_option_that_cannot_work_is_named(tmp_path: Path, options: dict[str, object], problem: str) -> None:
    file = write(tmp_path / "t.jsonl", mooncake())
    with pytest.raises(ConfigError, match=re.escape(problem)):
        load_trace(file, **options)  # type: ignore[arg-type]


FAULTS: dict[str, tuple[str, list[object], str]] = {
    # mooncake
    "no timestamp": ("mooncake", [mooncake(), {"input_length": 1}], "2: timestamp missing: expected a finite number"),
    "time in text": ("mooncake", [mooncake("0")], '1: timestamp "0": expected a finite number, not negative'),
    "true as time": ("mooncake", [mooncake(True)], "1: timestamp true: expected a finite number, not negative"),
    "negative time": ("mooncake", [mooncake(-1)], "1: timestamp -1: expected a finite number, not negative"),
    "nan": ("mooncake", [mooncake(float("nan"))], "1: timestamp NaN: expected a finite number, not negative"),
    "infinite": ("mooncake", [mooncake(10**400)], "1: timestamp 1000000"),
    "unsorted": ("mooncake", [mooncake(7), mooncake(6.5)], "2: timestamp 6.5: expected at least 7, the time before"),
    "zero length": ("mooncake", [mooncake(length=0)], "1: input_length 0: expected an integer from 1 to 2147483647"),
    "float length": ("mooncake", [mooncake(length=1.5)], "1: input_length 1.5: expected an integer from 1"),
    "text output": ("mooncake", [mooncake(output="x")], '1: output_length "x": expected an integer from 0'),
    "too few ids": ("mooncake", [mooncake(ids=[1])], "1: hash_ids has 1 ids: expected 3 for input_length 1100"),
    "ids in text": ("mooncake", [mooncake(ids=["1"])], '1: hash_ids ["1"]: expected a list of integers'),
    "large ids": ("mooncake", [mooncake(ids=[2**31, 1, 2])], "1: hash_ids [2147483648, 1, 2]: expected integers from"),
    "two parents": (
        "mooncake",
        [mooncake(), mooncake(ids=[1, 5, 6]), mooncake(ids=[1, 6, 5])],
        "3: hash_ids 6 stands after 1: expected after 5, as before",
    ),
    "a root inside": ("mooncake", [mooncake(ids=[4, 9, 4])], "1: hash_ids 4 stands after 9: expected first, as before"),
    # kv-cache-tester
    "no id": ("kv-cache-tester", [{"requests": []}], "1: id missing: expected a string"),
    "id twice": (
        "kv-cache-tester",
        [session("a", call()), session("a")],
        '2: id "a": expected another than on t.jsonl:1',
    ),
    "other blocks": ("kv-cache-tester", [{**session("a"), "block_size": 16}], "1: block_size 16: expected 64"),
    "no list": ("kv-cache-tester", [{**session("a"), "requests": 3}], "1: requests 3: expected a list of objects"),
    "unsorted calls": (
        "kv-cache-tester",
        [session("a", call(3), call(2))],
        "1: requests[1].t 2: expected at least 3, the time before it",
    ),
    "no input types": (
        "kv-cache-tester",
        [session("a", {**call(), "input_types": "text"})],
        '1: requests[0].input_types "text": expected a list of strings',
    ),
    "wrong ids in a subagent": (
        "kv-cache-tester",
        [session("a", call()), session("b", call(), subagent(1, call(0, 500)))],
        "2: requests[1].requests[0].hash_ids has 3 ids: expected 7 for in 500",
    ),
    "two parents in a session": (
        "kv-cache-tester",
        [session("a", call(), call(1, ids=[1, 3, 2]))],
        "1: requests[1].hash_ids 3 stands after 1: expected after 2, as before",
    ),
    # messages
    "no messages": ("messages", [chat(), chat()], "1: messages []: expected at least one message"),
    "no shape": (
        "messages",
        [{"a": 1, "b\n": 2}],
        '1: fields "a, b\\n": expected one of messages, traj, conversations, outputs, input',
    ),
    "no role": (
        "messages",
        [chat("x"), {"messages": [{"content": "x"}]}],
        "2: messages[0].role missing: expected a str",
    ),
    "no content": ("messages", [{"messages": [{"role": "user"}]}], "1: messages[0].content missing: expected a string"),
    "odd content": ("messages", [{"messages": [message("user", [])]}], "1: messages[0].content []: expected a string"),  # type: ignore[arg-type]
    "odd output": ("messages", [chat("x", output=3)], "1: output 3: expected a string"),
    "a time too few": (
        "messages",
        [chat("x", arrival_s=1), chat("y")],
        "2: arrival_s missing: expected a finite number",
    ),
    "a time too many": ("messages", [chat("x"), chat("y", arrival_s=1)], "2: arrival_s 1: expected no time, like the"),
    "unsorted chats": (
        "messages",
        [chat("x", arrival_s=2), chat("y", arrival_s=1)],
        "2: arrival_s 1: expected at least 2",
    ),
    "other shape": ("messages", [chat("x"), {"traj": []}], "2: messages missing: expected a list of objects"),
    "an early answer": (
        "messages",
        [{"traj": [message("assistant", "Hi")]}],
        '1: traj[0].role "assistant": expected a message of somebody else first',
    ),
    "no prediction": (
        "messages",
        [{"outputs": [{"input": "x"}]}],
        "1: outputs[0].prediction missing: expected a string",
    ),
    "no session": (
        "messages",
        [{"input": "x", "output": "y", "timestamp": 0}],
        "1: session_id missing: expected a string",
    ),
    # tokens
    "no tokens": ("tokens", [{"prompt": []}], "1: prompt []: expected at least one token"),
    "negative token": ("tokens", [{"prompt": [1, -1]}], "1: prompt [1, -1]: expected integers from 0 to 2147483647"),
    "true as token": ("tokens", [{"prompt": [True]}], "1: prompt [true]: expected a list of integers"),
    "odd flag": (
        "tokens",
        [{"prompt": [1], "marks": [{"position": 1, "explicit": 1}]}],
        "1: marks[0].explicit 1: expected true or false",
    ),
    "marks fall": (
        "tokens",
        [{"prompt": [1, 2, 3], "marks": [{"position": 2}, {"position": 2}]}],
        "1: marks[1].position 2: expected an integer from 3 to 3",
    ),
    # any
    "broken JSON": (
        "mooncake",
        [mooncake(), '{"timestamp": 0,'],
        "2: JSON broken at column 17: Expecting property name",
    ),
    "endless number": ("mooncake", ["1" * 5000], "1: JSON broken: Exceeds the limit"),
    "no object": ("tokens", ["[1]"], "1: JSON [1]: expected an object"),
}


@pytest.mark.parametrize(("format", "lines", "problem"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_told_with_its_file_line_and_field(
    tmp_path: Path, format: str, lines: list[object], problem: str
) -> None:
    file = write(tmp_path / "t.jsonl", *lines)
    with pytest.raises(TraceError) as caught:
        load_trace(file, format)
    assert str(caught.value).startswith(f"{file}:{problem}")
    assert "\n" not in str(caught.value)


RAG_FAULTS: dict[str, tuple[list[object], dict[str, list[object]], str]] = {
    "number as time": ([rag(82)], {}, "0_trace.jsonl.gz:1: timestamp 82: expected a finite number in quotes"),
    "odd time": ([rag(), rag("nan")], {}, '0_trace.jsonl.gz:2: timestamp "nan": expected a finite number in quotes'),
    "negative time": ([rag("-1")], {}, '0_trace.jsonl.gz:1: timestamp "-1": expected a finite number in quotes'),
    "ids as list": ([{**rag(), "hash_ids": [1]}], {}, "0_trace.jsonl.gz:1: hash_ids [1]: expected an object"),
    "unknown id": ([rag(history=[8])], {}, "0_trace.jsonl.gz:1: hash_ids.history 8: expected an id of 3_history"),
    "too short": ([rag(length=9, web_search=[40])], {}, "0_trace.jsonl.gz:1: input_length 9: expected at least 70"),
    "bad length": (
        [rag()],
        {"history": ["", {"history_id": 1}]},
        "3_history.jsonl.gz:2: token_length missing: expected",
    ),
    "id twice": (
        [rag()],
        {"history": [{"history_id": 1, "token_length": 1}] * 2},
        "3_history.jsonl.gz:2: history_id 1: expected each id once",
    ),
    "endless": (
        [rag()],
        {"history": [{"history_id": 1, "token_length": 2**31 - 1}]},
        "3_history.jsonl.gz:1: token_length 2147483647: expected no more than",
    ),
}


@pytest.mark.parametrize(("lines", "tables", "problem"), RAG_FAULTS.values(), ids=RAG_FAULTS.keys())
def test_a_fault_in_ragpulse_is_told_with_its_file_line_and_field(
    tmp_path: Path, lines: list[object], tables: dict[str, list[object]], problem: str
) -> None:
    ragpulse(tmp_path, *lines, **tables)
    with pytest.raises(TraceError, match=re.escape(f"{tmp_path}/{problem}")):
        load_trace(tmp_path, "ragpulse")


def test_a_missing_table_of_ragpulse_is_named(tmp_path: Path) -> None:
    ragpulse(tmp_path, rag())
    (tmp_path / "3_history.jsonl.gz").unlink()
    with pytest.raises(TraceError, match=re.escape(f"{tmp_path}: 0 files 3_history*: expected one")):
        load_trace(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_packed_file_that_was_cut_off_says_where(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    lines = [{"prompt": rng.integers(0, 1 << 30, 500).tolist()} for _ in range(20)]
    file = write(tmp_path / f"t.jsonl{suffix}", *lines)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(TraceError) as caught:
        load_trace(file)
    found = re.fullmatch(
        rf"{re.escape(str(file))}:(\d+): compressed data ends early: expected a whole {suffix} file", str(caught.value)
    )
    assert found
    assert 1 <= int(found[1]) <= 11


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_file_that_is_not_packed_as_its_name_says_is_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"t.jsonl{suffix}"
    file.write_text(json.dumps(mooncake()))
    with pytest.raises(TraceError, match=re.escape(f"{file}:1: compressed data broken (")):
        load_trace(file)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"prompt": [1]}\n{"\xff": 1}\n')
    with pytest.raises(TraceError, match=r"t\.jsonl:2: JSON broken: 'utf-8' codec can't decode byte 0xff"):
        load_trace(tmp_path / "t.jsonl")


@pytest.mark.parametrize("format", [None, *FORMATS])
def test_a_trace_without_requests_is_refused(tmp_path: Path, format: str | None) -> None:
    file = ragpulse(tmp_path, "") if format == "ragpulse" else write(tmp_path / "t.jsonl.gz", "")
    with pytest.raises(TraceError, match=re.escape(f"{file}:1: requests: expected at least one, found none")):
        load_trace(file, format)


def test_sessions_without_requests_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", session("a"))
    with pytest.raises(TraceError, match=re.escape(f"{file}:1: requests: expected at least one, found none")):
        load_trace(file)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=re.escape(f"{tmp_path}/t.jsonl: cannot be read: No such file or directory")):
        load_trace(tmp_path / "t.jsonl")
    with pytest.raises(
        TraceError, match=re.escape(f"{tmp_path}: no files: expected some with names that end in .json")
    ):
        load_trace(tmp_path)


def test_a_first_line_of_no_format_lists_the_formats(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", "", {"TIMESTAMP": 0, "tokens": 3})
    problem = f'{file}:2: fields "TIMESTAMP, tokens": expected those of {", ".join(FORMATS)}'
    with pytest.raises(TraceError, match=re.escape(problem)):
        load_trace(file)


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared traces are not here")
def test_the_real_mooncake_trace_has_the_hit_rate_that_is_known_for_it() -> None:
    trace = load_trace(DATA / "mooncake/conversation_trace.t_lt_2100s.jsonl.gz")
    assert (len(trace.requests), trace.requests[-1].arrival_s) == (6758, 2097)
    assert hit_rate(trace) == pytest.approx(0.3521, abs=5e-5)  # full blocks only
    assert hit_rate(trace, partial=True) == pytest.approx(0.3522, abs=5e-5)


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared traces are not here")
def test_the_real_small_session_trace_has_its_sharing() -> None:
    trace = load_trace(DATA / "kv-cache-tester/traces.small24.jsonl.gz")
    assert (len(trace.requests), len({r.session for r in trace.requests})) == (321, 24)
    assert hit_rate(trace) == pytest.approx(0.8646, abs=5e-5)
    assert hit_rate(trace.coarsened(1024)) == hit_rate(
        load_trace(DATA / "kv-cache-tester/traces.small24.jsonl.gz", page_tokens=1024)
    )


def test_what_a_record_says_of_itself_is_kept(tmp_path: Path) -> None:
    said = {"session": "s", "user": "u", "tools": [{"name": "f"}], "template": "t", "finish_reason": "tool_calls"}
    files = [
        write(tmp_path / "c.jsonl", chat("Be brief.", "x", **said), chat("Be brief.", "y"), chat("Be long.", "z")),
        write(tmp_path / "t.jsonl", {"prompt": [1, 2], **said}, {"prompt": [1]}, {"prompt": [1], "tools": False}),
    ]
    for file in files:
        first, second, _ = load_trace(file).requests
        assert (first.origin, first.finish) == (Origin("s", "u", True, "t"), Finish.TOOL_CALL)
        assert (second.finish, second.user, second.tools) == (Finish.UNKNOWN, "", None)
    _, one, other = load_trace(files[0]).requests
    assert len({first.template, one.template, other.template}) == 3, "else the system message tells"
    assert load_trace(files[1]).requests[2].tools is False


@pytest.mark.parametrize(
    ("word", "finish"),
    [
        *((finish.value, finish) for finish in Finish),
        *(
            ("tool_use", Finish.TOOL_CALL),
            ("end_turn", Finish.STOP),
            ("max_tokens", Finish.LENGTH),
            ("", Finish.UNKNOWN),
        ),
    ],
)
def test_why_an_answer_ended_is_told_in_the_words_of_any_interface(tmp_path: Path, word: str, finish: Finish) -> None:
    (request,) = load_trace(write(tmp_path / "t.jsonl", {"prompt": [1], "finish_reason": word})).requests
    assert request.finish is finish


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"finish_reason": "bored"}, 'finish_reason "bored": expected one of unknown, stop, end_turn'),
        ({"finish_reason": 1}, "finish_reason 1: expected a string"),
        ({"tools": "f"}, 'tools "f": expected true, false, or a list of tools'),
        ({"user": 1}, "user 1: expected a string"),
    ],
)
def test_what_a_record_says_of_itself_is_checked(tmp_path: Path, more: Json, problem: str) -> None:
    with pytest.raises(TraceError, match=problem):
        load_trace(write(tmp_path / "t.jsonl", {"prompt": [1], **more}))


def test_kv_cache_tester_says_how_answers_ended_and_which_agent_asked(tmp_path: Path) -> None:
    nested = {**subagent(2.5, call()), "agent_id": "helper", "tool_tokens": 0}
    line = session("a", {**call(), "stop": "tool_use"}, nested, {**call(5), "stop": ""})
    first, other, last = load_trace(write(tmp_path / "t.jsonl", line)).requests
    assert (first.finish, last.finish) == (Finish.TOOL_CALL, Finish.UNKNOWN)
    assert [r.origin.session for r in (first, other, last)] == ["a", "a/helper", "a"]
    assert [r.tools for r in (first, other, last)] == [True, False, True]
    assert first.template == last.template != other.template
    assert other.session == "a", "sessions are drawn whole"
