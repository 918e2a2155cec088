"""Prompts that a prefix cache meets in practice, sent in a fixed order to one server.

cold        prompts never seen before: a system prompt and one user message
repeat      the cold prompts again, last one first
grow        one conversation; each turn sends everything so far, with the server's own replies.
            The first turn is sent but not counted: it is one more cold prompt
regenerate  the last turn of `grow` asked again
edit        the user message of a middle turn of `grow` replaced, from the last but one back to the second
shared      new conversations with one system prompt, one by one. The first is sent but not counted
burst       as many new conversations with that system prompt, all at once
return      the conversations of `shared` come back in their old order, each with one more message
decode      short prompts with long replies, as many at once as `Shape.streams` says

A scenario that needs an earlier one (see `NEEDS`) makes that one run too, without reporting it.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from hybrid_cache.errors import ConfigError

DECODE_PROMPT_TOKENS = 30
CALIBRATION_WORDS = (10, 110)
PLAIN_ENGLISH = """
about above across after again air almost along also always animal answer apple around arrive
away back bank become before begin behind below between bird black boat book both bread bridge
bring build button call carry center change child city clear climb close cloud coast cold color
come corner country cover cross dance dark day deep doctor door draw dream drive early earth
east enough evening every farm father field fire fish floor flower follow forest friend garden
glass gold grass green ground half hand happen head hear heavy high hill history hold home hope
horse hour house hundred ice idea inside island journey keep kind kitchen know lake land large
late laugh learn leave letter light line listen little long machine market meet middle minute
money month moon morning mother mountain move music name near never night north number ocean
often open order other over page paint paper park people picture place plain plant point power
quick quiet rain reach ready river road rock room round sail school sea second seed shape ship
short side silver simple sing sleep slow small snow song sound south space spring stand star
start stay stone store story street strong summer sun table teach thing think thread time today
together town travel tree under until valley village visit voice wait walk wall warm watch water
week west wheel white wind window winter wood word work world write year yellow young
"""
ENGLISH = tuple(PLAIN_ENGLISH.split())


class SentMessage(NamedTuple):
    role: str
    content: str


Conversation = tuple[SentMessage, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request; times are seconds of one clock, `None` is what the server did not say."""

    text: str
    sent: float
    first: float  # when the first text arrived
    last: float  # when the last text arrived
    done: float
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; `None` if the text came all at once."""
        return (self.last - self.first) / (self.completion_tokens - 1) if self.last > self.first else None


Ask = Callable[[Conversation, int], Awaitable[Reply]]  # a prompt and the number of tokens wanted


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths in tokens, and how many of everything."""

    system: int = 1000
    turn: int = 100
    reply: int = 16
    decode: int = 64
    samples: int = 3
    turns: int = 6
    conversations: int = 6
    streams: tuple[int, ...] = (1, 4)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Words to write prompts with, and how many tokens one of them is on average."""

    words: tuple[str, ...] = ENGLISH
    tokens_per_word: float = 1.0

    def text(self, rng: random.Random, tokens: int) -> str:
        """Random words, each with a space in front, about `tokens` long."""
        num_words = max(1, round(tokens / self.tokens_per_word))
        return "".join(f" {rng.choice(self.words)}" for _ in range(num_words))


def one_token_words(folder: Path) -> tuple[str, ...]:
    """The lower-case words of three or more letters that are one token after a space, in alphabetical order.

    Raises ConfigError for a folder without a tokenizer.json, or with too few such words.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file, --tokenizer wants a folder that has one")
    tokenizer = Tokenizer.from_file(str(path))
    marks = ("\u0120", "\u2581")  # how byte-level and SentencePiece vocabularies spell a space
    spelled = sorted({token[1:] for token in tokenizer.get_vocab() if token.startswith(marks)})
    candidates = [word for word in spelled if len(word) > 2 and word.isascii() and word.isalpha() and word.islower()]
    encoded = tokenizer.encode_batch([f" {word}" for word in candidates], add_special_tokens=False)
    words = tuple(word for word, encoding in zip(candidates, encoded, strict=True) if len(encoding.ids) == 1)
    if len(words) < 100:
        raise ConfigError(f"{path}: {len(words)} words of one token, at least 100 are needed")
    return words


async def calibrate(ask: Ask, words: tuple[str, ...], seed: str) -> Vocabulary:
    """Tokens per word as the server counts them, from two prompts of different length; 1 if it does not count."""
    rng, raw = random.Random(f"{seed} calibrate"), Vocabulary(words)
    few, many = [await ask((SentMessage("user", raw.text(rng, n)),), 1) for n in CALIBRATION_WORDS]
    if few.prompt_tokens is None or many.prompt_tokens is None:
        return raw
    more_words = CALIBRATION_WORDS[1] - CALIBRATION_WORDS[0]
    return replace(raw, tokens_per_word=max(0.1, (many.prompt_tokens - few.prompt_tokens) / more_words))


