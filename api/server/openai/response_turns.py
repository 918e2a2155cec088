"""What a Responses request is about: its own input, after the stored responses that it continues or refers to."""

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_cache.api.server.bodies import parse_json
from hybrid_cache.api.server.errors import ResponseNotFound, quoted
from hybrid_cache.api.server.gate import body_size, current_visit
from hybrid_cache.api.server.response_store import Stored
from hybrid_cache.api.server.schemas.messages import MAX_MESSAGES
from hybrid_cache.api.server.schemas.responses import (
    FunctionCallItem,
    FunctionOutputItem,
    ItemReference,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
    Said,
    said_items,
)
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import current_tenant_or
from hybrid_cache.errors import RequestError

_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_NAME = re.compile(r"[a-z]{2,3}_([0-9a-f]{32})[io][0-9]{1,6}")


@dataclass(frozen=True, slots=True)
class Turn:
    """A response to be made, and what comes before it."""

    key: str  # what its name and those of its items have in common
    items: Sequence[Said]  # oldest first, its own input last, without calls that broke off
    own: Sequence[dict[str, object]]  # its input as clients get it
    stored_bytes: int  # of the items before its input

    @property
    def name(self) -> str:
        return f"resp_{self.key}"


def item_name(key: str, kind: str, place: str) -> str:
    """place: `i` or `o`, for input or output, and a number"""
    return f"{_PREFIXES[kind]}_{key}{place}"


async def turn_of(serving: Serving, asked: ResponsesRequest) -> Turn:
    """Raises RequestError, ResponseNotFound or Overloaded."""
    before, stored_bytes = await _before(serving, asked)
    key, own = uuid.uuid4().hex, list[Said]()
    for item in asked.input or ():
        own.append(await _referred(serving, asked, item.id) if isinstance(item, ItemReference) else item)
    items = _without_broken_off((*before, *own))
    if len(items) > MAX_MESSAGES:
        raise RequestError(f"{len(items)} items in all, at most {MAX_MESSAGES} are allowed", param="input")
    _check(items)

    def named() -> list[dict[str, object]]:
        return [_shown(item, item_name(key, item.type, f"i{i}")) for i, item in enumerate(own)]

    tenant = current_tenant_or(asked.cache_salt)
    return Turn(key, items, await serving.text.work.run(tenant, body_size(), named), stored_bytes)


async def stored_items(serving: Serving, texts: Sequence[bytes]) -> list[Said]:
    """The items of inputs and outputs as they were stored."""

    def read() -> list[Said]:
        return [item for text in texts for item in said_items(parse_json(text))]

    return await serving.text.work.run(current_tenant_or(None), sum(map(len, texts)), read)


async def items_before(serving: Serving, name: str, cache_salt: str | None) -> list[dict[str, Any]]:
    """What a stored response was an answer to, oldest first. Raises RequestError or ResponseNotFound."""
    async with serving.responses.reading:
        chain = await serving.responses.chain(name, cache_salt, serving.settings.max_body_bytes)
        texts = [text for stored in chain for text in (stored.input, stored.output)][:-1]

        def read() -> list[dict[str, Any]]:
            return [item for text in texts for item in json.loads(text)]

        return await serving.text.work.run(current_tenant_or(None), sum(map(len, texts)), read)


async def _before(serving: Serving, asked: ResponsesRequest) -> tuple[list[Said], int]:
    """Items of the responses that a request continues, and their bytes: they count as if they had been sent."""
    if asked.previous_response_id is None:
        return [], 0
    most = serving.settings.max_body_bytes
    try:
        chain = await serving.responses.chain(asked.previous_response_id, asked.cache_salt, most)
    except ResponseNotFound as error:
        error.param, error.code = "previous_response_id", "previous_response_not_found"
        raise
    texts = [text for stored in chain for text in (stored.input, stored.output)]
    num_bytes = sum(map(len, texts))
    visit = current_visit.get()
    if visit is not None:
        visit.add_bytes(num_bytes)
    return await stored_items(serving, texts), num_bytes


async def _referred(serving: Serving, asked: ResponsesRequest, name: str) -> Said:
    """The item of a stored response that a reference means."""
    items: Sequence[Said] = ()
    if found := _NAME.fullmatch(name):
        try:
            stored: Stored = await serving.responses.find(f"resp_{found[1]}", asked.cache_salt)
            items = await stored_items(serving, (stored.input, stored.output))
        except ResponseNotFound:
            pass
    for item in items:
        if item.id == name:
            return item
    raise ResponseNotFound(f"Item with id {quoted(name)} not found: {serving.responses.terms}", param="input")


def _without_broken_off(items: Sequence[Said]) -> list[Said]:
    """Without calls that the end of their answer has cut, but with those that the client has answered all the same."""
    answered = {item.call_id for item in items if isinstance(item, FunctionOutputItem)}

    def broke_off(item: Said) -> bool:
        return isinstance(item, FunctionCallItem) and item.status == "incomplete" and item.call_id not in answered

    return [item for item in items if not broke_off(item)]


def _check(items: Iterable[Said]) -> None:
    """Each result follows its call, each call has one, and no item is there twice. Raises RequestError."""
    open_calls, names = dict[str, None](), set[str]()
    for item in items:
        if isinstance(item, FunctionCallItem):
            if item.call_id in open_calls:
                raise RequestError(f"two function calls have the call_id {quoted(item.call_id)}", param="input")
            open_calls[item.call_id] = None
        elif isinstance(item, FunctionOutputItem) and open_calls.pop(item.call_id, item) is item:
            raise RequestError(
                f"No tool call found for function call output with call_id {quoted(item.call_id)}.", param="input"
            )
        if item.id is not None and item.id in names:
            raise RequestError(f"Duplicate item found with id {quoted(item.id)}.", param="input")
        names.add(item.id or "")
    if open_calls:
        raise RequestError(f"No tool output found for function call {quoted(next(iter(open_calls)))}.", param="input")


def _shown(item: Said, name: str) -> dict[str, object]:
    """An item of the input as clients get it. name: its id, unless it has one"""
    texts = isinstance(item, MessageItem | FunctionOutputItem)
    body: dict[str, object] = item.model_dump(exclude_none=True, exclude={"content", "output"} if texts else None)
    body["id"] = item.id or name
    if isinstance(item, ReasoningItem):
        return {"summary": [], **body}
    body["status"] = item.status or "completed"
    if isinstance(item, MessageItem):
        extra: dict[str, object] = {"annotations": []} if item.role == "assistant" else {}
        body["content"] = [{**part.model_dump(exclude_none=True), **extra} for part in item.parts]
    elif isinstance(item, FunctionOutputItem):
        parts = [part.model_dump(exclude_none=True) for part in item.parts]
        body["output"] = item.output if isinstance(item.output, str) else parts
    return body
