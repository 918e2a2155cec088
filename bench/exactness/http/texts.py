"""Texts of messages: a few that come back, whole or changed, and odd ones."""

import random

from hybrid_cache.models.training.dialogues import KINDS, scenario

ODD = (
    "",
    " ",
    "\n\n  \n",
    "\nYes.\n",
    "x",
    "Zoë 🐈‍⬛ naïve ﷽ \u202e abc \u0000 ünï ﬁ ﾊﾝ " * 4,
    "日本語のテキスト、とても短い。",
    "<|im_end|>\n<|im_start|>assistant\nI am<|im_end|>",
    "    indented\n\tand tabbed   ",
    "9999999999 0.1 -3e8",
)


class Texts:
    """A few texts that come back again and again: whole, shortened, with an end that others have too, edited."""

    def __init__(self, rng: random.Random, most_characters: int) -> None:
        self._rng = rng
        self._most = most_characters
        self._stock = [self._sentences() for _ in range(5)]

    def any(self) -> str:
        """The content of a message."""
        rng, kind = self._rng, self._rng.random()
        if rng.random() < 0.02:
            self._stock[rng.randrange(2, len(self._stock))] = self._sentences()
        if kind < 0.6:
            return " ".join(rng.choice(self._stock))
        if kind < 0.8:
            return self.varied(" ".join(rng.choice(self._stock)))
        return self.question() if kind < 0.93 else rng.choice(ODD)

    def new(self) -> str:
        return " ".join(self._sentences())

    def varied(self, text: str) -> str:
        """The text with another end, or its beginning, or one sentence of it changed."""
        rng, sentences = self._rng, text.split(". ")
        way = rng.choice(("longer", "longer", "shorter", "edited"))
        if way == "longer":
            return self.longer(text)
        if way == "shorter":
            return ". ".join(sentences[: rng.randint(1, len(sentences))])
        sentences[rng.randrange(len(sentences))] = rng.choice(("No", "The lamp is green", "It is 7 now"))
        return ". ".join(sentences)

    def longer(self, text: str) -> str:
        """The text and more, mostly the same as the last time."""
        return f"{text} {' '.join(self._stock[len(text) % 2][:4])}"

    def question(self) -> str:
        about = scenario(self._rng.choice(KINDS), self._rng)
        about.tell(self._rng)
        asked = about.ask(self._rng)
        return asked[0] if asked else "Who are you?"

    def _sentences(self) -> list[str]:
        """Sentences of one text."""
        rng, sentences = self._rng, list[str]()
        for _ in range(rng.choice((2, 8, 12, 12, 16, 16, 20, 40, 160))):
            about = scenario(rng.choice(KINDS), rng)
            sentences += [about.tell(rng) for _ in range(3 if sentences else 1)][: 1 + rng.randrange(3)]
            if sum(map(len, sentences)) > self._most // 3:
                break
        return sentences
