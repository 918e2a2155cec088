"""A conversation with the cache and without, side by side: what is computed of each prompt, and what it takes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console

from hybrid_cache.api.llm import LLM, Completion
from hybrid_cache.errors import HybridCacheError

RULES = "You keep in mind what people tell you about boxes, and answer in one short sentence. "
RULES_TIMES = 24  # instructions of about 400 tokens, as agents and assistants have them
LINES = ("The box has 4 pencils in it.", "Leo takes 2 pencils from the box.", "How many pencils are in the box?")
EDITED = "Leo takes 1 pencil from the box."
MOST_TOKENS = 32
BAR = 24  # characters

Messages = list[dict[str, str]]


class AnswersDiffer(HybridCacheError):
    """The cache has changed an answer."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request."""

    what: str
    prompt_tokens: int
    cached_tokens: int
    ms: float  # to the first token, with the cache
    ms_without: float
    answer: str
    same: bool  # tokens with the cache and without

    @property
    def line(self) -> str:
        cached = round(BAR * self.cached_tokens / self.prompt_tokens)
        bar = "█" * cached + "░" * (BAR - cached)
        computed = self.prompt_tokens - self.cached_tokens
        return f"{self.what:17} {bar} {self.cached_tokens:5} + {computed:3} {self.ms:7.1f} {self.ms_without:7.1f}"


def run(model: str | None, backend: str, *, as_json: bool) -> None:
    """Prints a line for each request. Raises HybridCacheError, AnswersDiffer among them."""
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    with LLM(model, backend=backend) as llm:
        rows = list(_rows(llm)) if as_json else list(_shown(llm, console))
    if as_json:
        console.print(json.dumps([asdict(row) for row in rows], indent=2))
    if not all(row.same for row in rows):
        raise AnswersDiffer("answers with the cache and without it differ: this backend or model is not exact")
    if not as_json:
        console.print("\nThe same tokens in every answer, with the cache and without it.")


def _shown(llm: LLM, console: Console) -> Iterator[Row]:
    console.print(f"{llm.name}: five requests, each with the cache and without it\n")
    console.print(f"{'':17} {'prompt tokens, █ cached':{BAR}}  cached +       ms to first token")
    console.print(f"{'':17} {'':{BAR}}   computed    cache      no")
    for row in _rows(llm):
        console.print(row.line)
        yield row


def _rows(llm: LLM) -> Iterator[Row]:
    messages: Messages = [{"role": "system", "content": RULES * RULES_TIMES}]
    _asked(llm, "warming up", [*messages, {"role": "user", "content": LINES[0]}], keeps=False)
    for what, line in zip(("first message", "next message", "next message"), LINES, strict=True):
        messages.append({"role": "user", "content": line})
        row = _asked(llm, what, messages)
        yield row
        messages.append({"role": "assistant", "content": row.answer})
    edited: Messages = [*messages[:3], {"role": "user", "content": EDITED}, *messages[4:-1]]
    yield _asked(llm, "message 2 edited", edited)
    yield _asked(llm, "the same again", edited)


def _asked(llm: LLM, what: str, messages: Sequence[dict[str, str]], *, keeps: bool = True) -> Row:
    found, computed = (_answer(llm, messages, use_cache=used) for used in (keeps, False))
    return Row(
        what=what,
        prompt_tokens=found.prompt_tokens,
        cached_tokens=found.cached_tokens,
        ms=round(1000 * found.first_token_s, 1),
        ms_without=round(1000 * computed.first_token_s, 1),
        answer=found.text,
        same=found.token_ids == computed.token_ids,
    )


def _answer(llm: LLM, messages: Sequence[dict[str, str]], *, use_cache: bool) -> Completion:
    return llm.chat(messages, temperature=0, max_tokens=MOST_TOKENS, use_cache=use_cache)
