"""Prefixes that somebody counts on though nobody holds them, such as those of conversations that wait for a tool.

A claim pins nothing. It says which state a prefix would be resumed from now, so that what makes room can ask whether to
spare that; when the state goes, the claim falls back to the next one above. A model without recurrent states resumes
from pages: its claims lie on these.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hybrid_cache.cache.tree import Checkpoint, Kept, Node


@dataclass(slots=True, eq=False)
class Claim:
    """See the module docstring. Only `Claims` changes it."""

    at: Checkpoint | Node | None = None  # what the prefix would be resumed from; None: nothing of it is there
    num_tokens: int = 0  # of the whole prefix

    @property
    def num_resumed(self) -> int:
        """Tokens that need not be computed again."""
        return 0 if self.at is None else self.at.num_tokens


Spare = Callable[[Claim], bool]  # whether what a claim lies on is to be left alone


class Claims:
    """All claims on one tree."""

    def __init__(self, *, stateless: bool) -> None:
        self.keeps: Spare | None = None  # what is never to go for a state that might be of use one day
        self._stateless = stateless
        self._claims: dict[Checkpoint | Node, set[Claim]] = {}

    def place(self, claim: Claim, node: Node | None, num_tokens: int) -> None:
        """The prefix of a claim, which has `num_tokens`, is in the tree as far as `node`; None: nothing of it is."""
        claim.num_tokens = num_tokens
        self._move(claim, self._resumed_from(node))

    def drop(self, claim: Claim) -> None:
        """Nobody counts on it any more."""
        self._move(claim, None)

    def lost(self, item: Kept | Node) -> None:
        """A state or a page has left the tree."""
        if not isinstance(item, Checkpoint | Node):
            return
        for claim in self._claims.pop(item, ()):
            claim.at = None
            self._move(claim, self._resumed_from(item.node if isinstance(item, Checkpoint) else item.parent))

    def on(self, item: Kept | Node) -> Iterable[Claim]:
        """Claims that lie on a state or a page."""
        return self._claims.get(item, ()) if isinstance(item, Checkpoint | Node) else ()

    def check(self) -> None:
        """Proves that all of them lie on what is there."""
        for item, claims in self._claims.items():
            assert item.attached
            assert claims
            assert all(claim.at is item for claim in claims)

    def _resumed_from(self, node: Node | None) -> Checkpoint | Node | None:
        if self._stateless:
            return node if node is not None and node.parent is not None else None
        while node is not None and node.checkpoint is None:
            node = node.parent
        return node.checkpoint if node is not None else None

    def _move(self, claim: Claim, to: Checkpoint | Node | None) -> None:
        if claim.at is not None:
            claims = self._claims[claim.at]
            claims.remove(claim)
            if not claims:
                del self._claims[claim.at]
        claim.at = to
        if to is not None:
            self._claims.setdefault(to, set()).add(claim)
