"""What a request finds in the cache, and what it holds while it runs. Only `HybridCache` makes or changes these."""

from dataclasses import dataclass, field

from hybrid_cache.tree import Checkpoint, CheckpointKind, Keys, Node, PromptEnd


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache holds of a prompt."""

    namespace: str
    path: tuple[Node, ...]  # nodes of [0, shared)
    length: int  # tokens the request may skip: a grid position below the prompt's end, or all of it with `end`
    shared: int  # tokens whose pages are there; more than `length` marks a branch point
    checkpoint: Checkpoint | None
    end: PromptEnd | None  # the whole prompt was seen: nothing needs computing


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
    """What one running sequence holds."""

    namespace: str
    keys: Keys  # the prompt
    publish: bool
    root: Node
    nodes: list[Node]  # pinned path; its pages come first in `pages`
    pages: list[int]  # page of each TILE tokens
    slot: int  # working state
    length: int  # tokens that the state held when it was acquired
    end: PromptEnd | None
    reserved: list[Reservation] = field(default_factory=list)
    written_tokens: int = 0  # tokens whose pages this lease has added to the tree
    released: bool = False

    @property
    def shared(self) -> int:
        """Tokens whose pages belong to the tree."""
        return self.tip.num_tokens

    @property
    def tip(self) -> Node:
        """The last node of the path, or the root."""
        return self.nodes[-1] if self.nodes else self.root
