"""Rows of the residual stream on their way into the cache, and out of it into another model; see `transfer`."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from torch import Tensor

from hybrid_cache.transfer import Transfer
from hybrid_cache.work import InputRows, Rows


def pieces(rows: InputRows, start: int, end: int, rows_in_item: int) -> Iterator[tuple[int, slice, slice]]:
    """Where tokens [start, end) of a sequence lie: an item, rows in it, and which of these tokens they are."""
    at = start - rows.start
    while at < end - rows.start:
        item, first = divmod(at, rows_in_item)
        num = min(rows_in_item - first, end - rows.start - at)
        token = at + rows.start - start
        yield rows.items[item], slice(first, first + num), slice(token, token + num)
        at += num


class KeptInputs:
    """Writes what layers are given into the cache, for some rows of a batch. See `ForwardBatch.tap`."""

    def __init__(self, memory: Tensor, chunks: Sequence[tuple[int, Rows]]) -> None:
        """memory [items, rows in each, hidden]   chunks: with the first row of each in the batch"""
        self._memory = memory
        kept = [(first, rows.start, each) for first, rows in chunks for each in rows.kept_inputs]
        kept.sort(key=lambda each: each[2].layer)
        self._by_layer = {layer: list(group) for layer, group in groupby(kept, key=lambda each: each[2].layer)}

    def __call__(self, layer: int, hidden: Tensor) -> None:
        for first, start, rows in self._by_layer.get(layer, ()):
            row = first + rows.start - start
            given = hidden[row : row + rows.end - rows.start]
            for item, there, tokens in pieces(rows, rows.start, rows.end, self._memory.shape[1]):
                self._memory[item, there] = given[tokens]


class HeldInputs:
    """What some layers are given for some rows of a pass, held until it ends. See `ForwardBatch.tap`."""

    def __init__(self, layers: Iterable[int]) -> None:
        self.rows = slice(0)  # of the batch
        self._layers = frozenset(layers)
        self._held = dict[int, Tensor]()

    def __call__(self, layer: int, hidden: Tensor) -> None:
        if layer in self._layers:
            self._held[layer] = hidden[self.rows].clone()

    def read(self, layer: int, num_rows: int) -> Tensor:
        """[num_rows, hidden], the first of them."""
        return self._held[layer][:num_rows]


class SentInputs:
    """Reads what layers were given, for a batch of one chunk. See `ForwardBatch.inputs`."""

    def __init__(self, memory: Tensor, rows: Rows, num_rows: int, held: HeldInputs | None = None) -> None:
        """memory [items, rows in each, hidden]   num_rows: of the batch; the chunk has the first of them
        held: where it is read from, if not from memory
        """
        assert rows.transfer is not None
        self.transfer: Transfer = rows.transfer
        self._memory = memory
        self._rows = rows
        self._num_rows = num_rows
        self._held = held

    def __call__(self, layer: int) -> Tensor:
        start, end = self._rows.start, self._rows.end
        hidden = self._memory.new_empty(self._num_rows, self._memory.shape[2])
        hidden[end - start :] = 0
        if self._held is not None:
            hidden[: end - start] = self._held.read(layer, end - start)
        for run in (each for each in self._rows.sent_inputs if each.layer == layer):
            first, last = max(run.start, start), min(run.end, end)
            wanted = hidden[first - start : last - start]
            for item, there, tokens in pieces(run, first, last, self._memory.shape[1]):
                wanted[tokens] = self._memory[item, there]
        return hidden
