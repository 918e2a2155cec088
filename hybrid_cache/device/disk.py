"""Copies between the arena and what is read from and written to files."""

import time

import numpy as np
import torch

from hybrid_cache.cache.commands import Forget, Restore, Save
from hybrid_cache.cache.disk.entries import EntryKind, NewEntry
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.device.arena import Arena
from hybrid_cache.spec import CacheSpec, StateSpec, align64
from hybrid_cache.storage.folder import Bytes
from hybrid_cache.storage.store import Store


class DiskMemory:
    """Carries out the commands of the disk tier. A file has the bytes of items without what pads them in the arena."""

    def __init__(self, store: Store, spec: CacheSpec, geometry: Geometry, arena: Arena) -> None:
        self._store = store
        self._gaps = {Kind.PAGE: [(spec.page_bytes, geometry.page_bytes)], Kind.SLOT: _gaps(spec)}
        self._hidden = spec.slot_bytes, geometry.slot_bytes
        self._arena = arena
        self._num_bytes = {Kind.PAGE: geometry.page_bytes, Kind.SLOT: geometry.slot_bytes}

    def run(self, command: Save | Restore | Forget) -> None:
        match command:
            case Save():
                self._save(command)
            case Restore():
                self._restore(command)
            case Forget():
                self._store.forget(command.ticket)

    def _save(self, command: Save) -> None:
        began_s = time.thread_time()
        try:
            payloads = [self._payload(entry) for entry in command.entries]
        except MemoryError:
            return self._store.give_up(command.job, "memory")
        self._store.copied_s += time.thread_time() - began_s
        self._store.save(command.job, command.entries, payloads)

    def _payload(self, entry: NewEntry) -> Bytes:
        payload, start = np.empty(entry.facts.num_bytes, np.uint8), 0
        for kind, item in entry.items:
            end, row = start + self._num_bytes[kind], self._arena.row(kind, item)
            if row is not None:
                torch.from_numpy(payload[start:end]).copy_(row[: end - start])
            for first, last in self._gaps[kind]:
                payload[start + first : start + last] = 0
            start = end
        if entry.facts.kind in (EntryKind.STATE, EntryKind.MESSAGE):  # what its slot has of another's end
            payload[slice(*self._hidden)] = 0
        for kind, item, num_bytes in entry.extra:
            row = self._arena.row(kind, item)
            assert row is not None
            torch.from_numpy(payload[start : start + num_bytes]).copy_(row[:num_bytes])
            start += num_bytes
        return payload

    def _restore(self, command: Restore) -> None:
        row, payload = self._arena.row(command.kind, command.item), self._store.payload(command.ticket, command.entry)
        if row is not None:
            part = payload[command.offset : command.offset + command.num_bytes]
            row[: command.num_bytes].copy_(torch.from_numpy(part))


def _gaps(spec: CacheSpec) -> list[tuple[int, int]]:
    """Bytes between the tensors of a slot, which nobody has written to."""
    gaps, start = list[tuple[int, int]](), 0
    for layer in spec.layers:
        if isinstance(layer, StateSpec):
            for num_bytes in (layer.conv_bytes, layer.state_bytes):
                gaps.append((start + num_bytes, start + align64(num_bytes)))
                start += align64(num_bytes)
    hidden_bytes = spec.hidden_size * spec.hidden_dtype.itemsize
    gaps.append((start + hidden_bytes, start + align64(hidden_bytes)))
    return [gap for gap in gaps if gap[0] < gap[1]]
