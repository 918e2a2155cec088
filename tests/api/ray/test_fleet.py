"""Which replica a request goes to."""

from array import array
from collections import Counter
from itertools import count

import pytest

from hybrid_cache.api.ray.call import Call
from hybrid_cache.api.ray.chain import Chain
from hybrid_cache.api.ray.fleet import LINGER_S, MOST_EXPECTED, Fleet

NUMBERS = count()
UNIT = 4  # of a chain's sizes to a token, as fleets guess at first


def call(*keys: int, own: int = 1, session: str = "", size: int = 400, names: tuple[str, ...] = ()) -> Call:
    """With `size` units for each message."""
    chain = Chain(keys, tuple(size * (i + 1) for i in range(len(keys))), own)
    return Call(next(NUMBERS), {}, b"", chain, session, names)


def digest(**held: int) -> dict[str, object]:
    """`k7=2`: two pages under key 7."""
    return {"digest": array("Q", [int(key[1:]) << 16 | pages for key, pages in held.items()]).tobytes()}


def fleet(**said: dict[str, object]) -> Fleet:
    made = Fleet(seed=1)
    made.hear(said, 0.0)
    return made


def route(to: Fleet, request: Call, now: float = 0.0) -> str:
    """As if it had been answered at once."""
    mark = to.rank(request, now)[0]
    to.answers(request)
    to.ended(request, now)
    return mark


def test_a_conversation_goes_where_most_of_it_can_be_resumed() -> None:
    known = fleet(a=digest(k1=2, k2=4), b=digest(k1=2, k2=4, k3=6), c=digest(k1=2))
    assert known.rank(call(1, 2, 3, 4), 0.0) == ["b", "a", "c"]


def test_it_follows_what_replicas_say() -> None:
    known = fleet(a=digest(k1=2, k2=4), b=digest(k1=2))
    assert route(known, call(1, 2, 3)) == "a"
    later = 2 * LINGER_S
    known.hear({"a": digest(k1=2), "b": digest(k1=2, k2=4)}, later)
    assert route(known, call(1, 2, 9), later) == "b"


def test_until_a_replica_must_have_spoken_it_is_expected_to_hold_what_it_was_sent() -> None:
    known = fleet(a={}, b={})
    first = route(known, call(1, 2, 3))
    assert all(route(known, call(1, 2, 4 + i), 1.0) == first for i in range(8))


def test_who_would_wait_longer_than_it_saves_goes_elsewhere() -> None:
    known = fleet(a=digest(k1=1, k2=4), b=digest(k1=1))
    long = call(1, 60, size=UNIT * 2000)
    long.to = "a"
    known.rank(long, 0.0)
    assert known.sent_to(long) == "a"
    asked = call(1, 2, 3, size=UNIT * 100)
    assert known.rank(asked, 0.0)[0] == "b"
    known.ended(asked, 0.0)
    known.answers(long)
    assert known.rank(call(1, 2, 4), 0.0)[0] == "a"


def test_a_short_wait_does_not_move_a_conversation() -> None:
    known = fleet(a=digest(k1=1, k2=8), b=digest(k1=1))
    short = call(1, 70, size=UNIT * 100)
    short.to = "a"
    known.rank(short, 0.0)
    assert known.rank(call(1, 2, 3), 0.0)[0] == "a"


def test_what_other_routers_sent_counts_until_it_has_been_read() -> None:
    known = fleet(a={**digest(k1=1, k2=2), "owed": 10_000, "rate": 1000.0}, b=digest(k1=1))
    asked = call(1, 2, 3)
    assert known.rank(asked, 1.0)[0] == "b"
    known.ended(asked, 1.0)
    known.hear({"a": {**digest(k1=1, k2=2), "owed": 10_000, "rate": 1000.0}, "b": digest(k1=1)}, 11.0)
    assert known.rank(call(1, 2, 4), 11.0)[0] == "a"


def test_equal_instructions_do_not_lead_all_conversations_to_one_replica() -> None:
    known = fleet(a={}, b={}, c={}, d={})
    went = Counter(route(known, call(1, 100 + i), float(i)) for i in range(200))
    assert set(went) == set("abcd")
    assert max(went.values()) <= 1.3 * min(went.values())


def test_with_many_instructions_conversations_stay_where_theirs_are() -> None:
    known = fleet(**{f"r{i}": {} for i in range(8)})
    places: dict[int, set[str]] = {}
    for i in range(800):
        system = i * 7 % 80
        places.setdefault(system, set()).add(route(known, call(system, 1000 + i), i * 0.01))
    assert sum(map(len, places.values())) / len(places) < 3  # of eight


def test_conversations_of_a_session_begin_at_the_same_replica_in_every_router() -> None:
    for session in ("s", "t", "u"):
        marks = {route(fleet(a={}, b={}, c={}), call(i, i + 1, session=session)) for i in range(0, 20, 2)}
        assert len(marks) == 1
    assert len({route(fleet(a={}, b={}, c={}), call(0, 1, session=str(i))) for i in range(30)}) == 3


def test_a_conversation_of_which_nothing_is_left_returns_to_its_replica() -> None:
    known = fleet(a={}, b={}, c={})
    first = route(known, call(1, 2))
    assert all(route(known, call(1, 2, 3 + i), 100.0 * (i + 1)) == first for i in range(10))


def test_what_a_request_names_decides() -> None:
    known = fleet(a=digest(k1=1, k2=9), b={})
    known.place(["resp_1"], "b")
    assert known.rank(call(1, 2, 3, names=("resp_1",)), 0.0) == ["b"]
    known.hear({"a": digest(k1=1, k2=9)}, 0.0)
    assert known.rank(call(1, 2, 4, names=("resp_1",)), 0.0) == ["a"]


def test_a_replica_that_could_not_answer_is_not_asked_again() -> None:
    known = fleet(a=digest(k1=1, k2=9), b={}, c={})
    asked = call(1, 2, 3)
    assert known.rank(asked, 0.0)[0] == "a"
    known.failed(asked)
    known.hear({"a": digest(k1=1, k2=9), "b": {}, "c": {}}, 0.0)  # it has not been missed yet
    assert "a" not in known.rank(asked, 0.0)


def test_who_was_sent_elsewhere_is_not_expected_at_the_first_one() -> None:
    known = fleet(a=digest(k1=1, k2=9), b={})
    asked = call(1, 2, 3)
    assert known.rank(asked, 0.0)[0] == "a"
    asked.tried.add("a")
    assert known.rank(asked, 0.0) == ["b"]
    known.ended(asked, 0.0)
    known.hear({"a": {}, "b": {}}, 0.1)
    assert known.rank(call(1, 2, 3, 4), 0.1)[0] == "b"


def test_nobody_is_there() -> None:
    assert fleet().rank(call(1), 0.0) == []


@pytest.mark.parametrize("bad", [{"digest": "text"}, {"owed": "many"}, {"rate": None}])
def test_stats_of_another_version_are_passed_over(bad: dict[str, object]) -> None:
    assert fleet(a=bad).rank(call(1, 2), 0.0) == ["a"]


def test_what_is_remembered_is_bounded() -> None:
    known = fleet(a={}, b={})
    for i in range(0, 3 * MOST_EXPECTED, 3):
        route(known, call(i, i + 1, i + 2))
    assert all(len(each.expected) <= MOST_EXPECTED for each in known._replicas.values())
    assert not known._flights
