"""The messages that were seen: what an id stands for."""

from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b
from sys import getsizeof
from threading import Lock

import numpy as np

from hybrid_cache.choreography.arrangement import message_id
from hybrid_cache.errors import MessageGone, UnknownMessage
from hybrid_cache.tokens import TokenArray

MOST_BYTES = 64 << 20
SHARE = 8  # one message takes at most an eighth of the bytes, and so do the names of those that were forgotten
ENTRY_BYTES = 160  # of a name in a dictionary
MESSAGE_BYTES = 640  # of a message beside its tokens and texts
NAME_BYTES = 88  # of a message that comes before another


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
    """Messages by id, of all namespaces, in a bounded number of bytes. The least recently used ones are dropped.

    Messages whose rows and states have left the cache can be encoded again from here. Safe to use from several threads.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        """most_bytes: of messages and of the names of those that were dropped, as `num_bytes` counts them"""
        self.most_bytes = most_bytes
        self._messages: OrderedDict[bytes, tuple[Message, int]] = OrderedDict()  # and the bytes of each
        self._forgotten: OrderedDict[bytes, None] = OrderedDict()
        self._message_bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def num_bytes(self) -> int:
        return self._message_bytes + ENTRY_BYTES * len(self._forgotten)

    def add(
        self,
        namespace: str,
        role: str,
        tokens: TokenArray,
        context: tuple[str, ...] = (),
        *,
        text: str = "",
        sent: object = None,
        sent_bytes: int = 0,
        is_answer: bool = False,
    ) -> Message:
        """Enters a message, or finds the equal one that is there. One that is too large is forgotten at once.

        sent_bytes: of `sent`
        """
        name = message_id(namespace, tokens, context)
        message = Message(name, role, np.array(tokens, np.int32), context, text, sent, is_answer)
        key = _key(namespace, name)
        num_bytes = MESSAGE_BYTES + NAME_BYTES * len(context) + message.tokens.nbytes + getsizeof(text) + sent_bytes
        with self._lock:
            known = self._messages.get(key)
            if known is not None:
                self._messages.move_to_end(key)
                return known[0]
            if num_bytes > self.most_bytes // SHARE:
                self._forget(key)
                return message
            self._forgotten.pop(key, None)
            self._messages[key] = message, num_bytes
            self._message_bytes += num_bytes
            while self._message_bytes > self.most_bytes - self.most_bytes // SHARE:
                oldest, (_, old_bytes) = self._messages.popitem(last=False)
                self._message_bytes -= old_bytes
                self._forget(oldest)
        return message

    def find(self, namespace: str, name: str) -> Message:
        """Raises UnknownMessage for an id that never was in this namespace, MessageGone for one that was forgotten."""
        key = _key(namespace, name)
        with self._lock:
            known = self._messages.get(key)
            if known is not None:
                self._messages.move_to_end(key)
                return known[0]
            if key in self._forgotten:
                raise MessageGone(f"the text of message {name} is no longer kept; send it again", param="messages")
        raise UnknownMessage(f"there is no message {name} for this model and tenant", param="messages")

    def _forget(self, key: bytes) -> None:
        self._forgotten[key] = None
        self._forgotten.move_to_end(key)
        while ENTRY_BYTES * len(self._forgotten) > self.most_bytes // SHARE:
            self._forgotten.popitem(last=False)


def _key(namespace: str, name: str) -> bytes:
    return blake2b(name.encode(), key=blake2b(namespace.encode()).digest(), digest_size=16).digest()
