"""What a router knows of its replicas, and which of them a request should go to. Holds integers only.

    held    keys of requests with the tokens that a replica could resume under each, as it says
    owed    tokens of prompts that it has still to read, for those that came before
    placed  tokens of new conversations that were sent to it, of the latest ones

A request goes to the replica that

    it asks for, or that has what it names (a stored response, a message, an adapter)
    can resume most of its conversation, unless what that one still has to read for others is more than it saves
    else answered the conversation's turn before
    else, where it begins a conversation: by its session, else by its instructions and tools, else the less loaded of
    two, each as long as the replica has not got more than its part

The last line is consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2018) for sessions, and the
power of two choices (Mitzenmacher 2001) for the rest. What all conversations begin with would otherwise lead all of
them to the one replica that saw it first.

Replicas say what they hold once a second. What was sent to one of them counts as held there until it must have said so.
"""

import random
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NotRequired, TypedDict

from hybrid_cache.api.ray.call import Call
from hybrid_cache.api.ray.holdings import Digest, entries_of

MARK_CHARACTERS = 12
PART = 1.05  # of what the replicas have on average, that one may have more of than others before it gets no new ones
MEMORY = 64  # replicas' worth of placements that are remembered, in requests of each
LINGER_S = 3.0  # after the end of a request, until its replica must have said what it holds of it
MOST_EXPECTED = 4096  # keys that one replica is expected to hold
MOST_NAMES = 1 << 16  # things that one replica has, and which one
STAY = 2  # tokens of waiting that a token is worth which is not computed twice: those behind it would wait, too
TOKENS_PER_UNIT = 0.25  # of a chain's sizes, until replicas have shown more
NEWS = 1 / 16  # part that each look at a replica's holdings has in it


class Stats(TypedDict):
    """What a replica publishes."""

    digest: Digest
    owed: NotRequired[int]  # tokens
    rate: NotRequired[float]  # tokens of prompts a second that it can read


@dataclass(slots=True)
class Replica:
    """What is known of one."""

    mark: str
    digest: Digest = b""
    held: Mapping[int, int] = field(default_factory=dict)  # tokens by key
    expected: OrderedDict[int, tuple[int, float]] = field(default_factory=OrderedDict)  # tokens, and until when
    said_owed: int = 0
    said_s: float = 0.0  # when
    rate: float = 0.0  # tokens a second; 0 while nobody knows
    placed: float = 0.0

    def depth(self, call: Call, now: float) -> tuple[int, int]:
        """Tokens of a request that it can resume, known or expected, and how many of its keys these are under."""
        chain = call.chain
        for place in range(len(chain.keys) - 1, -1, -1):
            key = chain.keys[place]
            tokens, until = self.expected.get(key, (0, 0.0))
            tokens = max(self.held.get(key, 0), tokens if until > now else 0)
            if tokens:
                return tokens, place + 1
        return 0, 0


@dataclass(slots=True)
class Flight:
    """A request that has been sent to a replica."""

    mark: str
    work: int  # tokens that it has to read of it
    answered: bool = False  # and has


@dataclass(frozen=True, slots=True)
class Offer:
    """What a replica would be for a request."""

    replica: Replica
    tokens: int  # that it can resume
    keys: int
    owed: int  # tokens that it reads before

    @property
    def wait(self) -> int:
        """Tokens to be read until the answer begins, less those that any replica has to read."""
        return self.owed - self.tokens


