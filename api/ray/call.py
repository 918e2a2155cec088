"""One HTTP request on its way to a replica, and what a router may know of it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from hybrid_cache.api.ray.chain import NO_CHAIN, Chain

REPLICA = "x-replica"  # a header of ours: which one answered, and which one is asked for
NAMED = re.compile(r"resp_[0-9a-f]{32}|msg_[0-9a-f]{24}")  # what replies give names to, and requests refer to
ITEM = re.compile(r"[a-z]{2,3}_([0-9a-f]{32})[io][0-9]{1,6}")  # of a stored response
MOST_NAMES = 64  # of one request


class Ranking(Protocol):
    """Who knows the replicas, see `fleet`."""

    def hear(self, said: Mapping[str, Mapping[str, object]], now: float) -> None: ...
    def rank(self, call: "Call", now: float) -> list[str]: ...


@dataclass(eq=False)
class Call:
    """What is known of it beside its bytes. `fleet` stays in the process that makes it."""

    id: int
    scope: Mapping[str, Any]
    body: bytes
    chain: Chain = NO_CHAIN
    session: str = ""
    names: tuple[str, ...] = ()  # of what one replica has and others do not
    names_model: bool = False
    gives_names: bool = False  # its answer names what only its replica has
    to: str | None = None  # the replica that it is for, whatever the others have
    unread: int = 0  # tokens that its replica has to read of it, as the router guesses
    tried: set[str] = field(default_factory=set)  # replicas that could not answer it
    fleet: Ranking | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "fleet": None, "tried": set()}


def names_in(path: str, body: object) -> tuple[str, ...]:
    """What a request refers to that only one replica has: stored responses and their items, stored messages."""
    found = list(NAMED.findall(path))
    if isinstance(body, Mapping):
        named = (body.get("previous_response_id"), *_references(body))
        found += [name for name in named if isinstance(name, str) and name]
    return tuple(dict.fromkeys(map(_kept, found[:MOST_NAMES])))


def _references(body: Mapping[str, object]) -> Iterator[object]:
    for field_name, reference in (("messages", "ref"), ("input", "id")):
        items = body.get(field_name)
        for item in items if isinstance(items, list) else ():
            if isinstance(item, Mapping) and (reference == "ref" or item.get("type") == "item_reference"):
                yield item.get(reference)


def _kept(name: str) -> str:
    """The response that an item is part of."""
    item = ITEM.fullmatch(name)
    return f"resp_{item[1]}" if item else name
