"""Who gets a request: routers of a fleet, as a rule that knows what such a router could know.

A router sees the prompt, the session if there is one, which replicas are up, how busy each is, and what the replicas'
events said some time ago. A class of your own has a constructor `(num_replicas, seed)` and the methods of `Router`;
what it does not care to hear is inherited from `Deaf`.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar, Protocol

from hybrid_cache.cache.keys import Name
from hybrid_cache.cache.policies.foreign import described, imported
from hybrid_cache.errors import ConfigError

MOST_BUSY = 1.5  # times the mean of work of late, until it counts against a replica


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that is to be sent somewhere, and how things stand.

    names  of the prefixes that end with each full page of its prompt
    up     numbers of the replicas that take requests
    busy_s, lately_s, done_s [replicas]  seconds of work that wait; of late, older ones counting less; and in all
    """

    names: Sequence[Name]
    conversation: bytes  # names it: the session, or how its prompt begins
    up: Sequence[int]
    busy_s: Sequence[float]
    lately_s: Sequence[float]
    done_s: Sequence[float]
    seconds: Callable[[int], float]  # to compute the prompt where so many pages of it are there


class Router(Protocol):
    """Chooses one of `ask.up` for each request."""

    hears: ClassVar[bool]  # whether it wants to know what replicas have

    def choose(self, ask: Ask) -> int: ...
    def stored(self, replica: int, names: Iterable[Name]) -> None:
        """Prefixes that end with these pages can be gone on from, there or further down."""
        ...

    def removed(self, replica: int, names: Iterable[Name]) -> None: ...
    def cleared(self, replica: int) -> None:
        """It has nothing that it had."""
        ...


class Deaf:
    """Hears nothing."""

    hears: ClassVar[bool] = False

    def __init__(self, num_replicas: int, seed: int) -> None:
        pass

    def stored(self, replica: int, names: Iterable[Name]) -> None:
        pass

    def removed(self, replica: int, names: Iterable[Name]) -> None:
        pass

    def cleared(self, replica: int) -> None:
        pass


class Random(Deaf):
    """Any replica."""

    def __init__(self, num_replicas: int, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, ask: Ask) -> int:
        return self._random.choice(ask.up)


class RoundRobin(Deaf):
    """One after the other."""

    def __init__(self, num_replicas: int, seed: int) -> None:
        self._next = 0

    def choose(self, ask: Ask) -> int:
        self._next += 1
        return ask.up[self._next % len(ask.up)]


class LeastLoaded(Deaf):
    """Where least waits, and among these where least was computed."""

    def choose(self, ask: Ask) -> int:
        return min(ask.up, key=lambda i: (ask.busy_s[i], ask.done_s[i]))


class Affinity(Deaf):
    """A conversation stays where it is, by rendezvous hashing (Thaler and Ravishankar 1998): each replica draws a
    number for it, and the highest has it. When a replica goes, only its own conversations move, and come back with it.
    """

    def __init__(self, num_replicas: int, seed: int) -> None:
        self._salts = [f"{seed} {i}".encode()[:16] for i in range(num_replicas)]

    def choose(self, ask: Ask) -> int:
        key = ask.conversation

        def drawn(replica: int) -> bytes:
            return blake2b(key, digest_size=8, salt=self._salts[replica]).digest()

        return max(ask.up, key=drawn)


