"""Plans, before anything runs."""

import pytest

from hybrid_cache.choreography.arrangement import Arrangement, Fidelity, Part, Positions
from hybrid_cache.choreography.plan import Action, exact_plan, make_plan, plan_after
from hybrid_cache.errors import RequestError
from hybrid_cache.spec import PrefillCost

COST = PrefillCost(per_token=10.0, per_token_per_position=0.1)


def arrangement(lengths=(100, 50, 80), **options):
    parts = tuple(Part(n, f"m{i}") for i, n in enumerate(lengths))
    return Arrangement((*parts, Part(7)), Fidelity.COMPOSED, **options)


def plan(stored=("m0", "m1", "m2"), prefix=0, states=True, **options):
    return make_plan(arrangement(**options), prefix, stored.__contains__, COST, states=states)


def actions(p):
    return [item.action for item in p.items]


def test_stored_messages_are_composed_and_the_rest_is_computed():
    p = plan(stored=("m0", "m2"))
    assert actions(p) == [Action.COMPOSED, Action.COMPUTED, Action.COMPOSED, Action.COMPUTED]
    assert p.computed == 57
    assert p.flops == COST.flops(100, 150) + COST.flops(230, 237)
    assert p.flops_of_encoding == COST.flops(0, 237)
    assert p.tokens(Action.COMPOSED) == 180


def test_without_states_they_are_relocated():
    assert actions(plan(states=False))[:3] == [Action.RELOCATED] * 3


def test_a_seam_is_computed_and_short_messages_are_nothing_but_seam():
    p = plan(lengths=(100, 16, 80), seam=16)
    assert [item.computed for item in p.items] == [16, 16, 16, 7]
    assert actions(p) == [Action.COMPOSED, Action.COMPUTED, Action.COMPOSED, Action.COMPUTED]


def test_a_prefix_is_used_where_that_is_cheaper():
    assert plan(prefix=128).prefix == 0  # it ends inside a stored message: 22 tokens of that would be computed
    behind = plan(prefix=128, stored=("m2",))
    assert behind.prefix == 128
    assert actions(behind) == [Action.REUSED, Action.COMPUTED, Action.COMPOSED, Action.COMPUTED]
    assert behind.items[1].computed == 22
    assert {action: behind.tokens(action) for action in Action} == {
        Action.REUSED: 128,  # 28 of them of the message that is computed to its end
        Action.RELOCATED: 0,
        Action.COMPOSED: 80,
        Action.COMPUTED: 29,
    }


def test_a_message_that_a_prefix_ends_in_is_computed_to_its_end():
    p = plan_after(arrangement(), 128, lambda name: True, COST, states=True)
    assert actions(p) == [Action.REUSED, Action.COMPUTED, Action.COMPOSED, Action.COMPUTED]
    assert [item.computed for item in p.items] == [0, 22, 0, 7]


def test_a_prefix_is_of_no_use_to_siblings_at_one_place():
    assert plan(prefix=192, stored=(), positions=Positions.LEFTMOST).prefix == 0


def test_the_last_part_is_always_computed():
    whole = Arrangement((Part(5, "m0"), Part(6, "m1")), Fidelity.COMPOSED)
    p = make_plan(whole, 0, lambda name: True, COST, states=True)
    assert actions(p) == [Action.COMPOSED, Action.COMPUTED]


def test_nothing_stored_is_said():
    p = plan(stored=())
    assert p.fidelity is Fidelity.COMPOSED
    assert "nothing is stored" in p.why


def test_an_exact_plan_computes_all_behind_the_prefix():
    p = exact_plan(Fidelity.COMPOSED, ["a", "b", ""], [100, 50, 7], 128, COST, "no way")
    assert p.fidelity is Fidelity.EXACT
    assert actions(p) == [Action.REUSED, Action.COMPUTED, Action.COMPUTED]
    assert p.flops == COST.flops(128, 157)
    assert "no way" in str(p)


def test_plans_can_be_read():
    text = str(plan(stored=("m0", "m2"), seam=16))
    assert text.splitlines()[0].startswith("composed: 89 of 237 tokens computed")
    assert "the first 16 tokens again" in text


def test_arrangements_are_checked():
    with pytest.raises(RequestError, match="seam is 5, must be one of 0, 8, 16, 32, 64"):
        arrangement(seam=5)
    with pytest.raises(RequestError, match="237 tokens, the prompt 200"):
        arrangement().check(200)
