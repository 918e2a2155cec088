"""Which conversation a request belongs to, read from what clients send anyway.

The first of these that says anything:

    session_id                              in the body
    x-session-id, x-claude-code-session-id  headers
    session-id, thread-id                   headers
    metadata.user_id                        in the body: the session that coding agents put into it, else all of it
    prompt_cache_key                        in the body

Agents of one session are told apart: `x-claude-code-parent-agent-id` and `x-claude-code-agent-id` follow after a slash.

A session is a hint. It is the client's word, two tenants may send the same one, and it never decides what a request
finds, computes or sees.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

MOST_CHARACTERS = 256  # of a session; a longer one is known by its digest
MOST_USER_ID = 4096  # characters of a `user_id` that are looked into
HEADERS = ("x-session-id", "x-claude-code-session-id", "session-id", "thread-id")
AGENT_HEADERS = ("x-claude-code-parent-agent-id", "x-claude-code-agent-id")
_MARK = "_session_"


def session_of(headers: Mapping[str, str], asked: BaseModel) -> str:
    """The session that a request names; empty if it names none. headers: names in lower case"""
    session = next((said for said in map(str.strip, _named(headers, asked)) if said), "")
    agents = [agent for name in AGENT_HEADERS if (agent := headers.get(name, "").strip())]
    return _bounded("/".join([session, *agents])) if session or agents else ""


def user_of(asked: BaseModel) -> str:
    """The user that a request names; empty if it names none. Of a `user_id` with a session in it, what comes before."""
    said = getattr(asked, "user", None) or getattr(asked, "safety_identifier", None)
    user_id = getattr(getattr(asked, "metadata", None), "user_id", None) or ""
    return _bounded((said or user_id.partition(_MARK)[0]).strip())


def _named(headers: Mapping[str, str], asked: BaseModel) -> Iterator[str]:
    yield getattr(asked, "session_id", None) or ""
    for name in HEADERS:
        yield headers.get(name, "")
    yield _session_in(getattr(getattr(asked, "metadata", None), "user_id", None) or "")
    yield getattr(asked, "prompt_cache_key", None) or ""


def _session_in(user_id: str) -> str:
    """`{"session_id": "s", ...}` or `user_u_account_a_session_s` -> `s`; anything else as it is."""
    if len(user_id) <= MOST_USER_ID and user_id.startswith("{"):
        try:
            session = json.loads(user_id).get("session_id")
        except (ValueError, RecursionError):
            session = None
        return session if isinstance(session, str) and session.strip() else user_id
    return user_id.rpartition(_MARK)[2] or user_id


def _bounded(session: str) -> str:
    if len(session) <= MOST_CHARACTERS:
        return session
    return "sha256:" + hashlib.sha256(session.encode("utf-8", "surrogatepass")).hexdigest()
