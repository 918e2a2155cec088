"""Random requests, commits, evictions and aborts, next to a dictionary that is obviously right.

A fake forward pass writes numbers that tell which tokens came before: whoever reads a row or a state can say whether it is
the right one. Rows and states that decoding writes are marked, and must never be found in the tree.
"""

import zlib
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybrid_cache.cache import HybridCache, Lease, Match
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.layout import TILE
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.policy import make_policy
from hybrid_cache.request import TokenArray
from hybrid_cache.spec import AttentionSpec, CacheSpec, PrefillCost, StateSpec
from hybrid_cache.tree import CheckpointKind, Node

ATTENTION = AttentionSpec(num_kv_heads=1, head_dim=2, dtype=torch.float32)  # pages of 1024 bytes


def state(*shape: int) -> StateSpec:
    return StateSpec(conv_shape=(3, 2), state_shape=shape, conv_dtype=torch.float32)


SPECS = {
    "slot takes three pages": CacheSpec((ATTENTION, state(40, 16)), 2, torch.float32),
    "slot takes nine pages": CacheSpec((state(70, 16), ATTENTION, state(70, 16)), 2, torch.float32),
    "page takes six slots": CacheSpec((state(2, 2), ATTENTION), 2, torch.float32),
    "same size": CacheSpec((ATTENTION, state(14, 16)), 2, torch.float32),
    "only attention": CacheSpec((ATTENTION, ATTENTION), 2, torch.float32),
    "only state": CacheSpec((state(2, 2), state(2, 2)), 2, torch.float32),
}
KINDS = [k for k in CheckpointKind if k is not CheckpointKind.PROMPT_END]
NAMESPACES = ("", "tenant")
DECODED = 1 << 21  # added to what decoding writes

Numbers = npt.NDArray[np.float32]
Prefix = tuple[str, bytes]  # namespace and tokens

prompts = st.tuples(st.lists(st.integers(0, 2), max_size=5), st.sampled_from([0, 1, 1, 5, 63])).map(
    lambda p: make_prompt(*p)
)


def make_prompt(letters: list[int], tail: int) -> TokenArray:
    """A page for each letter, then the first tokens of another page."""
    pages = [np.arange(TILE) + 100 * letter for letter in letters] + [np.arange(tail) + 900]
    return np.concatenate(pages).astype(np.int32)


def prefix_numbers(namespace: str, tokens: TokenArray) -> npt.NDArray[np.int64]:
    """[len + 1] a number below 2**20 for each prefix of the tokens."""
    crc, numbers = zlib.crc32(namespace.encode()), []
    numbers.append(crc)
    for token in tokens.tolist():
        crc = zlib.crc32(token.to_bytes(4, "little"), crc)
        numbers.append(crc)
    return np.array(numbers, dtype=np.int64) % (1 << 20)


