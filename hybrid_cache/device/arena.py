"""The memory of the cache: one buffer, seen as pages and slots (`cache.geometry`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor

from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.device.batch import CacheTensors
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors, StateTensors
from hybrid_cache.spec import AttentionSpec, CacheSpec, StateSpec, align64


class Arena:
    """The buffer, and its views as pages and slots. Memory is touched only when an item is written."""

    def __init__(self, spec: CacheSpec, geometry: Geometry, device: str, *, pinned: bool = False) -> None:
        self._geometry = geometry
        # Not in large pages: they make decode 4 % faster, and the first request to touch each of them much slower.
        num_bytes = geometry.num_units * geometry.unit_bytes
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        self._rows = {k: self._view(k, torch.uint8, 0, (geometry.stride_bytes(k),)) for k in Kind if geometry.units(k)}
        self.tensors = self._layers(spec)
        self.hidden = self._view(Kind.SLOT, spec.hidden_dtype, spec.slot_bytes, (spec.hidden_size,))

    def copy(self, kind: Kind, source: int, target: int) -> None:
        """Copies a whole item. A page without bytes has nothing to copy."""
        if kind not in self._rows:
            return
        self._rows[kind][target].copy_(self._rows[kind][source])

    def clear(self) -> None:
        """Zeros everywhere."""
        self._buffer.zero_()

    @contextmanager
    def unchanged(self, num_units: int) -> Iterator[None]:
        """What is done to the first units is undone."""
        some = self._buffer[: num_units * self._geometry.unit_bytes]
        before = some.clone()
        yield
        some.copy_(before)

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    def row(self, kind: Kind, item: int) -> Tensor | None:
        """The bytes of an item; None where items of a kind have none."""
        return self._rows[kind][item] if kind in self._rows else None

    def move(self, kind: Kind, moves: Sequence[tuple[int, int]]) -> None:
        """Copies items (from, to); no item may be both."""
        sources, targets = torch.tensor(moves, device=self._buffer.device).T
        try:
            self._rows[kind][targets] = self._rows[kind][sources]
        except torch.OutOfMemoryError:  # for all of them between; one after the other needs none
            for source, target in moves:
                self.copy(kind, source, target)

    def digest(self, kind: Kind, item: int) -> bytes:
        """A digest of all bytes of an item; an empty one where items of a kind have none."""
        if kind not in self._rows:
            return b""
        return blake2b(self._rows[kind][item].cpu().numpy().tobytes(), digest_size=16).digest()

    def numbers(self, kind: Kind) -> Tensor:
        """All items of a kind as numbers, [items, numbers in each] float32."""
        return self._rows[kind].view(torch.float32)

    def input_rows(self, spec: CacheSpec, kind: Kind) -> Tensor:
        """All items of a kind as rows of the residual stream, [items, rows in each, hidden]."""
        num_rows = self._geometry.stride_bytes(kind) // spec.input_bytes
        return self._view(kind, spec.stream_dtype or spec.hidden_dtype, 0, (num_rows, spec.hidden_size))

    def _layers(self, spec: CacheSpec) -> CacheTensors:
        """Views [pages, TILE, kv_heads, head_dim] and [slots, ...] of every layer, side by side inside an item."""
        layers: list[KVTensors | StateTensors] = []
        page_offset = slot_offset = 0
        for layer in spec.layers:
            if isinstance(layer, AttentionSpec):
                shape = (TILE, layer.num_kv_heads, layer.head_dim)
                half = TILE * layer.bytes_per_token // 2
                k = self._view(Kind.PAGE, layer.dtype, page_offset, shape)
                v = self._view(Kind.PAGE, layer.dtype, page_offset + half, shape)
                layers.append(KVTensors(k, v))
                page_offset += 2 * half
            else:
                assert isinstance(layer, StateSpec)
                conv = self._view(Kind.SLOT, layer.conv_dtype, slot_offset, layer.conv_shape)
                slot_offset += align64(layer.conv_bytes)
                state = self._view(Kind.SLOT, torch.float32, slot_offset, layer.state_shape)
                slot_offset += align64(layer.state_bytes)
                layers.append(StateTensors(conv, state))
        return tuple(layers)

    def _view(self, kind: Kind, dtype: torch.dtype, offset_bytes: int, shape: tuple[int, ...]) -> Tensor:
        """All items of a kind as [items, *shape] of a dtype, starting `offset_bytes` into each item."""
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        step = self._geometry.stride_bytes(kind) // dtype.itemsize
        sizes = (self._geometry.count(kind), *shape)
        return self._buffer.view(dtype).as_strided(sizes, (step, *strides), offset_bytes // dtype.itemsize)
