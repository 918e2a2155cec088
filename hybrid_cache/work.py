"""What one engine step asks of the device: the value between those who decide and those who hold tensors.

    commands  what was decided since the step before, in order: by the books and by choreography
    chunks    runs of prompt tokens, computed in tiles;     } one forward pass
              then runs of tokens that answers have to have }
    decodes   one token each of other sequences that decode }
    kept      states whose hidden row was kept: nothing needs computing for these

What follows from a pass is decided after it, and carried out before the next one. So there is one list of commands, and
it comes first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hybrid_cache.cache import commands as books
from hybrid_cache.cache.tree import KVRows, LayerInputs
from hybrid_cache.choreography import commands as choreography
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.tokens import TokenArray
from hybrid_cache.transfer import Transfer

Command = books.Command | choreography.Command


@dataclass(frozen=True, slots=True)
class Noted:
    """Tokens [start, end) of some rows, by index in their sequence: what they do to the states is added to `items`.

    first: it begins with these
    """

    start: int
    end: int
    items: tuple[int, ...]
    first: bool


@dataclass(frozen=True, slots=True)
class InputRows:
    """Where what a layer is given for tokens [start, end) of a sequence lies: row after row, item after item."""

    layer: int
    start: int
    end: int
    items: tuple[int, ...]


def input_rows(run: LayerInputs) -> InputRows:
    """All of a run."""
    return InputRows(run.layer, run.start, run.num_tokens, tuple(run.items))


class Rows(NamedTuple):
    """A run of tokens of one sequence in one pass. Each decoding sequence has one a step, so it is made cheaply."""

    model: str  # the fingerprint of the model that computes them
    tokens: TokenArray | tuple[int, ...]
    start: int  # index of the first token in its sequence
    shift: int  # index of a token in its sequence minus its position for the model
    slot: int  # working state
    pages: Sequence[int]  # of the whole sequence
    kv_rows: KVRows | tuple[int, ...]  # where K and V of each token go; -1 for those that are there already
    fresh: bool = False  # a text begins here: the model starts from no state at all
    captures: tuple[tuple[int, int], ...] = ()  # index at which a tile ends, slot that gets the states there
    cuts: tuple[int, ...] = ()  # indices at which a tile ends and the grid starts again, rising
    noted: tuple[Noted, ...] = ()
    num_wanted: int = 0  # of the last rows, how many hidden rows are read
    kept_inputs: tuple[InputRows, ...] = ()  # what layers are given for some of the tokens is written there
    transfer: Transfer | None = None  # entries of each layer are made in this way: what is taken is there already,
    sent_inputs: tuple[InputRows, ...] = ()  # and this is what other layers are given
    beside: int | None = None  # or what those of a chunk of the same work are given, by its place; it has more tokens

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class Work:
    """See the module docstring."""

    commands: tuple[Command, ...] = ()
    chunks: tuple[Rows, ...] = ()
    decodes: tuple[Rows, ...] = ()
    kept: tuple[int, ...] = ()

    def written_slots(self) -> Iterator[int]:
        """Slots that the pass writes states to."""
        for rows in self.chunks:
            yield rows.slot
            yield from (slot for _, slot in rows.captures)
        yield from (rows.slot for rows in self.decodes)


class PassFailed(HybridCacheError):
    """A pass or the choice of tokens ended with an error that is none of ours. All commands were carried out; states of
    its sequences may or may not have moved on.
    """


class OutOfDeviceMemory(HybridCacheError):
    """The device had no memory for a piece of work. All its commands were carried out but those `lost`; the pass was
    not made, or states of its sequences may or may not have moved on.
    """

    def __init__(self, why: str, lost: tuple[Command, ...] = ()) -> None:
        super().__init__(why)
        self.lost = lost
