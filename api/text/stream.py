"""Tokens to text, as they come: whole characters only, stop strings cut off.

Streaming and non-streaming replies, and the stoppers on the engine's thread, all use the classes of this file, so
they agree on every character.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.request import FinishReason, Stopper, TokenOutput

CONTEXT_TOKENS = 8  # tokens of the prompt that the first tokens of an answer are decoded after
MAX_HELD_TOKENS = 3  # a UTF-8 character has at most four bytes, so three tokens may wait for a fourth


class Detokenizer:
    """Text of a growing sequence of tokens.

    ids:  [0, start) forgotten | [start, read) context, its text is out | [read, len) held back
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip: Container[int]) -> None:
        """`prompt` gives the first tokens something to follow; `skip` are tokens that have no text."""
        self._tokenizer = tokenizer
        self._skip = skip
        self._ids = [int(t) for t in prompt[-CONTEXT_TOKENS:] if int(t) not in skip]
        self._read = len(self._ids)
        self._known = self._text(self._ids)  # text of ids[:read]

    def push(self, token: int) -> str:
        """Takes a token -> text that is now certain, "" while a character is unfinished."""
        if token in self._skip:
            return ""
        self._ids.append(token)
        text = self._text(self._ids)
        if not text.endswith("\ufffd"):
            return self._release(len(self._ids), text)
        held = len(self._ids) - self._read
        if held <= MAX_HELD_TOKENS:
            return ""
        # These bytes are not UTF-8 and never will be.
        end = len(self._ids) - MAX_HELD_TOKENS
        return self._release(end, self._text(self._ids[:end]))

    def flush(self) -> str:
        """The rest, with U+FFFD for a character that was never finished."""
        return self._release(len(self._ids), self._text(self._ids))

    def _release(self, end: int, text: str) -> str:
        new = text[len(self._known) :]
        # The last tokens that are out stay as context: a decoder may treat the first token of a text in its own way.
        start = max(0, end - CONTEXT_TOKENS)
        self._ids = self._ids[start:]
        self._read = end - start
        self._known = self._text(self._ids[: self._read]) if start else text
        return new

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that has appeared."""

    start: int  # characters of all text before it
    stop: str

    @property
    def end(self) -> int:
        return self.start + len(self.stop)


class StopMatcher:
    """Looks for stop strings in text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._tail = ""  # the last characters, in which a stop string may have begun
        self._length = 0  # characters seen

    def push(self, text: str) -> StopMatch | None:
        """Takes text -> the earliest stop string that it completes; the longest of several at one place."""
        if not self._stops or not text:
            return None
        window, first = self._tail + text, self._length - len(self._tail)
        self._length += len(text)
        self._tail = window[-(self._longest - 1) :] if self._longest > 1 else ""
        # A match that ended before this piece was reported then, and let pass.
        known = len(window) - len(text)
        found = ((window.find(stop, max(0, known - len(stop) + 1)), -len(stop), stop) for stop in self._stops)
        hits = [hit for hit in found if hit[0] >= 0]
        if not hits:
            return None
        place, _, stop = min(hits)
        return StopMatch(first + place, stop)

    def held_back(self) -> int:
        """How many of the last characters might be the beginning of a stop string."""
        for length in range(len(self._tail), 0, -1):
            end = self._tail[-length:]
            if any(length < len(stop) and stop.startswith(end) for stop in self._stops):
                return length
        return 0


def make_stopper(detokenizer: Callable[[], Detokenizer], stops: Sequence[str]) -> Callable[[], Stopper]:
    """What the engine asks, on its own thread, after each token of each choice."""

    def new() -> Stopper:
        text, matcher = detokenizer(), StopMatcher(stops)
        return lambda token: matcher.push(text.push(token)) is not None

    return new


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds to the text of one choice."""

    text: str
    output: TokenOutput
    stop: str | int | None = None  # the stop string or stop token that ended the choice, if the client named it
    offset: int = 0  # characters of text before this token


class ChoiceText:
    """Text of one choice. What might become a stop string or a whole character is held back until it is decided."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        stop_ids: Container[int],
        named_stop_ids: Container[int],
        *,
        include_stop: bool,
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._stop_ids = stop_ids
        self._named_stop_ids = named_stop_ids
        self._include_stop = include_stop
        self._seen = 0  # characters, held ones included
        self._held = ""

    def push(self, output: TokenOutput) -> Piece:
        """Takes the next output of this choice -> the text that is now certain."""
        offset, token, finish = self._seen, output.token, output.finish
        if finish is FinishReason.STOP and token in self._stop_ids and not self._include_stop:
            stop = token if token in self._named_stop_ids else None
            return Piece(self._take(self._detokenizer.flush()), output, stop, offset)
        new = "" if token is None else self._detokenizer.push(token)
        match = self._matcher.push(new)
        if finish is FinishReason.STOP and match is not None:
            text, begin = self._held + new, self._seen - len(self._held)
            end = match.end if self._include_stop else match.start
            return Piece(text[: end - begin], output, match.stop, offset)
        if finish is not None:
            return Piece(self._take(new + self._detokenizer.flush()), output, None, offset)
        self._seen += len(new)
        text = self._held + new
        keep = self._matcher.held_back()
        certain = len(text) - keep
        self._held = text[certain:]
        return Piece(text[:certain], output, None, offset)

    def _take(self, new: str) -> str:
        text, self._held = self._held + new, ""
        self._seen += len(new)
        return text
