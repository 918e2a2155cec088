"""What a request begins with, as a chain of keys: one for each message, over it and all that comes before it.

Two requests with equal keys begin with equal messages, so that what was computed for one can be gone on from for the
other. So a router needs neither tokenizer nor template, and any dialect will do: messages are looked at as JSON. The
price: equal prompts in two dialects have different keys, and a message that a client sends back in another form begins
new ones; the messages before it are still found.

    root     model, tools, and whose it is: the tenant with its salt
    message  of the key before it, and the message as canonical JSON, without marks of where to cache
    piece    of a text completion: 256 characters, or 64 tokens

A key has 48 bits of a BLAKE2b under a secret of the deployment: it tells those who see it nothing of what was said, and
where two are equal by chance, a request goes to a replica that is no better than another.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

from hybrid_cache.kernels.grid import TILE

KEY_BYTES = 6
MOST_KEYS = 1024  # of one request
PIECE = 256  # characters
NOT_SAID = frozenset({"cache_control", "prompt_cache_breakpoint"})  # they move from turn to turn
BILLING = "x-anthropic-billing-header:"  # differs in each request, and is dropped from the prompt

Json = object


@dataclass(frozen=True, slots=True)
class Chain:
    """Keys with what lies before the end of each, in whatever unit: bytes of JSON, characters or tokens."""

    keys: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    own: int = 0  # from this key on it is a conversation, before it what many begin with: instructions and tools

    @property
    def size(self) -> int:
        return self.sizes[-1] if self.sizes else 0


NO_CHAIN = Chain()


def chain_of(body: Json, whose: str, secret: bytes) -> Chain:
    """Of the body of a request, whatever it holds; empty where it holds no prompt.

    whose: keys of no two are ever equal
    """
    if not isinstance(body, Mapping):
        return NO_CHAIN
    root = _digest(secret, whose.encode("utf-8", "surrogatepass"), _canonical([body.get("model"), body.get("tools")]))
    messages = _messages(body)
    if messages:
        return _of_messages(root, messages[:MOST_KEYS], secret)
    return _of_pieces(root, list(_pieces(body.get("prompt")))[:MOST_KEYS], secret)


def _of_messages(root: bytes, messages: Sequence[Json], secret: bytes) -> Chain:
    texts = [_canonical(_said(message)) for message in messages]
    instructions = next((i for i, each in enumerate(messages) if _role(each) not in ("system", "developer")), 0)
    return Chain(_keys(root, texts, secret), tuple(accumulate(map(len, texts))), instructions)


def _of_pieces(root: bytes, pieces: Sequence[tuple[bytes, int]], secret: bytes) -> Chain:
    """Half of a text has to be equal for it to be the same one that goes on."""
    keys = _keys(root, [piece for piece, _ in pieces], secret)
    return Chain(keys, tuple(accumulate(size for _, size in pieces)), len(pieces) // 2)


def _keys(root: bytes, texts: Iterable[bytes], secret: bytes) -> tuple[int, ...]:
    keys = list[int]()
    for text in texts:
        root = _digest(secret, root, text)
        keys.append(int.from_bytes(root[:KEY_BYTES], "little"))
    return tuple(keys)


def _messages(body: Mapping[str, Json]) -> list[Json]:
    """Of any dialect, with the instructions that stand beside them."""
    messages = body.get("messages", body.get("input"))
    beside = body.get("system") or body.get("instructions")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        return []
    return [{"role": "system", "content": beside}, *messages] if beside else messages


def _pieces(prompt: Json) -> Iterable[tuple[bytes, int]]:
    """Parts of a prompt in text or tokens, each with its size; of several prompts the first one."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        for start in range(0, len(prompt), PIECE):
            piece = prompt[start : start + PIECE]
            yield piece.encode("utf-8", "surrogatepass"), len(piece)
    elif isinstance(prompt, list):
        for start in range(0, len(prompt), TILE):
            tokens = prompt[start : start + TILE]
            yield _canonical(tokens), len(tokens)


def _said(message: Json) -> Json:
    """In one form of the several that mean the same: texts are parts, and marks are left out."""
    if isinstance(message, Mapping):
        said = {name: _said(value) for name, value in message.items() if name not in NOT_SAID and value is not None}
        if isinstance(said.get("content"), str):
            said["content"] = [{"type": "text", "text": said["content"]}]
        if isinstance(parts := said.get("content"), list):
            said["content"] = _without_billing(parts)
        return said
    return [_said(each) for each in message] if isinstance(message, list) else message


def _without_billing(parts: list[Json]) -> list[Json]:
    first = parts[0] if parts else None
    text = first.get("text") if isinstance(first, Mapping) else None
    if not isinstance(first, Mapping) or not isinstance(text, str) or not text.startswith(BILLING):
        return parts
    return [{**first, "text": text.partition("\n")[2].lstrip("\n")}, *parts[1:]]


def _role(message: Json) -> Json:
    return message.get("role") if isinstance(message, Mapping) else None


def _canonical(value: Json) -> bytes:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return text.encode("utf-8", "surrogatepass")


def _digest(secret: bytes, *parts: bytes) -> bytes:
    digest = blake2b(key=secret, digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
