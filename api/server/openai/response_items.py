"""The output of a response as it grows: items, and the events that tell of them."""

import uuid
from collections.abc import Callable, Iterator
from typing import Literal

from hybrid_cache.api.server.openai.response_turns import item_name
from hybrid_cache.api.text.generation import Event, Text, Thought, Token, ToolCall

Shown = Iterator[tuple[str, dict[str, object]]]  # names of events, and what they hold beside their numbers
Kind = Literal["message", "reasoning"]
ENTRY_SIZE = 64  # characters of a log-probability
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}


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
            case ToolCall():
                self._untold = []  # of its marks
                yield from self._close("completed")
                yield from self._call(event)

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
        delta: dict[str, object] = {**self._place, "content_index": 0, "delta": text}
        if self._kind == "message":
            delta["logprobs"] = self._untold
            self._logprobs += self._untold
            self._untold = []
        yield f"response.{_PARTS[self._kind or 'message']}.delta", delta

    def _open(self, kind: Kind) -> Shown:
        yield from self._close("completed")
        self._kind = kind
        yield "response.output_item.added", {"output_index": len(self.items), "item": self._item("in_progress", [])}
        yield "response.content_part.added", {**self._place, "content_index": 0, "part": self._part()}

    def _close(self, status: str) -> Shown:
        """Ends the open item, if there is one."""
        if self._kind is None:
            return
        if self._kind == "message" and self._untold:
            yield from self._delta("")
        place, part = {**self._place, "content_index": 0}, self._part()
        done: dict[str, object] = {**place, "text": part["text"]}
        if self._kind == "message":
            done["logprobs"] = self._logprobs
        yield f"response.{_PARTS[self._kind]}.done", done
        yield "response.content_part.done", {**place, "part": part}
        item, index = self._item(status, [part]), len(self.items)
        self.items.append(item)
        self._kind, self._texts, self._logprobs = None, [], []
        yield "response.output_item.done", {"output_index": index, "item": item}

    def _part(self) -> dict[str, object]:
        text = "".join(self._texts)
        if self._kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "annotations": [], "logprobs": self._logprobs, "text": text}

    def _item(self, status: str, content: list[dict[str, object]]) -> dict[str, object]:
        head: dict[str, object] = {"id": self._place["item_id"], "type": self._kind, "status": status}
        if self._kind == "message":
            return {**head, "role": "assistant", "content": content}
        if self._encoded is not None:
            head["encrypted_content"] = self._encoded("".join(self._texts))
        return {**head, "summary": [], "content": content}

    def _call(self, call: ToolCall) -> Shown:
        index = len(self.items)
        name = item_name(self._key, "function_call", f"o{index}")
        item: dict[str, object] = {
            "id": name,
            "type": "function_call",
            "status": "completed",
            "call_id": call.id or f"call_{uuid.uuid4().hex[:24]}",
            "name": call.name,
            "arguments": call.arguments,
        }
        self.items.append(item)
        self.size += len(call.arguments)
        place: dict[str, object] = {"item_id": name, "output_index": index}
        started = {**item, "status": "in_progress", "arguments": ""}
        yield "response.output_item.added", {"output_index": index, "item": started}
        yield "response.function_call_arguments.delta", {**place, "delta": call.arguments}
        done = {**place, "name": call.name, "arguments": call.arguments}
        yield "response.function_call_arguments.done", done
        yield "response.output_item.done", {"output_index": index, "item": item}
