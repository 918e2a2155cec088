import random
from collections import Counter, defaultdict
from functools import cache
from itertools import accumulate, islice, pairwise
from statistics import mean, median, pstdev

import numpy as np
import pytest

from hybrid_cache.bench.traces.trace import Trace, TraceRequest
from hybrid_cache.bench.traces.workloads import (
    CONTEXT,
    VOCABULARY,
    WORKLOADS,
    Agent,
    Chat,
    FewShot,
    Lognormal,
    Retrieval,
    Tokens,
    TreeSearch,
    Uniform,
    even,
    gamma_bursts,
    make_workload,
    poisson,
    popular,
    text,
)
from hybrid_cache.cache.policies.signals import Finish
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE

NAMES = ["chat", "agent", "few-shot", "retrieval", "tree-search", "mixed"]


@cache
def whole(name: str) -> Trace:
    return make_workload(name)


def prompt(request: TraceRequest) -> Tokens:
    assert request.tokens is not None
    return request.tokens


def same(a: Tokens, b: Tokens) -> bool:
    return np.array_equal(a, b)


def sessions(trace: Trace) -> list[list[TraceRequest]]:
    found: defaultdict[str, list[TraceRequest]] = defaultdict(list)
    for request in trace.requests:
        found[request.session].append(request)
    return list(found.values())


def shared_length(a: Tokens, b: Tokens) -> int:
    num = min(len(a), len(b))
    differ = np.flatnonzero(a[:num] != b[:num])
    return int(differ[0]) if len(differ) else num


def hit_rate(trace: Trace) -> float:
    """Pages of prompts that an endless cache has seen, of all."""
    seen: set[int] = set()
    hits = total = 0
    for request in trace.requests:
        pages = request.pages.tolist()
        full = pages[: request.num_prompt_tokens // trace.page_tokens]
        hits += sum(page in seen for page in full)
        total += len(full)
        seen.update(pages)
    return hits / total


def facts(request: TraceRequest) -> tuple[object, ...]:
    sizes = (request.num_prompt_tokens, request.num_output_tokens, request.num_known_tokens, request.whole)
    return request.arrival_s, request.session, sizes, request.marks, request.pages.tobytes(), prompt(request).tobytes()


def test_the_names_are_the_documented_ones() -> None:
    assert list(WORKLOADS) == NAMES
    assert [whole(name).name for name in NAMES] == NAMES


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'chess'.*chat, agent, few-shot, retrieval, tree-search, mixed"):
        make_workload("chess")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_above_zero_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match="scale"):
        make_workload("chat", scale=scale)


@pytest.mark.parametrize("page_tokens", [0, 32, 96, -64])
def test_pages_that_are_no_multiple_of_a_tile_are_refused(page_tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"page_tokens {page_tokens}"):
        make_workload("chat", page_tokens=page_tokens)


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_makes_one_trace_and_another_seed_another(name: str) -> None:
    first, again, other = (make_workload(name, seed=seed, scale=0.1) for seed in (3, 3, 4))
    assert [facts(r) for r in first.requests] == [facts(r) for r in again.requests]
    assert first.note == again.note
    assert {prompt(r).tobytes() for r in first.requests}.isdisjoint(prompt(r).tobytes() for r in other.requests)


def test_text_and_times_are_the_same_on_every_machine() -> None:
    assert text(random.Random("0"), 4).tolist() == [48773, 48312, 27675, 29512]
    assert [round(time, 6) for time in islice(poisson(random.Random("0"), 1.0), 3)] == [0.448932, 2.820944, 3.271749]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mixed"])
def test_a_larger_scale_has_the_sessions_of_a_smaller_one(name: str) -> None:
    few, more = (make_workload(name, scale=scale) for scale in (0.1, 0.25))
    kept = {r.session for r in few.requests}
    assert len({r.session for r in more.requests}) >= 2 * len(kept)
    again = [(r.arrival_s, prompt(r).tobytes()) for r in more.requests if r.session in kept]
    assert again == [(r.arrival_s, prompt(r).tobytes()) for r in few.requests]


@pytest.mark.parametrize("name", NAMES)
def test_requests_come_in_order_of_arrival(name: str) -> None:
    times = [r.arrival_s for r in whole(name).requests]
    assert times[0] >= 0
    assert times == sorted(times)


@pytest.mark.parametrize("name", NAMES)
def test_the_size_is_as_documented(name: str) -> None:
    requests = whole(name).requests
    assert 600 <= len(requests) <= 1_500
    assert sum(len(r.pages) for r in requests) < 150_000
    assert max(r.num_prompt_tokens for r in requests) <= CONTEXT


