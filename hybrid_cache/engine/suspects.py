"""Which request makes steps fail: found by halves, and given up only when it fails in a step of its own."""

import logging
from collections.abc import Iterable, Mapping

MOST_IN_VAIN = 3  # searches that find nobody
QUIET = 1000  # steps without a failure, after which they are forgotten

logger = logging.getLogger("hybrid_cache")

Rank = tuple[int, int]  # of a sequence: arrival of its request, and which of its choices it is


class Suspects:
    """The requests of a step that failed, by their arrival. Holds integers only.

    Half of them run, and nothing beside them, until each has come as far as it was when it failed. If that goes well,
    the fault lies in the other half, and it is halved; if it fails, this half is. Requests that came last go first:
    they are most likely at fault, and have the least to repeat. Those who wait meanwhile are no suspects any more when
    the search is over. Where searches find nobody, as requests only fail together, fewer of them should run.
    """

    def __init__(self) -> None:
        self._now: tuple[int, ...] = ()  # may run; rising
        self._then: tuple[int, ...] = ()  # one of them is at fault if all of `_now` pass
        self._goals: dict[Rank, int] = {}  # tokens that a sequence has in its state when it has passed
        self._in_vain = 0  # searches in a row that found nobody
        self._quiet = 0  # steps since the last failure, searches left out

    def __bool__(self) -> bool:
        return bool(self._now)

    def may_run(self, arrival: int) -> bool:
        return not self._now or arrival in self._now

    def failed(self, goals: Mapping[Rank, int]) -> int | None:
        """A step has failed -> the request at fault, if there was only one in it.

        goals: of the sequences in it, tokens in their states had it not failed
        """
        arrivals = sorted({arrival for arrival, _ in goals})
        self._now, self._then, self._goals, self._quiet = (), (), {}, 0
        if len(arrivals) > 1:
            self._goals = dict(goals)
            self._halve(arrivals)
            return None
        self._in_vain = 0
        return arrivals[0] if arrivals else None

    def fewer(self, most: int) -> int:
        """How many sequences should run from now on, if so many may run today."""
        if self._in_vain < MOST_IN_VAIN or most == 1:
            return most
        self._in_vain = 0
        logger.warning("steps fail in which no request is at fault; from now on at most %d sequences run", most // 2)
        return most // 2

    def rest(self) -> None:
        """A step has passed while nobody is suspected."""
        self._quiet += 1
        if self._quiet == QUIET:
            self._in_vain = 0

    def try_alone(self, rank: Rank) -> None:
        """Nothing but this sequence runs until it ends."""
        self._now, self._then, self._goals = (rank[0],), (), {rank: 1 << 62}

    def reached(self, rank: Rank, num_tokens: int) -> None:
        """A step has passed, after which a sequence has so many tokens in its state."""
        if num_tokens >= self._goals.get(rank, num_tokens + 1):
            del self._goals[rank]

    def ended(self, rank: Rank) -> None:
        """A sequence has finished, or was aborted."""
        self._goals.pop(rank, None)

    def advance(self) -> bool:
        """Goes on when all that run have passed -> whether others may run than before, and not all may."""
        if not self._now or not self._unproven(self._now).isdisjoint(self._now):
            return False
        others = sorted(self._unproven(self._then))
        self._now, self._then = (), ()
        if not others:
            self._goals = {}
            self._in_vain += 1
            return False
        self._halve(others)
        return True

    def _unproven(self, arrivals: Iterable[int]) -> set[int]:
        return {arrival for arrival, _ in self._goals}.intersection(arrivals)

    def _halve(self, arrivals: list[int]) -> None:
        middle = len(arrivals) // 2
        self._now, self._then = tuple(arrivals[middle:]), tuple(arrivals[:middle])