class Fleet:
    """See the module docstring. May be used on several threads."""

    def __init__(self, seed: int | None = None) -> None:
        self._replicas: dict[str, Replica] = {}
        self._flights: dict[int, Flight] = {}
        self._density = TOKENS_PER_UNIT  # of chains
        self._places: OrderedDict[str, str] = OrderedDict()  # names, and the replica that has them
        self._latest: OrderedDict[int, str] = OrderedDict()  # last keys of requests, and the replica that got them
        self._random = random.Random(seed)
        self._lock = threading.RLock()

    @property
    def marks(self) -> list[str]:
        """Of the replicas that there are, in an order that stays."""
        with self._lock:
            return sorted(self._replicas)

    def hear(self, said: Mapping[str, Mapping[str, object]], now: float) -> None:
        """What each of the replicas that there are has published, by its mark; nothing yet of one that is new."""
        with self._lock:
            for gone in self._replicas.keys() - said.keys():
                del self._replicas[gone]
            for mark, stats in said.items():
                self._hear(self._replicas.setdefault(mark, Replica(mark)), stats, now)

    def _hear(self, replica: Replica, stats: Mapping[str, object], now: float) -> None:
        digest, owed, rate = stats.get("digest", b""), stats.get("owed", 0), stats.get("rate", 0.0)
        if isinstance(digest, bytes) and digest != replica.digest:
            replica.digest, replica.held = digest, entries_of(digest)
        if isinstance(owed, int) and owed != replica.said_owed:
            replica.said_owed, replica.said_s = owed, now
        if isinstance(rate, float):
            replica.rate = rate

    def rank(self, call: Call, now: float) -> list[str]:
        """Marks of the replicas that may answer a request, the best one first, as which it counts from now on."""
        with self._lock:
            offers = [self._offer(each, call, now) for mark, each in self._replicas.items() if mark not in call.tried]
            if not offers:
                return self.marks
            fixed = self._fixed(call, offers)
            best = fixed or self._best(call, offers)
            self._send(call, best, now)
            if fixed:
                return [best.replica.mark]
            others = sorted((each for each in offers if each is not best), key=lambda each: each.wait)
            return [best.replica.mark, *(each.replica.mark for each in others)]

    def place(self, names: Iterable[str], mark: str) -> None:
        """A replica has these, and the others do not."""
        with self._lock:
            for name in names:
                self._places[name] = mark
                self._places.move_to_end(name)
            while len(self._places) > MOST_NAMES:
                self._places.popitem(last=False)

    def sent_to(self, call: Call) -> str | None:
        with self._lock:
            flight = self._flights.get(call.id)
            return None if flight is None else flight.mark

    def answers(self, call: Call) -> None:
        """The first of its answer has come: its prompt has been read."""
        with self._lock:
            if (flight := self._flights.get(call.id)) is not None:
                flight.answered = True

    def ended(self, call: Call, now: float) -> None:
        with self._lock:
            flight = self._flights.pop(call.id, None)
            replica = self._replicas.get(flight.mark) if flight is not None else None
            if replica is not None:
                self._expect(replica, call, now + LINGER_S)

    def failed(self, call: Call) -> None:
        """Its replica has gone, and it with that."""
        with self._lock:
            flight = self._flights.pop(call.id, None)
            if flight is not None:
                call.tried.add(flight.mark)
                self._replicas.pop(flight.mark, None)

    def _offer(self, replica: Replica, call: Call, now: float) -> Offer:
        tokens, keys = replica.depth(call, now)
        if keys and (held := replica.held.get(call.chain.keys[keys - 1], 0)):
            self._density += NEWS * (held / max(call.chain.sizes[keys - 1], 1) - self._density)
        return Offer(replica, tokens, keys, self._owed(replica, call, now))

    def _owed(self, replica: Replica, call: Call, now: float) -> int:
        """What we have sent, or what it has said less what it has read since: others send it requests, too."""
        ours = sum(
            flight.work
            for number, flight in self._flights.items()
            if flight.mark == replica.mark and not flight.answered and number != call.id
        )
        said = replica.said_owed - replica.rate * (now - replica.said_s)
        return max(ours, int(said))

    def _fixed(self, call: Call, offers: Sequence[Offer]) -> Offer | None:
        """The one that it is for, or that alone has what it names."""
        by_mark = {each.replica.mark: each for each in offers}
        wanted = (call.to, *(self._places.get(name) for name in call.names))
        return next((by_mark[mark] for mark in wanted if mark is not None and mark in by_mark), None)

    def _best(self, call: Call, offers: Sequence[Offer]) -> Offer:
        """Of at least one."""
        most = max(each.tokens for each in offers)
        deepest = self._less_loaded(call, [each for each in offers if each.tokens == most])
        if deepest.keys > call.chain.own:
            quickest = min(offers, key=lambda each: each.wait)
            saved = deepest.tokens - quickest.tokens
            return deepest if deepest.owed - quickest.owed <= STAY * saved else quickest
        before = next((each for each in offers if each.replica.mark == self._before(call)), None)
        if before is not None and before.owed <= self._of_two(call, offers).owed + self._size(call):
            return before
        return self._for_a_new_one(call, offers, deepest)

    def _before(self, call: Call) -> str | None:
        """The replica that answered the conversation's turn before, even if nothing of it is left there: what is
        learned of its returns is, and moving it would only unbalance the others.
        """
        own = reversed(call.chain.keys[call.chain.own :])
        return next((self._latest[key] for key in own if key in self._latest), None)

    def _for_a_new_one(self, call: Call, offers: Sequence[Offer], deepest: Offer) -> Offer:
        if call.session:
            first = max(offers, key=lambda each: _weight(call.session, each.replica.mark))
        elif deepest.tokens:
            first = deepest
        else:
            return self._of_two(call, offers)
        bound = PART * sum(each.replica.placed for each in offers) / len(offers)
        other = self._of_two(call, offers)
        return first if first.replica.placed <= bound and first.wait <= other.wait + self._size(call) else other

    def _of_two(self, call: Call, offers: Sequence[Offer]) -> Offer:
        return self._less_loaded(call, self._random.sample(offers, min(2, len(offers))))

    def _less_loaded(self, call: Call, offers: Sequence[Offer]) -> Offer:
        """By what they owe, counted in requests of this size, then by what they were given: who answers a little later
        now, but has the room, answers sooner for many turns to come. By chance where all is equal.
        """
        size = self._size(call)
        return min(offers, key=lambda each: (each.owed // size, each.replica.placed, self._random.random()))

    def _send(self, call: Call, offer: Offer, now: float) -> None:
        replica, size = offer.replica, self._size(call)
        before = self._flights.get(call.id)
        if before is not None and before.mark == replica.mark:
            return
        if before is not None and before.mark in self._replicas:
            self._expect(self._replicas[before.mark], call, now)
        call.unread = self._unread(call, offer)
        self._flights[call.id] = Flight(replica.mark, call.unread)
        self._expect(replica, call, float("inf"))
        is_new = offer.keys <= call.chain.own and self._before(call) is None
        if call.chain.keys:
            self._latest[call.chain.keys[-1]] = replica.mark
            self._latest.move_to_end(call.chain.keys[-1])
            while len(self._latest) > MOST_NAMES:
                self._latest.popitem(last=False)
        if is_new:
            for each in self._replicas.values():
                each.placed *= 1 - 1 / (MEMORY * len(self._replicas))
            replica.placed += size

    def _size(self, call: Call) -> int:
        """Tokens of a request, at a guess."""
        return max(int(call.chain.size * self._density), 1)

    def _unread(self, call: Call, offer: Offer) -> int:
        """Tokens of a request that a replica cannot resume, at a guess."""
        before = call.chain.sizes[offer.keys - 1] if offer.keys else 0
        return max(int((call.chain.size - before) * self._density), 1)

    def _expect(self, replica: Replica, call: Call, until: float) -> None:
        """It will hold what it was sent. How much that is, is a guess: enough for it to be the deepest."""
        for key, size in zip(call.chain.keys, call.chain.sizes, strict=True):
            replica.expected[key] = max(int(size * self._density), 1), until
            replica.expected.move_to_end(key)
        while len(replica.expected) > MOST_EXPECTED:
            replica.expected.popitem(last=False)


def mark_of(replica: str) -> str:
    """Names a replica by what Ray calls it."""
    return blake2b(replica.encode(), digest_size=MARK_CHARACTERS // 2).hexdigest()


def marks_of(replicas: Collection[str]) -> dict[str, str]:
    """What Ray calls them, by their marks."""
    return {mark_of(replica): replica for replica in replicas}


def _weight(session: str, mark: str) -> bytes:
    """Rendezvous hashing: the same one in every router, and few sessions move when a replica comes or goes."""
    return blake2b(f"{session}\0{mark}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
