"""What a folder of a disk tier has, in the words of a running server."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hybrid_cache.api.server.schemas.cache import CachedState, ConversationInfo, ConversationList, Dropped
from hybrid_cache.api.server.schemas.stored import StoredDetail, StoredFile, StoredInfo
from hybrid_cache.api.server.tenants import TENANT_CHARACTERS, salt_of_tenant, tenant_of
from hybrid_cache.cache.disk.entries import Entry
from hybrid_cache.errors import ConfigError
from hybrid_cache.namespaces import fingerprint_in, salt_in
from hybrid_cache.storage.contents import Contents, StoredConversation, StoredState
from hybrid_cache.storage.packs import opened

SHORT_FINGERPRINT = 12  # digits


class FolderCache:
    """Answers as `ServerCache` does. A server may be using the folder."""

    def __init__(self, path: Path, contents: Contents) -> None:
        self._path = path
        self._contents = contents

    def list(self, limit: int) -> ConversationList:
        found = self._contents.conversations()
        data: list[ConversationInfo] = [_conversation(each) for each in found[:limit]]
        return ConversationList(data=data, total=len(found))

    def show(self, name: str) -> StoredDetail:
        """Reads the files. Raises ConfigError for the name of none, or of several."""
        whole = self._contents.find(name)
        if whole is None:
            raise self._not_one(name)
        return StoredDetail(
            **_conversation(whole.conversation).model_dump(),
            states=[_state(each) for each in whole.states],
            text="",
            files=[self._file(each) for each in whole.files],
        )

    def drop(self, name: str | None) -> Dropped:
        """None: all of them. Raises ConfigError as `show` does."""
        freed_bytes = self._contents.drop_all() if name is None else self._contents.drop(name)
        if freed_bytes is None:
            raise self._not_one(str(name))
        return Dropped(freed_bytes=freed_bytes)

    def _file(self, entry: Entry) -> StoredFile:
        facts = entry.facts
        return StoredFile(
            file=entry.file_name,
            kind=facts.kind.value,
            pages=len(facts.page_names),
            tokens=facts.num_tokens,
            bytes=facts.file_bytes,
            wrong=self._contents.why_not(entry) or None,
        )

    def _not_one(self, name: str) -> ConfigError:
        return ConfigError(f"no conversation in {self._path} has the name {name[:64]!r}, or more than one")


@contextmanager
def folder_cache(path: Path, key: str | None, salt: str | None) -> Iterator[FolderCache]:
    """Raises ConfigError for what is no folder of a disk tier, or cannot be read."""
    with opened(path) as folder:
        yield FolderCache(path, Contents(folder, _seen_by(key, salt)))


def _seen_by(key: str | None, salt: str | None) -> Callable[[str], bool]:
    """Namespaces of a tenant, of a salt, of both, or all."""
    if key is not None:
        own = salt_of_tenant(tenant_of(key), salt)
        return lambda namespace: salt_in(namespace) == own or (salt is None and salt_in(namespace).startswith(own))
    return lambda namespace: salt is None or salt in (salt_in(namespace), _without_tenant(salt_in(namespace)))


def _without_tenant(salt: str) -> str:
    return salt[TENANT_CHARACTERS + 1 :] if salt[TENANT_CHARACTERS : TENANT_CHARACTERS + 1] == ":" else salt


def _conversation(found: StoredConversation) -> StoredInfo:
    facts = found.end.entry.facts
    fingerprint = fingerprint_in(facts.namespace)
    whole = {"bytes": found.num_bytes, "hits": found.uses, "models": [fingerprint[:SHORT_FINGERPRINT]]}
    about = {"namespace": salt_in(facts.namespace), "fingerprint": fingerprint, "identity": facts.identity}
    return StoredInfo.model_validate({**_state(found.end).model_dump(), **whole, **about})


def _state(state: StoredState) -> CachedState:
    facts = state.entry.facts
    return CachedState(
        name=facts.name.hex(),
        kind=facts.label or facts.kind.value,
        tokens=facts.num_tokens,
        bytes=facts.num_bytes,
        hits=state.use.count,
        age_s=state.age_s,
        score=state.use.score,
    )
