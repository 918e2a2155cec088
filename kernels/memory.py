"""CPU memory in large pages, where Linux gives them: weights, which a step reads once, come a third faster.

A core that streams memory in pages of 4 KiB waits for address translation, and its prefetcher stops at every page.
"""

import mmap
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20
BLOCK = 64 << 20
ALIGNMENT = 64


def large_pages(num_bytes: int) -> Tensor:
    """Zeros [num_bytes] uint8 from the address of a large page on; memory that is never touched takes no room.

    A storage of its own: offsets into it count from its first byte.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    area = _mapping(num_bytes + LARGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            area.madvise(mmap.MADV_HUGEPAGE)
    start = torch.frombuffer(area, dtype=torch.uint8).data_ptr()
    return torch.frombuffer(area, dtype=torch.uint8, count=num_bytes, offset=-start % LARGE_PAGE)


def _mapping(num_bytes: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, num_bytes)


class Pool:
    """Tensors next to each other in blocks of large pages, for many that live long."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """[*shape], with arbitrary contents; it keeps its block alive."""
        num_bytes = prod(shape) * dtype.itemsize
        if num_bytes > BLOCK:
            return large_pages(num_bytes).view(dtype).view(shape)
        if num_bytes > len(self._block):
            self._block = large_pages(BLOCK)
        piece = self._block[:num_bytes]
        self._block = self._block[-(-num_bytes // ALIGNMENT) * ALIGNMENT :]
        return piece.view(dtype).view(shape)
