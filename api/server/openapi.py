"""What the routes say about headers, failures and streams in /openapi.json."""

from typing import Any

from hybrid_cache.api.server import tasks
from hybrid_cache.api.server.errors import AnthropicErrorBody, ErrorBody

Responses = dict[int | str, dict[str, Any]]

UNAVAILABLE = 503  # the answer to a probe of a server that cannot serve
HINTS: dict[str, Any] = {
    "parameters": [
        {
            "name": tasks.HEADER,
            "in": "header",
            "required": False,
            "schema": {"type": "number", "minimum": 0, "maximum": tasks.MOST_MS},
            "description": "Milliseconds that the tools take which the answer may call. It changes no answer, only "
            "what the cache keeps while they run.",
        }
    ]
}
LOOKUP_ERRORS: Responses = {
    401: {"model": ErrorBody, "description": "The API key is missing or wrong."},
    404: {"model": ErrorBody, "description": "No such model, message or response."},
    421: {"model": ErrorBody, "description": "The Host header names another server."},
}
CACHE_ERRORS: Responses = {
    400: {"model": ErrorBody, "description": "The request cannot be served as it stands."},
    401: LOOKUP_ERRORS[401],
    403: {"model": ErrorBody, "description": "The cache is shared by all keys, and shown to its operator only."},
    404: {"model": ErrorBody, "description": "No such conversation, or more than one."},
    421: LOOKUP_ERRORS[421],
    503: {"model": ErrorBody, "description": "The engine has stopped or hangs."},
}
ERRORS: Responses = {
    **LOOKUP_ERRORS,
    400: {"model": ErrorBody, "description": "The request cannot be served as it stands."},
    408: {"model": ErrorBody, "description": "The body came too slowly."},
    409: {"model": ErrorBody, "description": "A message that is referred to is no longer kept."},
    413: {"model": ErrorBody, "description": "The body is too large."},
    503: {"model": ErrorBody, "description": "The queue is full or the server is draining; see Retry-After."},
}
EVENTS: Responses = {
    200: {"content": {"text/event-stream": {}}, "description": "With `stream`, server-sent events that end in [DONE]."}
}
NAMED_EVENTS: Responses = {
    200: {"content": {"text/event-stream": {}}, "description": "With `stream`, server-sent events with names."}
}
ANTHROPIC_ERRORS: Responses = {status: {**shown, "model": AnthropicErrorBody} for status, shown in ERRORS.items()}
