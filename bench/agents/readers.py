"""Files of agents' sessions, one a line: mars, kv-cache-tester, tau-bench.

mars              lengths and API times of synthetic agents; the API is known by its time only
kv-cache-tester   lengths, shared blocks and pauses of a coding agent; the tool is not known
tau-bench         messages and tool calls of an airline's agent, with simulated customers; no times
"""

import math
import random
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_cache.bench.agents.maker import MAX_PAUSE_S, SessionMaker
from hybrid_cache.bench.agents.workload import Turn
from hybrid_cache.bench.traces.blocks import check_block_size, session_blocks
from hybrid_cache.bench.traces.records import LARGEST, IntArray, Record, in_order, read_records
from hybrid_cache.bench.traces.tokens import Encoder, RequestMaker
from hybrid_cache.kernels.grid import TILE

EMPTY_ANSWERS = "answers of no tokens counted as one"

PERSON_S = 20.0  # median of the made-up time that a person takes
PERSON_SIGMA = 0.8
TOOL_SIGMA = 1.0  # of the made-up medians of tools, which are about 1 s, and of each tool's times


def read_mars(file: Path, maker: SessionMaker) -> list[str]:
    """Adds the sessions; returns notes. Raises TraceError."""
    for record in read_records(file):
        turns = list(mars_turns(record, maker))
        maker.add(turns[0].tool or "no tool", turns)
    return [
        "tools are classes by time: math under 0.01 s, ve under 0.3 s, qa returns tokens in under 5 s, gen the rest",
        "a session's kind is the class of its first tool and stands for the tools that it offers",
    ]


def mars_turns(record: Record, maker: SessionMaker) -> Iterator[Turn]:
    calls, before = record.records("calls"), 0
    if not calls:
        raise record.error("calls", "at least one call")
    for call, following in zip_longest(calls, calls[1:]):
        prompt, output = call.integer("prompt_tokens", least=1), answer_tokens(call, "completion_tokens", maker)
        returned = call.integer("api_token_length", least=-LARGEST) if call.has("api_token_length") else 0
        pause_s = pause(call, "api_time") if following or call.has("api_time") else None
        yield Turn(prompt, min(before, prompt - 1), output, api_class(pause_s, returned), pause_s)
        before = prompt + output


def api_class(pause_s: float | None, returned: int) -> str:
    """returned: tokens, of which some calls claim less than none"""
    if pause_s is None:
        return ""
    if pause_s < 0.01:
        return "math"
    if pause_s < 0.3:
        return "ve"
    return "qa" if pause_s < 5 and returned > 0 else "gen"


def read_kv_cache_tester(file: Path, maker: SessionMaker) -> list[str]:
    """Adds the sessions; returns notes. Raises TraceError."""
    for record in read_records(file):
        maker.add("coding", coding_turns(record, maker))
    return [
        "pauses are think times: of a tool, with what its client adds and a person's consent, or of a person",
        "what sessions share with each other is not known, so they share nothing",
    ]


class Context(NamedTuple):
    """A request with its answer."""

    blocks: IntArray
    prompt_tokens: int
    output_tokens: int


def coding_turns(record: Record, maker: SessionMaker) -> Iterator[Turn]:
    check_block_size(record)
    requests, before = list(own_requests(record, maker)), None
    for request, following in zip_longest(requests, requests[1:]):
        blocks, prompt = session_blocks(request), request.integer("in", least=1)
        kept, output = kept_tokens(before, blocks, prompt), answer_tokens(request, "out", maker)
        yield Turn(prompt, kept, output, *reply(following, maker))
        before = Context(blocks, prompt, output)


def own_requests(record: Record, maker: SessionMaker) -> Iterator[Record]:
    """All but those that agents of a session sent which others had started."""
    last = None
    for entry in record.records("requests"):
        in_order(last, entry, "t")
        last = entry
        if entry.fields.get("type") == "subagent":
            maker.counts["nested agents left out"] += 1
        else:
            yield entry


