"""What a running server or a folder has cached, as tables or as JSON."""

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import httpx
from rich.console import Console
from rich.table import Table

from hybrid_cache.api.cli.terminal import CONNECT_TIMEOUT_S, ServerFailed, harmless, refused, server_root
from hybrid_cache.api.server.schemas.cache import (
    CachedState,
    ConversationDetail,
    ConversationInfo,
    ConversationList,
    Dropped,
)
from hybrid_cache.api.server.schemas.stored import StoredDetail, StoredFile
from hybrid_cache.sizes import format_bytes

PATH = "/cache/conversations"
ANSWER_TIMEOUT_S = 60.0  # a step of the engine may be under way
SHORT_NAME = 12  # digits


class Cached(Protocol):
    """Something with conversations: a server, or a folder."""

    def list(self, limit: int) -> ConversationList: ...
    def show(self, name: str) -> ConversationDetail: ...
    def drop(self, name: str | None) -> Dropped:
        """None: all of them."""
        ...


class ServerCache:
    """The cache of a server, for one API key. Methods raise ServerFailed."""

    def __init__(self, url: str, key: str | None, salt: str | None) -> None:
        """Raises ServerFailed for what is not an address."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        self._http = httpx.Client(base_url=server_root(url), headers=headers, timeout=timeout, trust_env=False)
        self._params: dict[str, Any] = {} if salt is None else {"cache_salt": salt}

    def __enter__(self) -> "ServerCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def list(self, limit: int) -> ConversationList:
        return ConversationList.model_validate_json(self._ask("GET", PATH, limit=limit))

    def show(self, name: str) -> ConversationDetail:
        return ConversationDetail.model_validate_json(self._ask("GET", _path(name)))

    def drop(self, name: str | None) -> Dropped:
        """None: all of them."""
        return Dropped.model_validate_json(self._ask("DELETE", PATH if name is None else _path(name)))

    def _ask(self, method: str, path: str, **params: Any) -> bytes:
        try:
            response = self._http.request(method, path, params={**self._params, **params})
        except httpx.TransportError as error:
            raise ServerFailed(f"no connection to {self._http.base_url}: {error or type(error).__name__}") from error
        if response.status_code != 200:
            raise refused(response)
        return response.content


def _path(name: str) -> str:
    """Raises ServerFailed for what is no name, and might be another path."""
    if not name.isalnum():
        raise ServerFailed(f"{name!r} is no name of a conversation")
    return f"{PATH}/{name}"


def list_conversations(cached: Cached, limit: int, *, as_json: bool) -> None:
    found = cached.list(limit)
    if as_json:
        return _print_json(found.model_dump())
    console = _console()
    console.print(_conversations(found.data))
    if found.total > len(found.data):
        console.print(f"{found.total - len(found.data)} more were used earlier")


def show_conversation(cached: Cached, name: str, *, as_json: bool) -> None:
    found = cached.show(name)
    if as_json:
        return _print_json(found.model_dump())
    console = _console()
    console.print(_conversations([found], short=False))
    console.print(_states(found.states))
    if isinstance(found, StoredDetail):
        console.print(_files(found.files))
    else:
        console.print("…" + harmless(found.text), soft_wrap=True)


def drop_conversations(cached: Cached, name: str | None, *, as_json: bool) -> None:
    """name: None for all of them"""
    dropped = cached.drop(name)
    if as_json:
        return _print_json(dropped.model_dump())
    _console().print(f"{format_bytes(dropped.freed_bytes)} freed")


def _conversations(rows: Sequence[ConversationInfo], *, short: bool = True) -> Table:
    table = _table("name", "tokens", "own", "ends with", "used", "score", "hits", "model", "namespace")
    for row in rows:
        name = row.name[:SHORT_NAME] if short else row.name
        models = harmless(", ".join(row.models))
        table.add_row(*_facts(row, name, format_bytes(row.bytes)), models, harmless(row.namespace))
    return table


def _states(rows: Sequence[CachedState]) -> Table:
    table = _table("state", "tokens", "size", "kind", "used", "score", "hits")
    for row in rows:
        table.add_row(*_facts(row, row.name[:SHORT_NAME], format_bytes(row.bytes)))
    return table


def _files(rows: Sequence[StoredFile]) -> Table:
    table = _table("file", "kind", "pages", "tokens", "size", "bytes are")
    for row in rows:
        right = "right" if row.wrong is None else f"wrong: {row.wrong}"
        table.add_row(row.file, row.kind, f"{row.pages:,}", f"{row.tokens:,}", format_bytes(row.bytes), right)
    return table


def _facts(row: ConversationInfo | CachedState, name: str, size: str) -> tuple[str, ...]:
    score = "" if row.score is None else f"{row.score:.3g}"
    return name, f"{row.tokens:,}", size, row.kind, f"{_duration(row.age_s)} ago", score, str(row.hits)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, pad_edge=False)
    for name in others:
        table.add_column(
            name, justify="right" if name in ("tokens", "own", "size", "used", "score", "hits", "pages") else "left"
        )
    return table


def _console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)


def _print_json(value: Mapping[str, object]) -> None:
    print(json.dumps(value, indent=2))
