"""The messages that were seen: what an id stands for."""

from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from hybrid_cache.choreography.arrangement import message_id
from hybrid_cache.errors import MessageGone, UnknownMessage
from hybrid_cache.tokens import TokenArray

MOST_TOKENS = 16 << 20  # 64 MiB
MOST_FORGOTTEN = 1 << 16


@dataclass(frozen=True, slots=True)
class Message:
    """Tokens as rendered, and the ids of the messages after which they are encoded; none if from zero.

    Two answers are equal if their tokens are, other messages if the client sent the same: how a template renders that
    may depend on where it stands.
    """

    id: str
    role: str
    tokens: TokenArray = field(repr=False)
    context: tuple[str, ...] = ()
    text: str = ""
    sent: object = None
    is_answer: bool = False


class MessageBook:
    """Messages by id, of all namespaces. The least recently used ones are dropped when there are too many.

    Messages whose rows and states have left the cache can be encoded again from here. Safe to use from several threads.
    """

    def __init__(self, most_tokens: int = MOST_TOKENS) -> None:
        self._messages: OrderedDict[tuple[str, str], Message] = OrderedDict()
        self._forgotten: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._most_tokens = most_tokens
        self._num_tokens = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._messages)

    def add(
        self,
        namespace: str,
        role: str,
        tokens: TokenArray,
        context: tuple[str, ...] = (),
        *,
        text: str = "",
        sent: object = None,
        is_answer: bool = False,
    ) -> Message:
        """Enters a message, or finds the equal one that is there."""
        name = message_id(namespace, tokens, context)
        message = Message(name, role, np.asarray(tokens, np.int32), context, text, sent, is_answer)
        with self._lock:
            known = self._messages.get((namespace, name))
            if known is not None:
                self._messages.move_to_end((namespace, name))
                return known
            self._messages[namespace, name] = message
            self._forgotten.pop((namespace, name), None)
            self._num_tokens += len(tokens)
            while self._num_tokens > self._most_tokens and len(self._messages) > 1:
                gone, old = self._messages.popitem(last=False)
                self._num_tokens -= len(old.tokens)
                self._forgotten[gone] = None
            while len(self._forgotten) > MOST_FORGOTTEN:
                self._forgotten.popitem(last=False)
        return message

    def find(self, namespace: str, name: str) -> Message:
        """Raises UnknownMessage for an id that never was in this namespace, MessageGone for one that was forgotten."""
        with self._lock:
            message = self._messages.get((namespace, name))
            if message is not None:
                self._messages.move_to_end((namespace, name))
                return message
            if (namespace, name) in self._forgotten:
                raise MessageGone(f"the text of message {name} is no longer kept; send it again", param="messages")
        raise UnknownMessage(f"there is no message {name} for this model and tenant", param="messages")
