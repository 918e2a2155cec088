"""The memory of one cache: carries out what the books ask for, in order."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hybrid_cache.cache.commands import (
    Command,
    Copy,
    CopyEntries,
    Forget,
    Item,
    KeepHidden,
    Load,
    Move,
    MoveHost,
    Restore,
    Save,
    Seal,
    Store,
    Unseal,
    Verify,
    VerifySome,
)
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.device.arena import Arena
from hybrid_cache.device.batch import CacheTensors
from hybrid_cache.device.digests import Digests
from hybrid_cache.device.disk import DiskMemory
from hybrid_cache.device.host_memory import HostMemory
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.spec import CacheSpec
from hybrid_cache.storage.store import Store as DiskStore


class CacheMemory:
    """Pages and slots of all layers.

    rows    hidden rows [L, hidden] that the latest forward pass gave, for `KeepHidden`
    inputs  all items that may hold what layers were given: [items, rows in each, hidden]
    """

    def __init__(
        self,
        spec: CacheSpec,
        budget_bytes: int,
        device: str = "cpu",
        *,
        host_bytes: int = 0,
        disk: DiskStore | None = None,
        verify: bool = False,
    ) -> None:
        """host_bytes: of a second tier; 0 for none   disk: a third one
        verify: the books report what is published, used and given up
        """
        self._spec = spec
        self._geometry = Geometry.of(spec, budget_bytes)
        self._arena = Arena(spec, self._geometry, device)
        self._host = HostMemory(spec, Geometry.of(spec, host_bytes), self._arena) if host_bytes else None
        self._disk = DiskMemory(disk, spec, self._geometry, self._arena) if disk else None
        self.digests = Digests(self._arena.digest)
        self._verify = verify
        self.rows = torch.empty(0)
        self.inputs = self._arena.input_rows(spec, self._extra_kind)

    @property
    def _extra_kind(self) -> Kind:
        return Kind.PAGE if self._geometry.page_bytes else Kind.SLOT

    @property
    def holds_messages(self) -> bool:
        """Whether it is large enough for one."""
        return self._message_units <= self._geometry.num_units

    @property
    def _message_units(self) -> int:
        """From the first on, with a slot, a page, and what the effect of a message takes."""
        geometry, in_pages = self._geometry, self._extra_kind is Kind.PAGE
        num_slots, num_pages = (1, 1 + self._num_extra) if in_pages else (1 + self._num_extra, 1)
        last = geometry.first_page(num_slots) + num_pages
        return max(num_slots * geometry.units(Kind.SLOT), last * geometry.units(Kind.PAGE))

    @property
    def _num_extra(self) -> int:
        """Items that the effect of one message takes."""
        return -(-4 * self._spec.effect_size // self._geometry.stride_bytes(self._extra_kind))

    @property
    def tensors(self) -> CacheTensors:
        """Views of all pages and slots by layer."""
        return self._arena.tensors

    @property
    def numbers(self) -> Tensor:
        """All items of the kind that holds effects of messages, as numbers: [items, numbers in each] float32."""
        return self._arena.numbers(self._extra_kind)

    def hidden(self, slots: Sequence[int]) -> Tensor:
        """Copies of the hidden rows [slots, hidden_size] that are kept in these slots, at least one."""
        return torch.stack([self._arena.hidden[slot] for slot in slots])

    def run(self, command: Command) -> None:
        """Raises PublishedBytesChanged if an item that is verified or given up has changed since it was sealed."""
        match command:
            case Copy():
                self._arena.copy(command.kind, command.source, command.target)
            case CopyEntries():
                self._copy_entries(command)
            case Move():
                self._arena.move(command.kind, command.moves)
                if self._verify:
                    self.digests.moved(command.kind, command.moves)
            case KeepHidden():
                self._arena.hidden[command.slot] = self.rows[command.row]
            case Seal():
                self.digests.seal(command.items, command.what)
            case Unseal():
                self.digests.unseal(command.items)
            case Verify():
                self.digests.verify(command.items)
            case VerifySome():
                self.digests.verify_some()
            case Store() | Load() | MoveHost():
                assert self._host is not None
                self._host.run(command)
            case Save() | Restore() | Forget():
                assert self._disk is not None
                self._disk.run(command)

    def _copy_entries(self, command: CopyEntries) -> None:
        for index in command.entries:
            entry = self.tensors[index]
            for tensor in (entry.k, entry.v) if isinstance(entry, KVTensors) else (entry.conv, entry.state):
                for source, target in command.copies:  # needs no memory between
                    tensor[target] = tensor[source]

    @contextmanager
    def borrowed(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """A slot, a page and items for the effect of a message, whoever has them: what is done to them is undone."""
        in_pages = self._extra_kind is Kind.PAGE
        page = self._geometry.first_page(1 if in_pages else 1 + self._num_extra)
        first = page + 1 if in_pages else 1
        with self._arena.unchanged(self._message_units):
            yield 0, page, tuple(range(first, first + self._num_extra))

    def clear(self) -> None:
        """Zeros everywhere."""
        self._arena.clear()

    def contents(self, page: int, slot: int | None) -> bytes:
        """What all layers have in a page and in a slot; those of a model have nothing else in them."""
        found = list[Tensor]()
        for entry in self.tensors:
            if isinstance(entry, KVTensors):
                found += [entry.k[page], entry.v[page]] if page >= 0 else []
            else:
                found += [entry.conv[slot], entry.state[slot]] if slot is not None else []
        return b"".join(each.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes() for each in found)

    def check(self, published: set[Item]) -> None:
        """Proves that what was sealed is what is published. Raises PublishedBytesChanged."""
        if self._verify:
            self.digests.check(published)
