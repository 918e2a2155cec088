"""Double writing: while a prompt is computed, what models that are expected to read it need of it is made beside it.

What a transfer reads is at hand while the sender's layers run, so nothing of it has to be kept in the cache; and the
receiver finds its prefix in its lane, as if it had been there before. A prompt's *twins* go as far as it does in each
step, each with a lease of its own, and are given up with it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.claims import Spare
from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.lease import Lease
from hybrid_cache.engine.senders import Offer, Senders
from hybrid_cache.engine.sequence import Prefill, Twin, grid_floor
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.namespaces import fingerprint_in, lane_in, namespace_beside
from hybrid_cache.spec import PrefillCost
from hybrid_cache.tokens import TokenArray
from hybrid_cache.work import Rows

NEWEST = 1 / 32  # weight of a prompt among those that expectations are made of
EXPECTED = 1 / 2  # part of a sender's tokens from which on their reader is expected
MOST_COST = 1 / 3  # of a prefill: what costs more is made when it is asked for
MOST_HELD = 1 / 2  # part of the budget that running prompts may hold with their twins
MOST_UNREAD = 1 << 16  # pages that twins wrote, and nobody has read, which are remembered


@dataclass(slots=True)
class Readers:
    """How much of what a model computes another one reads. By lane: tokens, of which earlier prompts count less."""

    _computed: dict[str, float] = field(default_factory=dict)
    _read: dict[str, float] = field(default_factory=dict)
    _unread: dict[Name, str] = field(default_factory=dict)  # pages that twins wrote -> their lane

    def computed(self, lane: str, num_tokens: int) -> None:
        """A prompt that the sender begins to compute."""
        self._computed[lane] = self._computed.get(lane, 0.0) * (1 - NEWEST) + num_tokens
        self._read[lane] = self._read.get(lane, 0.0) * (1 - NEWEST)

    def read(self, lane: str, num_tokens: int) -> None:
        """The receiver has used tokens that it had not used before."""
        if lane in self._read:
            self._read[lane] += num_tokens

    def expects(self, lane: str) -> bool:
        """Whether most of what the sender computes next will be read."""
        computed = self._computed.get(lane, 0.0)
        return computed > 0 and self._read[lane] >= EXPECTED * computed

    def wrote(self, lane: str, pages: Iterable[Name]) -> None:
        """A twin has made pages of a lane."""
        self._unread.update((page, lane) for page in pages)
        while len(self._unread) > MOST_UNREAD:
            del self._unread[next(iter(self._unread))]

    def found(self, pages: Iterable[Name]) -> None:
        """The receiver has found pages of a lane."""
        for page in pages:
            lane = self._unread.pop(page, None)
            if lane is not None:
                self.read(lane, TILE)

    def forget(self) -> None:
        """Nothing is expected any more."""
        self._computed.clear()
        self._read.clear()
        self._unread.clear()


class Twins:
    """Begins and ends them, and says what the pass that computes a prompt does for them."""

    def __init__(self, cache: Books, cost: PrefillCost, senders: Senders, *, on: bool) -> None:
        """on: whether there are any"""
        self._cache = cache
        self._cost = cost
        self._senders = senders
        self._on = on
        self._owners: list[Prefill] = []  # prompts with twins
        self.readers = Readers()
        self.num_tokens = 0  # that twins have written

    def begin(self, prefill: Prefill, spare: Spare | None, *, again: bool) -> None:
        """To be called when a prompt has a lease. again: it had one before"""
        if not self._on or not _is_sender(prefill):
            return
        for offer in self._senders.read_from(fingerprint_in(prefill.namespace)):
            if self.readers.expects(offer.lane) and offer.cost.per_token <= MOST_COST * self._cost.per_token:
                self._begin(prefill, offer, spare)
            if not again:
                self.readers.computed(offer.lane, prefill.num_left)
        if prefill.twins:
            self._owners.append(prefill)

    def _begin(self, prefill: Prefill, offer: Offer, spare: Spare | None) -> None:
        tokens = prefill.tokens[: grid_floor(prefill.wanted)]
        namespace, marks = namespace_beside(prefill.namespace, offer.receiver, offer.lane), prefill.boundaries
        twin = Prefill(namespace, tokens, True, True, marks, prefill.only_marked)
        match = self._cache.match(twin.namespace, twin.keys.beginning(len(tokens)))
        page, state = self._cache.context_bytes
        held = self._cache.fixed_bytes + page * (len(tokens) - match.shared) + state
        if not prefill.computed <= match.length < len(tokens) or held > MOST_HELD * self._cache.budget_bytes:
            return
        lease = self._cache.acquire(match, twin.keys, spare=spare)
        if lease is None:
            return
        if lease.length < prefill.computed:  # what was matched had to make room
            self._cache.release(lease)
            return
        twin.lease, twin.computed = lease, lease.length
        self._cache.propose(lease, prefill.boundaries, only_marked=prefill.only_marked, origin=prefill.origin)
        prefill.twins.append(Twin(offer, twin))

    def rows(self, prefill: Prefill, rows: Rows) -> Iterator[tuple[Twin, Rows]]:
        """What a pass with rows of a prompt computes for its twins. States are kept where the prompt's are."""
        assert prefill.lease is not None
        kinds = {r.position: (r.kind, r.ttl_s) for r in prefill.lease.reserved}
        for twin in prefill.twins:
            tokens, lease = twin.prefill.tokens, twin.prefill.lease
            start, end = rows.start, min(rows.end, len(twin.prefill.tokens))
            if twin.prefill.computed != start or end <= start or lease is None:
                continue
            for position, _ in rows.captures:
                if position <= end and position in kinds:
                    kind, ttl_s = kinds[position]
                    self._cache.reserve_checkpoint(lease, position, kind, ttl_s=ttl_s)
            yield twin, _rows(twin, tokens[start:end], start, lease)

    def wrote(self, prefill: Prefill, rows: Rows, twin: Twin, made: Rows) -> None:
        """To be called when a pass with rows of a prompt has made those of a twin, before the prompt publishes them."""
        lease, slots = twin.prefill.lease, dict(rows.captures)
        assert prefill.lease is not None
        assert lease is not None
        copies = [(slots[position], slot) for position, slot in made.captures]
        self._cache.copy_beside(prefill.lease, lease, made.start, made.end, copies, twin.offer.entries)
        self._cache.publish(lease, made.end)
        twin.prefill.computed = made.end
        self.num_tokens += made.end - made.start
        names = twin.prefill.keys.names
        self.readers.wrote(twin.offer.lane, names[made.start // TILE + 1 : made.end // TILE + 1])

    def end(self, prefill: Prefill) -> None:
        """Gives back what the twins of a prompt hold; what they have published stays."""
        for twin in prefill.twins:
            if twin.prefill.lease is not None:
                self._cache.release(twin.prefill.lease)
                twin.prefill.lease = None
        if prefill.twins:
            self._owners.remove(prefill)
        prefill.twins.clear()

    def give_room(self) -> bool:
        """Gives up the twins of the newest prompt that has some -> whether there was one. Not while a pass is under way
        that writes them.
        """
        if not self._owners:
            return False
        self.end(self._owners[-1])
        return True

    def forget(self) -> None:
        """Gives up all of them, and expects nobody for now: models come and go, or a pass has failed."""
        while self.give_room():
            pass
        self.readers.forget()


def _is_sender(prefill: Prefill) -> bool:
    """Whether what a prompt computes is, from its start, what its model would compute of it alone."""
    own = prefill.publish and prefill.reuse and not lane_in(prefill.namespace)
    return own and prefill.arrangement is None and prefill.mark is None and prefill.source is None


def _rows(twin: Twin, tokens: TokenArray, start: int, lease: Lease) -> Rows:
    end = start + len(tokens)
    return Rows(
        model=twin.offer.receiver,
        tokens=tokens,
        start=start,
        shift=0,
        slot=lease.slot,
        pages=tuple(lease.pages),
        kv_rows=lease.rows_to_fill(start, end),
        fresh=start == 0,
        captures=tuple(sorted((r.position, r.slot) for r in lease.reserved if start < r.position <= end)),
        transfer=twin.offer.transfer,
    )
