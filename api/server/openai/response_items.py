"""The output of a response as it grows: items, and the events that tell of them."""

from collections.abc import Callable, Iterator
from typing import Literal

from hybrid_cache.api.server.openai.response_turns import item_name
from hybrid_cache.api.text.generation import CallArguments, CallBegin, CallEnd, Event, Text, Thought, Token

Shown = Iterator[tuple[str, dict[str, object]]]  # names of events, and what they hold beside their numbers
Kind = Literal["message", "reasoning", "function_call"]
ENTRY_SIZE = 64  # characters of a log-probability
_PARTS = {"message": "output_text", "reasoning": "reasoning_text", "function_call": "function_call_arguments"}


class Output:
    """Thoughts, text and calls become items, one after the other."""

    def __init__(
        self,
        key: str,
        entry: Callable[[Token], dict[str, object] | None],
        encoded: Callable[[str], str] | None = None,
    ) -> None:
        """key: of its items' names   entry: a token's log-probability, if shown   encoded: a thought once more"""
        self.items: list[dict[str, object]] = []  # those that have ended
        self._key = key
        self._entry = entry
        self._encoded = encoded
        self.size = 0  # characters in all, with log-probabilities
        self._kind: Kind | None = None  # of the item that is open
        self._texts: list[str] = []  # in it
        self._called: dict[str, object] = {}  # name and id, if it is a call
        self._logprobs: list[dict[str, object]] = []  # of it
        self._untold: list[dict[str, object]] = []  # of tokens that have let out nothing yet

    def take(self, event: Event) -> Shown:
        """Adds what has been said -> what to show of it. To be taken to its end."""
        if isinstance(event, Text) and event.token is not None and (entry := self._entry(event.token)):
            self._untold.append(entry)
            self.size += ENTRY_SIZE * (1 + len(event.token.logprob.top if event.token.logprob else ()))
        match event:
            case Text(text=text) if text:
                yield from self._say("message", text)
            case Thought(text=text):
                yield from self._say("reasoning", text)
            case CallBegin():
                self._untold = []  # of its marks
                yield from self._close("completed")
                self._called = {"call_id": event.id, "name": event.name}
                yield from self._open("function_call")
            case CallArguments(text=text):
                yield from self._say("function_call", text)
            case CallEnd(complete=complete):
                yield from self._close("completed" if complete else "incomplete")

    def finish(self, *, whole: bool) -> Shown:
        """Nothing follows. whole: the answer has come to its own end"""
        if whole and self._kind != "message" and not any(item["type"] != "reasoning" for item in self.items):
            yield from self._open("message")  # an answer that says nothing
        yield from self._close("completed" if whole else "incomplete")

    @property
    def _place(self) -> dict[str, object]:
        """Of the item that is open."""
        assert self._kind is not None
        index = len(self.items)
        return {"item_id": item_name(self._key, self._kind, f"o{index}"), "output_index": index}

    def _say(self, kind: Kind, text: str) -> Shown:
        if self._kind != kind:
            yield from self._open(kind)
        self._texts.append(text)
        self.size += len(text)
        yield from self._delta(text)

    def _delta(self, text: str) -> Shown:
        delta: dict[str, object] = {**self._place, **self._content_index, "delta": text}
        if self._kind == "message":
            delta["logprobs"] = self._untold
            self._logprobs += self._untold
            self._untold = []
        yield f"{self._event}.delta", delta

    def _open(self, kind: Kind) -> Shown:
        yield from self._close("completed")
        self._kind = kind
        yield "response.output_item.added", {"output_index": len(self.items), "item": self._item("in_progress")}
        if kind != "function_call":
            yield "response.content_part.added", {**self._place, **self._content_index, "part": self._part}

    def _close(self, status: str) -> Shown:
        """Ends the open item, if there is one."""
        if self._kind is None:
            return
        if self._kind == "message" and self._untold:
            yield from self._delta("")
        item, place, part = self._item(status), {**self._place, **self._content_index}, self._part
        yield f"{self._event}.done", {**place, **self._whole}
        if self._kind != "function_call":
            yield "response.content_part.done", {**place, "part": part}
        index = len(self.items)
        self.items.append(item)
        self._kind, self._texts, self._logprobs = None, [], []
        yield "response.output_item.done", {"output_index": index, "item": item}

    @property
    def _event(self) -> str:
        """How events about the text of the open item are called."""
        return f"response.{_PARTS[self._kind or 'message']}"

    @property
    def _content_index(self) -> dict[str, object]:
        return {} if self._kind == "function_call" else {"content_index": 0}

    @property
    def _whole(self) -> dict[str, object]:
        """The text of the open item as its last event has it."""
        text = "".join(self._texts)
        if self._kind == "function_call":
            return {"name": self._called["name"], "arguments": text}
        return {"text": text, "logprobs": self._logprobs} if self._kind == "message" else {"text": text}

    @property
    def _part(self) -> dict[str, object]:
        """The content of the open item, if it has any."""
        if self._kind == "message":
            return {"type": "output_text", "annotations": [], **self._whole}
        return {"type": "reasoning_text", **self._whole}

    def _item(self, status: str) -> dict[str, object]:
        """The open item; it has no content before there is text."""
        item: dict[str, object] = {"id": self._place["item_id"], "type": self._kind, "status": status}
        if self._kind == "function_call":
            return {**item, **self._called, "arguments": "".join(self._texts)}
        content = [] if status == "in_progress" else [self._part]
        if self._kind == "message":
            return {**item, "role": "assistant", "content": content}
        if self._encoded is not None:
            item["encrypted_content"] = self._encoded("".join(self._texts))
        return {**item, "summary": [], "content": content}
