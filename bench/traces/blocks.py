"""Traces that name blocks of tokens and have no tokens: mooncake and kv-cache-tester.

    mooncake          blocks of 512 tokens; true times
    kv-cache-tester   blocks of 64 tokens, named within a session; times within the session

A block's id stands for the block and all before it, so it follows the same block wherever it occurs. That is checked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybrid_cache.bench.traces.records import IntArray, Reading, Record, Times, in_order, read_records
from hybrid_cache.bench.traces.trace import Mark, TraceRequest
from hybrid_cache.kernels.grid import TILE

MOONCAKE_BLOCK = 512

Wholes = dict[tuple[int, int], int]  # last block, length -> the number of the prompt


def read_mooncake(files: Sequence[Path]) -> Reading:
    prompts: list[list[tuple[Record, IntArray]]] = [list(mooncake_prompts(file)) for file in files]
    numbered_blocks([prompt for file in prompts for prompt in file])
    wholes: Wholes = {}
    requests = [[mooncake_request(record, blocks, wholes) for record, blocks in file] for file in prompts]
    return Reading(requests, MOONCAKE_BLOCK, Times.TRACE)


def mooncake_prompts(file: Path) -> Iterator[tuple[Record, IntArray]]:
    last: Record | None = None
    for record in read_records(file):
        in_order(last, record, "timestamp")
        last = record
        blocks, num_tokens = record.integers("hash_ids"), record.integer("input_length", least=1)
        if len(blocks) != (expected := -(-num_tokens // MOONCAKE_BLOCK)):
            raise record.fault(f"hash_ids has {len(blocks)} ids: expected {expected} for input_length {num_tokens}")
        yield record, blocks


def mooncake_request(record: Record, blocks: IntArray, wholes: Wholes) -> TraceRequest:
    num_tokens = record.integer("input_length", least=1)
    return TraceRequest(
        arrival_s=record.time("timestamp") / 1000,
        session="",
        pages=blocks[: num_tokens // MOONCAKE_BLOCK].astype(np.int32),
        num_prompt_tokens=num_tokens,
        num_output_tokens=record.integer("output_length"),
        num_known_tokens=num_tokens,
        whole=wholes.setdefault((int(blocks[-1]), num_tokens), len(wholes)),
        marks=(Mark(num_tokens, ""),),
    )


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """One request of a kv-cache-tester session."""

    record: Record
    time_s: float  # since the start of the session
    num_system_tokens: int  # tools and system prompt


def read_kv_cache_tester(files: Sequence[Path], page_tokens: int) -> Reading:
    """In pages of `page_tokens` at once: the blocks of a large trace, all together, would fill the memory."""
    sessions = SessionNumbering(page_tokens)
    requests = [[r for record in read_records(file) for r in sessions.read(record)] for file in files]
    note = "prompts of one session with equal blocks and equal length count as repeats"
    return Reading(requests, page_tokens, Times.SESSION, (note,))


class SessionNumbering:
    """Numbers the pages and the prompts of one session after the other."""

    def __init__(self, page_tokens: int) -> None:
        self._page_blocks = page_tokens // TILE
        self._num_blocks = self._num_prompts = 0
        self._places: dict[str, str] = {}

    def read(self, record: Record) -> list[TraceRequest]:
        """The requests of a session by time."""
        session = record.text("id")
        if session in self._places:
            raise record.error("id", f"another than on {self._places[session]}")
        self._places[session] = f"{record.file.name}:{record.line}"
        sent = sorted(session_requests(record), key=lambda request: request.time_s)
        prompts, num_blocks = numbered_blocks([(r.record, session_blocks(r.record)) for r in sent])
        wholes: Wholes = {}
        requests = [self._request(session, *prompt, wholes) for prompt in zip(sent, prompts, strict=True)]
        self._num_blocks += num_blocks
        self._num_prompts += len(wholes)
        return requests

    def _request(self, session: str, request: SessionRequest, blocks: IntArray, wholes: Wholes) -> TraceRequest:
        num_tokens = request.record.integer("in", least=1)
        full = blocks[: num_tokens // TILE][self._page_blocks - 1 :: self._page_blocks]
        last = int(blocks[-1]) if len(blocks) else -1
        return TraceRequest(
            arrival_s=request.time_s,
            session=session,
            pages=(full + self._num_blocks).astype(np.int32),
            num_prompt_tokens=num_tokens,
            num_output_tokens=request.record.integer("out"),
            num_known_tokens=num_tokens,
            whole=self._num_prompts + wholes.setdefault((last, num_tokens), len(wholes)),
            marks=request_marks(request, num_tokens),
        )


def session_requests(owner: Record, start_s: float = 0.0) -> Iterator[SessionRequest]:
    """The requests of a session, or of a subagent that starts `start_s` after it."""
    check_block_size(owner)
    num_system_tokens, last = owner.integer("tool_tokens") + owner.integer("system_tokens"), None
    for entry in owner.records("requests"):
        in_order(last, entry, "t")
        last = entry
        if entry.fields.get("type") == "subagent":
            yield from session_requests(entry, start_s + entry.time("t"))
        else:
            yield SessionRequest(entry, start_s + entry.time("t"), num_system_tokens)


def check_block_size(session: Record) -> None:
    if session.has("block_size") and session.integer("block_size") != TILE:
        raise session.error("block_size", str(TILE))


def session_blocks(record: Record) -> IntArray:
    blocks, num_tokens = record.integers("hash_ids"), record.integer("in", least=1)
    if len(blocks) not in (num_tokens // TILE, -(-num_tokens // TILE)):  # without or with a part block at the end
        raise record.fault(f"hash_ids has {len(blocks)} ids: expected {num_tokens // TILE} for in {num_tokens}")
    return blocks


def request_marks(request: SessionRequest, num_tokens: int) -> tuple[Mark, ...]:
    inputs = request.record.texts("input_types")
    end = Mark(num_tokens, "tool" if inputs == ["tool_result"] else "user" if "text" in inputs else "")
    system = Mark(request.num_system_tokens, "system")
    return (system, end) if 0 < system.position < num_tokens else (end,)


def numbered_blocks(prompts: Sequence[tuple[Record, IntArray]]) -> tuple[list[IntArray], int]:
    """The blocks of the prompts numbered from zero, and how many different ones there are."""
    lengths = np.array([len(blocks) for _, blocks in prompts], np.int64)
    if not lengths.sum():
        return [blocks for _, blocks in prompts], 0
    ends = lengths.cumsum()
    blocks = np.concatenate([blocks for _, blocks in prompts])
    before = np.concatenate([[-1], blocks[:-1]])
    before[(ends - lengths)[lengths > 0]] = -1
    names, numbers = np.unique(blocks, return_inverse=True)
    parents = np.empty_like(names)
    parents[numbers[::-1]] = before[::-1]  # the last write stays: the block's first place in the file
    if len(wrong := np.flatnonzero(parents[numbers] != before)):
        place = int(wrong[0])
        expected, found = ("first" if b < 0 else f"after {b}" for b in (parents[numbers[place]], before[place]))
        record, _ = prompts[int(ends.searchsorted(place, side="right"))]
        raise record.fault(f"hash_ids {blocks[place]} stands {found}: expected {expected}, as before")
    return np.split(numbers, ends[:-1]), len(names)
