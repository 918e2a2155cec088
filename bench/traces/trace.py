"""Requests as a cache sees them: when they come, which pages of tokens they share, how much they generate.

A page is named by a number that stands for its tokens *and all tokens before it*: two requests share a prefix of k
pages exactly when their first k numbers are equal. Traces that name blocks this way need no tokens at all.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hybrid_cache.cache.policies.signals import Finish, Origin
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.shapes import ModelShape

PageIds = NDArray[np.int32]  # [full pages]
Tokens = NDArray[np.int32]


class TraceMessage(NamedTuple):
    """One message of a prompt; its tokens stand for the words and whatever a template puts around them."""

    role: str
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Mark:
    """A message ends at this token of the prompt."""

    position: int
    role: str  # system, user, assistant, tool; "" when the trace does not say
    explicit: bool = False  # the client asked for a checkpoint here
    ttl_s: float | None = None  # to be kept at least this long


class Choice(NamedTuple):
    """One of the answers to a prompt."""

    end_s: float
    num_tokens: int
    finish: Finish = Finish.UNKNOWN


Pieces = tuple[tuple[int, float], ...]  # ends of those that a prompt was computed in, in tokens, and when


@dataclass(frozen=True, slots=True)
class Stay:
    """What a server did with a request: when it held what of the cache, and what it found there."""

    start_s: float  # it was admitted
    prompted_s: float  # its prompt was computed
    choices: tuple[Choice, ...]
    cached_tokens: int
    complete: bool = True  # False: it was given up while its prompt was computed, and is cut off there
    run: int = 0  # which start of the server, each with an empty cache
    parts: Pieces = ()  # all but the last
    again: tuple[tuple[int, float, float], ...] = ()  # a choice held nothing from when until when, and began again
    meant: "TraceRequest | None" = None  # as it was sent, where it is not complete: it took room for all of that


@dataclass(frozen=True, slots=True)
class Turn:
    """Whole pages that a server computed when it was idle: what it expected the next prompt to begin with."""

    at_s: float  # it began
    end_s: float
    pages: PageIds
    marks: tuple[Mark, ...] = ()
    session: str = ""
    computed: int = 0  # tokens, before it gave its room
    parts: Pieces = ()  # all but the last


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One prompt and its answer.

    [0, num_prompt_tokens)                  sent by the client
    [num_prompt_tokens, num_known_tokens)   generated, if the trace knows what was generated; else nothing
    """

    arrival_s: float
    session: str  # "" when the trace does not say
    pages: PageIds  # one number for each full page of the known tokens
    num_prompt_tokens: int
    num_output_tokens: int
    num_known_tokens: int
    whole: int  # names the whole prompt, partial last page included: equal for exact repeats
    marks: tuple[Mark, ...] = ()  # rising positions, none beyond the prompt
    tokens: Tokens | None = None  # the prompt's tokens, if the trace has them
    finish: Finish = Finish.UNKNOWN
    agent: str = ""  # of several in one session, which sent it
    user: str = ""
    tools: bool | None = None
    template: str = ""
    only_marked: bool = False  # states at explicit marks and nowhere else
    stay: Stay | None = None  # in the server that recorded it
    turns: tuple[Turn, ...] = ()  # computed after it was admitted, and before the next one was

    @property
    def origin(self) -> Origin:
        """What a server's policy would be told beside the tokens."""
        session = f"{self.session}/{self.agent}" if self.agent else self.session
        return Origin(session, self.user, self.tools, self.template)

    @property
    def all_pages(self) -> PageIds:
        """Those that are there afterwards, some of them maybe twice."""
        return np.concatenate([self.pages, *(turn.pages for turn in self.turns)]) if self.turns else self.pages


def template_of(tokens: Tokens, marks: Sequence[Mark]) -> str:
    """Names the system message that a prompt begins with; empty if it does not begin with one."""
    if not marks or marks[0].role not in ("system", "developer"):
        return ""
    return blake2b(tokens[: marks[0].position].tobytes(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class RecordedServer:
    """Who recorded a trace."""

    model: ModelShape
    budget_bytes: int
    policy: str
    chunk_tokens: int  # of a prompt that are computed at a time
    spare_state: bool = False  # one stands aside for rows that pad a batch
    tiers: tuple[str, ...] = ()  # below its memory, in words
    totals: Mapping[str, float] = field(default_factory=dict)  # what it has counted since its start, if it says so


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival."""

    name: str
    page_tokens: int  # a multiple of TILE
    requests: tuple[TraceRequest, ...]
    note: str = ""  # what was assumed, e.g. a synthetic arrival process
    server: RecordedServer | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(r.num_prompt_tokens for r in self.requests)

    def coarsened(self, page_tokens: int) -> "Trace":
        """The same trace in larger pages, a multiple of its own: faster to replay, blind to what is smaller."""
        factor, rest = divmod(page_tokens, self.page_tokens)
        if factor < 1 or rest:
            raise ValueError(f"pages of {page_tokens} tokens are no multiple of the trace's {self.page_tokens}")

        def coarse(pages: PageIds) -> PageIds:
            return pages[factor - 1 :: factor].copy()

        def coarser(request: TraceRequest) -> TraceRequest:
            stay = request.stay
            if stay is not None and stay.meant is not None:
                stay = replace(stay, meant=coarser(replace(stay.meant, stay=None)))
            turns = tuple(replace(t, pages=coarse(t.pages)) for t in request.turns)
            return replace(request, pages=coarse(request.pages), turns=turns, stay=stay)

        requests = tuple(map(coarser, self.requests))
        return replace(self, page_tokens=page_tokens, requests=requests)


@dataclass(slots=True)
class PageNames:
    """Gives equal numbers to equal prefixes."""

    page_tokens: int = TILE
    _names: dict[Hashable, int] = field(default_factory=dict)

    def of(self, tokens: NDArray[np.int32]) -> tuple[PageIds, int]:
        """The numbers of all full pages of a token sequence, and that of the whole sequence."""
        data, step, parent, names = np.ascontiguousarray(tokens, np.int32).tobytes(), self.page_tokens * 4, -1, []
        for start in range(0, len(data) - step + 1, step):
            parent = self._name((parent, data[start : start + step]))
            names.append(parent)
        tail = data[len(names) * step :]
        return np.array(names, np.int32), self._name((parent, tail)) if tail else parent

    def of_blocks(self, blocks: Sequence[Hashable] | Iterable[Hashable]) -> PageIds:
        """The numbers of pages given by other names, which are unique only together with the pages before them."""
        parent, names = -1, []
        for block in blocks:
            parent = self._name((parent, block))
            names.append(parent)
        return np.array(names, np.int32)

    def _name(self, key: Hashable) -> int:
        return self._names.setdefault(key, len(self._names))
