"""Conversations that models of one engine read in turn, so that each goes on from what another has cached.

They grow turn by turn, with answers that were given; they fork, at the end of a message or inside one; prompts of an
activated adapter have its invocation anywhere, on the grid or off it, once or several times.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hybrid_cache.bench.exactness.asked import ROLES, Said
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import TokenArray

MOST = 2  # conversations at a time
WAYS = ("longer", "longer", "longer", "as it is", "other end", "cut")
BEHIND = (0, 1, 20, 62, 64, 130, 250)  # tokens behind an invocation


@dataclass(slots=True, eq=False)
class Talk:
    """What has been said, and who has read it last."""

    said: list[Said] = field(default_factory=list)
    reader: str = ""

    @property
    def num_tokens(self) -> int:
        return sum(len(message.tokens) for message in self.said)


class Talks:
    """Seeded; they draw on a source of their own."""

    def __init__(
        self,
        rng: random.Random,
        vocab: int,
        lengths: Sequence[int],
        longest: int,
        readers: Sequence[str],
        invocations: Sequence[tuple[int, ...]],
    ) -> None:
        """lengths: of messages; conversations begin with one of the longest   longest: tokens of a prompt
        readers: names of models, with an invocation of each; empty for those that are always on
        """
        self._rng, self._vocab, self._lengths, self._longest = rng, vocab, lengths, longest
        self._invocations = dict(zip(readers, invocations, strict=True))
        invoked = [name for name, invocation in self._invocations.items() if invocation]
        self._kin = ["", *invoked] if invoked else []  # the base, and those that go on from its entries
        self._talks: list[Talk] = []

    def next(self) -> tuple[list[Said], str]:
        """-> what is read next, and by which model: as a rule another one than the last."""
        rng, talk = self._rng, self._choose()
        reader = self._next_reader(talk.reader)
        said = self._varied(talk.said)
        if (invocation := self._invocations[reader]) and rng.random() < 0.6:
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                said.append(self._call(invocation, sum(len(message.tokens) for message in said)))
        talk.reader = reader
        if rng.random() < 0.7:  # else others do not go on from this
            talk.said = said
        return said, reader

    def heard(self, messages: Sequence[Said], answer: Said) -> None:
        """If it answers all that was said in one of them, that goes on from there."""
        for talk in self._talks:
            if len(talk.said) == len(messages) and all(a is b for a, b in zip(talk.said, messages, strict=True)):
                talk.said = [*talk.said, answer]

    def _choose(self) -> Talk:
        if len(self._talks) < MOST or self._rng.random() < 0.06:
            begin = [Said(self._tokens(max(self._lengths)), "system"), self._text()]
            self._talks = [*self._talks, Talk(begin, self._rng.choice(list(self._invocations)))][-MOST:]
            return self._talks[-1]
        talk = self._rng.choice(self._talks)
        while talk.num_tokens > self._longest // 2 and len(talk.said) > 1:
            talk.said = talk.said[: max(len(talk.said) // 2, 1)]
        return talk

    def _next_reader(self, last: str) -> str:
        rng = self._rng
        if last in self._kin and rng.random() < 0.5:
            return rng.choice(self._kin)
        others = [name for name in (*self._invocations, *self._kin) if name != last]
        return rng.choice(others) if rng.random() < 0.8 else last

    def _varied(self, said: Sequence[Said]) -> list[Said]:
        rng, way = self._rng, self._rng.choice(WAYS)
        if way == "as it is":
            return [*said]
        if way == "other end":
            said = said[: rng.randint(1, len(said))]
        elif way == "cut":
            *said, last = said
            said = [*said, replace(last, tokens=last.tokens[: rng.randint(1, len(last.tokens))])]
        return [*said, self._text()]

    def _text(self) -> Said:
        return Said(self._tokens(self._rng.choice(self._lengths)), self._rng.choice(ROLES))

    def _call(self, invocation: tuple[int, ...], before: int) -> Said:
        """A message with an invocation, which begins at a place that may be next to the grid. before: tokens"""
        rng = self._rng
        first = rng.choice((0, 0, rng.randrange(TILE), -before % TILE, (1 - before) % TILE, (-1 - before) % TILE))
        parts = (
            self._tokens(first),
            np.array(invocation, np.int32),
            self._tokens(min(rng.choice(BEHIND), self._longest // 4)),
        )
        return Said(np.concatenate(parts), "user")

    def _tokens(self, length: int) -> TokenArray:
        return np.array([self._rng.randrange(self._vocab) for _ in range(length)], np.int32)
