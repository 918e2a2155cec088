"""Decode steps as CUDA graphs: a step is hundreds of small launches, and a replay is one.

A graph repeats the same launches on the same memory. So what a batch of decode rows consists of lies in one tensor that
is overwritten before each replay, and sizes come in few steps (`rounded`): rows, pages of the table, blocks of shared
work. A row that only pads the batch reads token 0 at position 0, has a state slot that no sequence owns, and writes
no page; no bit of another row depends on it (the first promise of `kernels/ops.py`).

The first batch of some sizes runs without a graph, which compiles what there is to compile, and is recorded after
that; recording runs nothing. Where recording fails, all batches run without graphs, and `reason` says why.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from hybrid_cache.device.batch import ForwardBatch, HybridModel
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.kernels.decode_schedule import PAGES_PER_SPLIT, DecodeSchedule, DeviceBlocks
from hybrid_cache.kernels.shared_prefix import schedule_shared, with_schedule

MAX_ROWS = 512  # with more, a step is long enough to hide its launches
MAX_GRAPHS = 64  # of different sizes; the least recently used one is dropped
MIN_FREE_BYTES = 1 << 30  # of device memory, that recording leaves free
ALIGNMENT = 16  # values; pointers into the static tensor are as aligned as those of fresh tensors

Ints = npt.NDArray[np.int64]
Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Records a call without running it -> what runs it again, and the tensor that then holds its result."""

logger = logging.getLogger("hybrid_cache")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a graph is recorded for."""

    num_rows: int  # decode rows
    num_pages: int  # columns of the page table
    num_blocks: tuple[int, ...]  # of shared work, for each of the cuts that attention layers make


class DecodeGraphs:
    """Runs batches of decode rows, most of them by replaying a graph. Not thread-safe.

    reason: why nothing is recorded any more; empty while it is
    """

    def __init__(
        self, model: HybridModel, memory: CacheMemory, scratch_slot: int | None, capture: Capture | None = None
    ) -> None:
        """scratch_slot: a state slot that no sequence owns; None where the budget has no room for one"""
        self._model = model
        self._memory = memory
        self._capture = capture or _cuda_capture()
        self._scratch_slot = scratch_slot
        self._cuts: tuple[int, ...] | None = None  # rows in a block of attention work; None before the first batch
        self._recorded: OrderedDict[Sizes, _Recorded] = OrderedDict()
        self.reason = "" if self._scratch_slot is not None else "the cache budget has no room for a spare state"
        self.num_captures = 0
        self.num_replays = 0

    def run(self, batch: ForwardBatch) -> Tensor | None:
        """batch: decode rows only, on the host -> hidden rows [D, hidden], good until the next call.

        None, and nothing has happened, for a batch that no graph is made for.
        """
        num_rows = batch.layout.num_decode
        if self.reason or self._scratch_slot is None or num_rows > MAX_ROWS:
            return None
        if self._cuts is None:
            return self._look(batch)
        num_pages = PAGES_PER_SPLIT * rounded(-(-batch.layout.page_table.shape[1] // PAGES_PER_SPLIT))
        padded = pad_decodes(batch, rounded(num_rows), num_pages, self._scratch_slot)
        schedule = schedule_shared(padded.layout.page_table.numpy(), padded.layout.decode_len.numpy())
        blocks = [schedule.blocks(rows_per_block) for rows_per_block in self._cuts]
        sizes = Sizes(rounded(num_rows), num_pages, tuple(rounded(len(b)) for b in blocks))
        inputs = [*_host_inputs(padded), *(_padded_blocks(b, schedule, sizes) for b in blocks)]
        return self._run(sizes, padded, inputs)[:num_rows]

    def _look(self, batch: ForwardBatch) -> Tensor:
        """Runs a batch as it is, and sees how attention cuts its work."""
        layout = with_schedule(batch.layout)
        schedule = layout.decode_schedule
        assert schedule is not None
        hidden = self._model.forward(replace(batch, layout=layout).to(self._model.device), self._memory.tensors)
        self._cuts = tuple(rows_per_block for rows_per_block, _ in schedule.uploaded)
        return hidden

    def _run(self, sizes: Sizes, padded: ForwardBatch, inputs: Sequence[Ints]) -> Tensor:
        recorded = self._recorded.get(sizes)
        if recorded is not None:
            self._recorded.move_to_end(sizes)
            recorded.inputs.fill(inputs)
            recorded.replay()
            self.num_replays += 1
            return recorded.hidden
        assert self._cuts is not None
        static = StaticInputs(inputs, self._model.device)
        batch = _static_batch(padded, static.views, self._cuts, sizes, self._model.device)
        hidden = self._model.forward(batch, self._memory.tensors)
        self._record(sizes, static, batch)
        return hidden

    def _record(self, sizes: Sizes, static: "StaticInputs", batch: ForwardBatch) -> None:
        batch = replace(batch, layout=replace(batch.layout))  # a new layout: nothing that was read from the old one
        try:
            replay, hidden = self._capture(lambda: self._model.forward(batch, self._memory.tensors))
        except RuntimeError as error:
            self.reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self._recorded.clear()
            logger.warning("decode steps run without CUDA graphs: %s", self.reason)
            return
        self.num_captures += 1
        self._recorded[sizes] = _Recorded(static, batch, replay, hidden)
        if len(self._recorded) > MAX_GRAPHS:
            self._recorded.popitem(last=False)


class StaticInputs:
    """Integers in one tensor, which stays where it is: `views` of its parts, all filled by one copy."""

    def __init__(self, parts: Sequence[Ints], device: torch.device) -> None:
        starts = np.cumsum([0, *(-(-part.size // ALIGNMENT) * ALIGNMENT for part in parts)])
        self._starts = [int(start) for start in starts]
        self._values = torch.zeros(self._starts[-1], dtype=torch.int64, device=device)
        self.views = [
            self._values[start : start + part.size].view(part.shape)
            for start, part in zip(self._starts, parts, strict=False)
        ]
        self.fill(parts)

    def fill(self, parts: Sequence[Ints]) -> None:
        """Parts of the shapes that it was made for."""
        values = np.zeros(self._starts[-1], np.int64)
        for start, part in zip(self._starts, parts, strict=False):
            values[start : start + part.size] = part.ravel()
        host = torch.from_numpy(values)
        if self._values.is_cuda:
            host = host.pin_memory()
        self._values.copy_(host, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One graph and the memory that it reads and writes."""

    inputs: StaticInputs
    batch: ForwardBatch
    replay: Replay
    hidden: Tensor  # [sizes.num_rows, hidden]


