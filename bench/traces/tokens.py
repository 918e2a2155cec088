"""Traces that have tokens, or something to make them of: ragpulse, messages, tokens, marconi.

    ragpulse   segments with an id and a length; true times, unsorted
    messages   text, in one of the shapes of SHAPES; times if the file has them
    tokens     token ids; times if the file has them
    marconi    token ids; times

All requests carry their tokens, which make the names of their pages.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np

from hybrid_cache.bench.traces.records import (
    LARGEST,
    Reading,
    Record,
    Times,
    TraceError,
    brief,
    from_zero,
    in_order,
    read_records,
    records_by_time,
)
from hybrid_cache.bench.traces.trace import Mark, PageNames, Tokens, TraceMessage, TraceRequest, template_of
from hybrid_cache.cache.policies.signals import Finish
from hybrid_cache.kernels.grid import TILE

Encoder = Callable[[str], Sequence[int]]


class Signals(TypedDict, total=False):
    """The fields of that name of a `TraceRequest`."""

    finish: Finish
    user: str
    tools: bool | None
    template: str


# The parts of a ragpulse prompt in their order: field of `hash_ids`, table of lengths, field of the id there, speaker.
SEGMENTS = (
    ("sys_prompt", "1_sys_prompt", "sys_prompt_id", "system"),
    ("passages_ids", "2_passages", "passage_id", "tool"),
    ("history", "3_history", "history_id", "assistant"),
    ("web_search", "5_web_search", "web_search_id", "tool"),
    ("user_input", "4_user_input", "user_input_id", "user"),
)


@dataclass(slots=True)
class TokenSupply:
    """Hands out tokens that nobody had before."""

    num_used: int = 0

    def take(self, count: int, record: Record, name: str) -> Tokens:
        """As many tokens as the record's field asks for."""
        if self.num_used + count > LARGEST:
            raise record.error(name, f"no more than {LARGEST} different tokens in the whole trace")
        self.num_used += count
        return np.arange(self.num_used - count, self.num_used, dtype=np.int32)


def read_ragpulse(files: Sequence[Path]) -> Reading:
    """Requests by time. A segment stands for tokens of its own, the same ones wherever it is used."""
    supply, names = TokenSupply(), PageNames()
    segments = {part: read_segments(files[0].parent, table, key, supply) for part, table, key, _ in SEGMENTS}
    records = [record for file in files for record in read_records(file)]
    records.sort(key=lambda record: record.time_in_text("timestamp"))
    requests = [segments_request(record, segments, supply, names) for record in records]
    order = f"assumed order of a prompt's parts: {', '.join(part for part, *_ in SEGMENTS)}"
    rest = "tokens that no part accounts for come last and are found in no other prompt"
    return Reading([requests], TILE, Times.TRACE, (order, rest))


def read_segments(folder: Path, table: str, key: str, supply: TokenSupply) -> dict[int, Tokens]:
    """The tokens of each segment id, from the table of lengths. Raises TraceError."""
    files = sorted(folder.glob(f"{table}*"))
    if len(files) != 1:
        raise TraceError(f"{folder}: {len(files)} files {table}*: expected one, with the lengths of the segments")
    segments: dict[int, Tokens] = {}
    for record in read_records(files[0]):
        if (segment := record.integer(key)) in segments:
            raise record.error(key, "each id once")
        segments[segment] = supply.take(record.integer("token_length", least=1), record, "token_length")
    return segments


def segments_request(
    record: Record, segments: dict[str, dict[int, Tokens]], supply: TokenSupply, names: PageNames
) -> TraceRequest:
    ids, parts, ends, length = record.record("hash_ids"), list[Tokens](), dict[int, str](), 0
    for name, table, _, role in SEGMENTS:
        for segment in ids.integers(name).tolist():
            if segment not in segments[name]:
                raise ids.fault(f"{name} {segment}: expected an id of {table}")
            parts.append(segments[name][segment])
            length += len(parts[-1])
            if name == "passages_ids":
                ends[length] = role
        if name != "user_input" and length:
            ends.setdefault(length, role)
    if length > (num_tokens := record.integer("input_length", least=1)):
        raise record.error("input_length", f"at least {length}, the tokens of hash_ids")
    parts.append(supply.take(num_tokens - length, record, "input_length"))
    ends.setdefault(num_tokens, "user")
    return token_request(
        names,
        np.concatenate(parts),
        marks=tuple(Mark(position, role) for position, role in ends.items()),
        num_output_tokens=record.integer("output_length"),
        arrival_s=record.time_in_text("timestamp"),
        session=record.text("session_id"),
    )


