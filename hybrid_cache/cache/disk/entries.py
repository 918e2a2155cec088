"""What a file of the disk tier is, and the header that it must begin with. Integers and names only."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.keys import NAME_BYTES, Name, pieces

FORMAT = "hybrid-cache-1"
BLOCK_BYTES = 4096  # of file systems
ALIGNMENT = 64  # of a payload in its file


class EntryKind(Enum):
    """What a file holds."""

    PAGES = "pages"
    STATE = "state"
    END = "end"
    MESSAGE = "message"


class Facts(NamedTuple):
    """What is known of an entry before its bytes are. Many are made at once at the start."""

    identity: str  # of the model that made it, see `engine.identity`
    kind: EntryKind
    name: Name  # of the prefix that it ends; of a prompt's end, of the whole prompt; of a message, by its key
    namespace: str
    label: str  # the kind of a state, as in `CheckpointKind`
    first: int  # pages before it: of a run; of a state all that it needs; of a message, tokens before it
    num_tokens: int  # with it
    pages: bytes = b""  # of a run, the names of its pages one after the other
    num_bytes: int = 0  # of the payload
    value: float = 0.0  # of a state: what it saves for each byte, see `cache.disk.saving`
    position: int = 0  # of a message, of its first row

    @property
    def key(self) -> tuple[EntryKind, Name]:
        return self.kind, self.name

    @property
    def page_names(self) -> list[Name]:
        return pieces(self.pages, NAME_BYTES)

    @property
    def end(self) -> int:
        """Pages up to its end."""
        return self.first + len(self.pages) // NAME_BYTES

    def header(self, digest: bytes) -> bytes:
        """What its file begins with; the payload follows. digest: of the payload"""
        facts = {
            "format": FORMAT,
            "identity": self.identity,
            "kind": self.kind.value,
            "name": self.name.hex(),
            "first": str(self.first),
            "num_tokens": str(self.num_tokens),
            "position": str(self.position),
            "pages": self.pages.hex(),
            "blake2b": digest.hex(),
        }
        tensor = {"dtype": "U8", "shape": [self.num_bytes], "data_offsets": [0, self.num_bytes]}
        text = json.dumps({"__metadata__": facts, self.kind.value: tensor}, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def file_bytes(self) -> int:
        """What its file takes from a disk."""
        return -(-(len(self.header(bytes(DIGEST_BYTES))) + self.num_bytes) // BLOCK_BYTES) * BLOCK_BYTES


DIGEST_BYTES = 32  # blake2b of a payload


class Entry(NamedTuple):
    """A file that is there."""

    id: int  # never used again
    facts: Facts
    above: int | None  # the entry with the page before its first, or with its last page
    digest: bytes

    @property
    def file_name(self) -> str:
        return file_name(self.id)


@dataclass(frozen=True, slots=True)
class NewEntry:
    """A file that is to be written."""

    facts: Facts
    items: tuple[tuple[Kind, int], ...]  # whose bytes follow each other in the payload
    # What it needs: an entry that is there, or a run that is being written, by its name; None: nothing, or the entry
    # before it in the same job.
    above: int | Name | None
    tokens: bytes = b""  # of its pages, or of what a prompt has behind them, as int32; for those who ask for them
    extra: tuple[tuple[Kind, int, int], ...] = ()  # further items, and how many bytes follow of each


def file_name(entry: int) -> str:
    return f"{entry:016x}.safetensors"


# What the storage reports


@dataclass(frozen=True, slots=True)
class Saved:
    """A job is done; what it wrote was reported as found."""

    job: int


@dataclass(frozen=True, slots=True)
class NotSaved:
    """A job was given up. why: a word for a counter"""

    job: int
    why: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was asked for is in memory, until it is forgotten."""

    ticket: int
    num_bytes: int
    seconds: float  # that it took to read and to check it


@dataclass(frozen=True, slots=True)
class NotLoaded:
    """An entry could not be read, or is not what it was. why: a word for a counter"""

    ticket: int
    entry: int
    why: str


@dataclass(frozen=True, slots=True)
class Gone:
    """Entries that are no longer there."""

    entries: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Entries that are new, whoever wrote them, those that others need before them."""

    entries: tuple[Entry, ...]


Report = Saved | NotSaved | Loaded | NotLoaded | Gone | Found


@dataclass(frozen=True, slots=True)
class Usage:
    """How full a folder is."""

    num_bytes: int = 0  # of all files, of whatever model
    inflation: float = 0.0  # score of what went last


class Storage(Protocol):
    """What the tier asks of the bytes' side. Nothing here waits."""

    @property
    def usage(self) -> Usage:
        """After the latest change."""
        ...

    @property
    def queued_bytes(self) -> int:
        """That wait to be written."""
        ...

    @property
    def spent_s(self) -> float:
        """Processor time of copies and of writing, in total."""
        ...

    def entries(self, identity: str) -> list[Entry]:
        """All of a model, and from now on those that others write are reported."""
        ...

    def load(self, ticket: int, entries: Sequence[Entry]) -> None: ...
    def forget(self, ticket: int) -> None: ...
    def drop(self, entries: Sequence[int]) -> None: ...
    def drop_namespaces(self, may: Callable[[str], bool]) -> None: ...
    def use(self, used: Sequence[tuple[int, float, bool]]) -> None:
        """Entries, their values now, and whether they were read."""
        ...

    def refresh(self) -> None: ...
    def remember(self, name: str, value: bytes) -> None:
        """Keeps something beside the entries."""
        ...

    def recall(self, name: str) -> bytes | None: ...
    def reports(self) -> list[Report]: ...
