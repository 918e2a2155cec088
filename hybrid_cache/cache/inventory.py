"""What is kept, as conversations: for people who ask a running server. Integers only.

A conversation ends with a state that no other goes on from, and is known by the name of that state. Its stretch is what
it has to itself: pages and states after the last place where another conversation branches off.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.fates import End
from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.keys import Name, goes_on_from, tokens_in
from hybrid_cache.cache.tree import Checkpoint, Node, PromptEnd
from hybrid_cache.tokens import TokenArray

State = Checkpoint | PromptEnd
MaySee = Callable[[str], bool]  # whether somebody may be told of a namespace


@dataclass(frozen=True, slots=True)
class StateInfo:
    """A kept state."""

    name: Name
    kind: str
    num_tokens: int
    num_bytes: int  # its own, without pages before it
    hits: int  # requests that started from it
    age_s: float  # since it was made or started from
    score: float | None  # the policy's; the lowest goes first. None if it may not go now


@dataclass(frozen=True, slots=True)
class Conversation:
    """A state that no other goes on from, and what it has to itself."""

    namespace: str
    end: StateInfo
    num_bytes: int  # of its stretch: what is freed when it is dropped
    hits: int  # of all states of its stretch


@dataclass(frozen=True, slots=True)
class WholeConversation:
    """One of them, from its beginning."""

    conversation: Conversation
    states: tuple[StateInfo, ...]  # on the whole path, rising
    tokens: TokenArray


class Inventory:
    """Reads the books, and drops conversations on demand. To be used on the thread of the books, one question each."""

    def __init__(self, books: Books, may_see: MaySee) -> None:
        self._books = books
        self._pool = books.pool
        self._may_see = may_see
        owners = self._pool.slot_owner.values()
        self._states = [s for s in owners if isinstance(s, Checkpoint | PromptEnd) and may_see(s.namespace)]

    def conversations(self) -> list[Conversation]:
        """The one that was used last comes first."""
        return sorted(map(self._conversation, self._ends), key=lambda c: c.end.age_s)

    def latest(self, most: int) -> list[tuple[Conversation, tuple[StateInfo, ...]]]:
        """Those used last, at most so many, the last one first; each with all states on its path, rising."""
        ends = sorted(self._ends, key=lambda state: -state.last_used)[:most]
        return [(self._conversation(end), self._states_of(self._path(end)[0])) for end in ends]

    @property
    def num_conversations(self) -> int:
        return len(self._ends)

    def find(self, name: str) -> WholeConversation | None:
        """The one whose name begins with these hexadecimal digits; None if there is none, or more than one."""
        end = self._named(name)
        return None if end is None else self._whole(end)

    def drop(self, name: str) -> int | None:
        """Drops the stretch of a conversation, but for what is in use -> bytes freed. None as in `find`."""
        end, free_bytes = self._named(name), self._pool.allocator.free_bytes
        if end is None:
            return None
        nodes, states = self._stretch(end)
        for state in states:
            self._pool.evict(state, end=End.DROPPED)
        self._books.inputs.drop_pages(node.name for node in nodes)
        if nodes:
            self._drop_pages(nodes[0])
        return self._pool.allocator.free_bytes - free_bytes

    def _named(self, name: str) -> State | None:
        found = [state for state in self._ends if state.name.hex().startswith(name)]
        return found[0] if len(found) == 1 else None

    def drop_all(self) -> int:
        """Drops all that is seen and nobody uses now -> bytes freed."""
        known = {node.namespace for node in self._pool.tree.nodes()}
        known |= {kept.namespace for kept in self._pool.slot_owner.values()}
        known |= {run.node.namespace for run in self._books.inputs.runs}
        if self._pool.host is not None:
            known |= self._pool.host.namespaces
        if self._pool.disk is not None:
            self._pool.disk.drop(self._may_see)
        return sum(self._books.drop(namespace) for namespace in known if self._may_see(namespace))

    def _drop_pages(self, top: Node) -> None:
        below = [top]
        for node in below:
            below += node.children.values()
        for node in reversed(below):
            if node.dead and node.parent is not None:
                self._pool.evict_page(node, End.DROPPED)

    @cached_property
    def _ends(self) -> list[State]:
        """States that no other goes on from."""
        return list(self._find_ends())

    def _find_ends(self) -> Iterator[State]:
        inner = set[Node]()  # a state lies below
        for state in self._states:
            node = state.node if isinstance(state, PromptEnd) else state.node.parent
            while node is not None and node not in inner:
                inner.add(node)
                node = node.parent
        for state in self._states:
            if isinstance(state, Checkpoint):
                if state.node not in inner:
                    yield state
            elif not any(goes_on_from(key, state.tail) for key in state.node.children):
                yield state

    def _stretch(self, end: State) -> tuple[list[Node], list[State]]:
        """Nodes and states that are one conversation's alone, from the first to the last."""
        nodes, states, node, after = list[Node](), [end], end.node, self._tail(end)
        if isinstance(end, PromptEnd) and (node.children or len(node.ends) > 1):
            return [], states
        while node.parent is not None:
            nodes.append(node)
            states += [s for s in self._states_at(node, after) if s is not end]
            after, node = node.key, node.parent
            if len(node.children) > 1 or any(not goes_on_from(after, tail) for tail in node.ends):
                break
        return nodes[::-1], states

    @staticmethod
    def _tail(end: State) -> bytes:
        return end.tail if isinstance(end, PromptEnd) else b""

    @staticmethod
    def _states_at(node: Node, after: bytes) -> Iterator[State]:
        """States at a node of a conversation that goes on with some tokens, the longest first."""
        ends = [end for tail, end in node.ends.items() if goes_on_from(after, tail)]
        yield from sorted(ends, key=lambda end: -end.num_tokens)
        if node.checkpoint is not None:
            yield node.checkpoint

    def _conversation(self, end: State) -> Conversation:
        nodes, states = self._stretch(end)
        num_bytes = sum(map(self._bytes_of, states)) + len(nodes) * self._pool.item_bytes[Kind.PAGE]
        hits = sum(state.uses - 1 for state in states)
        return Conversation(end.namespace, self._info(end), num_bytes, hits)

    def _whole(self, end: State) -> WholeConversation:
        states, keys = self._path(end)
        tokens = np.frombuffer(b"".join(map(tokens_in, reversed(keys))), "<i4").astype(np.int32)
        return WholeConversation(self._conversation(end), self._states_of(states), tokens)

    def _states_of(self, states: list[State]) -> tuple[StateInfo, ...]:
        """Rising."""
        return tuple(sorted(map(self._info, states), key=lambda info: info.num_tokens))

    def _path(self, end: State) -> tuple[list[State], list[bytes]]:
        """The states and the keys of a conversation from its beginning, the last ones first."""
        states, keys, node, after = [end], [self._tail(end)], end.node, self._tail(end)
        while True:
            states += [s for s in self._states_at(node, after) if s is not end]
            if node.parent is None:
                break
            keys.append(node.key)
            after, node = node.key, node.parent
        return states, keys

    def _bytes_of(self, state: State) -> int:
        return sum(self._pool.item_bytes[kind] for kind, _ in self._pool.items(state))

    def _info(self, state: State) -> StateInfo:
        age_s, score = self._pool.clock() - state.last_used, self._pool.policy.score_of(state)
        bytes_of = self._bytes_of(state)
        return StateInfo(state.name, state.label, state.num_tokens, bytes_of, state.uses - 1, age_s, score)
