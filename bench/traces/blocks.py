"""Traces that name blocks of tokens and have no tokens: mooncake, qwen-bailian and kv-cache-tester.

    mooncake          blocks of 512 tokens, or of another size that the data show; true times
    qwen-bailian      blocks of 16 tokens; true times
    kv-cache-tester   blocks of 64 tokens, named within a session; times within the session

A block's id stands for the block and all before it, so it follows the same block wherever it occurs. That is checked.
The ids of qwen-bailian may stand for a block alone; they are named anew.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hybrid_cache.bench.traces.records import (
    IntArray,
    Reading,
    Record,
    Times,
    from_zero,
    in_order,
    read_records,
    records_by_time,
)
from hybrid_cache.bench.traces.trace import Mark, PageNames, TraceRequest
from hybrid_cache.kernels.grid import TILE

MOONCAKE_BLOCK, QWEN_BLOCK = 512, 16
BLOCKS = (MOONCAKE_BLOCK, QWEN_BLOCK, 32, 64, 128, 256, 1024, 2048)  # sizes that are looked for

Wholes = dict[tuple[int, int], int]  # last block, length -> the number of the prompt
Prompt = tuple[Record, IntArray]  # and its blocks


def read_mooncake(files: Sequence[Path], block_tokens: int | None, *, sort: bool) -> Reading:
    """block_tokens: that an id stands for; None looks at the lengths of the prompts"""
    prompts: list[list[Prompt]] = [list(block_prompts(file, sort=sort)) for file in files]
    everything = [prompt for file in prompts for prompt in file]
    size = block_tokens or found_size(everything)
    for record, blocks in everything:
        check_length(record, blocks, size)
    numbered_blocks(everything)
    wholes: Wholes = {}
    requests = [[block_request(record, blocks, size, 1e-3, wholes) for record, blocks in file] for file in prompts]
    dated = any(isinstance(record.fields["timestamp"], str) for record, _ in everything)
    notes = () if size == MOONCAKE_BLOCK else (f"a hash id stands for {size} tokens",)
    return Reading(from_zero(requests) if dated else requests, page_size(size), Times.TRACE, notes)


def read_qwen(files: Sequence[Path], block_tokens: int | None, *, sort: bool) -> Reading:
    size, names, roots, wholes = block_tokens or QWEN_BLOCK, PageNames(), dict[int, int](), Wholes()
    requests: list[list[TraceRequest]] = []
    for file in files:
        requests.append([])
        for record, ids in block_prompts(file, sort=sort):
            check_length(record, ids, size)
            blocks = names.of_blocks(ids.tolist()).astype(np.int64)
            request = block_request(record, blocks, size, 1.0, wholes)
            requests[-1].append(replace(request, session=conversation(record, roots)))
    return Reading(requests, page_size(size), Times.TRACE)


def conversation(record: Record, roots: dict[int, int]) -> str:
    """Names the first chat of a conversation: that of the parent, if it is in the trace."""
    chat, parent = record.integer("chat_id"), record.fields.get("parent_chat_id")
    roots[chat] = roots.get(parent, chat) if isinstance(parent, int) else chat
    return str(roots[chat])


def block_prompts(file: Path, *, sort: bool) -> Iterator[Prompt]:
    for record in records_by_time(file, "timestamp", sort=sort):
        record.integer("input_length", least=1)
        yield record, record.integers("hash_ids")


def found_size(prompts: Sequence[Prompt]) -> int:
    """The size of a block that explains all prompts, one of more than a block among them; else the usual one."""
    lengths = np.array([record.integer("input_length") for record, _ in prompts], np.int64)
    counts = np.array([len(blocks) for _, blocks in prompts], np.int64)
    fitting = (size for size in BLOCKS if counts.max(initial=0) > 1 and np.all(-(-lengths // size) == counts))
    return next(fitting, MOONCAKE_BLOCK)


def check_length(record: Record, blocks: IntArray, block_tokens: int) -> None:
    num_tokens = record.integer("input_length", least=1)
    if len(blocks) != (expected := -(-num_tokens // block_tokens)):
        size = "" if block_tokens == MOONCAKE_BLOCK else f" in blocks of {block_tokens}"
        raise record.fault(f"hash_ids has {len(blocks)} ids: expected {expected} for input_length {num_tokens}{size}")


def page_size(block_tokens: int) -> int:
    """The least page of whole blocks and whole tiles."""
    return math.lcm(block_tokens, TILE)


def block_request(record: Record, blocks: IntArray, block_tokens: int, unit_s: float, wholes: Wholes) -> TraceRequest:
    num_tokens, a_page = record.integer("input_length", least=1), page_size(block_tokens) // block_tokens
    return TraceRequest(
        arrival_s=record.time("timestamp", unit_s),
        session="",
        pages=blocks[: num_tokens // block_tokens][a_page - 1 :: a_page].astype(np.int32),
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
    num_tool_tokens: int
    num_system_tokens: int
    agent: str = ""  # which of a session, if one started others


def read_kv_cache_tester(files: Sequence[Path], page_tokens: int, *, sort: bool) -> Reading:
    """In pages of `page_tokens` at once: the blocks of a large trace, all together, would fill the memory."""
    sessions = SessionNumbering(page_tokens, sort=sort)
    requests = [[r for record in read_records(file) for r in sessions.read(record)] for file in files]
    note = "prompts of one session with equal blocks and equal length count as repeats"
    return Reading(requests, page_tokens, Times.SESSION, (note,))


class SessionNumbering:
    """Numbers the pages and the prompts of one session after the other."""

    def __init__(self, page_tokens: int, *, sort: bool = False) -> None:
        self._sort = sort
        self._page_blocks = page_tokens // TILE
        self._num_blocks = self._num_prompts = 0
        self._places: dict[str, str] = {}

    def read(self, record: Record) -> list[TraceRequest]:
        """The requests of a session by time."""
        session = record.text("id")
        if session in self._places:
            raise record.error("id", f"another than on {self._places[session]}")
        self._places[session] = f"{record.file.name}:{record.line}"
        sent = sorted(session_requests(record, sort=self._sort), key=lambda request: request.time_s)
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
            finish=request.record.finish("stop"),
            agent=request.agent,
            tools=request.num_tool_tokens > 0,
            template=f"{request.num_tool_tokens}+{request.num_system_tokens}",
        )


def session_requests(
    owner: Record, start_s: float = 0.0, agent: str = "", *, sort: bool = False
) -> Iterator[SessionRequest]:
    """The requests of a session, or of an agent in it that starts `start_s` after it. sort: times may fall"""
    check_block_size(owner)
    first, last = (owner.integer("tool_tokens"), owner.integer("system_tokens")), None
    for entry in owner.records("requests"):
        if not sort:
            in_order(last, entry, "t")
        last = entry
        if entry.fields.get("type") == "subagent":
            name = entry.text("agent_id") if entry.has("agent_id") else entry.place
            yield from session_requests(entry, start_s + entry.time("t"), name, sort=sort)
        else:
            yield SessionRequest(entry, start_s + entry.time("t"), *first, agent)


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
    system = Mark(request.num_tool_tokens + request.num_system_tokens, "system")
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