class Places:
    """Which replicas have which prefixes: a bit for each replica. A replica that has a prefix has those before it."""

    def __init__(self) -> None:
        self._bits: dict[Name, int] = {}

    def __len__(self) -> int:
        return len(self._bits)

    def add(self, replica: int, names: Iterable[Name]) -> None:
        bit, bits = 1 << replica, self._bits
        for name in names:
            bits[name] = bits.get(name, 0) | bit

    def remove(self, replica: int, names: Iterable[Name]) -> None:
        for name in names:
            self._take(name, 1 << replica)

    def clear(self, replica: int) -> None:
        bit = 1 << replica
        for name in [name for name, bits in self._bits.items() if bits & bit]:
            self._take(name, bit)

    def _take(self, name: Name, bit: int) -> None:
        left = self._bits.get(name, 0) & ~bit
        if left:
            self._bits[name] = left
        else:
            self._bits.pop(name, None)

    def depths(self, names: Sequence[Name]) -> list[tuple[int, int]]:
        """(pages, bits of those replicas that have so many and no more), the deepest first; none with no pages."""
        found, low = list[tuple[int, int]](), 0
        while (have := self._at(names, low + 1)) and low < len(names):
            start, end = low + 1, len(names)  # the last place where all of these are still there
            while start < end:
                middle = (start + end + 1) // 2
                start, end = (middle, end) if self._at(names, middle) == have else (start, middle - 1)
            found.append((start, have & ~self._at(names, start + 1)))
            low = start
        return found[::-1]

    def _at(self, names: Sequence[Name], num_pages: int) -> int:
        return self._bits.get(names[num_pages - 1], 0) if num_pages <= len(names) else 0


class Nearest(Deaf):
    """Where the prompt is computed soonest: what waits, and what is missing of it, by what is believed to be there.

    So a request waits for a prefix no longer than it would take to compute it elsewhere. And what a replica has
    computed of late beyond `MOST_BUSY` times the mean counts as if it still waited there: conversations that begin
    alike do not all go to one. Where all is equal, it is the replica that has computed least.
    """

    def __init__(self, num_replicas: int, seed: int) -> None:
        self.places = Places()

    def choose(self, ask: Ask) -> int:
        mean = sum(ask.lately_s[i] for i in ask.up) / len(ask.up)
        whole, deepest = ask.seconds(0), self.places.depths(ask.names)
        missing = dict.fromkeys(ask.up, whole)
        for num_pages, bits in deepest:
            seconds = ask.seconds(num_pages)
            missing.update((i, seconds) for i in ask.up if bits >> i & 1)

        def expected(i: int) -> tuple[float, float]:
            return ask.busy_s[i] + missing[i] + max(ask.lately_s[i] - MOST_BUSY * mean, 0.0), ask.done_s[i]

        return min(ask.up, key=expected)

    def cleared(self, replica: int) -> None:
        self.places.clear(replica)


class Prefix(Nearest):
    """`Nearest` that believes all it has sent somewhere to be there: what a router for attention alone knows without
    events. It is not told what was evicted, nor where no state lies.
    """

    def choose(self, ask: Ask) -> int:
        chosen = Nearest.choose(self, ask)
        self.places.add(chosen, ask.names)
        return chosen


class UsablePrefix(Nearest):
    """`Nearest` by what the events of the servers say: pages down to the deepest state that is there."""

    hears = True

    def stored(self, replica: int, names: Iterable[Name]) -> None:
        self.places.add(replica, names)

    def removed(self, replica: int, names: Iterable[Name]) -> None:
        self.places.remove(replica, names)


ROUTERS: dict[str, Callable[[int, int], Router]] = {
    "random": Random,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "affinity": Affinity,
    "prefix": Prefix,
    "usable-prefix": UsablePrefix,
}


def router_class(name: str) -> Callable[[int, int], Router]:
    """By name, or `package.module:Class`. Raises ConfigError."""
    if name in ROUTERS:
        return ROUTERS[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigError(f"unknown router {name!r}, must be one of {', '.join(ROUTERS)}, or package.module:Class")
    found = getattr(imported(name, module, "router"), attribute, None)
    methods = ("choose", "stored", "removed", "cleared")
    if not isinstance(found, type) or not all(callable(getattr(found, each, None)) for each in methods):
        raise ConfigError(f"router {name!r}: module {module} has no class {attribute!r} with {', '.join(methods)}")
    if not isinstance(getattr(found, "hears", None), bool):
        raise ConfigError(f"router {name!r}: {attribute} does not say whether it hears events (hears = True or False)")
    return found


def make_router(name: str, num_replicas: int, seed: int) -> Router:
    """Raises ConfigError."""
    try:
        return router_class(name)(num_replicas, seed)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"router {name!r}: its constructor raised {described(error)}") from error
