"""The prefix tree: one node for each full page of tokens that has been published. Integers only, no tensors.

Every edge is exactly one page, so the key of a child is the page's tokens themselves and a walk is one dictionary
look-up a page: no splitting, no hashes that could collide, and a cost that does not depend on how much the tree holds.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from hybrid_cache.cache.keys import Name, root_name
from hybrid_cache.errors import OwnershipError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import PrefillCost

KVRows = npt.NDArray[np.int64]  # page * TILE + offset


class CheckpointKind(Enum):
    """Why a state was kept."""

    MESSAGE_END = "message_end"
    BRANCH = "branch"  # two requests were seen to diverge here
    TURN_END = "turn_end"  # end of a generated answer
    INTERIOR = "interior"  # a sparse point inside a long message
    EXPLICIT = "explicit"  # the client marked it
    PROMPT_END = "prompt_end"  # a whole prompt, for starting to decode at once
    LAYER_INPUTS = "layer_inputs"  # no state, but what a layer was given, for other models to go on from


@dataclass(slots=True, eq=False)
class Node:
    """One page of tokens after its parent's; a root stands for the empty prefix of its namespace and has no page."""

    namespace: str  # with the model that computed its last token
    parent: "Node | None"
    key: bytes
    num_tokens: int  # from the start of the sequence to the end of this page
    page: int
    last_used: float
    name: Name = b""  # of this page and all before it, or of its namespace
    children: dict[bytes, "Node"] = field(default_factory=dict)
    checkpoint: "Checkpoint | None" = None
    ends: dict[bytes, "PromptEnd"] = field(default_factory=dict)
    pins: int = 0  # leases whose path goes through here
    awaited: bool = False  # a lease is about to fill a checkpoint here
    wanted: bool = False  # a state at or behind it is in the second tier

    @property
    def attached(self) -> bool:
        """False once this node has left the tree."""
        return self.parent is None or self.parent.children.get(self.key) is self

    @property
    def dead(self) -> bool:
        """True when nothing that could be resumed needs this node's page."""
        return not (self.children or self.checkpoint or self.ends or self.pins)

    def checkpoint_above(self) -> int:
        """Tokens that a request could skip if this node's own checkpoint were gone."""
        node = self.parent
        while node is not None and node.checkpoint is None:
            node = node.parent
        return node.num_tokens if node else 0

    def resume_point(self) -> int:
        """Tokens that a request whose path ends here can skip."""
        return self.num_tokens if self.checkpoint else self.checkpoint_above()

    def pages_alone(self) -> int:
        """Pages up to the next node that something else needs: they go with the only state kept here."""
        node, count = self, 0
        if node.children:
            return 0
        while node.parent is not None:
            count += 1
            node = node.parent
            if len(node.children) > 1 or node.checkpoint or node.ends:
                break
        return count


@dataclass(slots=True, eq=False)
class Checkpoint:
    """The recurrent state after a node's last token, in a slot that the tree owns."""

    node: Node
    slot: int
    kind: CheckpointKind
    ttl_s: float = 0.0  # minimum life after each use, if a client asked for one
    keep_until: float = 0.0
    base: float = 0.0  # the policy's clock when last used
    last_used: float = 0.0  # in seconds
    uses: int = 0  # its making included

    @property
    def attached(self) -> bool:
        return self.node.checkpoint is self

    @property
    def namespace(self) -> str:
        return self.node.namespace

    @property
    def num_tokens(self) -> int:
        return self.node.num_tokens

    @property
    def name(self) -> Name:
        return self.node.name

    @property
    def label(self) -> str:
        """What statistics count it as."""
        return self.kind.value

    @property
    def title(self) -> str:
        """For error messages."""
        return f"{self.label} of {self.num_tokens} tokens of {self.namespace}"

    def take_out(self) -> None:
        self.node.checkpoint = None

    def resume_without(self) -> int:
        """Where a request would have to start if this were gone."""
        return self.node.checkpoint_above()

    def pages_freed(self) -> int:
        """Pages that nothing needs any more once this is gone."""
        return 0 if self.node.ends else self.node.pages_alone()


@dataclass(slots=True, eq=False)
class PromptEnd:
    """The state at the end of a whole prompt, off the grid, with its last partial page and its last hidden row."""

    node: Node
    name: Name
    namespace: str  # with the model that computed its last token
    tail: bytes  # the tokens after the node, less than a page, as a key
    num_tokens: int
    slot: int
    page: int | None  # KV rows of the tail; None for an empty tail, or without attention
    kind: CheckpointKind = CheckpointKind.PROMPT_END
    keep_until: float = 0.0
    base: float = 0.0
    last_used: float = 0.0
    uses: int = 0

    @property
    def attached(self) -> bool:
        return self.node.ends.get(self.tail) is self

    @property
    def label(self) -> str:
        """What statistics count it as."""
        return self.kind.value

    @property
    def title(self) -> str:
        """For error messages."""
        return f"{self.label} of {self.num_tokens} tokens of {self.namespace}"

    def take_out(self) -> None:
        del self.node.ends[self.tail]

    def resume_without(self) -> int:
        """Where the same prompt would have to start: at least one token has to be computed."""
        return self.node.resume_point() if self.tail else self.node.checkpoint_above()

    def pages_freed(self) -> int:
        own = 0 if self.page is None else 1
        return own if self.node.checkpoint or len(self.node.ends) > 1 else own + self.node.pages_alone()