@pytest.mark.parametrize("name", NAMES)
def test_every_request_is_consistent(name: str) -> None:
    for request in whole(name).requests:
        assert request.tokens is not None
        assert request.tokens.dtype == np.int32
        assert 0 <= request.tokens.min() <= request.tokens.max() < VOCABULARY
        assert len(request.tokens) == request.num_prompt_tokens
        assert request.num_output_tokens > 0
        assert request.num_known_tokens == request.num_prompt_tokens + request.num_output_tokens
        assert len(request.pages) == request.num_known_tokens // TILE
        positions = [0, *(mark.position for mark in request.marks)]
        assert all(a < b for a, b in pairwise(positions))
        assert positions[-1] == request.num_prompt_tokens
        assert {mark.role for mark in request.marks} <= {"system", "user", "assistant", "tool"}
        assert request.marks[0].role == "system"


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_equal_exactly_where_prefixes_are(name: str) -> None:
    requests = make_workload(name, scale=0.1).requests
    for a, b in islice(pairwise(sorted(requests, key=lambda r: prompt(r).tobytes())), 60):
        tokens = shared_length(prompt(a), prompt(b))
        least = min(a.num_prompt_tokens, b.num_prompt_tokens) // TILE
        assert shared_length(a.pages[:least], b.pages[:least]) == min(tokens // TILE, least)
        assert (a.whole == b.whole) == same(prompt(a), prompt(b))


def test_larger_pages_name_the_same_texts() -> None:
    small, large = (make_workload("chat", scale=0.1, page_tokens=size) for size in (TILE, 4 * TILE))
    assert all(same(prompt(a), prompt(b)) for a, b in zip(small.requests, large.requests, strict=True))
    assert large.page_tokens == 4 * TILE
    assert all(len(r.pages) == r.num_known_tokens // (4 * TILE) for r in large.requests)


@pytest.mark.parametrize("name", NAMES)
def test_the_note_says_that_all_is_synthetic_and_with_which_parameters(name: str) -> None:
    note = make_workload(name, seed=7, scale=0.1).note
    assert note.startswith("synthetic in every respect")
    assert "seed 7, scale 0.1" in note
    assert "rate=" in note


def test_a_chat_without_revisions_only_grows() -> None:
    pairs = [pair for session in sessions(Chat(revises=0).trace(scale=0.3)) for pair in pairwise(session)]
    assert len(pairs) > 50
    for before, after in pairs:
        assert same(prompt(after)[: before.num_prompt_tokens], prompt(before))
        assert [mark.role for mark in after.marks[-2:]] == ["assistant", "user"]
        assert after.marks[-2].position == before.num_known_tokens
        full = before.num_known_tokens // TILE
        assert same(after.pages[:full], before.pages[:full])
        assert after.arrival_s > before.arrival_s


def test_some_chat_turns_are_asked_again_or_edited() -> None:
    pairs = [pair for session in sessions(Chat(revises=0.3).trace(scale=0.5)) for pair in pairwise(session)]
    kinds: Counter[str] = Counter()
    for before, after in pairs:
        length = shared_length(prompt(before), prompt(after))
        if before.whole == after.whole:
            kinds["again"] += 1
        elif length == before.num_prompt_tokens:
            kinds["goes on"] += 1
        else:  # the last message both have ends where they part, and a user message follows
            assert length in [mark.position for mark in before.marks]
            assert after.marks[-1].role == "user"
            assert after.marks[-2].position == length
            kinds["edited"] += 1
    assert kinds["again"] / len(pairs) == pytest.approx(0.15, abs=0.05)
    assert kinds["edited"] / len(pairs) == pytest.approx(0.15, abs=0.05)


def test_chat_has_its_documented_statistics() -> None:
    chat = Chat(revises=0).trace(scale=2)
    turns = [len(session) for session in sessions(chat)]
    assert mean(turns) == pytest.approx(5, rel=0.15)
    assert turns.count(1) / len(turns) == pytest.approx(1 / 3, abs=0.06)
    assert median(r.num_output_tokens for r in chat.requests) == pytest.approx(250, rel=0.1)
    last = [r.num_prompt_tokens - r.marks[-2].position for r in chat.requests]
    assert median(last) == pytest.approx(60, rel=0.1)
    assert 1_000 < max(last) <= 4_000
    gaps = [b.arrival_s - a.arrival_s for session in sessions(chat) for a, b in pairwise(session)]
    assert 50 < median(gaps) < 100
    assert len({r.pages[0] for r in chat.requests}) == 6


def test_collapsing_makes_agent_prompts_part_where_an_observation_has_gone() -> None:
    num_deleted = 0
    for session in sessions(Agent().trace(scale=0.2)):
        for done, (before, after) in enumerate(pairwise(session), start=1):  # complete turns in `after`
            length = shared_length(prompt(before), prompt(after))
            roles = [mark.role for mark in after.marks]
            assert roles.count("tool") == min(done, 5)
            assert roles.count("assistant") == done
            if done < 6:
                assert length == before.num_prompt_tokens
                continue
            # system, task and one action for each deleted observation stay; then comes what was deleted this time
            kept = 2 + done - 5
            assert [mark.role for mark in before.marks[:kept]] == ["system", "user"] + ["assistant"] * (done - 5)
            assert before.marks[kept].role == "tool"
            assert length == before.marks[kept - 1].position
            # and nothing else has changed
            rest = prompt(before)[before.marks[kept].position :]
            assert same(prompt(after)[length : length + len(rest)], rest)
            num_deleted += 1
    assert num_deleted > 30


def test_an_agent_that_keeps_everything_only_grows_until_the_context_is_full() -> None:
    trace = Agent(collapse=False, turns=Uniform(50, 50)).trace(scale=0.1)
    for session in sessions(trace):
        assert all(same(prompt(b)[: a.num_prompt_tokens], prompt(a)) for a, b in pairwise(session))
        assert CONTEXT - 4_000 < session[-1].num_prompt_tokens <= CONTEXT
        assert len(session) < 50


def test_agent_sessions_start_at_even_times_and_wait_for_tools() -> None:
    found = sessions(whole("agent"))
    assert [session[0].arrival_s for session in found] == [4.0 * i for i in range(Agent().sessions)]
    waits = [b.arrival_s - a.arrival_s - a.num_output_tokens / 50 for s in found for a, b in pairwise(s)]
    assert all(wait == pytest.approx(round(wait), abs=1e-4) for wait in waits)
    assert mean(waits) == pytest.approx(7.5, rel=0.1)
    assert pstdev(waits) == pytest.approx(7.5**0.5, rel=0.1)
    assert all(10 <= len(session) <= 50 for session in found)
    assert all(4_000 <= r.marks[0].position <= 8_000 for s in found for r in s)


def test_few_shot_questions_follow_one_of_fifteen_templates() -> None:
    requests = whole("few-shot").requests
    templates = Counter(prompt(r)[: r.marks[0].position].tobytes() for r in requests)
    assert len(templates) == 15
    assert all(1_000 <= r.marks[0].position <= 3_000 for r in requests)
    assert templates.most_common(1)[0][1] / len(requests) == pytest.approx(
        1 / sum(1 / k for k in range(1, 16)), rel=0.2
    )
    assert all(50 <= r.num_prompt_tokens - r.marks[0].position <= 200 for r in requests)
    assert len({r.session for r in requests}) == len(requests) == FewShot().sessions


def test_retrieval_puts_shared_passages_between_instructions_and_question() -> None:
    passages: Counter[bytes] = Counter()
    found = sessions(whole("retrieval"))
    for first, *later in found:
        roles = [mark.role for mark in first.marks]
        assert roles in [["system", *["tool"] * n, "user"] for n in range(3, 7)]
        ends = [mark.position for mark in first.marks]
        own = [prompt(first)[start:end].tobytes() for start, end in pairwise(ends[:-1])]
        assert len(set(own)) == len(own)
        passages.update(own)
        assert all(same(prompt(request)[: ends[-1]], prompt(first)) for request in later)
    assert all(200 <= len(passage) // 4 <= 500 for passage in passages)
    counts = sorted(passages.values(), reverse=True)
    assert 0.45 < sum(counts[: round(0.03 * Retrieval().library)]) / sum(counts) < 0.65
    assert mean(len(session) for session in found) == pytest.approx(4 / 3, rel=0.1)


def test_tree_search_sends_each_level_at_once_and_extends_the_kept_thoughts() -> None:
    search = TreeSearch(depth=3, branching=4, kept=3)
    for session in sessions(search.trace(scale=0.2)):
        levels: defaultdict[float, list[TraceRequest]] = defaultdict(list)
        for request in session:
            levels[request.arrival_s].append(request)
        assert [len(level) for level in levels.values()] == [4, 12, 12]
        assert [len({r.whole for r in level}) for level in levels.values()] == [1, 3, 3]
        for above, below in pairwise(levels.values()):
            known = {r.pages.tobytes() for r in above}
            for request in below:
                parent_end = request.marks[-2].position
                parents = [r for r in above if same(prompt(r), prompt(request)[:parent_end])]
                assert len(parents) >= 4
                assert request.num_prompt_tokens in {r.num_known_tokens for r in parents}
                assert request.pages[: request.num_prompt_tokens // TILE].tobytes() in known


def test_mixed_holds_parts_of_every_workload_over_the_same_time() -> None:
    mixed = whole("mixed")
    starts: defaultdict[str, list[float]] = defaultdict(list)
    for session in sessions(mixed):
        starts[session[0].session.rsplit("-", 1)[0]].append(session[0].arrival_s)
    assert {kind: len(times) for kind, times in starts.items()} == {
        part.name: round(part.sessions * 0.3) for part in (Chat(), Agent(), FewShot(), Retrieval(), TreeSearch())
    }
    assert [max(starts[kind]) for kind in ("few-shot", "retrieval")] == pytest.approx([900, 900], rel=0.2)
    first_pages = {kind: set[int]() for kind in starts}
    for request in mixed.requests:
        first_pages[request.session.rsplit("-", 1)[0]].add(int(request.pages[0]))
    assert sum(len(pages) for pages in first_pages.values()) == len(set().union(*first_pages.values()))


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("chat", 0.9, 1.0),
        ("agent", 0.65, 0.8),
        ("few-shot", 0.9, 0.96),
        ("retrieval", 0.4, 0.5),
        ("tree-search", 0.97, 1.0),
        ("mixed", 0.65, 0.9),
    ],
)
def test_an_endless_cache_finds_about_this_share_of_the_prompts(name: str, low: float, high: float) -> None:
    assert low < hit_rate(whole(name)) < high


def test_even_times_start_at_zero() -> None:
    assert list(islice(even(4.0), 5)) == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("cv", [None, 0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_the_spread_that_was_asked_for(cv: float | None) -> None:
    rng = random.Random(1)
    times = list(islice(poisson(rng, 5.0) if cv is None else gamma_bursts(rng, 5.0, cv), 40_000))
    gaps = [b - a for a, b in pairwise(times)]
    assert min(gaps) >= 0
    assert mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert pstdev(gaps) / mean(gaps) == pytest.approx(cv or 1.0, rel=0.05)


@pytest.mark.parametrize("rate", [0.0, -2.0])
def test_a_rate_that_is_not_above_zero_is_refused_at_once(rate: float) -> None:
    with pytest.raises(ConfigError, match="rate"):
        even(rate)
    with pytest.raises(ConfigError, match="rate"):
        poisson(random.Random(0), rate)
    with pytest.raises(ConfigError, match="rate"):
        gamma_bursts(random.Random(0), rate, 1.0)
    with pytest.raises(ConfigError, match="cv"):
        gamma_bursts(random.Random(0), 1.0, rate)


def test_popular_things_follow_the_law_of_zipf() -> None:
    rng = random.Random(2)
    counts = Counter(popular(rng, "abcd") for _ in range(25_000))
    assert [counts[x] / 12_000 for x in "abcd"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4], rel=0.05)


def test_lengths_stay_in_their_bounds() -> None:
    rng = random.Random(3)
    drawn = [Lognormal(60, 1.5, 20, 500).draw(rng) for _ in range(5_000)]
    assert (min(drawn), max(drawn)) == (20, 500)
    assert median(drawn) == pytest.approx(60, rel=0.1)
    assert {Uniform(2, 4).draw(rng) for _ in range(100)} == {2, 3, 4}


def test_a_session_never_outgrows_the_context() -> None:
    trace = Chat(sessions=3, mean_turns=30, user=Lognormal(4_000, 0.1, 1, 4_000)).trace()
    assert max(accumulate((r.num_prompt_tokens for r in trace.requests), max)) <= CONTEXT


def test_an_agent_calls_tools_until_its_last_answer_and_nobody_else_does() -> None:
    for session in sessions(whole("agent")):
        *before, last = session
        assert {r.finish for r in before} <= {Finish.TOOL_CALL}
        assert last.finish is Finish.STOP or last.num_known_tokens + 3_000 > CONTEXT, "or the context ends it"
        assert all(r.tools for r in session)
    assert {(r.finish, r.tools) for r in whole("chat").requests} == {(Finish.STOP, False)}
    templates = {r.template for r in whole("chat").requests}
    assert len(templates) == Chat().systems
    assert {r.template for r in whole("few-shot").requests}.isdisjoint({*templates, ""})
