"""The order of unordered messages: the best of all orders, found with few questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.policies.registry import make_policy
from hybrid_cache.cache.tree import CheckpointKind
from hybrid_cache.choreography.arrangement import Arrangement, Encoding, Fidelity, Order, Part
from hybrid_cache.choreography.order import MOST_ASKED, MOST_IN_VAIN, Known, best_order
from hybrid_cache.engine import intake
from hybrid_cache.engine.sequence import Prefill, grid_floor
from hybrid_cache.engine.sharing import soon_known
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models import loading
from hybrid_cache.request import TokenOutput
from hybrid_cache.tokens import Boundary, Prompt, TokenArray
from tests.choreography.conductor import Conductor, message
from tests.fakes import SumModel
from tests.models.checkpoints import CASES

HYBRID = next(case for case in CASES if case.name.startswith("bamba"))


def shared(a: TokenArray, b: TokenArray) -> int:
    """Tokens of the full pages that both begin with."""
    n = min(len(a), len(b))
    return grid_floor(int(np.append(a[:n] == b[:n], False).argmin()))


@dataclass
class Memory:
    """What a cache and a queue know, as the scheduler tells it: prompts, and how far each is kept or computed."""

    kept: list[tuple[TokenArray, int, tuple[int, ...]]] = field(default_factory=list)  # tokens with rows; with states
    coming: list[tuple[TokenArray, int]] = field(default_factory=list)  # tokens computed so far

    def known(self, tokens: TokenArray) -> Known:
        found, rows = 0, max((min(shared(tokens, prompt), grid_floor(n)) for prompt, n, _ in self.kept), default=0)
        for prompt, n, states in self.kept:
            found = max([found, *(at for at in states if at <= min(shared(tokens, prompt), n) and at < len(tokens))])
        on_the_way = [shared(tokens, prompt) for prompt, computed in self.coming if shared(tokens, prompt) > computed]
        return max([found, *on_the_way]), rows


def chosen(
    known: Callable[[TokenArray], Known], before: TokenArray, siblings: Sequence[TokenArray]
) -> tuple[list[int], int]:
    """The order that is chosen for siblings behind some tokens, and how often `known` was asked."""
    asked = []

    def counted(tokens: TokenArray) -> Known:
        asked.append(len(tokens))
        return known(tokens)

    ids = {str(i): i for i in range(len(siblings))}
    parts = (Part(len(before)), *(Part(len(siblings[i]), name) for name, i in ids.items()), Part(9, "last"), Part(3))
    prompt = Prompt(in_order(before, siblings, range(len(siblings))))
    prompt, moved = best_order(prompt, Arrangement(parts, Fidelity.EXACT, order=Order.ANY), counted)
    order = [ids[part.id] for part in moved.parts if part.id in ids]
    assert np.array_equal(prompt.tokens, in_order(before, siblings, order))
    assert moved.reordered == (order != sorted(order))
    return order, len(asked)


def best_of_all(memory: Memory, before: TokenArray, siblings: Sequence[TokenArray]) -> list[int]:
    def found(order: Sequence[int]) -> Known:
        return memory.known(np.concatenate([before, *(siblings[i] for i in order), np.zeros(1, np.int32)]))

    return list(max(permutations(range(len(siblings))), key=found))


def in_order(before: TokenArray, siblings: Sequence[TokenArray], order: Sequence[int]) -> TokenArray:
    return np.concatenate([before, *(siblings[i] for i in order), np.full(12, 5, np.int32)])


def random_memory(random: np.random.Generator, before: TokenArray, siblings: Sequence[TokenArray]) -> Memory:
    """Some prompts that begin with some of the siblings and then go on in their own way."""
    memory = Memory()
    for _ in range(random.integers(0, 6)):
        some = random.permutation(len(siblings))[: random.integers(0, len(siblings) + 1)]
        own = random.integers(1, 4, random.integers(0, 100)).astype(np.int32)
        prompt = np.concatenate([before, *(siblings[i] for i in some), own])
        n = int(random.integers(0, len(prompt) + 1))
        states = tuple(at for at in range(TILE, n + 1, TILE) if random.random() < 0.5)
        memory.kept.append((prompt, n, states))
        if random.random() < 0.5:
            memory.coming.append((prompt, grid_floor(n)))
    return memory


@pytest.mark.parametrize("longest", [20, 70, 200])
def test_the_best_of_all_orders_is_found_and_of_equal_ones_the_first(longest: int) -> None:
    random = np.random.default_rng(longest)
    moved = 0
    for _ in range(150):
        alphabet = int(random.choice([1, 2, 50]))  # few letters: messages that begin alike
        lengths = random.integers(1, longest + 1, random.integers(2, 6))
        before, *siblings = (
            random.integers(1, alphabet + 1, n).astype(np.int32) for n in (random.integers(1, 150), *lengths)
        )
        memory = random_memory(random, before, siblings)
        expected = best_of_all(memory, before, siblings)
        assert chosen(memory.known, before, siblings)[0] == expected
        moved += expected != sorted(expected)
    assert moved > 10


def messages(number: int, length: int) -> tuple[TokenArray, list[TokenArray]]:
    return message(500, 99), [message(length, seed) for seed in range(number)]


@pytest.mark.parametrize("number", [2, 5, 6, 40])
def test_where_nothing_is_known_each_sibling_is_asked_about_at_most_once(number: int) -> None:
    before, siblings = messages(number, 100)
    assert chosen(Memory().known, before, siblings) == (list(range(number)), 1)
    system_only = Memory(kept=[(before, len(before), (448,))])
    assert chosen(system_only.known, before, siblings) == (list(range(number)), number + 1)


@pytest.mark.parametrize("number", [5, 40])
def test_where_the_given_order_is_known_each_sibling_is_asked_about_once(number: int) -> None:
    before, siblings = messages(number, 100)
    prompt = in_order(before, siblings, range(number))
    memory = Memory(kept=[(prompt, len(prompt), tuple(range(TILE, len(prompt), TILE)))])
    assert chosen(memory.known, before, siblings) == (list(range(number)), number + 1)


@pytest.mark.parametrize("on_the_way", [False, True])
def test_another_order_of_many_siblings_is_found(on_the_way: bool) -> None:
    before, siblings = messages(40, 100)
    order = np.random.default_rng(1).permutation(40).tolist()
    prompt = in_order(before, siblings, order)
    states = tuple(range(TILE, len(prompt), TILE))
    memory = Memory(coming=[(prompt, 0)]) if on_the_way else Memory(kept=[(prompt, len(prompt), states)])
    found, asked = chosen(memory.known, before, siblings)
    assert found == order
    assert asked < 40 * 41 / 2 + MOST_IN_VAIN


@pytest.mark.parametrize("length", [5, 20, 100])
@pytest.mark.parametrize("number", [6, 40, 300])
def test_questions_are_bounded(number: int, length: int) -> None:
    before, siblings = messages(number, length)
    ways: list[Callable[[TokenArray], Known]] = [
        lambda tokens: (grid_floor(len(tokens)), 0),  # all orders are on their way
        lambda tokens: (0, grid_floor(min(len(tokens), 1000))),  # all orders begin well
        lambda tokens: (int(tokens.sum()) % 7 * TILE, grid_floor(len(tokens))),  # something better now and then
    ]
    for known in ways:
        order, asked = chosen(known, before, siblings)
        assert sorted(order) == list(range(number))
        assert asked <= MOST_ASKED


def test_short_messages_are_not_tried_in_all_orders() -> None:
    before, siblings = messages(40, 20)
    memory = Memory(kept=[(before, len(before), (448,))])
    order, asked = chosen(memory.known, before, siblings)
    assert order == list(range(40))
    assert asked <= 2 * MOST_IN_VAIN


def test_what_is_known_soon_is_the_longest_beginning_that_an_earlier_prompt_still_computes() -> None:
    """Next to a comparison with all of each prompt."""
    random = np.random.default_rng(0)
    for _ in range(200):
        cache = Books(SumModel.cache_spec, SumModel.prefill_cost, 1 << 22, make_policy("ours"))
        tokens = random.integers(1, 50, 300).astype(np.int32)
        lease = cache.acquire(cache.match("n", tokens), tokens)
        assert lease is not None
        at = int(random.integers(0, 5)) * TILE
        if at:
            cache.reserve_checkpoint(lease, at, CheckpointKind.MESSAGE_END)
        cache.publish(lease, 256)
        prefills = []
        for _ in range(random.integers(0, 5)):
            other = tokens[: random.integers(1, 301)].copy()
            other[random.integers(0, len(other)) :] = 0
            prefills.append(Prefill(str(random.choice(["n", "n", "m"])), other, bool(random.integers(0, 3)), True))
            prefills[-1].computed = int(random.choice([0, 64, 128, len(other)]))
        asked = tokens[: random.integers(0, 301)]
        mine = [p for p in prefills if p.publish and p.namespace == "n"]
        coming = [n for p in mine if (n := shared(p.tokens, asked)) > p.computed]
        match = cache.match("n", asked)
        sequences: list[Any] = [SimpleNamespace(prefill=prefill) for prefill in prefills]
        assert soon_known(cache, sequences, "n", asked) == (max([match.length, *coming]), match.shared)


def test_the_choices_of_a_request_share_the_order_of_the_first(folder, monkeypatch) -> None:
    conductor = Conductor(loading.load(folder(HYBRID), ops=dispatch.select()))
    asked: list[int] = []
    monkeypatch.setattr(intake, "best_order", lambda *args: asked.append(1) or best_order(*args))
    parts = [message(130, 8), message(140, 9), message(20, 10)]
    arrangement = conductor.arrangement(parts, Encoding.ALONE, Fidelity.EXACT, order=Order.ANY)
    conductor.engine.submit(replace(conductor.request(parts, arrangement, max_tokens=3), n=3))
    outputs = [output for _, output in conductor.engine.run_until_idle() if isinstance(output, TokenOutput)]
    answers = [[o.token for o in outputs if o.index == index] for index in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert len(asked) == 1


def test_marks_go_where_their_messages_go() -> None:
    before, siblings = messages(2, 100)
    turned = in_order(before, siblings, (1, 0))
    parts = (Part(500), Part(100, "0"), Part(100, "1"), Part(9, "last"), Part(3))
    marks = tuple(Boundary(at) for at in (500, 560, 600, 700, 712))
    prompt = Prompt(in_order(before, siblings, (0, 1)), marks)
    memory = Memory(kept=[(turned, len(turned), tuple(range(TILE, len(turned), TILE)))])
    moved, _ = best_order(prompt, Arrangement(parts, Fidelity.EXACT, order=Order.ANY), memory.known)
    assert np.array_equal(moved.tokens, turned)
    assert [mark.position for mark in moved.boundaries] == [500, 600, 660, 700, 712]


def test_siblings_that_end_in_one_page_are_not_asked_about() -> None:
    before, siblings = messages(2, 5)
    memory = Memory(kept=[(before, len(before), (448,))])
    assert chosen(memory.known, before, siblings) == ([0, 1], 1)


def test_where_siblings_are_many_the_best_one_comes_next() -> None:
    """The best order is the last of all: it is not found by trying one order after the other."""
    before, siblings = messages(40, 100)
    best = in_order(before, siblings, range(39, -1, -1))
    found, asked = chosen(lambda tokens: (shared(tokens, best), 1_000_000), before, siblings)
    assert found == list(range(39, -1, -1))
    assert asked <= MOST_ASKED


def test_questions_are_bounded_where_each_brings_something() -> None:
    before, siblings = messages(300, 100)
    asked: list[int] = []

    def better_each_time(tokens: TokenArray) -> Known:
        asked.append(len(tokens))
        assert len(asked) <= MOST_ASKED
        return len(asked), 1_000_000

    assert sorted(chosen(better_each_time, before, siblings)[0]) == list(range(300))
