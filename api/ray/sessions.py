"""The session of a request whose body nobody has checked yet."""

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from hybrid_cache.api.server.sessions import session_of, user_of


class _Metadata(BaseModel):
    user_id: str | None = None


class _Hints(BaseModel):
    """The fields in which a body of any dialect may say it."""

    session_id: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    metadata: _Metadata | None = None


def session_in(headers: Mapping[str, str], body: Mapping[str, object]) -> str:
    """As a server understands it, else the user; empty where neither is said."""
    try:
        hints = _Hints.model_validate({name: body.get(name) for name in _Hints.model_fields})
    except ValidationError:
        hints = _Hints()
    return session_of(headers, hints) or user_of(hints)
