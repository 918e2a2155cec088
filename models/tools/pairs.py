"""What is lost when one model makes its entries of the cache from another's: measured on texts, for any transfer.

A text has a context, of which the sender computes all whole tiles, and an answer, whose tokens are scored. The receiver
makes its entries of the context from the sender's, computes what is left itself, and its distributions over the answer
are compared with those that it has alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.commands import Command, Copy, CopyEntries
from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.policies.registry import make_policy
from hybrid_cache.cache.tree import rows_of
from hybrid_cache.choreography.commands import Clear
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.device.worker import Worker
from hybrid_cache.engine.senders import Offer, offer
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.profile import Plan
from hybrid_cache.tokens import TokenArray
from hybrid_cache.transfer import Transfer, equal_layers
from hybrid_cache.work import InputRows, Rows, Work

COST_TOKENS = 2048  # of the context for which FLOPs are compared


@dataclass(frozen=True, slots=True)
class Example:
    """A text whose last `num_scored` tokens are the answer, and whose first `num_shared` the sender may have."""

    tokens: TokenArray
    num_shared: int
    num_scored: int
    kind: str = ""

    @property
    def shared(self) -> int:
        """Whole tiles."""
        return self.num_shared // TILE * TILE


@dataclass(frozen=True, slots=True)
class Measured:
    """Means over the tokens of answers, and shares of answers."""

    kl: float  # nats a token, from the receiver (or the reference) alone
    agreement: float  # tokens that are the first choice of that alone
    right: float  # answers of which all tokens are the first choice
    by_kind: dict[str, float]  # `right`
    num_examples: int


Answer = Callable[["_Place"], Tensor]  # makes the receiver's entries of the shared part in the working items -> logits


class Pair:
    """A sender and a receiver of one shape on one memory."""

    def __init__(
        self,
        sender: HybridModel,
        receiver: HybridModel,
        examples: Sequence[Example],
        reference: HybridModel | None = None,
    ) -> None:
        """examples: with at least one whole tile to share
        reference: with whose answers alone the receiver's are compared, instead of its own
        """
        self.receiver = receiver
        self._sender = sender
        self._reference = reference or receiver
        self.examples = [each for each in examples if each.shared]
        self._places = _Places(receiver, max(len(each.tokens) for each in self.examples))
        self._worker = Worker(receiver, self._places.memory)
        for other in {each.fingerprint: each for each in (sender, self._reference)}.values():
            if other.fingerprint != receiver.fingerprint:
                self._worker.add(other)
        self._alone: dict[int, Tensor] = {}  # by example: logits of the reference alone, [scored, V]

    @property
    def common(self) -> int:
        """Layers from the first on that the two have in common: what lies below may be taken without any loss."""
        return equal_layers(self._sender.chain, self.receiver.chain) or 0

    def offer(self, transfer: Transfer) -> Offer:
        return offer(self._sender.fingerprint, "", self.receiver.layers, transfer)

    def plan(self, transfer: Transfer, measured: Measured) -> Plan:
        whole, made = self.receiver.prefill_cost, self.offer(transfer)
        flops = made.cost.flops(0, COST_TOKENS) / whole.flops(0, COST_TOKENS)
        num_bytes = len(made.transfer.reads) * self.receiver.cache_spec.input_bytes
        return Plan(made.transfer, measured.kl, measured.agreement, flops, num_bytes)

    def measure(self, transfers: Sequence[Transfer], examples: range) -> Iterator[list[Measured]]:
        """What each transfer does to some of the examples. Comes again and again, with the latest example added."""
        return self._measure([self._received(each) for each in transfers], examples)

    def measure_layers(self, examples: range) -> Iterator[list[Measured]]:
        """The same for taking one layer alone: all other layers have the receiver's own entries."""
        return self._measure([self._took_alone(index) for index in range(len(self.receiver.layers))], examples)

    def measure_alone(self, examples: range) -> Iterator[list[Measured]]:
        """The same for the receiver's own entries, and for two controls: with all recurrent states zeroed, and where
        attention does not see the shared part.
        """
        return self._measure([self._alone_again, self._without_states, self._blind], examples)

    def measure_beside_controls(self, transfer: Transfer, examples: range) -> Iterator[list[Measured]]:
        """The same for the receiver's own entries, for a transfer, and for its own with states zeroed."""
        return self._measure([self._alone_again, self._received(transfer), self._without_states], examples)

    def _measure(self, answers: Sequence[Answer], examples: range) -> Iterator[list[Measured]]:
        sums = [_Sums() for _ in answers]
        for index in examples:
            example, place = self.examples[index], self._places.of(self.examples[index])
            self._send(place)
            if index not in self._alone:
                self._alone[index] = self._asked_for(place)
            for answer, total in zip(answers, sums, strict=True):
                total.add(example, self._alone[index], answer(place))
            yield [total.means() for total in sums]

    # One example

    def _send(self, place: "_Place") -> None:
        """The sender and the receiver compute the shared part, each for itself."""
        sent = self._rows(place, self._sender, place.sent_pages, place.sent, 0, place.shared)
        sent = sent._replace(kept_inputs=place.inputs, fresh=True)
        own = self._rows(place, self.receiver, place.own_pages, place.own, 0, place.shared)._replace(fresh=True)
        self._run(Work(chunks=(sent,)))
        self._run(Work(chunks=(own,)))

    def _own(self, place: "_Place") -> None:
        """The receiver's own entries."""
        pairs = zip(place.own_pages, place.pages, strict=False)
        pages = [Copy(Kind.PAGE, own, work) for own, work in list(pairs)[: place.shared // TILE]]
        self._run(Work((*pages, Copy(Kind.SLOT, place.own, place.working))))

    def _alone_again(self, place: "_Place") -> Tensor:
        self._own(place)
        return self._answer(place)

    def _without_states(self, place: "_Place") -> Tensor:
        self._own(place)
        self._run(Work((Clear(place.working),)))
        return self._answer(place)

    def _blind(self, place: "_Place") -> Tensor:
        """What comes after the shared part is a sequence of its own, which goes on from the states alone."""
        self._own(place)
        rest = self._rest(place, self.receiver)
        pages = tuple(place.pages[place.shared // TILE :])
        return self._logits(rest._replace(start=0, shift=-place.shared, pages=pages), self.receiver)

    def _took_alone(self, index: int) -> Answer:
        entries = self.receiver.layers[index].entries

        def answer(place: "_Place") -> Tensor:
            self._own(place)
            self._run(Work(tuple(place.take(entries))))
            return self._answer(place)

        return answer

    def _received(self, transfer: Transfer) -> Answer:
        made = self.offer(transfer)

        def answer(place: "_Place") -> Tensor:
            rows = (self._made(place, made.transfer),) if made.transfer.computes else ()
            self._run(Work(tuple(place.take(made.entries)), rows))
            return self._answer(place)

        return answer

    def _made(self, place: "_Place", transfer: Transfer) -> Rows:
        """What the receiver runs for its entries of the shared part."""
        rows = self._rows(place, self.receiver, place.pages, place.working, 0, place.shared)
        inputs = tuple(each for each in place.inputs if each.layer in transfer.reads)
        return rows._replace(transfer=transfer, sent_inputs=inputs, fresh=True)

    def _asked_for(self, place: "_Place") -> Tensor:
        """The reference computes everything -> as `_answer`."""
        rows = self._rows(place, self._reference, place.pages, place.working, 0, place.shared)
        self._run(Work(chunks=(rows._replace(fresh=True),)))
        return self._logits(self._rest(place, self._reference), self._reference)

    def _answer(self, place: "_Place") -> Tensor:
        """The receiver computes what comes after the shared part -> logits that the answer is predicted by."""
        return self._logits(self._rest(place, self.receiver), self.receiver)

    def _rest(self, place: "_Place", model: HybridModel) -> Rows:
        end = len(place.example.tokens) - 1
        rows = self._rows(place, model, place.pages, place.working, place.shared, end)
        return rows._replace(num_wanted=place.example.num_scored)

    def _logits(self, rows: Rows, model: HybridModel) -> Tensor:
        hidden = self._run(Work(chunks=(rows,)))
        with torch.inference_mode():
            return self._worker.logits(model, hidden)

    def _rows(self, place: "_Place", model: HybridModel, pages: Sequence[int], slot: int, start: int, end: int) -> Rows:
        tokens, kv_rows = place.example.tokens[start:end], rows_of(pages, start, end)
        return Rows(model.fingerprint, tokens, start, 0, slot, tuple(pages), kv_rows)

    def _run(self, work: Work) -> Tensor:
        chunks = self._worker.run(work).chunks
        return chunks[0] if chunks else torch.empty(0)


class _Places:
    """Room for one example: what the sender has, what the receiver has alone, and what it makes."""

    def __init__(self, model: HybridModel, num_tokens: int) -> None:
        spec, num_pages = model.cache_spec, -(-num_tokens // TILE)
        self._num_layers = len(model.layers)
        inputs_bytes = self._num_layers * num_pages * TILE * spec.input_bytes
        item_bytes = (spec.page_bytes or spec.slot_bytes) + (1 << 12)
        num_items = 3 * num_pages + 2 * self._num_layers * (num_pages + 1)
        budget_bytes = 2 * (num_items * item_bytes + inputs_bytes + 8 * (spec.slot_bytes + (1 << 16)))
        books = Books(
            spec, model.prefill_cost, budget_bytes, make_policy("lru", spec, model.prefill_cost, budget_bytes)
        )
        self.memory = CacheMemory(spec, budget_bytes)
        self._kinds = books.pool.geometry.entries
        rows_in_item = books.inputs.rows_in_item
        self._items_a_layer = -(-num_pages * TILE // rows_in_item)
        extra = self._items_a_layer * self._num_layers
        in_pages = books.pool.extra_kind is Kind.PAGE
        taken = books.pool.take(num_slots=3 + (0 if in_pages else extra), num_pages=3 * num_pages + in_pages * extra)
        assert taken is not None
        self._slots, pages = taken
        self._sets = [pages[i * num_pages : (i + 1) * num_pages] for i in range(3)]
        self._items = pages[3 * num_pages :] if in_pages else self._slots[3:]

    def of(self, example: Example) -> "_Place":
        n = self._items_a_layer
        inputs = tuple(
            InputRows(layer, 0, example.shared, tuple(self._items[layer * n : (layer + 1) * n]))
            for layer in range(1, self._num_layers)
        )
        (sent_pages, own_pages, pages), (sent, own, working) = self._sets, self._slots[:3]
        return _Place(example, sent_pages, own_pages, pages, sent, own, working, inputs, self._kinds)


@dataclass(frozen=True, slots=True)
class _Place:
    example: Example
    sent_pages: Sequence[int]
    own_pages: Sequence[int]
    pages: Sequence[int]  # working
    sent: int  # slots
    own: int
    working: int
    inputs: tuple[InputRows, ...]
    kinds: Sequence[Kind]

    @property
    def shared(self) -> int:
        return self.example.shared

    def take(self, entries: Sequence[int]) -> Iterable[Command]:
        """Copies some layers' entries from the sender's."""
        pages = tuple(zip(self.sent_pages, self.pages, strict=False))[: self.shared // TILE]
        for kind, copies in ((Kind.PAGE, pages), (Kind.SLOT, ((self.sent, self.working),))):
            some = tuple(entry for entry in entries if self.kinds[entry] is kind)
            if some:
                yield CopyEntries(kind, copies, some)


class _Sums:
    """Adds up answers."""

    def __init__(self) -> None:
        self._kl = self._agreed = 0.0
        self._num_tokens = 0
        self._right: dict[str, list[bool]] = {}

    def add(self, example: Example, alone: Tensor, logits: Tensor) -> None:
        """alone, logits [scored, V]"""
        expected = torch.from_numpy(example.tokens[-example.num_scored :].astype(np.int64))
        own, other = torch.log_softmax(alone, 1), torch.log_softmax(logits, 1)
        self._kl += max(float((own.exp() * (own - other)).sum(1).double().sum()), 0.0)
        choice = logits.argmax(1)
        self._agreed += float((choice == alone.argmax(1)).sum())
        self._num_tokens += len(expected)
        self._right.setdefault(example.kind, []).append(bool((choice == expected).all()))

    def means(self) -> Measured:
        every = [right for some in self._right.values() for right in some]
        return Measured(
            self._kl / self._num_tokens,
            self._agreed / self._num_tokens,
            sum(every) / len(every),
            {kind: sum(some) / len(some) for kind, some in self._right.items()},
            len(every),
        )