@dataclass(eq=False)
class Running:
    """A request in the middle of its life."""

    namespace: str
    tokens: TokenArray  # the prompt
    lease: Lease
    computed: int  # prompt tokens in the working state
    numbers: npt.NDArray[np.int64]  # what its state held after each token, decoded ones included
    decoded: int = 0
    publish: bool = True
    read: list[int] = field(default_factory=list)

    @property
    def written(self) -> int:
        return self.computed + self.decoded


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.running: list[Running] = []
        self.released: list[Running] = []
        self.pages: set[Prefix] = set()  # everything ever published
        self.states: set[Prefix] = set()
        self.ends: set[Prefix] = set()
        self.dropped = False
        self.watch_tensors = False

    @initialize(
        spec=st.sampled_from(list(SPECS)),
        num_bytes=st.integers(1_000, 40_000),
        policy=st.sampled_from(["flops-per-byte", "lru"]),
        with_tensors=st.sampled_from([True, True, True, False]),
    )
    def make_cache(self, spec: str, num_bytes: int, policy: str, with_tensors: bool) -> None:
        self.budget = num_bytes
        try:
            self.cache = HybridCache(
                SPECS[spec],
                PrefillCost(100.0, 1.0),
                num_bytes,
                make_policy(policy),
                with_tensors=with_tensors,
                clock=lambda: self.now,
            )
        except ConfigError:
            assume(False)
        self.layers: list[tuple[bool, list[Numbers]]] = []
        if with_tensors:
            for layer in self.cache.tensors:
                pair = [layer.k, layer.v] if isinstance(layer, KVTensors) else [layer.conv, layer.state]
                self.layers.append((isinstance(layer, KVTensors), [t.numpy() for t in pair]))
                for tensor in pair:
                    tensor.fill_(torch.nan)

    # The fake model

    def write_row(self, page: int, offset: int, number: int) -> None:
        for is_kv, (k, v) in self.layers:
            if is_kv:
                k[page, offset], v[page, offset] = number, number + 1

    def write_state(self, slot: int, number: int) -> None:
        for is_kv, (conv, ssm) in self.layers:
            if not is_kv:
                conv[slot], ssm[slot] = number, number + 2

    def check_rows(self, page: int, numbers: npt.NDArray[np.int64]) -> None:
        """The first rows of a page hold these numbers."""
        for is_kv, (k, v) in self.layers:
            if is_kv:
                assert (k[page, : len(numbers)] == numbers[:, None, None]).all()
                assert (v[page, : len(numbers)] == numbers[:, None, None] + 1).all()

    def check_state(self, slot: int, number: int) -> None:
        for is_kv, (conv, ssm) in self.layers:
            if not is_kv:
                assert (conv[slot] == number).all()
                assert (ssm[slot] == number + 2).all()

    def check_lease(self, request: Running) -> None:
        """All that the request has read or written still holds what its tokens give."""
        lease, written = request.lease, request.written
        assert len(lease.pages) * TILE >= written
        for index, page in enumerate(lease.pages):
            self.check_rows(page, request.numbers[1:][index * TILE : min((index + 1) * TILE, written)])
        if written:
            self.check_state(lease.slot, int(request.numbers[written]))

    # Rules

    @rule(namespace=st.sampled_from(NAMESPACES), tokens=prompts, publish=st.booleans(), reuse=st.booleans())
    def acquire(self, namespace: str, tokens: TokenArray, publish: bool, reuse: bool) -> None:
        assume(len(tokens) > 0)
        match = self.cache.match(namespace, tokens if reuse else tokens[:0])
        if reuse:
            self.check_match(match, tokens)
        alone = not self.running
        lease = self.cache.acquire(match, tokens, publish=publish)
        if lease is None:
            assert not (alone and self.cache.fits(len(tokens)))
            return
        numbers = prefix_numbers(namespace, tokens)
        request = Running(namespace, tokens, lease, lease.length, numbers, publish=publish)
        self.running.append(request)
        for index, page in enumerate(lease.pages[: lease.shared // TILE]):
            self.check_rows(page, numbers[1:][index * TILE : (index + 1) * TILE])
        self.check_lease(request)
        if lease.end is not None:
            assert lease.length == len(tokens)
            if self.layers:
                assert self.cache.hidden(lease).tolist() == [numbers[-1], numbers[-1] + 3]

    def check_match(self, match: Match, tokens: TokenArray) -> None:
        """Nothing is claimed that was not published; and as long as nothing went, all of it is found."""
        namespace = match.namespace

        def prefix(n: int) -> Prefix:
            return namespace, tokens[:n].tobytes()

        grid = range(TILE, len(tokens) + 1, TILE)
        assert all(prefix(n) in self.pages for n in range(TILE, match.shared + 1, TILE))
        if match.end is not None:
            assert prefix(len(tokens)) in self.ends
            assert match.length == len(tokens)
        else:
            assert match.length < len(tokens)
            assert match.length == 0 or prefix(match.length) in self.states
            assert (match.checkpoint is None) == (match.length == 0)
        if self.cache.stats().num_evictions == 0:
            assert match.shared == max((n for n in grid if prefix(n) in self.pages), default=0)
            if prefix(len(tokens)) in self.ends:
                assert match.end is not None
            else:
                usable = [n for n in grid if n < len(tokens) and prefix(n) in self.states]
                assert match.length == max(usable, default=0)

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(),
        kind=st.sampled_from(KINDS),
        ttl=st.sampled_from([None, None, 1.0, 100.0]),
    )
    def reserve(self, data: st.DataObject, kind: CheckpointKind, ttl: float | None) -> None:
        request = data.draw(st.sampled_from(self.running))
        positions = range(request.computed // TILE * TILE + TILE, len(request.tokens) + 1, TILE)
        assume(len(positions) > 0)
        position = data.draw(st.sampled_from(positions))
        slot = self.cache.reserve_checkpoint(request.lease, position, kind, ttl_s=ttl)
        assert slot is None or request.publish

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tiles=st.integers(1, 3), commit=st.booleans())
    def prefill(self, data: st.DataObject, num_tiles: int, commit: bool) -> None:
        """Reads the state and earlier rows, writes the next tiles into pages of its own, and states into slots."""
        request = data.draw(st.sampled_from(self.running))
        assume(request.computed < len(request.tokens))
        lease, start = request.lease, request.computed
        self.check_lease(request)
        end = min(start + num_tiles * TILE, len(request.tokens))
        for position in range(max(start, lease.shared), end):
            self.write_row(lease.pages[position // TILE], position % TILE, int(request.numbers[position + 1]))
        for reservation in lease.reserved:
            if start < reservation.position <= end:
                self.write_state(reservation.slot, int(request.numbers[reservation.position]))
        self.write_state(lease.slot, int(request.numbers[end]))
        request.computed = end
        if commit:
            self.commit_until(request, end // TILE * TILE)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.commit_until(request, data.draw(st.sampled_from(range(0, request.computed + 1, TILE))))

    def commit_until(self, request: Running, end: int) -> None:
        reserved = [r.position for r in request.lease.reserved if r.position <= end]
        self.cache.commit(request.lease, end)
        if not request.publish:
            return
        assert request.lease.shared >= end
        for position in range(TILE, end + 1, TILE):
            self.pages.add((request.namespace, request.tokens[:position].tobytes()))
        self.states.update((request.namespace, request.tokens[:position].tobytes()) for position in reserved)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), commit=st.booleans())
    def commit_end(self, data: st.DataObject, commit: bool) -> None:
        request = data.draw(st.sampled_from(self.running))
        assume(request.computed == len(request.tokens) and request.decoded == 0)
        if commit:
            self.commit_until(request, request.computed // TILE * TILE)
        last = float(request.numbers[-1])
        hidden = torch.tensor([last, last + 3])
        if self.cache.commit_end(request.lease, request.tokens, hidden):
            assert request.publish
            self.ends.add((request.namespace, request.tokens.tobytes()))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, TILE + 1))
    def decode(self, data: st.DataObject, num_tokens: int) -> None:
        request = data.draw(st.sampled_from(self.running))
        assume(request.computed == len(request.tokens))
        lease, covered = request.lease, list(request.lease.pages)
        if not self.cache.extend(lease, request.written + num_tokens):
            assert lease.pages == covered
            assert len(self.running) > 1 or not self.cache.fits(request.written + num_tokens)
            return
        new = DECODED + request.written + np.arange(num_tokens)
        for position, number in enumerate(new.tolist(), start=request.written):
            assert position >= lease.shared
            self.write_row(lease.pages[position // TILE], position % TILE, number)
        request.numbers = np.concatenate([request.numbers, new])
        request.decoded += num_tokens
        self.write_state(lease.slot, int(request.numbers[request.written]))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(self.running))
        lease = self.cache.fork(source.lease, source.written)
        if lease is None:
            return
        fork = Running(
            source.namespace, source.tokens, lease, source.computed, source.numbers, source.decoded, source.publish
        )
        assert lease.shared == source.lease.shared
        assert not set(lease.pages[lease.shared // TILE :]) & set(source.lease.pages)
        self.check_lease(fork)
        self.running.append(fork)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.cache.release(request.lease)
        self.running.remove(request)
        self.released.append(request)

    @precondition(lambda self: self.released)
    @rule(data=st.data())
    def release_again(self, data: st.DataObject) -> None:
        self.cache.release(data.draw(st.sampled_from(self.released)).lease)

    @rule(namespace=st.sampled_from([None, *NAMESPACES]))
    def drop(self, namespace: str | None) -> None:
        others = [n for n in self.cache.nodes() if namespace not in (None, n.namespace) and n.parent is not None]
        free = self.cache.stats().free_bytes
        assert self.cache.drop(namespace) == self.cache.stats().free_bytes - free
        left = list(self.cache.nodes())
        assert all(n in left for n in others)
        used = {n for r in self.running for n in [r.lease.root, *r.lease.nodes]}
        for node in left:
            if namespace in (None, node.namespace):
                assert node in used
                assert node.checkpoint is None
                assert not node.ends
        if not self.running and namespace is None:
            assert self.cache.stats().free_bytes == self.cache.stats().budget_bytes // self.unit * self.unit

    @property
    def unit(self) -> int:
        return self.cache._geometry.unit_bytes

    @rule(seconds=st.sampled_from([0.5, 2.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    # What holds after each rule

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        stats = self.cache.stats()
        parts = stats.kv_bytes + stats.checkpoint_bytes + stats.prompt_end_bytes + stats.working_bytes
        assert parts + stats.free_bytes <= stats.budget_bytes == self.budget
        assert stats.working_bytes >= 0

    @invariant()
    def tree_holds_what_was_published(self) -> None:
        if not hasattr(self, "cache"):
            return
        for root in [n for n in self.cache.nodes() if n.parent is None]:
            self.check_subtree(root, np.empty(0, dtype=np.int32))

    def check_subtree(self, node: Node, tokens: TokenArray) -> None:
        numbers = prefix_numbers(node.namespace, tokens)
        if node.parent is not None:
            assert (node.namespace, tokens.tobytes()) in self.pages
            self.check_rows(node.page, numbers[1:][-TILE:])
        if node.checkpoint is not None:
            assert (node.namespace, tokens.tobytes()) in self.states
            self.check_state(node.checkpoint.slot, int(numbers[-1]))
        for tail, end in node.ends.items():
            whole = np.concatenate([tokens, np.frombuffer(tail, dtype=np.int32)])
            assert (node.namespace, whole.tobytes()) in self.ends
            all_numbers = prefix_numbers(node.namespace, whole)
            self.check_state(end.slot, int(all_numbers[-1]))
            if end.page is not None:
                self.check_rows(end.page, all_numbers[1 + len(tokens) :])
        for key, child in node.children.items():
            self.check_subtree(child, np.concatenate([tokens, np.frombuffer(key, dtype=np.int32)]))

    @invariant()
    def running_requests_are_untouched(self) -> None:
        for request in self.running:
            self.check_lease(request)

    def teardown(self) -> None:
        """When all requests are gone and all is dropped, every byte is free again."""
        if not hasattr(self, "cache"):
            return
        for request in self.running:
            self.cache.release(request.lease)
        self.cache.drop()
        self.cache.check()
        stats = self.cache.stats()
        assert list(self.cache.nodes()) == []
        assert stats.kv_bytes == stats.checkpoint_bytes == stats.prompt_end_bytes == stats.working_bytes == 0


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