def kept_tokens(before: Context | None, blocks: IntArray, prompt_tokens: int) -> int:
    """The last block of a prompt may differ: some hold a few tokens that only end it. So it decides nothing."""
    if before is None:
        return 0
    num = min(len(blocks), len(before.blocks))
    differ = np.flatnonzero(blocks[:num] != before.blocks[:num])
    num_common = int(differ[0]) if len(differ) else num
    whole = num_common >= max(1, len(before.blocks) - 1)
    kept = before.prompt_tokens + before.output_tokens if whole else num_common * TILE
    return min(kept, prompt_tokens - 1)


def reply(request: Record | None, maker: SessionMaker) -> tuple[str, float | None]:
    """The tool that this request answers, none for a person, and the time that took."""
    if request is None:
        return "", None
    if not request.has("think_time"):
        maker.counts["pauses that the file does not have taken for none"] += 1
    pause_s = pause(request, "think_time") if request.has("think_time") else 0.0
    return "tool" if request.texts("input_types") == ["tool_result"] else "", pause_s


def read_tau_bench(file: Path, maker: SessionMaker, encode: Encoder, seed: int) -> list[str]:
    """Adds the sessions; returns notes. Raises TraceError."""
    kinds: dict[str, str] = {}
    for record in read_records(file):
        kind, shared = "no system prompt", 0
        if (first := next(iter(record.records("traj")), None)) and first.text("role") == "system":
            kind = kinds.setdefault(first.text("content"), f"system prompt {len(kinds) + 1}")
            shared = len(RequestMaker(encode).parsed(first).tokens)
        maker.add(kind, trajectory_turns(record, encode, seed), shared)
    return [
        f"made-up times, all log-normal: a tool's median about 1 s, its own for each name (sigma {TOOL_SIGMA:g}), "
        f"its times around that (sigma {TOOL_SIGMA:g}); a person's around {PERSON_S:g} s (sigma {PERSON_SIGMA:g})",
        f"seed {seed}",
    ]


def trajectory_turns(record: Record, encode: Encoder, seed: int) -> Iterator[Turn]:
    """Each message of the assistant is a turn."""
    requests, rng = RequestMaker(encode), random.Random(f"tau-bench {seed} {record.line}")
    length = before = 0
    for sent in record.records("traj"):
        message = requests.parsed(sent)
        size = len(message.tokens)
        if message.role == "assistant":
            if not length:
                raise sent.error("role", "a message of somebody else first")
            tools = called_tools(sent)
            pause_s = max(tool_s(rng, seed, tool) for tool in tools) if tools else person_s(rng)
            yield Turn(length, min(before, length - 1), max(1, size), tools[0] if tools else "", pause_s)
            before = length + size
        length += size


def called_tools(sent: Record) -> list[str]:
    """Those of one message are called at the same time; the turn goes by the name of the first."""
    calls = [call.record("function") for call in sent.records("tool_calls")] if sent.has("tool_calls") else []
    for call in calls:
        if not call.text("name"):
            raise call.error("name", "a name")
    return [call.text("name") for call in calls]


def tool_s(rng: random.Random, seed: int, tool: str) -> float:
    median_s = random.Random(f"{seed} {tool}").lognormvariate(0, TOOL_SIGMA)
    return min(median_s * rng.lognormvariate(0, TOOL_SIGMA), MAX_PAUSE_S)


def person_s(rng: random.Random) -> float:
    return rng.lognormvariate(math.log(PERSON_S), PERSON_SIGMA)


def answer_tokens(record: Record, name: str, maker: SessionMaker) -> int:
    if not (tokens := record.integer(name)):
        maker.counts[EMPTY_ANSWERS] += 1
    return max(1, tokens)


def pause(record: Record, name: str) -> float:
    if (seconds := record.time(name)) > MAX_PAUSE_S:
        raise record.error(name, f"at most {MAX_PAUSE_S:.0f} seconds, a year")
    return seconds