def token_request(
    names: PageNames,
    prompt: Tokens,
    *,
    marks: tuple[Mark, ...],
    num_output_tokens: int,
    arrival_s: float,
    session: str,
    output: Tokens | None = None,
    finish: Finish = Finish.UNKNOWN,
    user: str = "",
    tools: bool | None = None,
    template: str = "",
) -> TraceRequest:
    """A request with its tokens; an output that is known counts for more than `num_output_tokens`."""
    known = prompt if output is None else np.concatenate([prompt, output])
    pages, whole = names.of(prompt)
    return TraceRequest(
        arrival_s=arrival_s,
        session=session,
        pages=pages if output is None else names.of(known)[0],
        num_prompt_tokens=len(prompt),
        num_output_tokens=num_output_tokens if output is None else len(output),
        num_known_tokens=len(known),
        whole=whole,
        marks=marks,
        tokens=prompt,
        finish=finish,
        user=user,
        tools=tools,
        template=template or template_of(prompt, marks),
    )


def signals_of(record: Record) -> Signals:
    """What a record says of itself beside its tokens."""
    tools = record.fields.get("tools")
    if not (tools is None or isinstance(tools, bool | list)):
        raise record.error("tools", "true, false, or a list of tools")
    return Signals(
        finish=record.finish("finish_reason"),
        user=record.text("user") if record.has("user") else "",
        tools=None if tools is None else bool(tools),
        template=record.text("template") if record.has("template") else "",
    )


class Clock:
    """Reads when requests came: by one field in all of them, or in none.

    arrival_s   seconds since the start of the trace
    timestamp   seconds since any moment
    """

    FIELDS = ("arrival_s", "timestamp")

    def __init__(self, first: Record | None, *, sort: bool = False) -> None:
        fields = {} if first is None else first.fields
        self.field = next((name for name in self.FIELDS if fields.get(name) is not None), "")
        self._from_zero = self.field == "timestamp" or isinstance(fields.get(self.field), str)
        self._sort = sort
        self._last: Record | None = None

    @property
    def times(self) -> Times:
        return Times.TRACE if self.field else Times.NONE

    def records(self, file: Path) -> Iterator[Record]:
        """Those of a file, sorted if that is wanted."""
        return records_by_time(file, self.field, sort=True) if self._sort and self.field else read_records(file)

    def read(self, record: Record) -> float:
        if not self.field:
            if name := next((name for name in self.FIELDS if record.has(name)), ""):
                raise record.error(name, "no time, like the first request")
            return 0.0
        in_order(self._last, record, self.field)
        self._last = record
        return record.time(self.field)

    def started(self, files: list[list[TraceRequest]]) -> list[list[TraceRequest]]:
        """The requests with times since the start of the trace."""
        return from_zero(files) if self._from_zero else files


def first_record(files: Iterable[Path]) -> Record | None:
    return next((record for file in files for record in read_records(file)), None)


def read_tokens(files: Sequence[Path], *, sort: bool) -> Reading:
    names, clock = PageNames(), Clock(first_record(files), sort=sort)
    requests = [[tokens_request(record, clock, names) for record in clock.records(file)] for file in files]
    return Reading(clock.started(requests), TILE, clock.times)


def read_marconi(files: Sequence[Path], *, sort: bool) -> Reading:
    """The traces that Marconi's published simulator reads."""
    names = PageNames()
    requests = [[marconi_request(r, names) for r in records_by_time(file, "ts", sort=sort)] for file in files]
    return Reading(from_zero(requests), TILE, Times.TRACE)


def marconi_request(record: Record, names: PageNames) -> TraceRequest:
    prompt = record.integers("input_tokens").astype(np.int32)
    if not len(prompt):
        raise record.error("input_tokens", "at least one token")
    session = record.fields.get("session_id")
    return token_request(
        names,
        prompt,
        marks=(Mark(len(prompt), ""),),
        num_output_tokens=record.integer("num_output_tokens") if record.has("num_output_tokens") else 0,
        arrival_s=record.time("ts"),
        session="" if session is None else str(session),
        output=record.integers("output_tokens").astype(np.int32) if record.has("output_tokens") else None,
    )


