"""Canonical passes: generated tokens of finished turns are computed again as a prompt, so that the tree may have them.

What decode leaves in states and pages has other bits than prefill, and so never enters the tree. Where a caller knows
how the next prompt will have a turn, that is computed.
"""

from collections import deque
from collections.abc import Callable

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.policies.signals import Origin
from hybrid_cache.engine.listener import Listener, Nobody
from hybrid_cache.engine.prefills import Chunk, Prefills
from hybrid_cache.engine.sequence import Prefill, Sequence, grid_floor
from hybrid_cache.scheduling.pauses import Pauses
from hybrid_cache.tokens import Boundary, TokenArray

MAX_WAITING = 64  # finished turns that wait; the oldest is dropped
DECODE_STEPS_A_TILE = 320  # steps that only decode, for each tile of a canonical pass among them


class CanonicalPasses:
    """Finished turns that wait for their pass, one after the other; only the first may hold room."""

    def __init__(self, cache: Books, prefills: Prefills, pauses: Pauses) -> None:
        self._cache = cache
        self._pauses = pauses
        self._prefills = prefills
        self.listener: Listener = Nobody()
        self._queue: deque[Prefill] = deque()
        self._decode_steps = 0  # since the last tile among them

    def __contains__(self, prefill: Prefill) -> bool:
        return prefill in self._queue

    def __len__(self) -> int:
        return len(self._queue)

    def add_turn(self, sequence: Sequence) -> None:
        """Has the generated tokens of a finished sequence computed again, if any of them fill a page; with what else of
        it the model of its namespace has not read.
        """
        prefill = sequence.prefill
        if not (prefill.publish and sequence.request.commits) or prefill.only_marked:
            return
        num_read = len(prefill.tokens) if prefill.mark is None else prefill.mark.position
        if grid_floor(sequence.num_tokens) > grid_floor(num_read):
            self.add(prefill.namespace, sequence.all_tokens(), (), prefill.origin, sequence.request.id)

    def add(
        self, namespace: str, tokens: TokenArray, boundaries: tuple[Boundary, ...], origin: Origin, of: str = ""
    ) -> None:
        """Has the full pages of tokens computed, with states at boundaries and at the end of the last page.

        of: the request whose answer they end with, if that is known
        """
        end = grid_floor(len(tokens))
        if end == 0:
            return
        within = tuple(boundary for boundary in boundaries if boundary.position <= end)
        if len(self._queue) == MAX_WAITING:
            self.give_room()
            self._queue.popleft()
        self._queue.append(Prefill(namespace, tokens[:end], True, True, within, generated=True, origin=origin, of=of))

    def end(self, turn: Prefill) -> None:
        self._release(turn)
        self._queue.remove(turn)

    def forget(self, may: Callable[[str], bool]) -> None:
        """Gives up those of the namespaces that are meant. What they have published stays."""
        for turn in [turn for turn in self._queue if may(turn.namespace)]:
            self.end(turn)

    def give_up_first(self) -> None:
        """Forgets the one in progress."""
        self.end(self._queue[0])

    def give_room(self) -> bool:
        """Gives up the room of the one in progress -> whether there was one. What it has published stays."""
        if not self._queue or self._queue[0].lease is None:
            return False
        self._release(self._queue[0])
        return True

    def _release(self, turn: Prefill) -> None:
        if turn.lease is not None:
            self.listener.ends(turn)
        self._prefills.release(turn)

    def next_chunk(self) -> Chunk | None:
        """One tile, so that a new request waits for one tile at most. None if there is nothing to do."""
        while self._queue:
            turn = self._queue[0]
            if turn.lease is not None or self._start(turn):
                return self._prefills.cut(turn, None, 1)
            self._queue.popleft()
        return None

    def spare_tile(self) -> tuple[Chunk, ...]:
        """Now and then a tile in a step that only decodes: endless streams would starve the passes."""
        self._decode_steps += 1
        if self._decode_steps < DECODE_STEPS_A_TILE or not self._queue:
            return ()
        self._decode_steps = 0
        chunk = self.next_chunk()
        return () if chunk is None else (chunk,)

    def _start(self, turn: Prefill) -> bool:
        # A match leaves at least one token to compute; as a beginning, all of ours may be there.
        known = self._cache.match(turn.namespace, turn.keys.beginning(len(turn.tokens)))
        if known.length >= len(turn.tokens):
            if known.path:
                self._pauses.computed(turn.of, turn.origin.session, turn.keys, known.path[-1])
            self.listener.ends(turn)
            return False
        # Not from the end of a prompt that may be as long.
        if self._prefills.acquire(turn, known, spare=self._pauses.keeps):
            return True
        self.listener.ends(turn)
        return False
