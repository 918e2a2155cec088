"""What a recorder takes from the engine's thread, and the lines that become of it on another."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from hybrid_cache.api.server.recording.lines import Line, PageWriter, Secret, marks_of
from hybrid_cache.cache.keys import Name
from hybrid_cache.engine.sequence import Phase, Prefill, Sequence
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.namespaces import salt_in
from hybrid_cache.request import CacheMode, FinishReason, Request
from hybrid_cache.tokens import Boundary

DIGITS = 6  # of seconds
MOST_PARTS = 4096


@dataclass(frozen=True, slots=True)
class Choice:
    index: int
    num_tokens: int
    finish: FinishReason | None
    ended_s: float
    again: tuple[tuple[float, float], ...] = ()  # it had no room from when until when, and began again

    @classmethod
    def of(cls, sequence: Sequence, finish: FinishReason | None, prompted_s: float | None, ended_s: float) -> "Choice":
        """sequence: which has just ended, and still has its lease if it had one"""
        again = () if prompted_s is None else _gaps(sequence, prompted_s, ended_s)
        return cls(sequence.index, len(sequence.generated), finish, ended_s, again)


def _gaps(sequence: Sequence, prompted_s: float, ended_s: float) -> tuple[tuple[float, float], ...]:
    """When a choice of a prompt that had been computed held nothing: others needed its room, or there was none."""
    lease = sequence.prefill.lease
    spells = [*sequence.spells, (ended_s if lease is None else lease.since_s, ended_s)]
    held = [(max(since, prompted_s), until) for since, until in spells if until > prompted_s]
    edges = [prompted_s, *(s for spell in held for s in spell)][:-1]
    return tuple((gave, back) for gave, back in zip(edges[::2], edges[1::2], strict=True) if back > gave)


@dataclass(slots=True)
class Served:
    """A request whose prompt was computed, or which ended before."""

    number: int
    request: Request
    namespace: str
    names: list[Name] | None  # of the beginnings of its prompt, from none on; None where nothing is kept of it, or not
    # of its tokens in their order
    whole: Name  # of all of the prompt
    boundaries: tuple[Boundary, ...]
    arrived_s: float
    started_s: float | None  # None: it has never run
    prompted_s: float | None  # its prompt was computed; None: never
    computed: int  # tokens of its prompt that were computed, or cached
    cached: int
    received: int  # tokens taken from another model's entries
    only_marked: bool
    parts: list[tuple[int, float]]  # ends of the chunks of its prompt, and when
    choices: list[Choice] = field(default_factory=list)

    @classmethod
    def of(cls, number: int, sequence: Sequence, prompted_s: float | None) -> "Served":
        """sequence: the first of its choices, with the lease that its prompt was computed with"""
        request, prefill = sequence.request, sequence.prefill
        lease, began = prefill.lease, prefill.lease is not None
        keeps = began and prefill.publish and prefill.reuse and prefill.arrangement is None
        source = prefill.received
        return cls(
            number=number,
            request=request,
            namespace=prefill.namespace,
            names=[*prefill.keys.names] if keeps else None,
            whole=prefill.keys.end_name if keeps else b"",
            boundaries=prefill.boundaries,
            arrived_s=sequence.submitted_s,
            started_s=None if lease is None else lease.since_s,
            prompted_s=prompted_s,
            computed=prefill.computed if sequence.phase is Phase.PREFILL else len(prefill.tokens) if began else 0,
            cached=prefill.cached or 0,
            received=0 if source is None else source.end - source.start,
            only_marked=prefill.only_marked,
            parts=prefill.parts[:MOST_PARTS],
        )

    @property
    def weight(self) -> int:
        """Of what it holds in memory, about: pages."""
        return 1 if self.names is None else len(self.names)

    def line(self, pages: PageWriter, since_s: float, model: str) -> Line:
        """since_s: when the server started   model: the name that clients know the first model by"""
        secret, request, choices = pages.secret, self.request, sorted(self.choices, key=lambda c: c.index)
        line: Line = {
            "request": self.number,
            "arrived": round(self.arrived_s - since_s, DIGITS),
            "started": _since(self.started_s, since_s),
            "prompted": _since(self.prompted_s, since_s),
            "ended": [round(c.ended_s - since_s, DIGITS) for c in choices],
            "tokens": len(request.prompt.tokens),
            "cached": self.cached,
            "output_tokens": [c.num_tokens for c in choices],
            "finish_reason": [c.finish.value if c.finish else "abort" for c in choices],
            "model": request.model or model,
            **said_of(request, secret),
        }
        if self.computed < len(request.prompt.tokens):
            line["computed"] = self.computed
        if self.received:
            line["received"] = self.received
        if self.names is None:
            return {**line, "left_out": self._why_left_out()}
        pauses = [[c.index, *map(partial(_since, since_s=since_s), gap)] for c in choices for gap in c.again]
        again = {"again": pauses} if pauses else {}
        marked = {"only_marked": True} if self.only_marked else {}
        named = {**pages.fields(self.names[1:]), "whole": secret.name(b"whole", self.whole)}
        parts = parts_of(self.parts, len(request.prompt.tokens), since_s)
        return {**line, **named, "marks": marks_of(self.boundaries), **marked, **parts, **again}

    def _why_left_out(self) -> str:
        if self.started_s is None:
            return "not begun"
        return "arranged" if self.request.arrangement is not None else "cache off"


def parts_of(parts: Iterable[tuple[int, float]], num_tokens: int, since_s: float) -> Line:
    """All but the one that ends with what they are parts of."""
    cuts = [[end, _since(at_s, since_s)] for end, at_s in parts if end < num_tokens]
    return {"parts": cuts} if cuts else {}


def _since(seconds: float | None, since_s: float) -> float | None:
    return None if seconds is None else round(seconds - since_s, DIGITS)


def said_of(request: Request, secret: Secret) -> Line:
    """What a request says of itself, by name; what it does not say is not there."""
    names: Line = {
        "session": secret.of_text(b"session", _within(request, request.session)),
        "user": secret.of_text(b"user", _within(request, request.user)),
        "tenant": secret.of_text(b"tenant", request.tenant),
        "tools": bool(request.tools),
        "template": secret.of_text(b"template", request.template),
        "cache_mode": "" if request.cache_mode is CacheMode.IMPLICIT else request.cache_mode.value,
    }
    return {name: value for name, value in names.items() if value}


def _within(request: Request, text: str) -> str:
    """Two tenants may say the same, and mean two things."""
    return f"{request.namespace}\0{text}" if text else ""


@dataclass(frozen=True, slots=True)
class Pass:
    """A canonical pass that has ended, maybe before it was complete."""

    namespace: str
    names: list[Name]  # as in `Served`
    boundaries: tuple[Boundary, ...]
    session: str
    computed: int  # tokens; all of them also where they were there already
    began_s: float
    ended_s: float
    parts: tuple[tuple[int, float], ...] = ()  # as in `Served`

    @classmethod
    def of(cls, turn: Prefill, ended_s: float) -> "Pass":
        lease = turn.lease
        done = (len(turn.tokens), ended_s) if lease is None else (turn.computed, lease.since_s)
        parts = () if lease is None else tuple(turn.parts[:MOST_PARTS])
        return cls(turn.namespace, [*turn.keys.names], turn.boundaries, turn.origin.session, *done, ended_s, parts)

    @property
    def weight(self) -> int:
        return len(self.names)

    def line(self, pages: PageWriter, since_s: float) -> Line:
        session = f"{salt_in(self.namespace)}\0{self.session}" if self.session else ""
        named = {"session": pages.secret.of_text(b"session", session)} if session else {}
        num_tokens = (len(self.names) - 1) * TILE
        line: Line = {"turn": _since(self.began_s, since_s), "ended": _since(self.ended_s, since_s)}
        line |= {"tokens": num_tokens} | ({"computed": self.computed} if self.computed < num_tokens else {})
        parts = parts_of(self.parts, num_tokens, since_s)
        return {**line, **pages.fields(self.names[1:]), "marks": marks_of(self.boundaries), **named, **parts}


@dataclass(frozen=True, slots=True)
class Called:
    """The answer to a request called a tool."""

    number: int
    namespace: str
    tool: str
    seconds: float | None  # that it takes, if the client says so
    at_s: float
    weight: int = 1

    def line(self, secret: Secret, since_s: float) -> Line:
        line: Line = {"called": self.number, "at": round(self.at_s - since_s, DIGITS)}
        line["tool"] = secret.of_text(b"tool", self.tool)
        return line if self.seconds is None else {**line, "takes": self.seconds}


Happening = Served | Pass | Called
