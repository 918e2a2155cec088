"""A running request: what has been computed of it, and what is still to come."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import numpy as np

from hybrid_cache.cache.disk.loading import Load
from hybrid_cache.cache.keys import Keys, Mark, keys_of
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.misses import Found
from hybrid_cache.cache.policies.base import Wish
from hybrid_cache.cache.policies.signals import NOWHERE, Origin
from hybrid_cache.cache.tree import LayerInputs
from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.choreography.program import Program
from hybrid_cache.engine.senders import Offer
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.namespaces import fingerprint_in, namespace_beside, namespace_of
from hybrid_cache.request import CacheMode, FinishReason, Request, Stopper
from hybrid_cache.sampling import TokenChooser, TokenLogprob
from hybrid_cache.scheduling.base import Pause, Task
from hybrid_cache.spec import PrefillCost, total_cost
from hybrid_cache.tokens import Boundary, BoundaryKind, TokenArray
from hybrid_cache.work import InputRows, input_rows


def grid_floor(position: int) -> int:
    """The last grid position at or before `position`."""
    return position // TILE * TILE


@dataclass(frozen=True, slots=True)
class Source:
    """What another model has of a prompt, from which its entries are being made."""

    offer: Offer
    start: int  # tokens that the receiver had itself
    end: int  # tokens that it has then
    runs: tuple[LayerInputs, ...]  # held

    def inputs(self, start: int, end: int) -> tuple[InputRows, ...]:
        """Where what layers were given for tokens [start, end) lies, and more."""
        return tuple(input_rows(run) for run in self.runs if run.start < end and run.num_tokens > start)


@dataclass(frozen=True, slots=True, eq=False)
class Twin:
    """What is made of a prompt for another model in the passes that compute it; see `engine.twins`."""

    offer: Offer
    prefill: "Prefill"  # in its lane


@dataclass(eq=False)
class Prefill:
    """Tokens on their way through the canonical tiles; what comes of it may enter the cache.

    [0, computed)            in the lease's state and pages
    [computed, len(tokens))  still to compute, in chunks that start on the grid

    An arranged prompt has a program: some of its tokens are not computed but attached.
    """

    namespace: str
    tokens: TokenArray
    publish: bool
    reuse: bool
    boundaries: tuple[Boundary, ...] = ()
    only_marked: bool = False  # states at explicit boundaries and nowhere else
    generated: bool = False  # a canonical pass over a finished turn
    origin: Origin = NOWHERE
    of: str = ""  # of a canonical pass: the request whose answer it computes, if that is known
    proposed: bool = False  # the policy has seen it
    parts: list[tuple[int, float]] = field(default_factory=list)  # ends of its chunks since it has its lease, and when
    wishes: deque[Wish] = field(default_factory=deque)  # rising positions
    lease: Lease | None = None
    computed: int = 0
    arrangement: Arrangement | None = None
    program: Program | None = None
    refused: set[str] = field(default_factory=set)  # messages that could not be stored for it
    passed_over: int = 0  # steps in a row in which others were computed and this was not
    owner: str | None = ""  # as in `Request`
    asks: bool = False  # whether its client may ask what was found of it
    found: Found | None = None  # once it was admitted
    cached: int | None = None  # tokens that it started from when it was first admitted
    written: int = 0  # tokens whose pages it added to the tree before it was preempted
    max_loss: float | None = None  # as in `Request`
    lane: Offer | None = None  # from which its entries may be made; None: only exactly
    source: Source | None = None  # while its entries are made from another model's
    received: Source | None = None  # the latest that it had
    twins: list[Twin] = field(default_factory=list)
    loads: list[Load] = field(
        default_factory=list
    )  # of its beginning or messages from the disk, while it waits for them
    num_loaded: int = 0  # tokens that came from there
    asked_disk: bool = False  # since it began to wait
    in_place: bool = False  # of an arranged prompt, everything is computed: the device had no memory for more
    mark: Mark | None = None  # from where on another model computes it; a tile ends there
    _keys: dict[str, Keys] = field(default_factory=dict)

    @cached_property
    def keys(self) -> Keys:
        """Made when the cache is first asked for these tokens, and not again while they wait."""
        return keys_of(self.namespace, self.tokens, self.mark)

    def keys_in(self, namespace: str) -> Keys:
        """Keys of the same tokens in a namespace beside its own, made once."""
        if namespace not in self._keys:
            self._keys[namespace] = keys_of(namespace, self.tokens)
        return self._keys[namespace]

    @cached_property
    def text(self) -> Keys:
        """As the model of the namespace would read all of it: what comes next may be known by that."""
        return self.keys if self.mark is None else keys_of(self.namespace, self.tokens)

    @cached_property
    def model(self) -> str:
        """The fingerprint of the model that computes its end, and goes on from there."""
        return fingerprint_in(self.namespace if self.mark is None else self.mark.namespace)

    @property
    def before_mark(self) -> bool:
        return self.mark is not None and self.computed < self.mark.position

    @property
    def next_model(self) -> str:
        """The fingerprint of the model that computes what comes next."""
        return fingerprint_in(self.namespace) if self.before_mark else self.model

    def leaves_stem(self, position: int) -> bool:
        """Whether what was computed up to a position is to be kept for others, who go on otherwise."""
        return self.mark is not None and self.mark.position == position and self.publish and not self.only_marked

    def enter_lane(self, lane: Offer | None) -> None:
        """From now on its entries are looked for, and kept, in a lane, or among the model's own."""
        if lane is not self.lane:
            self.lane = lane
            self.namespace = namespace_beside(self.namespace, self.model, lane.lane if lane else "")
            self.__dict__.pop("keys", None)

    def follow(self, first: "Prefill") -> None:
        """It is of a further choice of a request, whose answer has named what was done for the first one."""
        self.enter_lane(first.lane)
        self.cached = first.cached

    @property
    def shift(self) -> int:
        """Index of a token in the sequence minus its position for the model."""
        return self.program.shift if self.program else 0

    @property
    def from_zero(self) -> bool:
        """Starts from zeroed states, without being the start of a text."""
        return self.program is not None and self.program.from_zero

    @property
    def until(self) -> int:
        """Where the next chunk ends at the latest."""
        if self.source is not None:
            return self.source.end
        if self.program is not None:
            return self.program.until()
        end = self.mark.position if self.mark is not None and self.before_mark else len(self.tokens)
        ahead = (twin.prefill.computed for twin in self.twins)
        return min((there for there in ahead if there > self.computed), default=end)

    @property
    def beside(self) -> PrefillCost:
        """Cost of what is made beside it."""
        return total_cost(twin.offer.cost for twin in self.twins)

    @property
    def wanted(self) -> int:
        """Tokens up to the last place that the cache is to keep."""
        if not self.only_marked:
            return len(self.tokens)
        return max((boundary.position for boundary in self.boundaries), default=0)

    @property
    def num_left(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.tokens) - self.computed

    @property
    def tiles_left(self) -> int:
        """Behind a mark, with the one that goes back to the grid."""
        if self.program is not None:
            return -(-self.num_left // TILE)
        return -(-len(self.tokens) // TILE) - self.computed // TILE

    @property
    def done(self) -> bool:
        return self.computed == len(self.tokens)

    def wish(self, wish: Wish) -> None:
        """Adds a wish, unless its position has one or has been passed."""
        if wish.position <= self.computed or any(w.position == wish.position for w in self.wishes):
            return
        self.wishes = deque(sorted([*self.wishes, wish], key=lambda w: w.position))


class Phase(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One of the `n` continuations of a request. The scheduler owns it.

    Decode feeds the token at `fed`, with those that have to follow it, and gets the logits of the one after them. A
    sequence that was preempted keeps its `generated` tokens and is fed them again, those together that were before, so
    that its state takes the same path and has the same bits.
    """

    request: Request
    index: int
    arrival: int  # order of submission, and of service
    prefill: Prefill
    chooser: TokenChooser
    stopper: Stopper | None = None  # made with the first token
    generated: list[int] = field(default_factory=list)
    submitted_s: float = 0.0
    started_s: float = 0.0  # first admission
    spells: list[tuple[float, float]] = field(default_factory=list)  # it held room and gave it back: from, until
    fed: int = 0  # tokens in the state while decoding: the prompt and the first of `generated`
    forced: tuple[int, ...] = ()  # tokens that have to follow `generated`, and are fed together with its last one
    leaps: dict[int, int] = field(default_factory=dict)  # index in `generated` -> tokens fed together from there
    phase: Phase = Phase.WAITING
    task: Task | None = None  # which it belongs to, once it is queued
    claim: Pause | None = None  # on what the cache has of it: while it waits, and on what its task returns to
    continues: str | None = None  # the id of its request, if that was paused and goes on
    reserves: bool = False  # the state at the end of its prompt is kept for that
    forked: bool = False  # the other choices of its request are there
    announced: bool = False  # PromptOutput has been sent
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def rank(self) -> tuple[int, int]:
        """Higher ranks make room for lower ones. No two are equal, or they would preempt each other for ever."""
        return self.arrival, self.index

    @property
    def num_tokens(self) -> int:
        return len(self.prefill.tokens) + len(self.generated)

    @property
    def replaying(self) -> bool:
        """True while the logits of the coming row are not needed: its next token is known."""
        return self.fed + self.stride < self.num_tokens + len(self.forced)

    @property
    def stride(self) -> int:
        """How many tokens are fed next."""
        return self.leaps.get(self.fed - len(self.prefill.tokens), 1)

    def next_tokens(self) -> tuple[int, ...]:
        """The tokens that are fed next."""
        first = self.fed - len(self.prefill.tokens)
        if self.stride == 1:
            return (self.generated[first],)
        return (*self.generated[first:], *self.forced)[: self.stride]

    def leap(self, forced: Iterable[int]) -> None:
        """Has tokens fed together with the last of `generated`, as they have to follow it."""
        self.forced = tuple(forced)
        if self.forced:
            self.leaps[len(self.generated) - 1] = 1 + len(self.forced)

    def unscored(self, start: int, end: int) -> tuple[slice, list[int]]:
        """Of computed rows [start, end) of the prompt, those whose next token is not scored yet, and these tokens."""
        if not self.prompt_logprobs:
            self.prompt_logprobs.append(None)  # nothing predicts the first token
        tokens = self.prefill.tokens[start + 1 : end + 1]
        new = slice(len(self.prompt_logprobs) - 1 - start, len(tokens))
        return new, tokens[new].tolist()

    def finish_reason(self, max_length: int) -> FinishReason | None:
        """Whether the last generated token ends the sequence. Raises what the request's stopper raises."""
        token, sampling = self.generated[-1], self.request.sampling
        if self.stopper is None and self.request.make_stopper is not None:
            self.stopper = self.request.make_stopper()
        stopped = self.stopper is not None and self.stopper(token)
        if (stopped or token in sampling.stop_token_ids) and len(self.generated) >= sampling.min_tokens:
            return stopped if isinstance(stopped, FinishReason) else FinishReason.STOP
        if self.chooser.constraint is not None and self.chooser.constraint.done:
            return FinishReason.STOP
        if len(self.generated) >= sampling.max_tokens or self.num_tokens >= max_length:
            return FinishReason.LENGTH
        return None

    def all_tokens(self) -> TokenArray:
        return np.concatenate([self.prefill.tokens, np.asarray(self.generated, dtype=np.int32)])


def new_prefill(
    request: Request, fingerprint: str, *, enabled: bool, arranged: bool = False, mark: Mark | None = None
) -> Prefill:
    """The prefill of a request under its cache mode; `enabled=False` switches the cache off for all.

    fingerprint: of the model that its namespace names   mark: from where on another one computes it
    """
    marked = tuple(b for b in request.prompt.boundaries if b.kind is BoundaryKind.EXPLICIT)
    scored = request.sampling.prompt_logprobs is not None  # which takes all of the prompt
    unmarked = request.cache_mode is CacheMode.EXPLICIT and not marked
    off = not enabled or scored or unmarked or request.cache_mode is CacheMode.OFF
    namespace = namespace_of(request.namespace, fingerprint)
    if arranged:
        return Prefill(namespace, request.prompt.tokens, False, not off, arrangement=request.arrangement)
    only_marked = request.cache_mode is CacheMode.EXPLICIT
    boundaries = marked if only_marked else request.prompt.boundaries
    if mark is not None and not only_marked:
        boundaries = tuple(sorted((*boundaries, Boundary(mark.position)), key=lambda b: b.position))
    on = not off
    return Prefill(
        namespace,
        request.prompt.tokens,
        on,
        on,
        boundaries,
        only_marked,
        owner=request.owner,
        origin=request.origin,
        max_loss=request.max_loss if on else None,
        mark=mark,
    )
