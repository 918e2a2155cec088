"""What layers were given for tokens of prompts, so that other models may go on from there; see `transfer`.

Kept for pages of tokens, by the names of the prefixes that these end, in items of the one budget. One item may hold the
rows of several pages in a row, or a page take several items: a *run* is the least that wastes none of them.

    run of 3 pages in 1 item     | page 6 | page 7 | page 8 | - |
    run of 1 page in 2 items     | page 6 ...... | ... page 6 - |

A run that a prompt ends in, or begins in, holds fewer pages. Integers only: `device` holds the rows.
"""

from collections.abc import Iterable, Iterator, Sequence

from hybrid_cache.cache.fates import End
from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.keys import Keys, Name, inputs_name
from hybrid_cache.cache.policies.base import Worth
from hybrid_cache.cache.pool import Pool
from hybrid_cache.cache.tree import CheckpointKind, LayerInputs, Node
from hybrid_cache.spec import PrefillCost


class InputStore:
    """Runs by page and layer. No room is never an error: then there are fewer."""

    def __init__(self, pool: Pool, token_bytes: int) -> None:
        """token_bytes: of what a layer is given for one token"""
        self._pool = pool
        self._page_tokens = pool.tree.page_tokens
        self.rows_in_item = pool.item_bytes[pool.extra_kind] // token_bytes
        self._run_pages = max(self.rows_in_item // self._page_tokens, 1)
        self.stored: dict[tuple[Name, int], LayerInputs] = {}
        self.unwritten: set[LayerInputs] = set()

    @property
    def runs(self) -> Iterator[LayerInputs]:
        """All that are published, each once."""
        return (run for (page, _), run in self.stored.items() if page == run.pages[-1])

    def reserve(self, keys: Keys, layer: int, spared: PrefillCost, first: int, end: int) -> list[LayerInputs]:
        """Room for what a layer is given for pages [first, end) of a prompt, where it is not there yet.

        spared: cost of what need not be computed where they are there
        """
        if not self.rows_in_item:
            return []
        found = list[LayerInputs]()
        for start, stop in self._missing(keys, layer, first, end):
            run = self._make(keys, layer, spared, start, stop)
            if run is not None:
                found.append(run)
        self.unwritten.update(found)
        return found

    def _missing(self, keys: Keys, layer: int, first: int, end: int) -> Iterator[tuple[int, int]]:
        start = first
        while start < end:
            if (keys.names[start + 1], layer) in self.stored:
                start += 1
                continue
            stop = min((start // self._run_pages + 1) * self._run_pages, end)
            stop = next((i for i in range(start, stop) if (keys.names[i + 1], layer) in self.stored), stop)
            yield start, stop
            start = stop

    def _make(self, keys: Keys, layer: int, spared: PrefillCost, first: int, end: int) -> LayerInputs | None:
        pages = tuple(keys.names[first + 1 : end + 1])
        start, stop = first * self._page_tokens, end * self._page_tokens
        name, num_items = inputs_name(pages[-1], layer), -(-(stop - start) // self.rows_in_item)
        kind, pool = self._pool.extra_kind, self._pool
        worth = Worth(spared.flops(start, stop), num_items * pool.item_bytes[kind])
        score = pool.policy.candidate(CheckpointKind.LAYER_INPUTS, name, worth)
        slots, others = (num_items, 0) if kind is Kind.SLOT else (0, num_items)
        taken = None if score is None else pool.take(num_slots=slots, num_pages=others, ceiling=score)
        if taken is None:
            pool.declines["layer_inputs"] += 1
            return None
        root = Node(keys.namespace, None, b"", 0, -1, 0.0)
        return LayerInputs(root, name, layer, spared, start, stop, taken[0] + taken[1], pages, self.stored)

    def publish(self, runs: Iterable[LayerInputs]) -> None:
        """From now on they can be found: everything of them has been written."""
        for run in runs:
            self.unwritten.remove(run)
            if any((page, run.layer) in self.stored for page in run.pages):  # someone was faster
                self._give(run)
                continue
            self.stored.update(((page, run.layer), run) for page in run.pages)
            self._pool.publish(run, [])

    def give_back(self, runs: Iterable[LayerInputs]) -> None:
        """They will not be written."""
        for run in runs:
            self.unwritten.remove(run)
            self._give(run)

    def _give(self, run: LayerInputs) -> None:
        for kind, item in self._pool.items(run):
            self._pool.give(kind, item)

    def reach(self, keys: Keys, layers: Sequence[int], first: int, end: int) -> int:
        """Up to which page, from `first` on, what all these layers were given is there."""
        for index in range(first, end):
            if not all((keys.names[index + 1], layer) in self.stored for layer in layers):
                return index
        return end

    def hold(self, keys: Keys, layers: Sequence[int], first: int, end: int) -> tuple[LayerInputs, ...]:
        """The runs of these pages, all of which are there; they stay where they are until `let_go`."""
        wanted = ((page, layer) for layer in layers for page in keys.names[first + 1 : end + 1])
        runs = tuple(dict.fromkeys(self.stored[each] for each in wanted))
        for run in runs:
            self._pool.verify(self._pool.items(run))
            if not run.holders:
                self._pool.guard(run)
            run.holders += 1
        return runs

    def let_go(self, runs: Iterable[LayerInputs], *, used: bool) -> None:
        """Ends one `hold`; used: whether they were, for the policy."""
        for run in runs:
            run.holders -= 1
            if used:
                self._pool.stamp(run, [])
            if not run.holders:
                self._pool.unguard(run)

    def drop_pages(self, names: Iterable[Name]) -> None:
        """Drops all that nobody holds of pages that end these prefixes."""
        wanted = set(names)
        for run in [run for run in self.runs if not run.holders and not wanted.isdisjoint(run.pages)]:
            self._pool.evict(run, end=End.DROPPED)

    def drop(self, namespace: str | None = None) -> None:
        """Drops all that nobody holds, of one namespace or of all."""
        for run in [run for run in self.runs if not run.holders and namespace in (None, run.node.namespace)]:
            self._pool.evict(run, end=End.DROPPED)
