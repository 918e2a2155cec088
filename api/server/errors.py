"""The only place that knows status codes: every failure becomes an OpenAI error body, and nothing else leaks out."""

import logging
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hybrid_cache.api.server.discretion import place_of, without_values, words_of
from hybrid_cache.api.server.facts import facts
from hybrid_cache.errors import (
    EngineStopped,
    HybridCacheError,
    MessageGone,
    Overloaded,
    OverShare,
    RequestError,
    UnknownMessage,
)

RETRY_AFTER_S = 1
MAX_MESSAGE = 600  # characters of an error message; more is cut
MAX_VALUE = 100  # characters of a value quoted in one
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    405: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

ANTHROPIC_CODES = ("thread_unsupported_request",)  # by which its clients know what to send instead

current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)

logger = logging.getLogger("hybrid_cache.api")


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""


class NoSuchConversation(RequestError):
    """The request names a cached conversation that is not there, or not for this client."""


class NotAllowed(RequestError):
    """The request is one for others."""


class ResponseNotFound(RequestError):
    """The request names a stored response, or an item of one, that is not there for the one who asks."""


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's fields."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    """What went wrong, in Anthropic's fields."""

    type: str
    message: str
    details: dict[str, str] | None = None


class AnthropicErrorBody(BaseModel):
    """The same below `/v1/messages`."""

    type: Literal["error"] = "error"
    error: AnthropicErrorDetail
    request_id: str | None


@dataclass(frozen=True, slots=True)
class Problem:
    """A failure as a client sees it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry: bool = False  # the same request may succeed later
    for_log: str = ""  # the message without values that the client sent

    def __post_init__(self) -> None:
        if not self.for_log:
            object.__setattr__(self, "for_log", without_values(self.message))

    def body(self) -> dict[str, object]:
        detail = ErrorDetail(message=printable(self.message), type=self.type, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump()

    def body_for(self, path: str) -> dict[str, object]:
        """In the dialect of those who ask for a path."""
        if not path.startswith(ANTHROPIC_PATH):
            return self.body()
        kind = ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        where = f"{self.param}: " if self.param and self.param not in self.message else ""
        detail = AnthropicErrorDetail(type=kind, message=printable(where + self.message))
        if self.code in ANTHROPIC_CODES:
            detail.details = {"error_code": self.code}
        body = AnthropicErrorBody(error=detail, request_id=current_request_id.get())
        return body.model_dump(exclude=None if detail.details else {"error": {"details"}})

    def headers(self) -> dict[str, str]:
        if self.retry:
            return {"Retry-After": str(RETRY_AFTER_S)}
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        if self.status == 408:  # the rest of the request is still to come
            return {"Connection": "close"}
        return {"x-should-retry": "false"} if self.status >= 500 else {}

    def response(self, path: str) -> JSONResponse:
        facts().problem = self
        return JSONResponse(self.body_for(path), self.status, self.headers())


def problem_of(error: BaseException) -> Problem:
    """How an exception looks to a client. What is not ours becomes a 500 that says nothing about the inside."""
    return replace(_problem_of(error), for_log=words_of(error))


def _problem_of(error: BaseException) -> Problem:
    match error:
        case ModelNotFound():
            return Problem(404, str(error), "invalid_request_error", error.param, "model_not_found")
        case NoSuchConversation():
            return Problem(404, str(error), "invalid_request_error", error.param, "conversation_not_found")
        case NotAllowed():
            return Problem(403, str(error), "permission_error", error.param, "not_allowed")
        case UnknownMessage() | ResponseNotFound() | RequestError(code="not_recorded"):
            return Problem(404, str(error), "invalid_request_error", error.param, error.code)
        case RequestError(code="model_in_use" | "name_taken"):
            return Problem(409, str(error), "invalid_request_error", error.param, error.code)
        case MessageGone():
            return Problem(409, str(error), "invalid_request_error", error.param, error.code)
        case RequestError():
            return Problem(400, str(error), "invalid_request_error", error.param, error.code)
        case OverShare():
            return Problem(429, str(error), "rate_limit_error", code="rate_limit_exceeded", retry=True)
        case Overloaded():
            return Problem(503, str(error), "server_overloaded", code="server_overloaded", retry=True)
        case EngineStopped():
            message = str(error).partition(":")[0]  # what made the engine fail is for the log
            return Problem(503, message, "server_unavailable", code="server_unavailable", retry=True)
        case HybridCacheError():
            return Problem(500, str(error), "internal_error", code="internal_error")
        case RecursionError():
            return Problem(400, "The request body is nested too deeply.", code="invalid_json")
    return Problem(500, "The server failed while handling the request.", "internal_error", code="internal_error")


def unauthorized() -> Problem:
    message = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
    return Problem(401, message, "authentication_error", code="invalid_api_key")


def body_too_large(limit: int) -> Problem:
    return Problem(413, f"The request body is larger than the limit of {limit} bytes.", code="request_too_large")


def too_many_values(limit: int) -> Problem:
    message = f"The request body has more than {limit} commas and brackets: more values than are read."
    return Problem(413, message, code="request_too_large")


def body_too_slow(seconds: float, rate: int) -> Problem:
    message = f"The request body did not come within {seconds:g} seconds and at least {rate} bytes a second."
    return Problem(408, message, code="request_timeout")


def wrong_host(host: str) -> Problem:
    message = f"This server does not answer to the host {quoted(host)}; --allow-host adds a name."
    return Problem(421, message, code="wrong_host")


def invalid_http(limit: int) -> Problem:
    """limit: bytes of headers"""
    message = f"The request is not valid HTTP, has more than one length, or more than {limit} bytes of headers."
    return Problem(400, message, code="invalid_http")


def printable(text: str) -> str:
    """Cuts long text, and replaces what UTF-8 cannot carry."""
    text = text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def quoted(value: object) -> str:
    """A value as an error message shows it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nesting without end
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + "..."


def install_error_handlers(app: FastAPI) -> None:
    """Makes every failure of the app leave as an OpenAI error body."""

    async def on_ours(request: Request, error: Exception) -> Response:
        return problem_of(error).response(request.url.path)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _problem_of_validation(error.errors()).response(request.url.path)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = _problem_of_http(request, error).response(request.url.path)
        response.headers.update(error.headers or {})
        return response

    async def on_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    async def on_bug(request: Request, error: Exception) -> Response:
        return problem_of(error).response(request.url.path)  # the server logs the traceback

    app.add_exception_handler(HybridCacheError, on_ours)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientDisconnect, on_gone)
    app.add_exception_handler(Exception, on_bug)


def _problem_of_http(request: Request, error: HTTPException) -> Problem:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return Problem(404, f"{where} is not served here.", code="not_found")
    if error.status_code == 405:
        return Problem(405, f"{where} is not allowed.", code="method_not_allowed")
    if error.status_code == 400:  # raised by the framework when the bytes cannot be decoded
        return Problem(
            400, "The request body is not valid JSON in UTF-8, or is nested too deeply.", code="invalid_json"
        )
    return Problem(error.status_code, str(error.detail))


def _problem_of_validation(errors: Sequence[dict[str, object]]) -> Problem:
    problem, place = _first_problem(errors[0]), errors[0].get("loc")
    message = problem.message
    if problem.param is not None and isinstance(place, tuple) and place[0] == "body":  # elsewhere all names are ours
        message = message.replace(problem.param, place_of(place[1:]))
    return replace(problem, for_log=without_values(message))


def _first_problem(first: dict[str, object]) -> Problem:
    place = first.get("loc")
    loc = [str(part) for part in place] if isinstance(place, tuple) else []
    context, value = first.get("ctx"), first.get("input")
    if first.get("type") == "json_invalid":
        reason = context.get("error") if isinstance(context, dict) else ""
        return Problem(400, f"The request body is not valid JSON: {reason}.", code="invalid_json")
    param, message = ".".join(loc[1:]) or None, str(first.get("msg")).removeprefix("Value error, ")
    if first.get("type") == "missing":
        if param is None:
            return Problem(400, "The request has no body; send a JSON object.")
        return Problem(400, f"{param} is required.", param=param, code="missing_required_parameter")
    if param is None and first.get("type") != "value_error":
        message = "The request body must be a JSON object, sent with 'Content-Type: application/json'."
        return Problem(400, message, code="invalid_json")
    if isinstance(value, dict) or param is None:
        return Problem(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")
    return Problem(400, f"{param} is {quoted(value)}: {message}", param=param, code="invalid_value")
