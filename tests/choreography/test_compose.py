"""The ways of putting effects together, against going through all orders by hand."""

import itertools

import pytest
import torch

from hybrid_cache.choreography.arrangement import Composition
from hybrid_cache.device.compose import compose
from hybrid_cache.device.effects import ChannelDecay, Decay, MatrixTransition

RNG = torch.Generator().manual_seed(3)


def decays(count):
    """Mamba-2: [H] logarithms, states [H, P, N]."""
    return Decay(), [(-torch.rand(3, generator=RNG), torch.randn(3, 4, 5, generator=RNG)) for _ in range(count)]


def channels(count):
    """Mamba-1: [channels] times, states [channels, N]."""
    transition = ChannelDecay(-torch.rand(6, 4, generator=RNG))
    return transition, [(torch.rand(6, generator=RNG), torch.randn(6, 4, generator=RNG)) for _ in range(count)]


def matrices(count):
    """Delta nets: [H, N, N], states [H, P, N]."""
    pairs = [(torch.randn(2, 4, 4, generator=RNG) / 3, torch.randn(2, 3, 4, generator=RNG)) for _ in range(count)]
    return MatrixTransition(), pairs


def numbers(count):
    """RG-LRU: [channels] logarithms, states [channels]."""
    pairs = [(-torch.rand(6, generator=RNG), torch.randn(6, generator=RNG)) for _ in range(count)]
    return Decay(), pairs


KINDS = [decays, channels, matrices, numbers]


def composed(how, transition, h, effects):
    state = h.clone()
    ps, sums = zip(*effects, strict=True)
    compose(how, transition, state, torch.stack(ps), sums)
    return state


def by_hand(transition, h, effects):
    for p, s in effects:
        h = transition.apply(p, h) + s
    return h


@pytest.mark.parametrize("kind", KINDS)
def test_ordered_is_one_message_after_the_other(kind):
    transition, effects = kind(4)
    h = torch.randn_like(effects[0][1])
    torch.testing.assert_close(composed(Composition.ORDERED, transition, h, effects), by_hand(transition, h, effects))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", Composition)
def test_from_zero_whatever_the_state_holds(how, kind, count):
    transition, effects = kind(count)
    if how is Composition.PERMUTATIONS and not transition.commutes:
        return
    ps, sums = zip(*effects, strict=True)
    state = torch.full_like(sums[0], torch.nan)
    compose(how, transition, state, torch.stack(ps), sums, from_zero=True)
    torch.testing.assert_close(state, composed(how, transition, torch.zeros_like(state), effects))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_rotations_are_the_mean_over_all_rotations(kind, count):
    transition, effects = kind(count)
    h = torch.randn_like(effects[0][1])
    every = [by_hand(transition, h, effects[i:] + effects[:i]) for i in range(count)]
    found = composed(Composition.ROTATIONS, transition, h, effects)
    torch.testing.assert_close(found, sum(every) / count)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("kind", [decays, channels, numbers])
def test_permutations_are_the_mean_over_all_orders(kind, count):
    transition, effects = kind(count)
    h = torch.randn_like(effects[0][1])
    every = [by_hand(transition, h, order) for order in itertools.permutations(effects)]
    found = composed(Composition.PERMUTATIONS, transition, h, effects)
    torch.testing.assert_close(found, sum(every) / len(every), atol=1e-5, rtol=1e-5)


def test_permutations_do_not_underflow():
    transition = Decay()
    effects = [(torch.full((2,), -80.0), torch.ones(2, 3, 4)) for _ in range(60)]
    found = composed(Composition.PERMUTATIONS, transition, torch.zeros(2, 3, 4), effects)
    torch.testing.assert_close(found, torch.ones(2, 3, 4))  # each message is last in a share 1 / 60 of the orders


@pytest.mark.parametrize("kind", KINDS)
def test_mean_and_last(kind):
    transition, effects = kind(3)
    h = torch.randn_like(effects[0][1])
    alone = [by_hand(transition, h, [effect]) for effect in effects]
    torch.testing.assert_close(composed(Composition.MEAN, transition, h, effects), sum(alone) / 3)
    torch.testing.assert_close(composed(Composition.LAST, transition, h, effects), alone[-1])


@pytest.mark.parametrize("how", list(Composition))
def test_one_message_is_itself_in_every_way(how):
    transition, effects = matrices(1)
    h = torch.randn_like(effects[0][1])
    torch.testing.assert_close(composed(how, transition, h, effects), by_hand(transition, h, effects))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_message_adds_is_what_is_left_without_the_state_before_it(kind):
    transition, [(p, s)] = kind(1)
    before = torch.randn_like(s)
    h = transition.apply(p, before) + s
    transition.take_away(h, p, before)
    torch.testing.assert_close(h, s)
