"""What an answer's text is read as, with the parts of everything put together."""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from hybrid_cache.api.text.answer_parser import AnswerForm, AnswerParser, Item, Thought
from hybrid_cache.api.text.call_readers import Arguments, CallBegun, CallDone


@dataclass(frozen=True)
class Call:
    name: str
    arguments: str
    id: str | None = None
    complete: bool = True


Read = str | Thought | Call


def items_of(form: AnswerForm, pieces: Iterable[str]) -> list[Item]:
    parser = AnswerParser(form)
    return [item for piece in pieces for item in parser.push(piece)] + parser.finish()


def put_together(items: Iterable[Item]) -> list[Read]:
    """Fails unless each call has its parts in order, and nothing else among them."""
    found: list[Read] = []
    begun: tuple[CallBegun, list[str]] | None = None
    for item in items:
        last = found[-1] if found else None
        match item:
            case CallBegun():
                assert begun is None
                begun = (item, [])
            case Arguments():
                assert begun is not None
                assert item.text
                begun[1].append(item.text)
            case CallDone():
                assert begun is not None
                call, begun = begun, None
                found.append(Call(call[0].name, "".join(call[1]), call[0].id, item.complete))
            case str() if isinstance(last, str):
                found[-1] = last + item
            case Thought() if isinstance(last, Thought):
                found[-1] = Thought(last.text + item.text)
            case _:
                assert begun is None
                found.append(item)
    assert begun is None
    return found


def parse(form: AnswerForm, pieces: Iterable[str]) -> list[Read]:
    return put_together(items_of(form, pieces))


def pieces_of(text: str, rng: random.Random, most: int = 12) -> list[str]:
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(most)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
