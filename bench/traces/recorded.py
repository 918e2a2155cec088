"""Reads what `serve --record` writes, see `api.server.recording.lines`: what a server really served, and when.

A request counts from when it was admitted: that is when the cache sees it. One that was given up while its prompt was
computed is cut off where it stopped. Those that never ran, that did not use the cache, or that put messages together
are left out. A start of the server is an empty cache: what came before it shares no page with what comes after.

The last line of a file may be broken off: its server may have been killed, or write it just now.
"""

import base64
import binascii
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from hybrid_cache.api.server.recording.lines import FORMAT, NAME_BYTES, VERSION
from hybrid_cache.bench.traces.records import (
    Reading,
    Record,
    Times,
    TraceError,
    brief,
    is_time,
    parsed,
    unpacked,
)
from hybrid_cache.bench.traces.trace import (
    Choice,
    Mark,
    PageIds,
    Pieces,
    RecordedServer,
    Stay,
    TraceRequest,
    Turn,
)
from hybrid_cache.cache.policies.signals import Finish
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.shapes import Advance, ModelShape
from hybrid_cache.sizes import format_bytes
from hybrid_cache.spec import AttentionSpec, PrefillCost, StateSpec

LEFT_OUT = {
    "not begun": "never began",
    "cache off": "did not use the cache",
    "arranged": "put messages together",
    "nothing computed": "were given up before anything of them was computed",
}


@dataclass(frozen=True, slots=True)
class KnownLayer:
    """A part of a model of which only this is known."""

    kind: str
    cost: PrefillCost
    cache: AttentionSpec | StateSpec | None
    advance: Advance | None = None


@dataclass(slots=True)
class Pages:
    """Numbers of pages by the names that a record gives them, and the way to each from the start."""

    _places: dict[bytes, tuple[PageIds, int]] = field(default_factory=dict)  # in a path, and how deep
    num_pages: int = 0  # of all paths that ever were: numbers are not used again
    num_wholes: int = 0
    _wholes: dict[bytes, int] = field(default_factory=dict)

    def restart(self) -> None:
        """Names mean other pages from now on."""
        self._places.clear()
        self._wholes.clear()

    def path(self, record: Record) -> PageIds:
        """The pages of a prompt from the first on. Raises TraceError."""
        after, new = record.text("after"), decoded(record)
        if after and named(record, "after") not in self._places:
            raise record.error("after", "a page of a line before")
        above, depth = self._places[named(record, "after")] if after else (np.empty(0, np.int32), 0)
        path = np.concatenate([above[:depth], np.empty(len(new), np.int32)])
        for at, name in enumerate(new, depth):
            if name in self._places:
                there, deep = self._places[name]
                if deep != at + 1 or (at and there[at - 1] != path[at - 1]):
                    raise record.fault(f"pages[{at - depth}]: expected it after the same page as before")
                path[at] = there[at]
            else:
                path[at] = self.num_pages
                self.num_pages += 1
            self._places[name] = path, at + 1
        return path

    def whole(self, record: Record) -> int:
        return self._wholes.setdefault(named(record, "whole"), self.unrepeated())

    def unrepeated(self) -> int:
        """The number of a prompt that no other one is equal to."""
        self.num_wholes += 1
        return self.num_wholes - 1


def named(record: Record, field_name: str) -> bytes:
    try:
        name = bytes.fromhex(record.text(field_name))
    except ValueError:
        name = b""
    if len(name) != NAME_BYTES:
        raise record.error(field_name, f"{2 * NAME_BYTES} hexadecimal digits")
    return name


def decoded(record: Record) -> list[bytes]:
    """The names of the pages that a line adds. Raises TraceError."""
    try:
        data = base64.b64decode(record.text("pages"), validate=True)
    except binascii.Error:
        data = b"\0"
    if len(data) % NAME_BYTES:
        raise record.error("pages", f"names of {NAME_BYTES} bytes each in base64")
    return [data[i : i + NAME_BYTES] for i in range(0, len(data), NAME_BYTES)]


