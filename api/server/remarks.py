"""What the headers of a reply say about how its request was read: fields that nobody here knows, messages that moved.

Names come from clients: they are cleaned, cut and counted before they reach a header or the log.
"""

import logging
import re
import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

IGNORED = "x-ignored-fields"
REARRANGED = "x-messages-rearranged"
MOST_NAMED = 16  # fields in one header
MOST_LOGGED = 64  # different fields a minute
MAX_NAME = 64  # characters of a field's name
WINDOW_S = 60.0
_FREE = ("chat_template_kwargs", "metadata")  # whose names are clients' own
_ODD = re.compile(r"[^A-Za-z0-9_.\-]")

logger = logging.getLogger("hybrid_cache.remarks")


@dataclass(slots=True)
class Remarks:
    """About one request."""

    ignored: dict[str, None] = field(default_factory=dict)  # names in order, at most MOST_NAMED
    num_more: int = 0  # that are not among them
    rearranged: tuple[str, ...] = ()

    def headers(self) -> dict[str, str]:
        shown = [*self.ignored, *([f"and {self.num_more} more"] if self.num_more else [])]
        headers = {IGNORED: ", ".join(shown)} if shown else {}
        return {**headers, REARRANGED: ", ".join(self.rearranged)} if self.rearranged else headers


current_remarks: ContextVar[Remarks | None] = ContextVar("current_remarks", default=None)


class RecentNames:
    """Lets each name pass once in a window of time, and no more than MOST_LOGGED of them."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._since = float("-inf")

    def is_new(self, name: str, now_s: float) -> bool:
        if now_s - self._since >= WINDOW_S:
            self._names, self._since = set(), now_s
        if name in self._names or len(self._names) >= MOST_LOGGED:
            return False
        self._names.add(name)
        return True


_recent = RecentNames()


def ignore(name: str) -> None:
    """Remarks that a field of the request has no effect."""
    logged, name, remarks = loggable(name), cleaned(name), current_remarks.get()
    if _recent.is_new(logged, time.monotonic()):
        logger.warning("a request has the field %s, which is not known here: it is ignored", logged)
    if remarks is None or name in remarks.ignored:
        return
    if len(remarks.ignored) < MOST_NAMED:
        remarks.ignored[name] = None
    else:
        remarks.num_more += 1


def remark_reading(rearranged: tuple[str, ...], unread: tuple[str, ...]) -> None:
    """Remarks what was done to the order of the messages, and what of them the chat template does not show."""
    for name in unread:
        ignore(name)
    remarks = current_remarks.get()
    if remarks is not None:
        remarks.rearranged = rearranged


def loggable(name: str) -> str:
    """A name that looks like one; what may be a sentence of somebody is `*`, and so are names that clients make up."""
    first, dot, _ = name.partition(".")
    if dot and first in _FREE:
        return f"{first}.*"
    return "*" if _ODD.search(name) or len(name) > MAX_NAME else name


def cleaned(name: str) -> str:
    """A field's name as headers may show it."""
    return _ODD.sub("?", name[: MAX_NAME + 1])[:MAX_NAME] or "?"


class RemarkHeaders:
    """Adds the remarks about a request to its reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        remarks = Remarks()
        current_remarks.set(remarks)

        async def send_with_remarks(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(remarks.headers())
            await send(message)

        await self._app(scope, receive, send_with_remarks)