def rounded(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: at most half as much again."""
    power = 1 << max(count - 1, 0).bit_length()
    return 3 * power // 4 if power >= 4 and count <= 3 * power // 4 else power


def pad_decodes(batch: ForwardBatch, num_decode: int, num_pages: int, scratch_slot: int) -> ForwardBatch:
    """A batch of decode rows, on the host, with more of them and a wider page table; what was there stays in front.

    The rows added hold a sequence of one token, whose state is in `scratch_slot` and which writes no page.
    """
    layout = batch.layout
    assert layout.num_tiles == 0
    more, num_rows = num_decode - layout.num_decode, num_decode
    more_rows = num_rows - layout.num_rows
    table = layout.page_table
    return ForwardBatch(
        F.pad(batch.token_ids, (0, more_rows)),
        F.pad(batch.positions, (0, more_rows)),
        replace(
            layout,
            num_rows=num_rows,
            num_decode=num_decode,
            decode_slot=F.pad(layout.decode_slot, (0, more), value=scratch_slot),
            decode_len=F.pad(layout.decode_len, (0, more), value=1),
            page_table=F.pad(table, (0, num_pages - table.shape[1], 0, more)),
            kv_rows=F.pad(layout.kv_rows, (0, more_rows), value=-1),
        ),
        torch.arange(num_decode),
    )


def _host_inputs(batch: ForwardBatch) -> list[Ints]:
    layout = batch.layout
    tensors = (batch.token_ids, batch.positions, layout.decode_slot, layout.decode_len, layout.page_table)
    return [tensor.numpy() for tensor in (*tensors, layout.kv_rows)]


def _padded_blocks(blocks: Ints, schedule: DecodeSchedule, sizes: Sizes) -> Ints:
    """As `DeviceBlocks.data`, with blocks of no rows after the others, and room for as many rows as there can be."""
    num_blocks, num_splits = rounded(len(blocks)), sizes.num_pages // PAGES_PER_SPLIT
    data = np.zeros(3 * num_blocks + sizes.num_rows * num_splits, np.int64)
    data[: blocks.size] = blocks.ravel()
    data[3 * num_blocks : 3 * num_blocks + len(schedule.rows)] = schedule.rows
    return data


def _static_batch(
    padded: ForwardBatch, views: Sequence[Tensor], cuts: Sequence[int], sizes: Sizes, device: torch.device
) -> ForwardBatch:
    """The batch with its contents in `views`, in the order of `_host_inputs` and then the schedule for each cut."""
    token_ids, positions, decode_slot, decode_len, page_table, kv_rows, *data = views
    none = np.zeros(0, np.int64)
    blocks = zip(cuts, sizes.num_blocks, data, strict=True)
    schedule = DecodeSchedule(
        none, none, none, {(cut, values.device): DeviceBlocks(n, values) for cut, n, values in blocks}
    )
    layout = replace(
        padded.layout.to(device),
        decode_slot=decode_slot,
        decode_len=decode_len,
        page_table=page_table,
        kv_rows=kv_rows,
        decode_schedule=schedule,
    )
    return ForwardBatch(token_ids, positions, layout, padded.output_rows.to(device))


def _cuda_capture() -> Capture:
    """Graphs share one pool of memory: they never run at the same time, and nothing in it outlives a replay but the
    results, which are held."""
    pool = torch.cuda.graph_pool_handle()

    def capture(forward: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        free, _ = torch.cuda.mem_get_info()
        if free < MIN_FREE_BYTES:
            raise torch.OutOfMemoryError(f"{free >> 20} MiB of device memory are free, {MIN_FREE_BYTES >> 20} needed")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            hidden = forward()
        return graph.replay, hidden

    return capture
