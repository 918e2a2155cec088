"""Chat requests that reuse messages by reference or in another order: from JSON to an arranged prompt, and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybrid_cache.api.server.openai.messages import rendered
from hybrid_cache.api.server.schemas.chat import ChatRequest
from hybrid_cache.api.server.schemas.choreography import Choreography, ChoreographyReport, PlanItem, PlanReport
from hybrid_cache.api.server.schemas.common import held_bytes
from hybrid_cache.api.server.schemas.messages import ChatMessage
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import salt_of
from hybrid_cache.api.text.boundaries import check_length, limited
from hybrid_cache.choreography import assembly
from hybrid_cache.choreography.arrangement import (
    Arrangement,
    Composition,
    Encoding,
    Fidelity,
    Order,
    Positions,
    Style,
    closed,
)
from hybrid_cache.choreography.assembly import Piece, context_of
from hybrid_cache.choreography.book import Message
from hybrid_cache.choreography.plan import Plan
from hybrid_cache.errors import RequestError
from hybrid_cache.namespaces import namespace_of
from hybrid_cache.tokens import Prompt, TokenArray

MOST_MESSAGES = 256  # of an arranged request


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
        sent = ChatMessage(role="assistant", content=text)
        context = self.arrangement.context
        size = held_bytes(sent)
        message = serving.book.add(
            self.namespace, "assistant", whole, context, sent=sent, sent_bytes=size, is_answer=True
        )
        return message.id

    def report(self, plan: Plan, answer: str | None) -> ChoreographyReport:
        items = [
            PlanItem(
                message=item.id or None,
                action=item.action.value,
                tokens=item.end - item.start,
                computed_tokens=item.computed,
                flops=item.flops,
                why=item.why,
            )
            for item in plan.items
        ]
        return ChoreographyReport(
            fidelity=plan.fidelity.value,
            asked=plan.asked.value,
            why=plan.why,
            messages=self.ids,
            answer=answer,
            plan=PlanReport(
                items=items,
                prefix_tokens=plan.prefix,
                computed_tokens=plan.computed,
                flops=plan.flops,
                flops_of_encoding=plan.flops_of_encoding,
            ),
        )


def is_arranged(asked: ChatRequest) -> bool:
    return asked.choreography is not None or any(m.ref is not None for m in asked.messages)


async def arranged_prompt(serving: Serving, asked: ChatRequest) -> Arranged:
    """Looks references up, renders and tokenises. Raises UnknownMessage, MessageGone and other RequestErrors."""
    _refuse_unsupported(asked)
    namespace = namespace_of(salt_of(asked.cache_salt), serving.text.fingerprint)
    known = [serving.book.find(namespace, m.ref) if m.ref is not None else None for m in asked.messages]
    sent = [_as_sent(message, found) for message, found in zip(asked.messages, known, strict=True)]
    encoded = await rendered(
        serving.text, asked, sent, in_order=True
    )  # its messages may be apart from those that they answer
    style = _style(asked.choreography or Choreography())
    pieces = list[Piece]()
    ids: list[str | None] = [None] * len(sent)
    for piece, index in zip(encoded.pieces, encoded.messages, strict=True):
        if index is not None:
            before = context_of(pieces) if style.encoding is Encoding.IN_PLACE else ()
            message = _message(serving, namespace, sent[index], piece.tokens, known[index], before)
            ids[index], piece = message.id, piece.standing_for(message)
        pieces.append(piece)
    closing = serving.text.chat.answer_end() if (asked.n or 1) == 1 and len(encoded.opening.tokens) else None
    prompt, arrangement = assembly.arranged(pieces, encoded.opening, style, closing)
    check_length(len(prompt.tokens), serving.text.max_length)
    return Arranged(namespace, limited(prompt), arrangement, ids, encoded.opening.tokens)


def _style(asked: Choreography) -> Style:
    return Style(
        Fidelity(asked.fidelity),
        asked.seam,
        Composition(asked.composition),
        Positions(asked.positions),
        Order(asked.order),
        Encoding(asked.encode),
    )


def _refuse_unsupported(asked: ChatRequest) -> None:
    if len(asked.messages) > MOST_MESSAGES:
        raise RequestError(
            f"{len(asked.messages)} messages, a choreography has at most {MOST_MESSAGES}", param="messages"
        )
    if asked.continue_final_message:
        raise RequestError("continue_final_message cannot be used in a choreography", param="continue_final_message")


def _as_sent(message: ChatMessage, found: Message | None) -> ChatMessage:
    """What a reference stands for."""
    if found is None:
        return message
    assert isinstance(found.sent, ChatMessage)
    return found.sent


def _message(
    serving: Serving,
    namespace: str,
    sent: ChatMessage,
    tokens: TokenArray,
    found: Message | None,
    context: tuple[str, ...],
) -> Message:
    """The message that a piece of a prompt is: the one referred to, unless the template renders it differently here."""
    if found is not None and (found.is_answer or np.array_equal(found.tokens, tokens)):
        return found
    return serving.book.add(namespace, sent.role, tokens, context, sent=sent, sent_bytes=held_bytes(sent))