def tokens_request(record: Record, clock: Clock, names: PageNames) -> TraceRequest:
    prompt = record.integers("prompt").astype(np.int32)
    if not len(prompt):
        raise record.error("prompt", "at least one token")
    return token_request(
        names,
        prompt,
        marks=prompt_marks(record, len(prompt)),
        num_output_tokens=num_output_tokens(record),
        arrival_s=clock.read(record),
        session=record.text("session") if record.has("session") else "",
        output=record.integers("output").astype(np.int32) if record.has("output") else None,
        **signals_of(record),
    )


def prompt_marks(record: Record, num_tokens: int) -> tuple[Mark, ...]:
    marks: list[Mark] = []
    for mark in record.records("marks") if record.has("marks") else ():
        least = marks[-1].position + 1 if marks else 1
        if not least <= (position := mark.integer("position")) <= num_tokens:
            raise mark.error("position", f"an integer from {least} to {num_tokens}")
        role = mark.text("role") if mark.has("role") else ""
        marks.append(Mark(position, role, mark.flag("explicit") if mark.has("explicit") else False))
    return ended(marks, num_tokens)


def ended(marks: list[Mark], num_tokens: int) -> tuple[Mark, ...]:
    """The marks and, unless it is one of them, the end of the prompt."""
    at_end = bool(marks) and marks[-1].position == num_tokens
    return tuple(marks) if at_end else (*marks, Mark(num_tokens, ""))


def num_output_tokens(record: Record) -> int:
    return next((record.integer(name) for name in ("output_tokens", "max_tokens") if record.has(name)), 0)


@dataclass(slots=True)
class RequestMaker:
    """Makes requests of text. A message has the same tokens wherever it stands and whatever follows."""

    encode: Encoder
    names: PageNames = field(default_factory=PageNames)
    _encoded: dict[str, Tokens] = field(default_factory=dict)

    def message(self, role: str, content: str) -> TraceMessage:
        text = f"{role}\n{content}\n"
        if text not in self._encoded:
            self._encoded[text] = np.array(self.encode(text), np.int32)
        return TraceMessage(role, self._encoded[text])

    def parsed(self, record: Record) -> TraceMessage:
        """An OpenAI message."""
        content = content_of(record) if record.has("content") else ""
        if record.has("tool_calls"):
            calls = json.dumps(record.fields["tool_calls"], ensure_ascii=False, separators=(",", ":"))
            content = f"{content}\n{calls}" if content else calls
        elif not record.has("content"):
            raise record.error("content", "a string")
        return self.message(record.text("role"), content)

    def request(
        self,
        messages: Sequence[TraceMessage],
        answer: TraceMessage | None,
        session: str,
        arrival_s: float = 0.0,
        num_output_tokens: int = 0,
        signals: Signals | None = None,
    ) -> TraceRequest:
        prompt = np.concatenate([message.tokens for message in messages])
        ends = np.cumsum([len(message.tokens) for message in messages]).tolist()
        return token_request(
            self.names,
            prompt,
            marks=tuple(Mark(end, message.role) for end, message in zip(ends, messages, strict=True)),
            num_output_tokens=num_output_tokens,
            arrival_s=arrival_s,
            session=session,
            output=answer.tokens if answer else None,
            **(signals or Signals()),
        )


def content_of(record: Record) -> str:
    """The text of a message; of parts, one after the other, what is no text as it stands in the file."""
    if isinstance(record.fields["content"], str):
        return record.text("content")
    if not record.fields["content"] or not isinstance(record.fields["content"], list):
        raise record.error("content", "a string, or a list of parts")
    parts = record.records("content")
    return "\n".join(part.text("text") if part.has("text") else json.dumps(part.fields) for part in parts)


def read_messages(files: Sequence[Path], encode: Encoder, *, sort: bool) -> Reading:
    """The shape of the first record is the shape of all."""
    if (first := first_record(files)) is None:
        return Reading([], TILE, Times.NONE)
    shape = next((shape for name, shape in SHAPES.items() if first.has(name)), None)
    if shape is None:
        raise first.fault(f"fields {brief(', '.join(first.fields))}: expected one of {', '.join(SHAPES)}")
    return (
        read_chats(files, RequestMaker(encode), sort=sort)
        if shape is read_chats
        else shape(files, RequestMaker(encode))
    )


def read_chats(files: Sequence[Path], maker: RequestMaker, *, sort: bool = False) -> Reading:
    clock = Clock(first_record(files), sort=sort)
    requests = [[chat_request(record, clock, maker) for record in clock.records(file)] for file in files]
    return Reading(clock.started(requests), TILE, clock.times)