class Traffic:
    """One round of scenarios against one server; remembers the conversations that later scenarios come back to.

    Every scenario draws its text from a generator of its own, so leaving one out does not change the others.
    """

    def __init__(self, ask: Ask, vocabulary: Vocabulary, shape: Shape, seed: str) -> None:
        self.ask = ask
        self.vocabulary = vocabulary
        self.shape = shape
        self.seed = seed
        self.seen: list[Conversation] = []  # prompts of `cold`
        self.turns: list[Conversation] = []  # prompts of `grow`, each ends with a user message
        self.system: Conversation = ()  # the system prompt of `shared`
        self.parked: list[Conversation] = []  # conversations of `shared`, each ends with a reply

    async def cold(self) -> dict[str, list[Reply]]:
        rng = self._rng("cold")
        self.seen = [(*self._system(rng), self._user(rng)) for _ in range(self.shape.samples)]
        return {"cold": await self._one_by_one(self.seen)}

    async def repeat(self) -> dict[str, list[Reply]]:
        return {"repeat": await self._one_by_one(reversed(self.seen))}

    async def grow(self) -> dict[str, list[Reply]]:
        rng, replies = self._rng("grow"), list[Reply]()
        conversation = self._system(rng)
        for _ in range(self.shape.turns):
            self.turns.append((*conversation, self._user(rng)))
            replies.append(await self.ask(self.turns[-1], self.shape.reply))
            conversation = answered(self.turns[-1], replies[-1])
        return {"grow": replies[1:]}

    async def regenerate(self) -> dict[str, list[Reply]]:
        return {"regenerate": await self._one_by_one([self.turns[-1]] * self.shape.samples)}

    async def edit(self) -> dict[str, list[Reply]]:
        rng = self._rng("edit")
        edited = [(*prompt[:-1], self._user(rng)) for prompt in self.turns[-2:0:-1]]
        return {"edit": await self._one_by_one(edited)}

    async def shared(self) -> dict[str, list[Reply]]:
        rng = self._rng("shared")
        self.system = self._system(rng)
        prompts = [(*self.system, self._user(rng)) for _ in range(self.shape.conversations)]
        replies = await self._one_by_one(prompts)
        self.parked = [answered(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        return {"shared": replies[1:]}

    async def burst(self) -> dict[str, list[Reply]]:
        rng = self._rng("burst")
        prompts = [(*self.system, self._user(rng)) for _ in range(self.shape.conversations)]
        return {"burst": await self._at_once(prompts, self.shape.reply)}

    async def come_back(self) -> dict[str, list[Reply]]:
        rng = self._rng("return")
        return {"return": await self._one_by_one([(*old, self._user(rng)) for old in self.parked])}

    async def decode(self) -> dict[str, list[Reply]]:
        rng, measured = self._rng("decode"), dict[str, list[Reply]]()
        for streams in self.shape.streams:
            prompts = [(SentMessage("user", self.vocabulary.text(rng, DECODE_PROMPT_TOKENS)),) for _ in range(streams)]
            measured[f"decode x{streams}"] = await self._at_once(prompts, self.shape.decode)
        return measured

    def _rng(self, scenario: str) -> random.Random:
        return random.Random(f"{self.seed} {scenario}")

    def _system(self, rng: random.Random) -> Conversation:
        return (SentMessage("system", self.vocabulary.text(rng, self.shape.system)),)

    def _user(self, rng: random.Random) -> SentMessage:
        return SentMessage("user", self.vocabulary.text(rng, self.shape.turn))

    async def _one_by_one(self, prompts: Iterable[Conversation]) -> list[Reply]:
        return [await self.ask(prompt, self.shape.reply) for prompt in prompts]

    async def _at_once(self, prompts: Iterable[Conversation], max_tokens: int) -> list[Reply]:
        return await asyncio.gather(*(self.ask(prompt, max_tokens) for prompt in prompts))


SCENARIOS: dict[str, Callable[[Traffic], Awaitable[dict[str, list[Reply]]]]] = {
    "cold": Traffic.cold,
    "repeat": Traffic.repeat,
    "grow": Traffic.grow,
    "regenerate": Traffic.regenerate,
    "edit": Traffic.edit,
    "shared": Traffic.shared,
    "burst": Traffic.burst,
    "return": Traffic.come_back,
    "decode": Traffic.decode,
}
NEEDS = {"repeat": "cold", "regenerate": "grow", "edit": "grow", "burst": "shared", "return": "shared"}


def answered(prompt: Conversation, reply: Reply) -> Conversation:
    return (*prompt, SentMessage("assistant", reply.text))


async def play(
    traffic: Traffic, wanted: Collection[str], announce: Callable[[str], None]
) -> AsyncIterator[tuple[str, list[Reply]]]:
    """Runs the wanted scenarios and those they need; yields (name, replies) of the wanted ones."""
    needed = {NEEDS[name] for name in wanted if name in NEEDS}
    for name, scenario in SCENARIOS.items():
        if name not in wanted and name not in needed:
            continue
        announce(name)
        for row, replies in (await scenario(traffic)).items():
            if name in wanted:
                yield row, replies
