"""The bytes of the second tier: pages and states in host memory, pinned beside a GPU so that copies need not be waited
for."""

from typing import Any

from hybrid_cache.cache.commands import Load, MoveHost, Store
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.device.arena import Arena
from hybrid_cache.device.lanes import CudaLanes, Lanes, Overlapped
from hybrid_cache.spec import CacheSpec


class HostMemory:
    """Copies items of a device's arena to its own and back, in order with what the device does."""

    def __init__(self, spec: CacheSpec, geometry: Geometry, device: Arena, lanes: Lanes[Any] | None = None) -> None:
        """lanes: for copies beside the pass; None for a GPU's own, and none elsewhere"""
        self._device = device
        on_gpu = device.device.type == "cuda"
        self._arena = Arena(spec, geometry, "cpu" if on_gpu else str(device.device), pinned=on_gpu)
        largest_bytes = max(geometry.stride_bytes(kind) for kind in Kind)
        lanes = CudaLanes(device.device) if lanes is None and on_gpu else lanes
        self._overlapped = None if lanes is None else Overlapped(lanes, largest_bytes, device.device)

    def run(self, command: Store | Load | MoveHost) -> None:
        if isinstance(command, MoveHost):
            if self._overlapped is not None:
                self._overlapped.finish()
            self._arena.move(command.kind, command.moves)
            return
        host, row = self._arena.row(command.kind, command.host), self._device.row(command.kind, command.item)
        if host is None or row is None:
            return
        place = command.kind, command.host
        match command:
            case Store():
                if self._overlapped is None:
                    host.copy_(row)
                else:
                    self._overlapped.store(place, host, row)
            case Load():
                if self._overlapped is None:
                    row.copy_(host)
                else:
                    self._overlapped.load(place, row, host)