def chat_request(record: Record, clock: Clock, maker: RequestMaker) -> TraceRequest:
    messages = [maker.parsed(sent) for sent in record.records("messages")]
    if not messages:
        raise record.error("messages", "at least one message")
    answer = maker.message("assistant", record.text("output")) if record.has("output") else None
    session = record.text("session") if record.has("session") else ""
    said = num_output_tokens(record), signals_of(record)
    return maker.request(messages, answer, session, clock.read(record), *said)


def read_trajectories(files: Sequence[Path], maker: RequestMaker) -> Reading:
    """tau-bench: each message of the assistant answers those before it; a trajectory is a session."""
    requests = [[r for record in read_records(file) for r in trajectory(record, maker)] for file in files]
    return Reading(requests, TILE, Times.NONE)


def trajectory(record: Record, maker: RequestMaker) -> Iterator[TraceRequest]:
    messages: list[TraceMessage] = []
    for sent in record.records("traj"):
        message = maker.parsed(sent)
        if message.role == "assistant":
            if not messages:
                raise sent.error("role", "a message of somebody else first")
            finish = Finish.TOOL_CALL if sent.has("tool_calls") else Finish.STOP
            signals = Signals(finish=finish, tools=True)
            yield maker.request(messages, message, f"{record.file.name}:{record.line}", signals=signals)
        messages.append(message)


def read_share_gpt(files: Sequence[Path], maker: RequestMaker) -> Reading:
    """ShareGPT: what the model says answers what comes before; a conversation is a session."""
    requests = [[r for record in read_records(file) for r in shared_chat(record, maker)] for file in files]
    return Reading(requests, TILE, Times.NONE)


SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


def shared_chat(record: Record, maker: RequestMaker) -> Iterator[TraceRequest]:
    messages: list[TraceMessage] = []
    for turn in record.records("conversations"):
        speaker = turn.text("from")
        message = maker.message(SPEAKERS.get(speaker, speaker), turn.text("value"))
        if message.role == "assistant" and messages:
            yield maker.request(messages, message, f"{record.file.name}:{record.line}{record.place}")
        messages.append(message)


def read_few_shots(files: Sequence[Path], maker: RequestMaker) -> Reading:
    """BIG-Bench Hard: each of the `outputs` is a request of one message."""
    return Reading(
        [[few_shot(o, maker) for record in read_records(file) for o in record.records("outputs")] for file in files],
        TILE,
        Times.NONE,
    )


def few_shot(record: Record, maker: RequestMaker) -> TraceRequest:
    prompt, answer = maker.message("user", record.text("input")), maker.message("assistant", record.text("prediction"))
    return maker.request([prompt], answer, session="")


def read_agent_logs(files: Sequence[Path], maker: RequestMaker) -> Reading:
    """lmcache-agent-trace: an `input` extends the one before it in its session but omits what was answered."""
    requests = [list(agent_requests(file, maker)) for file in files]
    notes = (
        "outputs put back into the prompts that follow",
        "first input taken for the user's, what it grows by for a tool's",
    )
    return Reading(from_zero(requests), TILE, Times.TRACE, notes)


def agent_requests(file: Path, maker: RequestMaker) -> Iterator[TraceRequest]:
    logged: dict[str, tuple[str, list[TraceMessage]]] = {}  # by session: the last input, the messages up to its answer
    for record in sorted(read_records(file), key=lambda record: record.time("timestamp")):
        session, text = record.text("session_id"), record.text("input")
        before, messages = logged.get(session, ("", []))
        if messages and text.startswith(before):
            messages = [*messages, maker.message("tool", text[len(before) :])]
        else:  # the context was reset
            messages = [maker.message("user", text)]
        answer = maker.message("assistant", record.text("output"))
        logged[session] = text, [*messages, answer]
        yield maker.request(messages, answer, session, record.time("timestamp") / 1e6)


# By the field that gives a record away.
SHAPES: dict[str, Callable[[Sequence[Path], RequestMaker], Reading]] = {
    "messages": read_chats,
    "traj": read_trajectories,
    "conversations": read_share_gpt,
    "outputs": read_few_shots,
    "input": read_agent_logs,
}


def four_characters(text: str) -> list[int]:
    """About as many tokens as a tokenizer makes of English: a stable hash of every four characters."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    pieces = np.pad(points, (0, -len(points) % 4)).reshape(-1, 4)
    mixed = np.zeros(len(pieces), np.uint64)
    for column in pieces.T:  # a step of splitmix64 for each character; the upper bits are the good ones
        mixed = (mixed + column + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(31)
    tokens: list[int] = (mixed >> np.uint64(33)).tolist()
    return tokens