@dataclass(slots=True, eq=False)
class StoredMessage:
    """Some tokens as they were encoded in one context, kept outside the tree: KV rows, and what they do to states.

    The slot holds the states that they leave when started from zero, and their last convolution windows; see
    `choreography`.
    """

    node: Node  # the root of its namespace, for policies; not in the tree
    name: Name
    key: str
    start: int  # tokens before it in the context it was encoded in
    num_tokens: int  # and with it
    position: int  # of its first row
    slot: int
    pages: list[int]  # its rows, from the first row of the first page on
    extra: list[int]  # more pages (slots, without attention) for the transitions' bytes
    store: "dict[str, StoredMessage]"  # where it can be found once it is published
    holders: int = 0  # requests that are about to use it
    kind: CheckpointKind = CheckpointKind.EXPLICIT
    keep_until: float = 0.0
    base: float = 0.0
    last_used: float = 0.0
    uses: int = 0

    @property
    def attached(self) -> bool:
        """It is published: everything of it has been written, and it can be found."""
        return self.store.get(self.key) is self

    @property
    def namespace(self) -> str:
        return self.node.namespace

    @property
    def label(self) -> str:
        """What statistics count it as."""
        return "message"

    @property
    def title(self) -> str:
        """For error messages."""
        return f"message {self.key}"

    @property
    def length(self) -> int:
        return self.num_tokens - self.start

    def rows(self) -> KVRows:
        """Where its rows lie, to be read: [length], page * TILE + offset."""
        return rows_of(self.pages, 0, self.length)

    def own_rows(self) -> KVRows:
        """`rows`, to be written. Raises OwnershipError once the message is published."""
        if self.attached:
            raise OwnershipError(f"rows of message {self.key} are to be written, which was published")
        return self.rows()

    def take_out(self) -> None:
        del self.store[self.key]

    def resume_without(self) -> int:
        """It would be computed again after as many tokens."""
        return self.start

    def pages_freed(self) -> int:
        return len(self.pages) + len(self.extra)


@dataclass(slots=True, eq=False)
class LayerInputs:
    """What a layer was given for some pages of a prompt, kept outside the tree: rows of the residual stream.

    See `cache.inputs`.
    """

    node: Node  # the root of its namespace, for policies; not in the tree
    name: Name
    layer: int
    spared: PrefillCost  # of what need not be computed where they are there
    start: int  # tokens before its first row
    num_tokens: int  # and with its last row
    items: list[int]  # that hold the rows one after the other, of the kind that holds effects of messages
    pages: tuple[Name, ...]  # the prefixes that its pages end
    store: "dict[tuple[Name, int], LayerInputs]"  # where it can be found once it is published
    holders: int = 0  # requests that are about to read it
    kind: CheckpointKind = CheckpointKind.LAYER_INPUTS
    keep_until: float = 0.0
    base: float = 0.0
    last_used: float = 0.0
    uses: int = 0

    @property
    def namespace(self) -> str:
        return self.node.namespace

    @property
    def attached(self) -> bool:
        """It is published: everything of it has been written, and it can be found."""
        return self.store.get((self.pages[-1], self.layer)) is self

    @property
    def label(self) -> str:
        """What statistics count it as."""
        return self.kind.value

    @property
    def title(self) -> str:
        """For error messages."""
        return f"inputs of layer {self.layer} for tokens {self.start} to {self.num_tokens} of {self.node.namespace}"

    def take_out(self) -> None:
        for page in self.pages:
            del self.store[page, self.layer]

    def resume_without(self) -> int:
        """They would be computed again after as many tokens."""
        return self.start

    def pages_freed(self) -> int:
        return len(self.items)


Kept = Checkpoint | PromptEnd | StoredMessage | LayerInputs
Outside = StoredMessage | LayerInputs  # of the tree


def rows_of(pages: Sequence[int], start: int, end: int) -> KVRows:
    """Where rows [start, end) of a sequence with these pages lie: [end - start], page * TILE + offset."""
    first = start // TILE
    places = np.arange(start - first * TILE, end - first * TILE)
    found: KVRows = np.asarray(pages[first : -(-end // TILE)], np.int64)[places // TILE] * TILE + places % TILE
    return found


class PrefixTree:
    """The nodes of all namespaces."""

    def __init__(self, page_tokens: int = TILE) -> None:
        self.page_tokens = page_tokens
        self.roots: dict[str, Node] = {}
        self.num_nodes = 0  # roots not counted

    def root(self, namespace: str) -> Node:
        """The root of a namespace, made if it is new."""
        root = self.roots.get(namespace)
        if root is None:
            root = self.roots[namespace] = Node(namespace, None, b"", 0, -1, 0.0, root_name(namespace))
        return root

    def nodes(self) -> Iterator[Node]:
        """All nodes, roots first in each namespace."""
        stack = list(self.roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def walk(self, namespace: str, pages: Iterable[bytes]) -> tuple[Node, ...]:
        """The nodes of the longest known prefix."""
        node, path = self.roots.get(namespace), []
        if node is not None:
            for key in pages:
                node = node.children.get(key)
                if node is None:
                    break
                path.append(node)
        return tuple(path)

    def insert(self, parent: Node, key: bytes, name: Name, page: int, now: float, namespace: str = "") -> Node:
        """namespace: where it is not the parent's"""
        node = Node(namespace or parent.namespace, parent, key, parent.num_tokens + self.page_tokens, page, now, name)
        parent.children[key] = node
        self.num_nodes += 1
        return node

    def remove(self, node: Node) -> None:
        """Takes out a node that nothing needs, or an empty root."""
        assert node.dead
        if node.parent is None:
            del self.roots[node.namespace]
        else:
            del node.parent.children[node.key]
            self.num_nodes -= 1
