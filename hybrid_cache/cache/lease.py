"""What a request finds in the cache, and what it holds while it runs. Only `Books` makes or changes these."""

from dataclasses import dataclass, field, replace

import numpy as np

from hybrid_cache.cache.host import HostTier
from hybrid_cache.cache.keys import Keys
from hybrid_cache.cache.policies.signals import NOWHERE, Origin
from hybrid_cache.cache.tree import (
    Checkpoint,
    CheckpointKind,
    KVRows,
    LayerInputs,
    Node,
    PrefixTree,
    PromptEnd,
    rows_of,
)
from hybrid_cache.errors import OwnershipError
from hybrid_cache.kernels.grid import TILE


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache holds of a prompt."""

    keys: Keys  # of the tokens that were looked for
    path: tuple[Node, ...]  # nodes of [0, shared)
    length: int  # tokens the request may skip: below the prompt's end a grid position or its mark, or all with `end`
    shared: int  # tokens whose pages are there; more than `length` marks a branch point
    checkpoint: Checkpoint | PromptEnd | None  # the state there; the end of a prompt is good at a mark
    end: PromptEnd | None  # the whole prompt was seen: nothing needs computing
    hosted: bool = False  # the state that it starts from, and pages before it, come from the second tier

    @property
    def namespace(self) -> str:
        return self.keys.namespace

    def up_to_its_state(self, page_tokens: int) -> "Match":
        """The same without pages that lie beyond the state it starts from."""
        num_pages = self.length // page_tokens
        return replace(self, path=self.path[:num_pages], shared=min(self.shared, num_pages * page_tokens))


@dataclass(frozen=True, slots=True)
class Sent:
    """What another model has of a prompt, from a page on."""

    keys: Keys  # of the prompt's tokens, in its namespace
    path: tuple[Node, ...]  # of all pages up to the last one, where its state is
    layers: tuple[int, ...]  # what these were given is there
    first: int  # the page

    @property
    def end(self) -> int:
        """Pages."""
        return len(self.path)


def find(tree: PrefixTree, keys: Keys, host: HostTier | None = None, *, stateless: bool) -> Match:
    """The longest usable part of a prompt. stateless: every page is a place to resume from"""
    match = _on_device(tree, keys, stateless=stateless)
    if host is None or match.end is not None:
        return match
    step, most = tree.page_tokens, max(keys.num_tokens - 1, 0) // tree.page_tokens
    least = match.length // step
    found = host.resumes_at(keys, len(match.path), least, most)
    if found == least:
        return match
    return replace(match, length=found * step, checkpoint=None, hosted=True)


def _on_device(tree: PrefixTree, keys: Keys, *, stateless: bool) -> Match:
    path, step = tree.walk(keys.namespace, keys.pages), tree.page_tokens
    tip = path[-1] if path else tree.roots.get(keys.namespace)
    end = tip.ends.get(keys.tail) if tip is not None and len(path) == len(keys.pages) else None
    if end is not None:
        return Match(keys, path, keys.num_tokens, len(path) * step, None, end)
    found: Checkpoint | PromptEnd | None = None
    length = min(len(path), max(keys.num_tokens - 1, 0) // step) * step
    if not stateless:
        usable = (n.checkpoint for n in reversed(path) if n.checkpoint and n.num_tokens < keys.num_tokens)
        found = next(usable, None)
        length = found.num_tokens if found else 0
    stem = keys.stem
    if stem is not None and stem.num_tokens > length and len(path) >= len(stem.pages):
        tip = path[len(stem.pages) - 1] if stem.pages else tree.roots.get(keys.namespace)
        at_mark = tip.ends.get(stem.tail) if tip is not None else None
        found, length = (at_mark, stem.num_tokens) if at_mark is not None else (found, length)
    return Match(keys, path, length, len(path) * step, found, None)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A slot that the coming forward pass fills with the state at a grid position."""

    position: int
    slot: int
    kind: CheckpointKind
    ttl_s: float
    node: Node | None  # marked as awaiting it, if the tree had the node already


@dataclass(slots=True, eq=False)
class Lease:
    """What one running sequence holds, and so what may be written for it.

    [0, shared)   pages of the tree, which nothing ever writes to; a lease that publishes computes tokens there again
                  where only their state is missing: its rows would have the same bits
    [shared, ..)  pages of its own

    Every writer of rows asks `rows_to_fill` or `own_rows`.
    """

    keys: Keys  # the prompt
    publish: bool
    root: Node
    nodes: list[Node]  # pinned path; its pages come first in `pages`
    pages: list[int]  # page of each TILE tokens
    slot: int  # working state
    length: int  # tokens that the state held when it was acquired
    end: PromptEnd | None
    reserved: list[Reservation] = field(default_factory=list)
    inputs: list[LayerInputs] = field(default_factory=list)  # that the coming forward pass fills
    written_tokens: int = 0  # tokens whose pages this lease has added to the tree
    origin: Origin = NOWHERE  # of its request
    released: bool = False
    since_s: float = 0.0  # when it was taken, on the cache's clock

    @property
    def shared(self) -> int:
        """Tokens whose pages belong to the tree."""
        return self.tip.num_tokens

    @property
    def tip(self) -> Node:
        """The last node of the path, or the root."""
        return self.nodes[-1] if self.nodes else self.root

    @property
    def stem_tip(self) -> Node:
        """The last node of what another sequence without this one's mark would have."""
        mark = self.keys.mark
        num_pages = len(self.nodes) if mark is None else min(mark.position // TILE, len(self.nodes))
        return self.nodes[num_pages - 1] if num_pages else self.root

    def rows(self, start: int, end: int) -> KVRows:
        """Where the rows of tokens [start, end) lie, to be read: [end - start], page * TILE + offset.

        Raises OwnershipError once the lease is released.
        """
        if self.released:
            raise OwnershipError(f"rows [{start}, {end}) of a lease that was given back")
        return rows_of(self.pages, start, end)

    def own_rows(self, start: int, end: int) -> KVRows:
        """`rows`, to be written. Raises OwnershipError if the tree owns one, or the lease is released."""
        if start < min(self.shared, end):
            raise OwnershipError(f"rows [{start}, {end}) would be written, the tree owns those below {self.shared}")
        return self.rows(start, end)

    def own_row(self, index: int) -> int:
        """`own_rows` of one token. Raises OwnershipError likewise."""
        if index < self.shared or self.released:
            raise OwnershipError(f"row {index} would be written, the tree owns those below {self.shared}")
        return self.pages[index // TILE] * TILE + index % TILE

    def rows_to_fill(self, start: int, end: int) -> KVRows:
        """Where K and V of the computed tokens [start, end) go; -1 for those whose page the tree holds already.

        Raises OwnershipError for a lease that does not publish and has such pages, as its rows may differ.
        """
        shared = min(max(self.shared, start), end) if self.publish else start
        return np.concatenate([np.full(shared - start, -1, np.int64), self.own_rows(shared, end)])
