"""Log-probabilities in the forms of the two completion endpoints."""

import codecs
import math
from collections.abc import Container, Iterable, Sequence

from hybrid_cache.api import schemas
from hybrid_cache.api.tokenizer import Tokenizer
from hybrid_cache.request import TokenLogprob

IMPOSSIBLE = -9999.0  # JSON has no infinities; this is what OpenAI writes


def chat_logprob(tokenizer: Tokenizer, entry: TokenLogprob) -> schemas.ChatLogprob:
    """One token of a chat completion."""
    top = [_top_logprob(tokenizer, token, logprob) for token, logprob in entry.top]
    own = _top_logprob(tokenizer, entry.token, entry.logprob)
    return schemas.ChatLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)


def _top_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> schemas.TopLogprob:
    data = tokenizer.token_bytes(token)
    return schemas.TopLogprob(token=data.decode("utf-8", "replace"), logprob=_finite(logprob), bytes=list(data))


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], entries: Iterable[TokenLogprob | None], offsets: Sequence[int]
) -> schemas.CompletionLogprobs:
    """Tokens of a text completion. An entry of None is the first token of a prompt.

    The token itself is always among its alternatives, with the same number: lm-eval compares the two for equality.
    """
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        logprobs.append(None if entry is None else _finite(entry.logprob))
        tops.append(None if entry is None else _alternatives(tokenizer, entry))
    return schemas.CompletionLogprobs(
        tokens=[token_name(tokenizer, token) for token in tokens],
        token_logprobs=logprobs,
        top_logprobs=tops,
        text_offset=list(offsets),
    )


def _alternatives(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, logprob in entry.top:
        found.setdefault(token_name(tokenizer, token), _finite(logprob))
    found[token_name(tokenizer, entry.token)] = _finite(entry.logprob)
    return found


def token_name(tokenizer: Tokenizer, token: int) -> str:
    r"""The text of a token, or `bytes:\xe2\x80` for a part of a character: distinct tokens keep distinct names."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def prompt_offsets(tokenizer: Tokenizer, tokens: Sequence[int], hidden: Container[int]) -> list[int]:
    """For each token, how many characters of the text come before it. Hidden tokens have no text."""
    decoder, length, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
    for token in tokens:
        offsets.append(length)
        if token not in hidden:
            length += len(decoder.decode(tokenizer.token_bytes(token)))
    return offsets


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else IMPOSSIBLE
