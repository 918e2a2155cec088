"""Folders from outside: whether what lies there is what it was, and one file of a prefix that another folder takes in.

A pack is a safetensors file with the payload of each entry under its number, those that others need first; what they
are stands in its metadata.
"""

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hybrid_cache.cache.disk.entries import DIGEST_BYTES, Entry, EntryKind, Facts, NewEntry
from hybrid_cache.cache.disk.index import NAME
from hybrid_cache.cache.keys import KEY_BYTES, NAME_BYTES, TOKEN_BYTES
from hybrid_cache.errors import ConfigError
from hybrid_cache.storage.folder import BadEntry, Bytes, Folder, digest_of

PACK = "hybrid-cache-pack-1"
ANY_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Verified:
    """What was found in a folder."""

    num_entries: int
    num_bytes: int  # of payloads that are what they were
    bad: dict[str, int]  # entries that are not, by why
    dropped: int


@contextmanager
def opened(path: Path, budget_bytes: int = ANY_BYTES) -> Iterator[Folder]:
    """A folder that is there. Raises ConfigError for one that is none."""
    if not (path / NAME).is_file():
        raise ConfigError(f"{path} is no folder of a disk tier: there is no {NAME} in it")
    folder = Folder(path, budget_bytes)
    try:
        yield folder
    except sqlite3.Error as error:
        raise ConfigError(f"{path / NAME}: {error}") from error
    finally:
        folder.close()


def verify(path: Path, *, drop: bool) -> Verified:
    """Reads all of a folder. drop: what is not what it was, and all that needs it, is removed"""
    bad, num_bytes, wrong = Counter[str](), 0, list[int]()
    with opened(path) as folder:
        entries = folder.index.all()
        for entry in entries:
            try:
                num_bytes += len(folder.read(entry))
            except (BadEntry, OSError) as error:
                bad[str(error) if isinstance(error, BadEntry) else (error.strerror or "error")] += 1
                wrong.append(entry.id)
        gone = folder.index.remove(wrong) if drop else []
        folder.erase(gone)
    return Verified(len(entries), num_bytes, dict(bad), len(gone))


def pack(path: Path, name: str, target: Path) -> list[Facts]:
    """Writes the deepest state whose name begins with some hexadecimal digits, and all that it needs -> what it wrote.

    Raises ConfigError if there is none, more than one, or one that is not what it was.
    """
    with opened(path) as folder:
        by_id = {entry.id: entry for entry in folder.index.all()}
        chain = _chain(by_id, _named(by_id, name))
        try:
            payloads = [folder.read(entry) for entry in chain]
            about = [_told(entry, folder.index.tokens(entry.id)) for entry in chain]
        except (BadEntry, OSError) as error:
            raise ConfigError(f"{name} cannot be packed: a file that it needs is not what it was: {error}") from error
    tensors = {f"{number}": payload for number, payload in enumerate(payloads)}
    try:
        save_file(tensors, target, {"format": PACK, "entries": json.dumps(about)})
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}") from error
    return [entry.facts for entry in chain]


def unpack(source: Path, path: Path, budget_bytes: int) -> tuple[list[Facts], int]:
    """Takes a pack into a folder, which is made if it is not there -> what is in it, and how many of that were new.

    Raises ConfigError for a file that is no pack, or damaged, and where there is no room.
    """
    facts, payloads, tokens = _read(source)
    folder = Folder(path, budget_bytes)
    try:
        reserved = folder.index.reserve(
            [NewEntry(each, (), None, said) for each, said in zip(facts, tokens, strict=True)]
        )
        folder.erase(reserved.gone)
        if reserved.refused:
            raise ConfigError(f"{path} has no room for {source} ({reserved.refused}), budget {budget_bytes} bytes")
        new = [(e, f, p) for e, f, p in zip(reserved.ids, facts, payloads, strict=True) if e is not None]
        written = [(entry, folder.write(entry, each, payload)) for entry, each, payload in new]
        folder.settle()
        folder.index.commit(written)
        return facts, len(new)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"{path}: {error}") from error
    finally:
        folder.close()


def _named(entries: dict[int, Entry], name: str) -> Entry:
    found = [each for each in entries.values() if each.facts.name.hex().startswith(name.lower())]
    states = [each for each in found if each.facts.kind is not EntryKind.PAGES] or found
    if len({each.facts.name for each in states}) != 1:
        raise ConfigError(f"{len(states)} states have a name that begins with {name!r}, must be one")
    return states[0]


def _chain(entries: dict[int, Entry], last: Entry) -> list[Entry]:
    """It and all that it needs, those that others need first."""
    chain, above = [last], last.above
    while above is not None:
        if above not in entries:
            raise ConfigError(f"what {last.facts.name.hex()} needs has gone")
        chain.append(entries[above])
        above = entries[above].above
    return chain[::-1]


def _told(entry: Entry, tokens: bytes) -> dict[str, object]:
    facts = entry.facts._asdict()
    hexed = {name: facts[name].hex() for name in ("name", "pages")}
    return {**facts, **hexed, "kind": entry.facts.kind.value, "digest": entry.digest.hex(), "tokens": tokens.hex()}


def _read(source: Path) -> tuple[list[Facts], list[Bytes], list[bytes]]:
    """What each entry is, its payload, and its tokens."""
    try:
        with safe_open(source, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != PACK:
                raise ConfigError(f"{source} is no pack of a cache")
            told = json.loads(metadata["entries"])
            payloads = [np.ascontiguousarray(file.get_tensor(f"{number}")) for number in range(len(told))]
        if not told:
            raise ValueError("nothing is in it")
        facts = [_facts(each, payload) for each, payload in zip(told, payloads, strict=True)]
        tokens = [_tokens(each, of) for each, of in zip(told, facts, strict=True)]
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source} is no pack of a cache, or damaged: {error}") from error
    return facts, payloads, tokens


def _tokens(told: dict[str, object], facts: Facts) -> bytes:
    """Those of an entry. Raises ValueError if it cannot have these."""
    tokens, num_pages = bytes.fromhex(str(told.get("tokens", ""))), len(facts.page_names)
    wanted = num_pages * KEY_BYTES if num_pages else len(tokens) // TOKEN_BYTES * TOKEN_BYTES
    if tokens and (len(tokens) != wanted or (not num_pages and wanted >= KEY_BYTES)):
        raise ValueError(f"{len(tokens)} bytes of tokens for {num_pages} pages")
    return tokens


def _facts(told: dict[str, object], payload: Bytes) -> Facts:
    """What is told of an entry. Raises ValueError, KeyError, TypeError if that cannot be."""
    texts = {name: str(told[name]) for name in ("identity", "namespace", "label")}
    name, pages, digest = (bytes.fromhex(str(told[each])) for each in ("name", "pages", "digest"))
    first, num_tokens = (int(str(told[each])) for each in ("first", "num_tokens"))
    if len(name) != NAME_BYTES or len(pages) % NAME_BYTES or len(digest) != DIGEST_BYTES or first < 0 or num_tokens < 1:
        raise ValueError("an entry that cannot be")
    if payload.dtype != np.uint8 or payload.ndim != 1 or digest_of(payload) != digest:
        raise ValueError(f"the bytes of {name.hex()} are not what they were")
    kind, value = EntryKind(told["kind"]), float(str(told["value"]))
    if not 0 <= value < math.inf:
        raise ValueError(f"a value of {value}")
    place = first, num_tokens, pages, len(payload), value, int(str(told.get("position", 0)))
    return Facts(texts["identity"], kind, name, texts["namespace"], texts["label"], *place)
