"""Chat requests that reuse messages by reference or in another order: from JSON to an arranged prompt, and back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybrid_cache.api import schemas
from hybrid_cache.api.chat import Rendering
from hybrid_cache.api.prompts import message_of, off_the_loop_if_long
from hybrid_cache.api.serving import Serving
from hybrid_cache.choreography.arrangement import (
    Arrangement,
    Composition,
    Encoding,
    Fidelity,
    Order,
    Part,
    Positions,
    closed,
)
from hybrid_cache.choreography.book import Message
from hybrid_cache.choreography.plan import Plan
from hybrid_cache.choreography.workflow import part_of
from hybrid_cache.errors import ContextTooLong, RequestError
from hybrid_cache.tokens import Boundary, Prompt, TokenArray

MOST_MESSAGES = 256  # of an arranged request: the end of each is found by rendering all before it


@dataclass(frozen=True, slots=True)
class Arranged:
    """A request ready for the engine, and what its reply says of it."""

    namespace: str
    prompt: Prompt
    arrangement: Arrangement
    ids: list[str | None]  # of the request's messages, as sent
    opening: TokenArray  # of the answer

    def answer_id(self, serving: Serving, tokens: Sequence[int], text: str) -> str | None:
        """Enters an answer in the book -> its id; None where answers are not kept."""
        if self.arrangement.closing is None:
            return None
        whole = closed(np.concatenate([self.opening, np.asarray(tokens, np.int32)]), self.arrangement.closing)
        sent = json.dumps({"role": "assistant", "content": text})
        context = self.arrangement.context
        return serving.book.add(self.namespace, "assistant", whole, context, text=text, sent=sent, is_answer=True).id

    def report(self, plan: Plan, answer: str | None) -> schemas.ChoreographyReport:
        items = [
            schemas.PlanItem(
                message=item.id or None,
                action=item.action.value,
                tokens=item.end - item.start,
                computed_tokens=item.computed,
                flops=item.flops,
                why=item.why,
            )
            for item in plan.items
        ]
        return schemas.ChoreographyReport(
            fidelity=plan.fidelity.value,
            asked=plan.asked.value,
            why=plan.why,
            messages=self.ids,
            answer=answer,
            plan=schemas.PlanReport(
                items=items,
                prefix_tokens=plan.prefix,
                computed_tokens=plan.computed,
                flops=plan.flops,
                flops_of_encoding=plan.flops_of_encoding,
            ),
        )


def is_arranged(asked: schemas.ChatRequest) -> bool:
    return asked.choreography is not None or any(m.ref is not None for m in asked.messages)


async def arranged_prompt(serving: Serving, asked: schemas.ChatRequest, rendering: Rendering) -> Arranged:
    """Looks references up, renders and tokenises. Raises UnknownMessage, MessageGone and other RequestErrors."""
    _refuse_unsupported(asked)
    namespace = f"{serving.engine.model.fingerprint}/{asked.cache_salt or ''}"
    known = [serving.book.find(namespace, m.ref) if m.ref is not None else None for m in asked.messages]
    sent = [_as_sent(message, found) for message, found in zip(asked.messages, known, strict=True)]
    as_text = serving.chat.takes_argument_text(rendering)
    messages = [message_of(m, as_text) for m in sent]
    size = sum(len(part.text) for m in messages for part in m.parts or ()) * len(messages)
    room = serving.model.max_length
    pieces, opening = await off_the_loop_if_long(size, lambda: serving.chat.segments(messages, rendering, room))
    style = asked.choreography or schemas.Choreography()
    encoding, parts = Encoding(style.encode), list[Part]()
    tokens: list[TokenArray] = []
    ids: list[str | None] = [None] * len(messages)
    for piece in pieces:
        message = None
        if piece.message is not None:
            found = known[piece.message]
            before = [part.id for part in parts] if all(part.id for part in parts) else []
            message = _message(serving, namespace, sent[piece.message], piece.tokens, found, encoding, before)
            ids[piece.message] = message.id
            parts.append(part_of(message, before))
        else:
            parts.append(Part(len(piece.tokens)))
        tokens.append(piece.tokens if message is None else message.tokens)
    ends = np.cumsum([len(t) for t in tokens]).tolist()
    if len(opening):
        parts.append(Part(len(opening)))
        tokens.append(opening)
    whole = np.concatenate(tokens)
    if len(whole) > room:
        raise ContextTooLong(
            f"the messages are {len(whole)} tokens, this model's context holds {room}", param="messages"
        )
    arrangement = Arrangement(
        tuple(parts),
        Fidelity(style.fidelity),
        style.seam,
        Composition(style.composition),
        Positions(style.positions),
        Order(style.order),
        closing=serving.chat.answer_end() if (asked.n or 1) == 1 and len(opening) else None,
        answer_start=len(whole) - len(opening),
        context=tuple(part.id for part in parts if part.id),
    )
    boundaries = tuple(Boundary(end) for end in ends)
    return Arranged(namespace, Prompt(whole, boundaries), arrangement, ids, opening)


def _refuse_unsupported(asked: schemas.ChatRequest) -> None:
    if len(asked.messages) > MOST_MESSAGES:
        raise RequestError(
            f"{len(asked.messages)} messages, a choreography has at most {MOST_MESSAGES}", param="messages"
        )
    if asked.continue_final_message:
        raise RequestError("continue_final_message cannot be used in a choreography", param="continue_final_message")


def _as_sent(message: schemas.ChatMessage, found: Message | None) -> schemas.ChatMessage:
    """What a reference stands for."""
    return message if found is None else schemas.ChatMessage.model_validate_json(str(found.sent))


def _message(
    serving: Serving,
    namespace: str,
    sent: schemas.ChatMessage,
    tokens: TokenArray,
    found: Message | None,
    encoding: Encoding,
    before: Sequence[str],
) -> Message:
    """The message that a piece of a prompt is: the one referred to, unless the template renders it differently here."""
    if found is not None and (found.is_answer or np.array_equal(found.tokens, tokens)):
        return found
    context = tuple(before) if encoding is Encoding.IN_PLACE else ()
    return serving.book.add(namespace, sent.role, tokens, context, sent=sent.model_dump_json(exclude_none=True))
