"""Reads traces of real requests from files, plain or packed: an object a line, or one array of objects.

FIELDS says what each format looks like. A time is a number or text in ISO 8601. A request without a word about its
output generates nothing. Times that a file does not have are made up from a seed; `Trace.note` says which.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hybrid_cache.api.server.recording.lines import FORMAT as RECORDED
from hybrid_cache.bench.traces.blocks import read_kv_cache_tester, read_mooncake, read_qwen
from hybrid_cache.bench.traces.recorded import read_recorded
from hybrid_cache.bench.traces.records import Reading, Times, TraceError, brief
from hybrid_cache.bench.traces.tokens import (
    SHAPES,
    Encoder,
    first_record,
    four_characters,
    read_marconi,
    read_messages,
    read_ragpulse,
    read_tokens,
)
from hybrid_cache.bench.traces.trace import Trace, TraceRequest
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE

__all__ = ["FIELDS", "FORMATS", "Encoder", "TraceError", "four_characters", "load_trace"]

FIELDS = {
    "mooncake": "timestamp (ms), input_length, output_length, hash_ids (of 512 tokens each, or as the lengths show)",
    "qwen-bailian": "chat_id, parent_chat_id, timestamp (s), input_length, output_length, hash_ids (of 16 tokens each)",
    "kv-cache-tester": "a session a line: id, tool_tokens, system_tokens, requests (t, in, out, hash_ids, input_types, "
    "optional stop)",
    "ragpulse": "a folder: 0_trace* (timestamp, input_length, output_length, session_id, hash_ids), and the lengths of "
    "its segments in 1_sys_prompt* to 5_web_search*",
    "messages": "messages (role, content: text or parts, tool_calls), optional arrival_s or timestamp (s), session, "
    "output or output_tokens or max_tokens, finish_reason, user, tools, template; or ShareGPT's conversations (from, "
    "value), BIG-Bench Hard's outputs (input, prediction), tau-bench's traj, lmcache-agent-trace's input, output, "
    "session_id, timestamp (us)",
    "tokens": "prompt, optional arrival_s or timestamp (s), session, output or output_tokens, marks (position, role, "
    "explicit), finish_reason, user, tools, template",
    "marconi": "input_tokens, ts (s), optional session_id, output_tokens or num_output_tokens",
    "recorded": "what `serve --record` writes: a line with format, then lines with request, turn or called",
}
FORMATS = tuple(FIELDS)
SUFFIXES = (".json", ".jsonl")
PACKED = (".gz", ".xz")
BLOCK_FORMATS = ("mooncake", "qwen-bailian")

THINK_S = 5.0  # mean pause between the requests of a session whose trace has no times
OVERLAP = 8  # sessions at a time, unless a rate is given
REQUESTS_PER_S = 1.0  # of a trace without sessions, unless a rate is given


def load_trace(
    path: Path,
    format: str | None = None,
    *,
    page_tokens: int | None = None,
    sessions: int | None = None,
    seed: int = 0,
    rate: float | None = None,
    encode: Encoder | None = None,
    block_tokens: int | None = None,
    sort: bool = False,
) -> Trace:
    """Reads a file, or all files of a folder as one trace. Raises TraceError for content, ConfigError for arguments.

    format        one of FORMATS; None looks at the first line
    page_tokens   a multiple of the trace's own pages: whole blocks of those that name them, and at least 64 tokens
    sessions      take only this many, drawn with `seed`
    rate          starts of sessions (of requests, if there are no sessions) a second, for a trace without such times
    encode        makes tokens of text; None counts about four characters as one
    block_tokens  that a hash id of mooncake or qwen-bailian stands for; None finds it
    sort          by time first, where a file is not in order
    """
    if rate is not None and not 0 < rate < np.inf:
        raise ConfigError(f"rate {rate}: expected a finite number above 0")
    if format not in (None, *FORMATS):
        raise ConfigError(f"format {format}: expected one of {', '.join(FORMATS)}")
    files = trace_files(path)
    format = format or guessed(path, files)
    if block_tokens is not None and format not in BLOCK_FORMATS:
        raise ConfigError(f"block_tokens {block_tokens}: expected none, {format} does not leave it open")
    reading = read(format, files, page_tokens, encode or four_characters, block_tokens, sort=sort)
    if not any(reading.files):
        raise TraceError(f"{path}:1: requests: expected at least one, found none")
    rng, notes = np.random.default_rng(seed), list(reading.notes)
    if sessions is not None:
        reading = sampled(path, reading, sessions, rng)
        notes.append(f"{sessions} sessions drawn with seed {seed}")
    requests, made_up = timed(reading, rate, rng)
    if made_up:
        notes += [*made_up, f"seed {seed}"]
    requests.sort(key=lambda request: request.arrival_s)
    trace = Trace(stem(path), reading.page_tokens, tuple(requests), "; ".join(notes), reading.server)
    return trace if page_tokens is None else trace.coarsened(page_tokens)


def trace_files(path: Path) -> list[Path]:
    """The files to read, by name; of a ragpulse folder, the trace. Raises TraceError."""
    if not path.is_dir():
        return [path]
    try:
        files = sorted(f for f in path.iterdir() if bare(f).endswith(SUFFIXES) and not f.name.startswith("."))
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror or error}") from error
    if traces := [file for file in files if file.name.startswith("0_trace")]:
        return traces
    if not files:
        raise TraceError(f"{path}: no files: expected some with names that end in {' or '.join(SUFFIXES)}")
    return files


def bare(path: Path) -> str:
    """The name without the suffix of a packer."""
    return path.stem if path.suffix in PACKED else path.name


def stem(path: Path) -> str:
    return next((bare(path).removesuffix(s) for s in SUFFIXES if bare(path).endswith(s)), path.name)


def guessed(path: Path, files: Sequence[Path]) -> str:
    """The format by the fields of the first record. Raises TraceError."""
    first = first_record(files)
    if first is None:
        raise TraceError(f"{path}:1: requests: expected at least one, found none")
    match first.fields:
        case {"format": str(name)} if name == RECORDED:
            return "recorded"
        case {"hash_ids": dict()}:
            return "ragpulse"
        case {"hash_ids": _, "input_length": _, "chat_id": _}:
            return "qwen-bailian"
        case {"hash_ids": _, "input_length": _}:
            return "mooncake"
        case {"requests": _}:
            return "kv-cache-tester"
        case {"input_tokens": _, "ts": _}:
            return "marconi"
        case {"prompt": _}:
            return "tokens"
        case fields if any(name in fields for name in SHAPES):
            return "messages"
    raise first.fault(
        f"fields {brief(', '.join(first.fields))}: expected those of {', '.join(FORMATS)}; --help names them"
    )


def read(
    format: str,
    files: Sequence[Path],
    page_tokens: int | None,
    encode: Encoder,
    block_tokens: int | None,
    *,
    sort: bool,
) -> Reading:
    """Reads all files in one format. Raises TraceError for their content, ConfigError for `page_tokens`."""
    if format not in BLOCK_FORMATS:
        check_pages(page_tokens, TILE, format)
    match format:
        case "mooncake" | "qwen-bailian":
            reader = read_mooncake if format == "mooncake" else read_qwen
            reading = reader(files, block_tokens, sort=sort)
            check_pages(page_tokens, reading.page_tokens, format)
            return reading
        case "kv-cache-tester":
            return read_kv_cache_tester(files, page_tokens or TILE, sort=sort)
        case "ragpulse":
            return read_ragpulse(files)
        case "messages":
            return read_messages(files, encode, sort=sort)
        case "marconi":
            return read_marconi(files, sort=sort)
        case "recorded":
            return read_recorded(files)
        case _:
            return read_tokens(files, sort=sort)


def check_pages(page_tokens: int | None, native: int, format: str) -> None:
    """Raises ConfigError for pages that are not made of the trace's own."""
    if page_tokens is not None and (page_tokens < native or page_tokens % native):
        raise ConfigError(f"page_tokens {page_tokens}: expected a multiple of {native}, a page of {format}")


