"""Loads the workloads of agents.

    mars              jsonl  a session a line: calls (prompt_tokens, completion_tokens, api_time, api_token_length)
    kv-cache-tester   jsonl  a session a line: requests (t, in, out, hash_ids of 64 tokens, input_types, think_time)
    tau-bench         jsonl  a session a line: traj, messages of OpenAI's chat with tool_calls
    synthetic         no file

Sessions are cut where a call or its tokens would be one too many, and longer pauses are shortened. `Workload.note` says
how many, and what the data did not say.
"""

from pathlib import Path

from hybrid_cache.bench.agents.generators import make_sessions
from hybrid_cache.bench.agents.maker import Limits, SessionMaker
from hybrid_cache.bench.agents.readers import read_kv_cache_tester, read_mars, read_tau_bench
from hybrid_cache.bench.agents.workload import Workload
from hybrid_cache.bench.traces.files import stem
from hybrid_cache.bench.traces.records import TraceError
from hybrid_cache.bench.traces.tokens import Encoder, four_characters
from hybrid_cache.errors import ConfigError

# By name, with what sessions are cut to unless the caller says otherwise.
FORMATS = {
    "mars": Limits(),
    "kv-cache-tester": Limits(60, 200_000, 600.0),
    "tau-bench": Limits(),
    "synthetic": Limits(100, 100_000, 3_600.0),
}


def load_workload(
    path: Path | None,
    format: str,
    *,
    max_calls: int | None = None,
    max_tokens: int | None = None,
    max_pause_s: float | None = None,
    seed: int = 0,
    encode: Encoder | None = None,
) -> Workload:
    """Reads a file, plain or packed, or makes sessions up. Raises TraceError for content, ConfigError for arguments.

    path          None for `synthetic`, and only for that
    format        one of FORMATS, which has the limits that are None here
    max_calls     of a session
    max_tokens    of a prompt and its answer
    max_pause_s   of a tool or a person
    seed          of what is made up: all of `synthetic`, the times of `tau-bench`
    encode        makes tokens of text; None counts about four characters as one
    """
    if format not in FORMATS:
        raise ConfigError(f"format {format}: expected one of {', '.join(FORMATS)}")
    if (path is None) != (format == "synthetic"):
        raise ConfigError(f"trace {path}: expected {'a file' if path is None else 'none'} for format {format}")
    usual = FORMATS[format]
    limits = Limits(
        usual.max_calls if max_calls is None else max_calls,
        usual.max_tokens if max_tokens is None else max_tokens,
        usual.max_pause_s if max_pause_s is None else max_pause_s,
    )
    maker = SessionMaker(limits)
    notes = _fill(maker, path, format, seed, encode or four_characters)
    if not maker.sessions:
        raise TraceError(f"{path or format}:1: sessions: expected at least one within the limits, found none")
    name = format if path is None else stem(path)
    return Workload(name, tuple(maker.sessions), "; ".join([*notes, *maker.notes]))


def _fill(maker: SessionMaker, path: Path | None, format: str, seed: int, encode: Encoder) -> list[str]:
    if path is None:
        return make_sessions(maker, seed)
    match format:
        case "mars":
            return read_mars(path, maker)
        case "kv-cache-tester":
            return read_kv_cache_tester(path, maker)
        case _:
            return read_tau_bench(path, maker, encode, seed)
