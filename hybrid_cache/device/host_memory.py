"""The bytes of the second tier: pages and states in host memory, pinned beside a GPU so that copies need not be waited
for."""

import torch

from hybrid_cache.cache.commands import Load, MoveHost, Store
from hybrid_cache.cache.geometry import Geometry
from hybrid_cache.device.arena import Arena
from hybrid_cache.spec import CacheSpec


class HostMemory:
    """Copies items of a device's arena to its own and back, in order with what the device does."""

    def __init__(self, spec: CacheSpec, geometry: Geometry, device: Arena) -> None:
        self._device = device
        on_gpu = device.device.type == "cuda"
        self._arena = Arena(spec, geometry, "cpu" if on_gpu else str(device.device), pinned=on_gpu)

    def run(self, command: Store | Load | MoveHost) -> None:
        match command:
            case Store():
                self._arena.fill(command.kind, command.host, self._device.row(command.kind, command.item))
            case Load():
                self._device.fill(command.kind, command.item, self._arena.row(command.kind, command.host))
            case MoveHost():
                if self._device.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()  # copies to the places that move may be under way
                self._arena.move(command.kind, command.moves)
