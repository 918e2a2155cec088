"""Which request makes steps fail: found by halves, and given up only when it fails in a step of its own."""

from collections.abc import Iterable, Mapping

Rank = tuple[int, int]  # of a sequence: arrival of its request, and which of its choices it is


class Suspects:
    """The requests of a step that failed, by their arrival. Holds integers only.

    Half of them run, and nothing beside them, until each has come as far as it was when it failed. If that goes well,
    the fault lies in the other half, and it is halved; if it fails, this half is. Requests that came last go first:
    they are most likely at fault, and have the least to repeat. Those who wait meanwhile are no suspects any more when
    the search is over.
    """

    def __init__(self) -> None:
        self._now: tuple[int, ...] = ()  # may run; rising
        self._then: tuple[int, ...] = ()  # one of them is at fault if all of `_now` pass
        self._goals: dict[Rank, int] = {}  # tokens that a sequence has in its state when it has passed

    def __bool__(self) -> bool:
        return bool(self._now)

    def may_run(self, arrival: int) -> bool:
        return not self._now or arrival in self._now

    def failed(self, goals: Mapping[Rank, int]) -> int | None:
        """A step has failed -> the request at fault, if there was only one in it.

        goals: of the sequences in it, tokens in their states had it not failed
        """
        arrivals = sorted({arrival for arrival, _ in goals})
        self._now, self._then, self._goals = (), (), {}
        if len(arrivals) > 1:
            self._goals = dict(goals)
            self._halve(arrivals)
        return arrivals[0] if len(arrivals) == 1 else None

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
            return False
        self._halve(others)
        return True

    def _unproven(self, arrivals: Iterable[int]) -> set[int]:
        return {arrival for arrival, _ in self._goals}.intersection(arrivals)

    def _halve(self, arrivals: list[int]) -> None:
        middle = len(arrivals) // 2
        self._now, self._then = tuple(arrivals[middle:]), tuple(arrivals[:middle])
