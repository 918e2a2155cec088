"""What the server owes to any request at all."""

import json

from tests.fuzz.cases import Case
from tests.soak.wire import Json, Reply, events

ERROR_FIELDS = {"message", "type", "param", "code"}
ANTHROPIC_FIELDS = {"message", "type"}
LAST = {"message_stop", "response.completed", "response.incomplete"}
OVERLOADED = {"server_overloaded", "overloaded_error"}  # in OpenAI's words and in Anthropic's


def fault_of(case: Case, reply: Reply) -> str | None:
    """How an answer breaks the promises; None if it does not."""
    if not reply.status:
        return "no answer" if case.framed and case.leave_after_s > 1 else None
    if reply.status >= 400:
        return _fault_of_error(case, reply)
    if reply.status >= 300:
        return f"sends elsewhere: {reply.headers['location']}" if "evil" in reply.headers.get("location", "") else None
    kind = reply.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        return _fault_of_stream(reply.body)
    if kind.startswith("application/json") and case.method != "HEAD":
        return None if _is_json(reply.body) else f"{reply.status} without JSON: {reply.body[:200]!r}"
    return None


def _fault_of_error(case: Case, reply: Reply) -> str | None:
    if case.method == "HEAD":
        return f"status {reply.status}" if reply.status >= 500 else None
    by_the_framework = reply.headers.get("content-type", "").startswith("text/plain")
    if not case.framed and reply.status < 500 and by_the_framework:
        return None  # what is no HTTP never reaches the application
    try:
        error = json.loads(reply.body)["error"]
        ours = not case.path.startswith("/v1/messages") or ("param" in error and not case.framed)
        formed = (
            set(error) == (ERROR_FIELDS if ours else ANTHROPIC_FIELDS)
            and isinstance(error["message"], str)
            and bool(error["message"])
        )
    except (ValueError, TypeError, KeyError):
        formed = False
    if not formed:
        return f"{reply.status} without our error: {reply.body[:200]!r}"
    full = OVERLOADED & {error.get("code"), error.get("type")}
    if reply.status >= 500 and not (reply.status == 503 and full):
        return f"status {reply.status}: {error['message'][:200]}"
    return None


def _fault_of_stream(body: bytes) -> str | None:
    found = events(body)
    for event in found:
        if event != "[DONE]" and not _is_json(event):
            return f"an event without JSON: {event[:200]!r}"
    told = [json.loads(event) for event in found if event != "[DONE]"]
    errors = [error for event in told if (error := _error_in(event))]
    if not all(OVERLOADED & {error.get("code"), error.get("type")} for error in errors):
        return f"a stream with an error: {found[-2:]}"
    ended = bool(errors) or found[-1:] == ["[DONE]"] or any(event.get("type") in LAST for event in told[-1:])
    return None if ended else f"a stream without an end: {body[-200:]!r}"


def _error_in(event: Json) -> Json:
    """What an event says of a failure, in either form."""
    if event.get("type") == "error":
        return event.get("error") or event
    return event.get("error") or (event.get("response") or {}).get("error")


def _is_json(text: str | bytes) -> bool:
    """NaN and Infinity are none."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True
