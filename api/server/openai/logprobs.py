"""Log-probabilities in the two forms that clients know."""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from hybrid_cache.api.server.schemas.chat import ChatLogprob, TopLogprob
from hybrid_cache.api.server.schemas.common import PromptLogprob
from hybrid_cache.api.text.stream import Detokenizer
from hybrid_cache.api.text.text_work import still_wanted
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.sampling import TokenLogprob

IMPOSSIBLE = -9999.0  # JSON has no infinities


@dataclass(frozen=True, slots=True)
class Columns:
    """Log-probabilities as in `CompletionLogprobs`: one entry a token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def __add__(self, other: "Columns") -> "Columns":
        return Columns(
            self.tokens + other.tokens,
            self.token_logprobs + other.token_logprobs,
            self.top_logprobs + other.top_logprobs,
            self.text_offset + other.text_offset,
        )

    def shown(self) -> dict[str, object]:
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; `bytes:\\xe2\\x82` for one that is not whole characters."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprob(tokenizer: Tokenizer, logprob: TokenLogprob) -> ChatLogprob:
    def entry(token: int, value: float) -> TopLogprob:
        data = list(tokenizer.token_bytes(token))
        return TopLogprob(token=token_name(tokenizer, token), logprob=_finite(value), bytes=data)

    own = entry(logprob.token, logprob.logprob)
    top = [entry(token, value) for token, value in logprob.top]
    return ChatLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], offsets: Sequence[int]
) -> Columns:
    """One entry a token; nothing predicts the first token of a prompt. A token itself is always in its top."""
    assert len(tokens) == len(logprobs) == len(offsets)
    return Columns(
        tokens=[token_name(tokenizer, token) for token in tokens],
        token_logprobs=[None if logprob is None else _finite(logprob.logprob) for logprob in logprobs],
        top_logprobs=[None if logprob is None else _top(tokenizer, logprob) for logprob in logprobs],
        text_offset=list(offsets),
    )


def narrowed(logprobs: Sequence[TokenLogprob | None], num_top: int) -> list[TokenLogprob | None]:
    """With so many of the likeliest tokens at most."""
    return [None if each is None else replace(each, top=each.top[:num_top]) for each in logprobs]


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob | None], num_top: int
) -> list[dict[str, dict[str, object]] | None]:
    """As in vLLM: for each place of a prompt but the first, its own token and the likeliest ones."""
    return [None if each is None else _ranked(tokenizer, each) for each in narrowed(logprobs, num_top)]


def _ranked(tokenizer: Tokenizer, logprob: TokenLogprob) -> dict[str, dict[str, object]]:
    still_wanted()
    ranks = {token: rank for rank, (token, _) in enumerate(logprob.top, 1)}
    values = {logprob.token: logprob.logprob, **dict(logprob.top)}
    return {
        str(token): PromptLogprob(
            logprob=_finite(value), rank=ranks.get(token), decoded_token=token_name(tokenizer, token)
        ).model_dump()
        for token, value in values.items()
    }


def prompt_offsets(tokenizer: Tokenizer, tokens: Sequence[int], hidden: Container[int]) -> list[int]:
    """Where the text of each token of a prompt begins, in characters. `hidden` tokens have no text."""
    detokenizer, offsets, length = Detokenizer(tokenizer, [], hidden), [], 0
    for token in tokens:
        still_wanted()
        offsets.append(length)
        length += len(detokenizer.push(token))
    return offsets


def _top(tokenizer: Tokenizer, logprob: TokenLogprob) -> dict[str, float]:
    still_wanted()
    top: dict[str, float] = {}
    for token, value in (*logprob.top, (logprob.token, logprob.logprob)):
        top.setdefault(token_name(tokenizer, token), _finite(value))  # of two that read alike, the likelier one
    return top


def _finite(value: float) -> float:
    return value if math.isfinite(value) else IMPOSSIBLE
