"""Random requests of every kind that a server takes: they share, branch, repeat, grow, and refer to each other."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from hybrid_cache.bench.exactness.asked import ACTIVATED, ROLES, VARIANT, Asked, Said, Some, stop_at
from hybrid_cache.bench.exactness.talks import Talks
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.cache.policies.registry import policy_names
from hybrid_cache.choreography.arrangement import (
    SEAMS,
    Arrangement,
    Composition,
    Encoding,
    Fidelity,
    Order,
    Part,
    Positions,
    closed,
    message_id,
)
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.namespaces import namespace_of
from hybrid_cache.request import CacheMode, Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, BoundaryKind, Prompt, TokenArray

T = TypeVar("T")

KEEPING = ("learned", "flops-per-byte", "lru")  # policies that keep what layers are given

NO_VARIANTS: Mapping[str, HybridModel] = MappingProxyType({})

SALTS = ("", "", "", "", "a")
BEHIND = (0, 0, 1, 20, 62, 64, 90)  # tokens behind an invocation
OPENING, CLOSING = 3, 2  # tokens
KINDS = ("as it is", "as it is", "as it is", "continued", "continued", "longer", "other end", "shuffled", "changed")
MOST_ANSWERS = 8


@dataclass(frozen=True, slots=True)
class Phase:
    """Sizes of what is asked. A budget is the number of the longest sequences that it holds."""

    name: str
    requests: int  # in a round
    systems: tuple[int, ...]  # tokens of messages that prompts begin with
    messages: tuple[int, ...]  # tokens of others
    more: int  # tokens that go on where a message ended
    longest: int  # tokens of a prompt
    answers: tuple[int, ...]  # tokens
    budgets: tuple[int, ...]  # sequences; none: two prompts, and one answer's pages to share
    stopped: float = 0.25  # share of requests that something may stop early
    arrivals: tuple[int, ...] = (0,)  # steps between two requests; -1 is until nobody waits and a little more
    in_turn: float = 0.3  # share of requests of conversations that several models read in turn, if there are any
    named: float = 0.4  # share of these that name their messages
    usual: int = 4  # requests with the usual cache mode, to one with each of all modes
    scored: float = 0.1  # share of requests whose prompt is scored
    policies: tuple[str, ...] = (*policy_names(), Learned.name, Learned.name)

    @property
    def most_tokens(self) -> int:
        return self.longest + max(self.answers)

    @property
    def sharing(self) -> "Phase":
        """The same where models often find what others have cached: one has been answered when the next one asks."""
        return replace(
            self,
            in_turn=max(self.in_turn, 0.7),
            budgets=self.budgets[-3:],
            policies=KEEPING,
            arrivals=(0, 2, -1, -1, -1, -1),
        )


GRID = (63, 64, 65, 128)
ARRIVALS = (0, 0, 0, 1, 2, 4, -1, -1)
MIXED = Phase(
    "mixed",
    requests=24,
    systems=(70, 130),
    messages=(1, 3, 20, 40, 70, 90, 150, *GRID),
    more=80,
    longest=300,
    answers=(0, 1, 1, 2, 3, 8, 20, 70),
    budgets=(2, 4, 12, 40, 80),
    arrivals=ARRIVALS,
)
SHARED = replace(
    MIXED,
    name="shared",
    in_turn=0.93,
    named=0.1,
    usual=30,
    scored=0.02,
    requests=40,
    messages=(20, 90, 150, 200, 250, 290, *GRID),
    longest=900,
    answers=(0, 1, 2, 8, 20),
    budgets=(12, 30, 100),
).sharing
TIGHT = Phase(
    "tight",
    requests=10,
    systems=(30,),
    messages=(10, 30, 40, 64),
    more=30,
    longest=100,
    answers=(40, 70, 100),
    budgets=(),
    stopped=0.0,
)
LONG = Phase(
    "long",
    requests=8,
    systems=(1500, 6000),
    messages=(300, 1000, 2048, 2500, 4000),
    more=900,
    longest=16_000,
    answers=(0, 1, 5, 20),
    budgets=(2, 6),
    arrivals=ARRIVALS,
)


def salt_of(request: Request) -> str:
    """Whose conversations a request is one of: a salt's, or another model's."""
    return request.model if request.model.startswith(VARIANT) else request.namespace


class Mix:
    """Seeded requests for one engine. What it has asked, and what was answered, comes again in later ones."""

    def __init__(
        self, model: HybridModel, phase: Phase, rng: random.Random, variants: Mapping[str, HybridModel] = NO_VARIANTS
    ) -> None:
        self._rng = rng
        others = [name for name, variant in variants.items() if not variant.invocation]
        self._invocation = variants[ACTIVATED].invocation if ACTIVATED in variants else ()
        self._calls = random.Random(phase.name)  # of an activated adapter
        self._read: dict[str, list[Said]] = {}  # what came before the last one, by salt
        self._salts = (*SALTS, *others)
        self._vocab = model.vocab_size
        self._compositions = list(Composition)
        self._longest = min(phase.longest, model.max_length - max(phase.answers) - 1)
        self._phase = phase
        self._namespaces = {
            salt: namespace_of("" if salt in variants else salt, variants.get(salt, model).fingerprint)
            for salt in dict.fromkeys(self._salts)
        }
        self._openings = {role: self._tokens(OPENING) for role in ("assistant", "critic")}
        self._closing = tuple(self._tokens(CLOSING).tolist())
        self._systems = [Said(self._tokens(length), "system") for length in phase.systems]
        self._texts = [self._text() for _ in range(6)]
        self._texts += [self._changed(said) for said in self._texts[:3]]
        if self._invocation:
            self._texts += [self._call() for _ in range(2)]
        self._more = self._tokens(phase.more)
        self._talks = self._talks_of(variants) if variants else None
        self._themes: dict[str, list[Said]] = {}
        self._answers: dict[str, list[Said]] = {salt: [] for salt in self._namespaces}
        self._count = 0

    def _talks_of(self, variants: Mapping[str, HybridModel]) -> Talks:
        readers = {"": (), **{name: variant.invocation for name, variant in variants.items()}}
        rng = random.Random()
        rng.setstate(self._rng.getstate())  # drawn apart: what a seed mixes besides stays the same
        lengths = [length for length in self._phase.messages if length < self._longest // 3]
        return Talks(rng, self._vocab, lengths, self._longest - OPENING, [*readers], [*readers.values()])

    @property
    def namespaces(self) -> Mapping[str, str]:
        """By salt."""
        return self._namespaces

    def next(self) -> Asked:
        rng = self._rng
        self._count += 1
        in_turn = self._talks is not None and self._calls.random() < self._phase.in_turn
        salt, model, messages = self._in_turn() if in_turn else self._of_its_own()
        opening = self._tokens(0) if rng.random() < 0.2 else rng.choice(list(self._openings.values()))
        sampling = self._sampling()
        if rng.random() < (self._phase.named if in_turn else 0.75):
            return self._arranged(salt, model, messages, opening, sampling)
        tokens, marks = self._joined(messages, opening)
        if rng.random() < (0.05 if in_turn else 0.2):  # exactly on the grid, or next to it
            tokens = tokens[: max(1, len(tokens) // TILE * TILE + rng.choice((-1, 0, 1)))]
        marks = tuple(mark for mark in marks if mark.position <= len(tokens))
        return Asked(self._request(salt, model, Prompt(tokens, marks), sampling), tuple(messages), opening)

    def heard(self, asked: Asked) -> None:
        """A request was answered: others may refer to it."""
        salt, arrangement = salt_of(asked.request), asked.request.arrangement
        if len(asked.opening):
            tokens = closed(np.concatenate([asked.opening, asked.answer(0)]), self._closing)
            context = arrangement.context if arrangement else ()
            answer = Said(tokens, "assistant", context, is_answer=True)
            _keep(self._answers[salt], answer)
            if self._talks is not None:
                self._talks.heard(asked.messages, answer)

    # Conversations

    def _in_turn(self) -> tuple[str, str, list[Said]]:
        """-> a salt, a model, and what comes next in a conversation that several models read."""
        assert self._talks is not None
        messages, model = self._talks.next()
        return model if model.startswith(VARIANT) else "", model, self._fitting(messages)

    def _of_its_own(self) -> tuple[str, str, list[Said]]:
        """-> a salt, a model, and what comes next in a conversation of theirs, or at times of another's."""
        rng = self._rng
        salt = rng.choice(self._salts)
        if rng.random() < 0.1:
            self._texts[rng.randrange(len(self._texts))] = self._text()
        model = salt if salt.startswith(VARIANT) else ""
        messages = self._messages("" if model and rng.random() < 0.4 else salt)  # what another model may have read
        if self._invocation and not model and self._calls.random() < 0.4:
            if self._calls.random() < 0.8:
                messages = self._read.get(salt, messages)
            self._read[salt] = messages
            messages, model = self._called(messages), ACTIVATED
        return salt, model, messages

    # Messages

    def _tokens(self, length: int) -> TokenArray:
        return np.array([self._rng.randrange(self._vocab) for _ in range(length)], np.int32)

    def _text(self) -> Said:
        return Said(self._tokens(self._rng.choice(self._phase.messages)), self._rng.choice(ROLES))

    def _call(self) -> Said:
        """A message that begins with the invocation of an adapter."""
        more = self._tokens(min(self._calls.choice(BEHIND), self._longest // 4))
        return Said(np.concatenate([np.array(self._invocation, np.int32), more]), "user")

    def _called(self, messages: list[Said]) -> list[Said]:
        """As a rule they end in an invocation; sometimes at one that they have, or nowhere."""
        if self._calls.random() < 0.2:
            return messages
        room = self._longest - OPENING - self._longest // 4 - len(self._invocation)  # whatever the call, as many
        while messages and sum(len(message.tokens) for message in messages) > room:
            messages = messages[:-1]
        return [*messages, self._call()]

    def _messages(self, salt: str) -> list[Said]:
        """What one prompt holds: the theme of its tenant, with a variation."""
        rng = self._rng
        if salt not in self._themes or rng.random() < 0.15:
            self._themes[salt] = self._theme(salt)
        said, kind = list(self._themes[salt]), rng.choice(KINDS)
        if kind == "longer":
            said += self._some(salt)
        elif kind == "other end":
            said = said[: rng.randrange(len(said) + 1)] + self._some(salt)
        elif kind == "shuffled":
            rng.shuffle(said)
        elif kind == "continued":
            said[-1] = replace(said[-1], tokens=np.concatenate([said[-1].tokens, self._more]))
        elif kind == "changed":
            place = rng.randrange(len(said))
            said[place] = self._changed(said[place])
        return self._fitting(said)

    def _theme(self, salt: str) -> list[Said]:
        """A new one, or the last one and more, as a conversation goes on."""
        rng, last = self._rng, self._themes.get(salt)
        if last is None or rng.random() < 0.6:
            last = [rng.choice(self._systems)] if rng.random() < 0.7 else []
        return self._fitting([*last, *self._some(salt)])

    def _some(self, salt: str) -> list[Said]:
        """A few texts, or an answer and then a text."""
        rng = self._rng
        if self._answers[salt] and rng.random() < 0.5:
            return [rng.choice(self._answers[salt]), rng.choice(self._texts)]
        return rng.sample(self._texts, rng.choice((1, 2, 2, 3)))

    def _changed(self, said: Said) -> Said:
        """The same and more, less of it, or with another token."""
        rng, tokens = self._rng, said.tokens
        kind = rng.choice(("more", "more", "less", "edited"))
        if kind == "more":
            tokens = np.concatenate([tokens, self._tokens(rng.choice((1, 20, 64, 130)))])
        elif kind == "less":
            tokens = tokens[: rng.randint(1, len(tokens))]
        else:
            tokens = tokens.copy()
            tokens[rng.randrange(len(tokens))] = rng.randrange(self._vocab)
        return Said(tokens, said.role)

    def _fitting(self, said: Sequence[Said]) -> list[Said]:
        """As many as a prompt has room for, at least one, of which there may be only the start."""
        room, found = self._longest - OPENING, list[Said]()
        for message in said:
            if len(message.tokens) > room:
                break
            found.append(message)
            room -= len(message.tokens)
        return found or [Said(said[0].tokens[:room], said[0].role)]

    # Requests

    def _arranged(
        self, salt: str, model: str, messages: Sequence[Said], opening: TokenArray, sampling: SamplingParams
    ) -> Asked:
        rng, namespace = self._rng, self._namespaces[salt]
        tokens, marks = self._joined(messages, opening)
        usual, in_place, named = rng.random() < 0.7, rng.random() < 0.3, dict[str, TokenArray]()
        parts, ids = list[Part](), list[str]()
        for message in messages:
            context = tuple(ids) if in_place and not message.is_answer else message.context
            name = message_id(namespace, message.tokens, context)
            named[name] = message.tokens
            part = Part(len(message.tokens), name, keep=tuple(ids) == context, role=message.role)
            part = replace(part, encoding=Encoding.IN_PLACE if context else Encoding.ALONE)
            parts.append(part if usual else self._unusual(part))
            ids.append(name)
        if len(opening):
            parts.append(Part(len(opening)))
        arrangement = Arrangement(
            tuple(parts),
            rng.choice((*Fidelity, *[Fidelity.COMPOSED] * 2)),
            rng.choice((0, 0, *SEAMS)),
            rng.choice(self._compositions),
            rng.choice((*Positions, Positions.CONSECUTIVE)),
            rng.choice((*Order, Order.ANY)),
            closing=self._closing if len(opening) and rng.random() < 0.6 else None,
            answer_start=len(tokens) - len(opening),
            context=tuple(ids),
        )
        request = self._request(salt, model, Prompt(tokens, marks), sampling)
        return Asked(replace(request, arrangement=arrangement), tuple(messages), opening, named)

    def _unusual(self, part: Part) -> Part:
        rng = self._rng
        name = part.id if rng.random() < 0.85 else ""
        return replace(part, id=name, encoding=rng.choice(list(Encoding)), keep=rng.random() < 0.7)

    def _joined(self, messages: Sequence[Said], opening: TokenArray) -> tuple[TokenArray, tuple[Boundary, ...]]:
        """-> the tokens of a prompt, and the ends of its messages; some are marked, some places inside are, too."""
        rng, tokens = self._rng, np.concatenate([*(message.tokens for message in messages), opening])
        ends = np.cumsum([len(message.tokens) for message in messages]).tolist()
        places = {end: message.role for end, message in zip(ends, messages, strict=True)}
        if rng.random() < 0.4:
            return tokens, ()
        for _ in range(rng.choice((0, 0, 1, 3))):
            places.setdefault(rng.randint(1, len(tokens)), "")
        return tokens, tuple(self._mark(place, role) for place, role in sorted(places.items()))

    def _mark(self, position: int, role: str) -> Boundary:
        kind = self._rng.choice((BoundaryKind.MESSAGE_END, BoundaryKind.MESSAGE_END, BoundaryKind.EXPLICIT))
        ttl_s = self._rng.choice((None, None, 2.0, 60.0)) if kind is BoundaryKind.EXPLICIT else None
        return Boundary(position, kind, ttl_s, role)

    def _request(self, salt: str, model: str, prompt: Prompt, sampling: SamplingParams) -> Request:
        rng = self._rng
        mode = rng.choice((*CacheMode, *[CacheMode.IMPLICIT] * self._phase.usual))
        if mode is CacheMode.EXPLICIT and rng.random() < 0.4:
            prompt = Prompt(prompt.tokens, tuple(replace(b, kind=BoundaryKind.MESSAGE_END) for b in prompt.boundaries))
        make_stopper = stop_at(rng.randrange(7)) if rng.random() < self._phase.stopped / 2 else None
        number = rng.choice((1, 1, 1, 1, 1, 1, 2, 3))
        tenant, divisor = f"tenant {self._count % 3}", rng.randrange(2, 6)
        constraint = partial(Some, self._vocab, divisor) if rng.random() < 0.15 else None
        name, session = f"r{self._count}", ("", "", "s", "t")[self._count % 4]
        choice = number, "" if salt == model else salt, mode, make_stopper, constraint
        return Request(name, prompt, sampling, *choice, tenant=tenant, session=session, model=model)

    def _sampling(self) -> SamplingParams:
        rng, most = self._rng, self._rng.choice(self._phase.answers)
        stopped, penalised = rng.random() < self._phase.stopped, rng.random() < 0.25
        return SamplingParams(
            temperature=rng.choice((0.0, 0.0, 1.0)),
            top_p=rng.choice((1.0, 1.0, 0.9)),
            top_k=rng.choice((0, 0, 5)),
            min_p=rng.choice((0.0, 0.0, 0.05)),
            presence_penalty=rng.choice((0.0, 0.5, -0.5)) if penalised else 0.0,
            frequency_penalty=rng.choice((0.0, 0.3)) if penalised else 0.0,
            repetition_penalty=rng.choice((1.2, 0.8, 1.0)) if penalised else 1.0,
            logit_bias={token: rng.choice((-5.0, 3.0)) for token in self._tokens(3).tolist()}
            if rng.random() < 0.1
            else {},
            seed=rng.randrange(1 << 30),
            max_tokens=most,
            min_tokens=rng.choice((0, 0, min(5, most))),
            stop_token_ids=(*self._closing[:1], *self._tokens(min(self._vocab // 40, 100)).tolist()) if stopped else (),
            logprobs=rng.choice((None, 0, 3)),
            prompt_logprobs=rng.choice((0, 2)) if rng.random() < self._phase.scored else None,
        )


def _keep(kept: list[T], new: T) -> None:
    kept.append(new)
    del kept[:-MOST_ANSWERS]