@dataclass(slots=True)
class Recording:
    """What the lines have said so far."""

    pages: Pages = field(default_factory=Pages)
    requests: dict[tuple[int, int], TraceRequest] = field(default_factory=dict)  # by start and number
    turns: list[tuple[int, Turn]] = field(default_factory=list)  # with the start
    left_out: Counter[str] = field(default_factory=Counter)
    server: RecordedServer | None = None
    run: int = -1  # starts so far, less one
    start_s: float = 0.0  # of the server, since 1970
    since_s: float | None = None  # of the first one
    end_s: float = 0.0  # of what was said
    num_cut: int = 0
    num_forgotten: int = 0
    lost: int = 0
    full: bool = False

    def take(self, record: Record) -> None:
        """Raises TraceError."""
        match record.fields:
            case {"format": _}:
                self.begin(record)
            case _ if self.server is None:
                raise record.fault("fields without those of a start: expected a line with format first")
            case {"request": _}:
                self.take_request(record)
            case {"turn": _}:
                self.turns.append((self.run, self.turn(record)))
            case {"called": _}:
                self.called(record)
            case {"lost": _}:
                self.lost += record.integer("lost")
            case {"stopped": _}:
                self.full = True
            case _:
                raise record.fault(f"fields {brief(', '.join(record.fields))}: expected those of {FORMAT}")

    def begin(self, record: Record) -> None:
        if record.fields["format"] != FORMAT or record.fields.get("version") != VERSION:
            raise record.fault(f"format {brief(record.fields['format'])}: expected {FORMAT}, version {VERSION}")
        if record.integer("page_tokens") != TILE:
            raise record.error("page_tokens", str(TILE))
        server = server_of(record)
        if self.server is not None and server.model.layers != self.server.model.layers:
            raise record.fault(f"model {brief(server.model.name)}: expected {self.server.model.name}, as before")
        self.server = server
        self.run += 1
        self.start_s = max(record.time("started"), self.end_s)
        self.since_s = self.start_s if self.since_s is None else self.since_s
        self.pages.restart()
        self.num_forgotten += record.integer("forgotten") if record.has("forgotten") else 0

    def at(self, seconds: float) -> float:
        """A time since the start of the server -> one since 1970."""
        self.end_s = max(self.end_s, self.start_s + seconds)
        return self.start_s + seconds

    def take_request(self, record: Record) -> None:
        number, num_tokens = record.integer("request"), record.integer("tokens", least=1)
        reason = record.text("left_out") if record.has("left_out") else ""
        if reason:
            self.left_out[reason] += 1
            return
        path, whole = self.pages.path(record), self.pages.whole(record)
        if len(path) != num_tokens // TILE:
            raise record.fault(f"pages: expected {num_tokens // TILE} with those after, for tokens {num_tokens}")
        computed = record.integer("computed") if record.has("computed") else num_tokens
        if not computed:
            self.left_out["nothing computed"] += 1
            return
        ended, outputs = times_of(record, "ended"), record.integers("output_tokens").tolist()
        start_s, reasons = self.at(record.time("started")), record.texts("finish_reason")
        if not len(ended) == len(outputs) == len(reasons) > 0:
            raise record.error("ended", "as many as output_tokens and finish_reason, at least one")
        prompted_s = self.at(record.time("prompted")) if record.has("prompted") else self.at(max(ended))
        finishes = [finish_of(record, reason) for reason in reasons]
        choices = tuple(map(Choice, map(self.at, ended), outputs, finishes))
        again = tuple((index, self.at(gave), self.at(back)) for index, gave, back in gaps_of(record, len(ended)))
        request = TraceRequest(
            arrival_s=start_s,
            session=said(record, "session"),
            pages=path,
            num_prompt_tokens=num_tokens,
            num_output_tokens=sum(outputs),
            num_known_tokens=num_tokens,
            whole=whole,
            marks=marks_of(record, num_tokens),
            only_marked=record.has("only_marked"),
            finish=finishes[0],
            user=said(record, "user"),
            tools=record.has("tools"),
            template=said(record, "template"),
            stay=Stay(
                *(start_s, prompted_s, choices, record.integer("cached"), computed == num_tokens, self.run),
                *(self.parts(record), again),
            ),
        )
        self.num_cut += computed < num_tokens
        cut = request if computed == num_tokens else cut_off(request, computed, self.pages.unrepeated())
        self.requests[self.run, number] = cut

    def parts(self, record: Record) -> Pieces:
        return tuple((end, self.at(at_s)) for end, at_s in parts_of(record))

    def turn(self, record: Record) -> Turn:
        path, num_tokens = self.pages.path(record), record.integer("tokens")
        if len(path) * TILE != num_tokens:
            raise record.fault(f"pages: expected {num_tokens // TILE} with those after, for tokens {num_tokens}")
        times = self.at(record.time("turn")), self.at(record.time("ended"))
        computed = record.integer("computed") if record.has("computed") else num_tokens
        marks, session = marks_of(record, num_tokens), said(record, "session")
        return Turn(*times, path, marks, session, computed, self.parts(record))

    def called(self, record: Record) -> None:
        place = self.run, record.integer("called")
        if place in self.requests:
            self.requests[place] = that_called(self.requests[place])

    def in_order(self) -> list[TraceRequest]:
        """The requests as they were admitted, each with the turns that were computed before the next one was."""
        requests = sorted(self.requests.values(), key=lambda r: r.arrival_s)
        starts, turns = [r.arrival_s for r in requests], dict[int, list[Turn]]()
        for _, turn in self.turns:
            at = int(np.searchsorted(starts, turn.at_s, side="right")) - 1
            if at >= 0:
                turns.setdefault(at, []).append(turn)
        return [replace(r, turns=tuple(turns.get(i, ()))) for i, r in enumerate(requests)]

    def notes(self) -> list[str]:
        told = [f"{n} requests left out that {LEFT_OUT.get(why, why)}" for why, n in self.left_out.items()]
        if self.num_cut:
            told.append(f"{self.num_cut} requests given up while their prompts were computed, cut off there")
        if self.run > 0:
            told.append(f"{self.run + 1} starts of the server, each with an empty cache")
        if self.num_forgotten:
            told.append(f"{self.num_forgotten} lines before these are forgotten: the replay begins with an empty cache")
        if self.lost:
            told.append(f"{self.lost} lines were lost")
        if self.full:
            told.append("the record reached its limit and goes no further")
        if self.server is not None and self.server.tiers:
            told.append(f"the server had {' and '.join(self.server.tiers)} below its memory, which is not replayed")
        return told