def sampled(path: Path, reading: Reading, sessions: int, rng: np.random.Generator) -> Reading:
    """Only the requests of `sessions` sessions. Raises ConfigError if there are not that many."""
    names = list(dict.fromkeys(r.session for file in reading.files for r in file if r.session))
    if not 1 <= sessions <= len(names):
        raise ConfigError(f"sessions {sessions}: expected 1 to {len(names)}, the sessions of {path}")
    chosen = {names[i] for i in rng.permutation(len(names))[:sessions]}
    return replace(reading, files=[[r for r in file if r.session in chosen] for file in reading.files])


def timed(reading: Reading, rate: float | None, rng: np.random.Generator) -> tuple[list[TraceRequest], list[str]]:
    """The requests with times since the start of the trace, and notes on synthetic times. Raises ConfigError."""
    if reading.times is Times.TRACE:
        if rate is not None:
            raise ConfigError(f"rate {rate}: expected none, the trace has times of its own")
        return [r for file in reading.files for r in file], []
    notes: list[str] = []
    sessions = by_session(reading.files, rng)
    if len(reading.files) > 1:
        notes.append("files mixed at random, each in its own order")
    if reading.times is Times.NONE and any(len(session) > 1 for session in sessions):
        sessions = [with_pauses(session, rng) for session in sessions]
        notes.append(f"made-up pauses within a session, exponential with a mean of {THINK_S:g} s")
    rate = usual_rate(sessions) if rate is None else rate
    what = "sessions" if any(session[0].session for session in sessions) else "requests"
    notes.append(f"made-up Poisson process that starts {rate:.4g} {what} a second")
    starts = np.cumsum(rng.exponential(1 / rate, len(sessions))).tolist()
    return [
        replace(r, arrival_s=start - starts[0] + r.arrival_s)
        for start, session in zip(starts, sessions, strict=True)
        for r in session
    ], notes


def by_session(files: Sequence[Sequence[TraceRequest]], rng: np.random.Generator) -> list[list[TraceRequest]]:
    """The requests of each session; one without a name is a session. Several files take turns at random."""
    queues: list[Iterator[list[TraceRequest]]] = []
    named: dict[str, list[TraceRequest]] = {}
    counts: list[int] = []
    for file in files:
        sessions: list[list[TraceRequest]] = []
        for request in file:
            if request.session in named:
                named[request.session].append(request)
                continue
            sessions.append([request])
            if request.session:
                named[request.session] = sessions[-1]
        queues.append(iter(sessions))
        counts.append(len(sessions))
    turns = np.repeat(np.arange(len(files)), counts)
    if len(files) > 1:
        rng.shuffle(turns)
    return [next(queues[turn]) for turn in turns]


def with_pauses(session: Sequence[TraceRequest], rng: np.random.Generator) -> list[TraceRequest]:
    times = np.cumsum([0.0, *rng.exponential(THINK_S, len(session) - 1)]).tolist()
    return [replace(r, arrival_s=time) for r, time in zip(session, times, strict=True)]


def usual_rate(sessions: Sequence[Sequence[TraceRequest]]) -> float:
    """Starts a second that keep OVERLAP sessions open; what takes no time starts at REQUESTS_PER_S."""
    mean_s = sum(session[-1].arrival_s for session in sessions) / len(sessions)
    return OVERLAP / mean_s if mean_s > 0 else REQUESTS_PER_S
