"""JSON bodies, read in a time that does not stop the event loop."""

import gc
import json
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from hybrid_cache.api.server.facts import facts

MAX_VALUES = (1 << 18) + 1024  # of one body, or twice the model's context: about what can be read in 100 ms
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonRoute(APIRoute):
    """A route whose body is read by `parse_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        body = parse_json(await self.body())
        facts().read(body)
        return body


def parse_json(body: bytes) -> object:
    """The value that a body holds. Raises JSONDecodeError, also for text that UTF-8 cannot carry."""
    body = body.removeprefix(BYTE_ORDER_MARK)
    try:
        with _without_collector():
            return from_json(body, cache_strings="none")
    except ValueError as error:
        reason, _, place = str(error).partition(" at line ")
        if "hex escape" in reason:
            reason = "half a surrogate pair, which UTF-8 cannot carry (lone surrogates),"
        line, _, column = place.partition(" column ")
        raise json.JSONDecodeError(f"{reason} at line {line}, column {column}", "", 0) from None


def values_in(body: bytes) -> int:
    """At most so many values are in a piece of JSON: each but the first follows a comma or a bracket."""
    return sum(body.count(mark) for mark in (b",", b"[", b"{"))


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's collector looks at all objects again and again while many are made, and frees none of these."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