def cut_off(request: TraceRequest, num_tokens: int, whole: int) -> TraceRequest:
    """One that was given up when some tokens of its prompt had been computed. whole: a number that no other has"""
    return replace(
        request,
        pages=request.pages[: num_tokens // TILE],
        num_prompt_tokens=num_tokens,
        num_known_tokens=num_tokens,
        whole=whole,
        marks=tuple(mark for mark in request.marks if mark.position <= num_tokens),
        stay=request.stay and replace(request.stay, meant=request),
    )


def that_called(request: TraceRequest) -> TraceRequest:
    """The server told of its latest answer that it was a tool call."""
    stay = request.stay
    assert stay is not None
    latest = max(stay.choices, key=lambda choice: choice.end_s)
    choices = tuple(c._replace(finish=Finish.TOOL_CALL) if c is latest else c for c in stay.choices)
    return replace(request, finish=Finish.TOOL_CALL, stay=replace(stay, choices=choices))


def read_recorded(files: Sequence[Path]) -> Reading:
    """All files as one record, each with starts of its own. Raises TraceError."""
    recording, remarks = Recording(), list[str]()
    for file in files:
        for record in whole_records(file, remarks):
            recording.take(record)
    requests = recording.in_order()
    if recording.server is not None and not requests:
        reasons = "; ".join(recording.notes()) or "nothing was served"
        raise TraceError(f"{files[0]}: holds no request that can be replayed: {reasons}")
    requests = shifted(requests, recording.since_s or 0.0)
    return Reading([requests], TILE, Times.TRACE, (*recording.notes(), *remarks), recording.server)


def whole_records(file: Path, remarks: list[str]) -> Iterator[Record]:
    """The lines of a file but for a last one that broke off, which is remarked. Raises TraceError."""
    number, text = 0, b""
    try:
        with unpacked(file) as lines:
            for number, text in enumerate(lines, 1):
                if text.endswith(b"\n") and not text.isspace():
                    yield parsed(file, number, text)
    except EOFError:
        text = b"..."
    except OSError as error:
        raise TraceError(f"{file}: cannot be read: {error.strerror or error}") from error
    if text and not text.endswith(b"\n"):
        remarks.append(f"the last line of {file.name} broke off and was left out")


def shifted(requests: Sequence[TraceRequest], since_s: float) -> list[TraceRequest]:
    """The requests with times since the first start of a server."""
    return [
        replace(
            r,
            arrival_s=r.arrival_s - since_s,
            stay=r.stay and earlier(r.stay, since_s),
            turns=turned(r.turns, since_s),
        )
        for r in requests
    ]


def earlier(stay: Stay, since_s: float) -> Stay:
    choices = tuple(choice._replace(end_s=choice.end_s - since_s) for choice in stay.choices)
    again = tuple((index, gave - since_s, back - since_s) for index, gave, back in stay.again)
    stay = replace(stay, parts=sooner(stay.parts, since_s), again=again)
    return replace(stay, start_s=stay.start_s - since_s, prompted_s=stay.prompted_s - since_s, choices=choices)


def sooner(parts: Pieces, since_s: float) -> Pieces:
    return tuple((end, at_s - since_s) for end, at_s in parts)


def turned(turns: Sequence[Turn], since_s: float) -> tuple[Turn, ...]:
    return tuple(
        replace(t, at_s=t.at_s - since_s, end_s=t.end_s - since_s, parts=sooner(t.parts, since_s)) for t in turns
    )


def times_of(record: Record, name: str) -> list[float]:
    values = record.fields.get(name)
    if not isinstance(values, list) or not all(type(v) in (int, float) and is_time(v) for v in values):
        raise record.error(name, "a list of seconds")
    return [float(value) for value in values]


def parts_of(record: Record) -> list[tuple[int, float]]:
    """[end, seconds] each. Raises TraceError."""
    parts: list[tuple[int, float]] = []
    given = record.fields.get("parts", [])
    for part in given if isinstance(given, list) else [given]:
        match part:
            case [int(end), int() | float() as at_s] if 0 <= end < 1 << 31 and is_time(at_s):
                parts.append((end, float(at_s)))
            case _:
                raise record.fault(f"parts {brief(part)}: expected [end, seconds]")
    return parts


def gaps_of(record: Record, num_choices: int) -> list[tuple[int, float, float]]:
    """[choice, seconds, seconds] each. Raises TraceError."""
    gaps: list[tuple[int, float, float]] = []
    given = record.fields.get("again", [])
    for gap in given if isinstance(given, list) else [given]:
        match gap:
            case [int(index), int() | float() as gave, int() | float() as back] if (
                0 <= index < num_choices and is_time(gave) and is_time(back)
            ):
                gaps.append((index, float(gave), float(back)))
            case _:
                raise record.fault(f"again {brief(gap)}: expected [choice, seconds, seconds]")
    return gaps


def finish_of(record: Record, reason: str) -> Finish:
    """By the name that a server writes. Raises ConfigError for another."""
    known = {finish.value: finish for finish in Finish} | {"abort": Finish.GONE}
    if reason not in known:
        raise record.error("finish_reason", f"one of {', '.join(known)}")
    return known[reason]


def said(record: Record, name: str) -> str:
    return record.text(name) if record.has(name) else ""


def marks_of(record: Record, num_tokens: int) -> tuple[Mark, ...]:
    """[position, role, perhaps true, perhaps seconds] each. Raises TraceError."""
    marks = record.fields.get("marks")
    if not isinstance(marks, list):
        raise record.error("marks", "a list")
    return tuple(mark_of(record, mark, num_tokens) for mark in marks)


def mark_of(record: Record, mark: object, num_tokens: int) -> Mark:
    match mark:
        case [int(position), str(role), *rest] if 0 <= position <= num_tokens:
            seconds = [float(each) for each in rest if isinstance(each, int | float) and not isinstance(each, bool)]
            return Mark(position, role, any(each is True for each in rest), seconds[0] if seconds else None)
    raise record.fault(f"marks {brief(mark)}: expected [position up to {num_tokens}, role]")


def server_of(record: Record) -> RecordedServer:
    """Raises TraceError."""
    layers = tuple(layer_of(layer) for layer in record.records("layers"))
    stream = dtype_of(record, "stream") if record.has("stream") else None
    sizes = record.integer("hidden_size"), record.integer("vocab_size")
    totals = record.fields.get("totals")
    return RecordedServer(
        model=ModelShape(record.text("model"), layers, *sizes, dtype_of(record, "dtype"), stream),
        budget_bytes=whole_number(record, "budget_bytes"),
        policy=record.text("policy"),
        chunk_tokens=record.integer("chunk_tokens", least=TILE),
        spare_state=record.flag("spare_state"),
        tiers=tiers_of(record),
        totals={k: float(v) for k, v in totals.items() if type(v) in (int, float)} if isinstance(totals, dict) else {},
    )


def tiers_of(record: Record) -> tuple[str, ...]:
    kinds = {"host_bytes": "of host memory (--host-budget)", "disk_bytes": "of disk (--disk)"}
    sizes = {name: whole_number(record, name) for name in kinds if record.fields.get(name)}
    return tuple(f"{format_bytes(size)} {kinds[name]}" for name, size in sizes.items())


def whole_number(record: Record, name: str) -> int:
    value = record.fields.get(name)
    if type(value) is not int or not 0 < value < 1 << 62:
        raise record.error(name, "bytes")
    return value


def layer_of(layer: Record) -> KnownLayer:
    cost = PrefillCost(layer.time("flops"), layer.time("flops_per_position"))
    return KnownLayer(layer.text("kind"), cost, kept(layer))


def kept(layer: Record) -> AttentionSpec | StateSpec | None:
    match layer.fields:
        case {"kv": [int(heads), int(size), str(dtype)]} if 0 < heads < 1 << 20 and 0 < size < 1 << 20:
            return AttentionSpec(heads, size, as_dtype(layer, dtype))
        case {"state": [[int(rows), int(channels)], list(state), str(dtype), list(effect)]}:
            shape, way = sizes(layer, state), sizes(layer, effect)
            rows, channels = sizes(layer, [rows, channels])
            return StateSpec((rows, channels), shape, as_dtype(layer, dtype), way)
        case {"kv": _} | {"state": _}:
            raise layer.fault("kv or state: expected the sizes of what a layer keeps")
    return None


def sizes(layer: Record, values: list[object]) -> tuple[int, ...]:
    if not all(type(value) is int and 0 <= value < 1 << 31 for value in values):
        raise layer.fault(f"state {brief(values)}: expected sizes")
    return tuple(value for value in values if isinstance(value, int))


def dtype_of(record: Record, name: str) -> torch.dtype:
    return as_dtype(record, record.text(name))


def as_dtype(record: Record, name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise record.fault(f"dtype {brief(name)}: expected one such as bfloat16")
    return found
