"""Tasks that are paused, and how their next request is known.

A turn that has ended is remembered under the names of its prompt and of what was computed of its answer; the request
whose prompt goes on from the deepest of these resumes it. If what came before was edited, the session that the client
names still says which task it is, so that it keeps its place: if it may call the same tools and brings what one of them
said; where nobody knows that, if it begins with the same page. Other requests of the session, such as one for a title,
leave the task alone. Whoever comes second begins a task of its own.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field

from hybrid_cache.cache.claims import Claim, Claims
from hybrid_cache.cache.keys import Keys, Name
from hybrid_cache.cache.tree import Node
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.scheduling.base import Load, Order, Pause, Task
from hybrid_cache.stats import PauseStats

MOST_PAUSES = 1 << 14  # the one that began first is forgotten
MOST_ALIKE = 64  # turns behind one page that are told apart by what comes behind it; others by their sessions only
TOKEN_BYTES = 4
FORGOTTEN_AFTER_S = 3600.0  # a call that is never answered


@dataclass(slots=True, eq=False)
class _Turn:
    """What a pause is known by."""

    pause: Pause
    request_id: str
    namespace: str
    session: str
    num_prompt: int  # tokens of its prompt: the next one has more
    first: Name | None  # of the first page of its prompt
    names: dict[Name, bytes] = field(default_factory=dict)  # of full pages -> the tokens behind them, less than a page

    @property
    def session_key(self) -> tuple[str, str, str]:
        return self.namespace, self.pause.task.tenant, self.session


class Pauses:
    """The books of one scheduler."""

    def __init__(self, claims: Claims, order: Order, load: Load) -> None:
        self._claims = claims
        claims.keeps = self.keeps
        self._order = order
        self._load = load
        self._turns: OrderedDict[Pause, _Turn] = OrderedDict()  # in the order in which they ended
        self._by_name: dict[Name, list[_Turn]] = {}
        self._by_request: dict[str, _Turn] = {}
        self._by_session: dict[tuple[str, str, str], list[_Turn]] = {}
        self._num_paused = self._num_resumed = self._num_resident = self._num_forgotten = 0

    @property
    def stats(self) -> PauseStats:
        return PauseStats(self._num_paused, self._num_resumed, self._num_resident, self._num_forgotten)

    def __len__(self) -> int:
        """How many turns are remembered."""
        return len(self._turns)

    # Ends

    def ended(
        self, request_id: str, task: Task, session: str, keys: Keys, said: int, tip: Node | None, answer: int
    ) -> None:
        """A turn has ended; whether in a call is still to be said.

        keys, tip: of its prompt, and how far that is in the tree   answer: tokens
        said: tokens up to the end of its last message, which the next prompt begins with
        """
        namespace, num_tokens = keys.namespace, keys.num_tokens + answer
        pause = Pause(task=task, began_s=self._load.now)
        turn = self._turns[pause] = _Turn(pause, request_id, namespace, session, keys.num_tokens, _first_of(keys))
        self._by_request[request_id] = turn
        if session:
            self._by_session.setdefault(turn.session_key, []).append(turn)
        self._name(turn, keys, said)
        self._claims.place(pause, tip, num_tokens)

    def called(self, request_id: str, tool: str, hint_s: float | None) -> bool:
        """The turn of a request ended in a call -> whether that request is known."""
        turn = self._by_request.get(request_id)
        if turn is None:
            return False
        self._num_paused += turn.pause.tool is None
        turn.pause.tool, turn.pause.hint_s, turn.pause.task.tool = tool, hint_s, tool
        self._order.paused(turn.pause, self._load)
        return True

    def begins(self, request_id: str) -> None:
        """A request with this id has come: what is said of the id from now on is not of an earlier one."""
        self._by_request.pop(request_id, None)

    def over(self, request_id: str) -> None:
        """The turn of a request was the last of its task."""
        turn = self._by_request.get(request_id)
        if turn is not None:
            self._end_task(turn)

    def computed(self, request_id: str, session: str, keys: Keys, tip: Node) -> None:
        """The beginning of a prompt that is still to come was computed, and is in the tree as far as `tip`.

        request_id: whose answer it ends with; empty if nobody knows
        """
        found = [self._by_request[request_id]] if request_id in self._by_request else self._found(session, keys)
        if len(found) == 1:  # of several that said the same so far, nobody knows which it is
            self._name(found[0], keys, tip.num_tokens)
            self._claims.place(found[0].pause, tip, max(found[0].pause.num_tokens, tip.num_tokens))

    # Returns

    def resumed(
        self,
        tenant: str,
        session: str,
        keys: Keys,
        *,
        kind: str = "",
        answers: bool | None = None,
        request_id: str | None = None,
    ) -> Pause | None:
        """A prompt has come -> the pause that it ends, a claim until it is dropped; None for a new task.

        kind: as in `Request`   answers: whether it brings a tool's result; None if nobody knows
        request_id: of the request that is itself continued, if it is
        """
        turn = self._by_request.get(request_id) if request_id is not None else None
        if turn is None:
            longer = (t for t in self._found(session, keys) if t.num_prompt < keys.num_tokens)
            turn = next((t for t in longer if t.pause.task.tenant == tenant), None)
        if turn is None and session:
            turn = self._edited(keys, tenant, session, kind, answers)
        if turn is None:
            return None
        pause = turn.pause
        if pause.tool is None:
            self._end_task(turn)
            return None
        pause.returned = True
        self._num_resumed += 1
        self._num_resident += 2 * pause.num_resumed >= pause.num_tokens
        task, seconds = pause.task, self._load.now - pause.began_s
        self._load.tools.add(task.tenant, pause.tool, seconds)
        self._load.outlook.returned(task.tenant, task.kind, task.num_calls - 1, seconds)
        self._forget(turn)
        return pause

    def keeps(self, claim: Claim) -> bool:
        """Whether what a claim lies on is spared."""
        assert isinstance(claim, Pause)
        if claim.running:
            return not self._load.host_bytes_per_s  # beside a second tier, the running state is enough
        return claim.returned or (claim.tool is not None and self._order.keeps(claim, self._load))

    @property
    def next_forgotten_s(self) -> float:
        """When a turn will be forgotten, if nothing comes before; infinite if none is remembered."""
        return next(iter(self._turns)).began_s + FORGOTTEN_AFTER_S if self._turns else math.inf

    def forget_old(self) -> None:
        """Forgets what will not be resumed any more."""
        while self._turns:
            turn = next(iter(self._turns.values()))
            age = self._load.now - turn.pause.began_s
            if len(self._turns) <= MOST_PAUSES and age < FORGOTTEN_AFTER_S:
                break
            self._num_forgotten += turn.pause.tool is not None
            self._end_task(turn)

    def _edited(self, keys: Keys, tenant: str, session: str, kind: str, answers: bool | None) -> _Turn | None:
        """The turn of a session that a prompt answers though it begins otherwise; nothing of it is of use then."""
        turns = self._by_session.get((keys.namespace, tenant, session), ())
        if len(turns) != 1 or turns[0].pause.task.kind != kind:
            return None
        if not (turns[0].first == _first_of(keys) if answers is None else answers):
            return None
        self._claims.drop(turns[0].pause)
        return turns[0]

    # Books

    def _found(self, session: str, keys: Keys) -> list[_Turn]:
        """The turns with the longest prefix of these; not those of another session than the one that is named."""
        if self._by_name:
            for num_pages in range(len(keys.pages), 0, -1):
                name = keys.names[num_pages]
                turns = self._by_name.get(name)
                if turns:
                    rest = keys.pages[num_pages] if num_pages < len(keys.pages) else keys.tail
                    known = [t for t in turns if rest.startswith(t.names[name])]
                    named = [t for t in known if t.session == session] if session else known
                    known = named or [t for t in known if not t.session]
                    if known:
                        return known
        return []

    def _name(self, turn: _Turn, keys: Keys, num_tokens: int) -> None:
        """Has a turn found by the first tokens of these."""
        num_pages, tail = divmod(num_tokens, TILE)
        if not num_pages or keys.names[num_pages] in turn.names:
            return
        name, rest = keys.names[num_pages], keys.pages[num_pages] if num_pages < len(keys.pages) else keys.tail
        turns = self._by_name.setdefault(name, [])
        if len(turns) < MOST_ALIKE:
            turn.names[name] = rest[: tail * TOKEN_BYTES]
            turns.append(turn)

    def _end_task(self, turn: _Turn) -> None:
        task = turn.pause.task
        self._load.outlook.ended(task.tenant, task.kind, task.num_calls)
        if task.guess_s is not None:
            self._load.outlook.took(task.tenant, task.kind, task.guess_s, task.spent_s)
        self._claims.drop(turn.pause)
        self._forget(turn)

    def _forget(self, turn: _Turn) -> None:
        del self._turns[turn.pause]
        self._num_paused -= turn.pause.tool is not None
        if self._by_request.get(turn.request_id) is turn:
            del self._by_request[turn.request_id]
        for name in turn.names:
            turns = self._by_name[name]
            turns.remove(turn)
            if not turns:
                del self._by_name[name]
        if turn.session:
            key = turn.session_key
            self._by_session[key].remove(turn)
            if not self._by_session[key]:
                del self._by_session[key]


def _first_of(keys: Keys) -> Name | None:
    """The name of the first page, if there is a full one."""
    return keys.names[1] if keys.pages else None
