"""Random requests, commits, evictions and aborts, next to a dictionary that is obviously right.

A fake forward pass writes numbers that tell which tokens came before: whoever reads a row or a state can say whether it
is the right one. Rows and states that decoding writes are marked, and must never be found in the tree.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.lease import Lease, Match
from hybrid_cache.cache.policies.marconi import Marconi
from hybrid_cache.cache.policies.registry import make_policy, policy_names
from hybrid_cache.cache.tree import CheckpointKind, Node
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.tokens import TokenArray
from tests.cache.at_once import HybridCache
from tests.cache.driver import COST, SPECS, Clock, tokens_of

KINDS = [k for k in CheckpointKind if k is not CheckpointKind.PROMPT_END]
DECODED = 1 << 21  # added to what decoding writes
MOST_RUNNING = 4

Numbers = npt.NDArray[np.int64]
Prefix = tuple[str, bytes]  # namespace and tokens

namespaces = st.sampled_from(["", "", "", "tenant"])
pages = st.text("ab", max_size=5) | st.sampled_from(["aaab", "aabb", "abab", "cdefg"])
tails = st.sampled_from([1, 1, 0, 5, 63])
rarely = st.integers(0, 9).map(lambda n: n == 9)
wishes = st.lists(  # page, kind, life
    st.tuples(st.integers(1, 5), st.sampled_from(KINDS), st.sampled_from([None, None, 1.0, 100.0])), max_size=3
)
Wishes = list[tuple[int, CheckpointKind, float | None]]
which = st.integers(0, MOST_RUNNING - 1)  # of the requests that could do it


def prefix_numbers(namespace: str, tokens: TokenArray) -> Numbers:
    """[len + 1] a number below 2**20 for each prefix of the tokens."""
    numbers = [zlib.crc32(namespace.encode())]
    for token in tokens.tolist():
        numbers.append(zlib.crc32(token.to_bytes(4, "little"), numbers[-1]))
    return np.array(numbers, dtype=np.int64) % (1 << 20)


@dataclass(eq=False)
class Running:
    """A request in the middle of its life."""

    namespace: str
    tokens: TokenArray  # the prompt
    lease: Lease
    publish: bool
    computed: int  # prompt tokens in the working state
    numbers: Numbers  # what its state held after each token, decoded ones included
    decoded: int = 0

    @property
    def written(self) -> int:
        return self.computed + self.decoded

    @property
    def in_prompt(self) -> bool:
        return self.computed < len(self.tokens)

    def prefix(self, num_tokens: int) -> Prefix:
        return self.namespace, self.tokens[:num_tokens].tobytes()


class CacheMachine(RuleBasedStateMachine):
    cache: Books

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.running: list[Running] = []
        self.released: list[Lease] = []
        self.seen: list[tuple[str, TokenArray]] = []
        self.pages: set[Prefix] = set()  # everything ever published
        self.states: set[Prefix] = set()
        self.ends: set[Prefix] = set()
        self.dropped = False

    @initialize(
        name=st.sampled_from(sorted(SPECS)),
        slots=st.integers(1, 9),
        pages=st.integers(1, 24),
        spare_bytes=st.sampled_from([0, 64, 1000]),
        policy=st.sampled_from([*policy_names(), "marconi-static"]),
        with_tensors=st.sampled_from([True, True, True, False]),
    )
    def make_cache(self, name: str, slots: int, pages: int, spare_bytes: int, policy: str, with_tensors: bool) -> None:
        self.stateless = name == "only attention"  # every page is a place to resume from
        geometry = Geometry.of(SPECS[name], 1 << 24)
        self.unit = geometry.unit_bytes
        num_bytes = slots * geometry.stride_bytes(Kind.SLOT) + pages * geometry.stride_bytes(Kind.PAGE)
        self.budget = num_bytes + spare_bytes
        fit = SPECS[name], COST, self.budget
        chosen = Marconi(0.5) if policy == "marconi-static" else make_policy(policy, *fit)
        self.cache = Books(*fit, chosen, clock=self.clock)
        if with_tensors:
            self.cache = HybridCache(*fit, chosen, clock=self.clock)
        self.layers: list[tuple[bool, npt.NDArray[np.float32], npt.NDArray[np.float32]]] = []
        for layer in self.cache.tensors if isinstance(self.cache, HybridCache) else ():
            a, b = (layer.k, layer.v) if isinstance(layer, KVTensors) else (layer.conv, layer.state)
            a.fill_(torch.nan)
            b.fill_(torch.nan)
            self.layers.append((isinstance(layer, KVTensors), a.numpy(), b.numpy()))

    # The fake model

    def write_row(self, page: int, offset: int, number: int) -> None:
        for is_kv, k, v in self.layers:
            if is_kv:
                k[page, offset], v[page, offset] = number, number + 1

    def write_state(self, slot: int, number: int) -> None:
        for is_kv, conv, state in self.layers:
            if not is_kv:
                conv[slot], state[slot] = number, number + 2

    def check_rows(self, page: int, numbers: Numbers) -> None:
        """The first rows of a page hold these numbers."""
        for is_kv, k, v in self.layers:
            if is_kv:
                assert (k[page, : len(numbers)] == numbers[:, None, None]).all()
                assert (v[page, : len(numbers)] == numbers[:, None, None] + 1).all()

    def check_state(self, slot: int, number: int) -> None:
        for is_kv, conv, state in self.layers:
            if not is_kv:
                assert (conv[slot] == number).all()
                assert (state[slot] == number + 2).all()

    def check_lease(self, request: Running) -> None:
        """All that the request has read or written still holds what its tokens give."""
        lease, written = request.lease, request.written
        assert len(lease.pages) * TILE >= written
        rows = request.numbers[1:]
        for index, page in enumerate(lease.pages):
            readable = max(written, lease.shared)
            self.check_rows(page, rows[index * TILE : min((index + 1) * TILE, readable)])
        if written:
            self.check_state(lease.slot, int(request.numbers[written]))

    # Steps of a request

    def acquire(self, namespace: str, tokens: TokenArray, *, publish: bool, reuse: bool) -> Running | None:
        match = self.cache.match(namespace, tokens if reuse else tokens[:0])
        if reuse:
            self.check_match(match, tokens)
        lease = self.cache.acquire(match, tokens, publish=publish)
        if lease is None:
            assert self.running or not self.cache.fits(len(tokens))
            return None
        numbers = prefix_numbers(namespace, tokens)
        request = Running(namespace, tokens, lease, publish, lease.length, numbers)
        self.running.append(request)
        self.seen.append((namespace, tokens))
        self.check_lease(request)
        if lease.end is not None:
            assert lease.length == len(tokens)
            if self.layers:
                assert self.cache.hidden(lease).tolist() == [numbers[-1], numbers[-1] + 3]
        return request

    def check_match(self, match: Match, tokens: TokenArray) -> None:
        """Nothing is claimed that was not published; and as long as nothing went, all of it is found."""

        def prefix(num_tokens: int) -> Prefix:
            return match.namespace, tokens[:num_tokens].tobytes()

        grid = range(TILE, len(tokens) + 1, TILE)
        states = self.pages if self.stateless else self.states
        assert all(prefix(n) in self.pages for n in range(TILE, match.shared + 1, TILE))
        if match.end is not None:
            assert match.length == len(tokens)
            assert prefix(len(tokens)) in self.ends
        else:
            assert match.length < len(tokens)
            assert match.length == 0 or prefix(match.length) in states
        if self.cache.stats().num_evictions == 0 and not self.dropped:
            assert match.shared == max((n for n in grid if prefix(n) in self.pages), default=0)
            assert (match.end is not None) == (prefix(len(tokens)) in self.ends)
            usable = [n for n in grid if n < len(tokens) and prefix(n) in states]
            assert match.end is not None or match.length == max(usable, default=0)

    def reserve(self, request: Running, wishes: Wishes) -> None:
        for page, kind, ttl_s in wishes:
            if request.computed < page * TILE <= len(request.tokens):
                slot = self.cache.reserve_checkpoint(request.lease, page * TILE, kind, ttl_s=ttl_s)
                assert slot is None or request.publish

    def prefill(self, request: Running, num_tiles: int) -> None:
        """Writes the next tiles into pages of its own, and states into slots."""
        lease, start = request.lease, request.computed
        end = min(start + num_tiles * TILE, len(request.tokens))
        for position in range(max(start, lease.shared), end):
            self.write_row(lease.pages[position // TILE], position % TILE, int(request.numbers[position + 1]))
        for reservation in lease.reserved:
            if start < reservation.position <= end:
                self.write_state(reservation.slot, int(request.numbers[reservation.position]))
        self.write_state(lease.slot, int(request.numbers[end]))
        request.computed = end

    def commit(self, request: Running, end: int) -> None:
        """Up to the page that holds token `end`, or starts there."""
        end = min(end, request.computed) // TILE * TILE
        reserved = [r.position for r in request.lease.reserved if r.position <= end]
        self.cache.publish(request.lease, end)
        if request.publish:
            assert request.lease.shared >= end
            self.pages.update(request.prefix(n) for n in range(TILE, end + 1, TILE))
            self.states.update(request.prefix(n) for n in reserved)

    def publish_end(self, request: Running) -> None:
        last = float(request.numbers[-1])
        if isinstance(self.cache, HybridCache):
            self.cache.memory.rows = torch.tensor([[last, last + 3]])
        if self.cache.publish_end(request.lease, 0):
            assert request.publish
            self.ends.add(request.prefix(len(request.tokens)))

    # Rules

    @precondition(lambda self: len(self.running) < MOST_RUNNING)
    @rule(namespace=namespaces, pages=pages, tail=tails, wishes=wishes, end=st.booleans(), release=st.booleans())
    def serve(self, namespace: str, pages: str, tail: int, wishes: Wishes, end: bool, release: bool) -> None:
        """A whole prompt in one go."""
        request = self.acquire(namespace, tokens_of(pages, tail or (not pages)), publish=True, reuse=True)
        if request is None:
            return
        if request.in_prompt:
            self.reserve(request, wishes)
            self.prefill(request, 9)
            self.commit(request, len(request.tokens))
        if end:
            self.publish_end(request)
        if release:
            self.give_back(request)

    @precondition(lambda self: len(self.running) < MOST_RUNNING)
    @rule(namespace=namespaces, pages=pages, tail=tails, wishes=wishes, private=rarely, afresh=rarely)
    def start(self, namespace: str, pages: str, tail: int, wishes: Wishes, private: bool, afresh: bool) -> None:
        tokens = tokens_of(pages, tail or (not pages))
        request = self.acquire(namespace, tokens, publish=not private, reuse=not afresh)
        if request is not None:
            self.reserve(request, wishes)

    @precondition(lambda self: self.seen and len(self.running) < MOST_RUNNING)
    @rule(back=st.integers(0, 3), release=st.booleans())
    def repeat(self, back: int, release: bool) -> None:
        """One of the last prompts once more, word for word."""
        namespace, tokens = self.seen[-1 - back % len(self.seen)]
        request = self.acquire(namespace, tokens, publish=True, reuse=True)
        if request is not None and release:
            self.give_back(request)

    @precondition(lambda self: self.some("in_prompt"))
    @rule(which=which, num_tiles=st.integers(1, 3), commit=st.integers(0, 6), wishes=wishes)
    def go_on(self, which: int, num_tiles: int, commit: int, wishes: Wishes) -> None:
        request = self.pick(which, self.some("in_prompt"))
        self.reserve(request, wishes)
        self.prefill(request, num_tiles)
        self.commit(request, commit * TILE)

    @precondition(lambda self: self.some("prompt done"))
    @rule(which=which, commit=st.booleans())
    def end_prompt(self, which: int, commit: bool) -> None:
        """Without a commit before, the last page is not the tree's and there is no place for an end."""
        request = self.pick(which, self.some("prompt done"))
        if commit:
            self.commit(request, len(request.tokens))
        self.publish_end(request)

    @precondition(lambda self: self.some("decoding"))
    @rule(which=which, num_tokens=st.integers(1, TILE + 1))
    def decode(self, which: int, num_tokens: int) -> None:
        request = self.pick(which, self.some("decoding"))
        lease, covered = request.lease, list(request.lease.pages)
        if not self.cache.extend(lease, request.written + num_tokens):
            assert lease.pages == covered
            if len(self.running) == 1 and self.cache.fits(request.written + num_tokens):
                self.start_again(request, request.decoded + num_tokens)
            return
        new = DECODED + request.written + np.arange(num_tokens)
        for position, number in enumerate(new.tolist(), start=request.written):
            assert position >= lease.shared
            self.write_row(lease.pages[position // TILE], position % TILE, number)
        request.numbers = np.concatenate([request.numbers, new])
        request.decoded += num_tokens
        self.write_state(lease.slot, int(request.numbers[request.written]))

    def start_again(self, request: Running, num_more: int) -> None:
        """A lone request whose own slot was in the way of its next page has room when it is placed anew."""
        self.give_back(request)
        tokens = np.append(request.tokens, np.full(num_more, 8, np.int32))
        assert self.acquire(request.namespace, tokens, publish=False, reuse=True) is not None

    @precondition(lambda self: 0 < len(self.running) < MOST_RUNNING)
    @rule(which=which)
    def fork(self, which: int) -> None:
        source = self.pick(which, self.running)
        lease = self.cache.fork(source.lease, source.written)
        if lease is None:
            return
        assert lease.shared == source.lease.shared
        assert not set(lease.pages[lease.shared // TILE :]) & set(source.lease.pages)
        numbers, decoded = source.numbers, source.decoded
        fork = Running(source.namespace, source.tokens, lease, source.publish, source.computed, numbers, decoded)
        self.check_lease(fork)
        self.running.append(fork)

    @precondition(lambda self: self.running)
    @rule(which=which)
    def release(self, which: int) -> None:
        """At any moment: an abort is a release."""
        self.give_back(self.pick(which, self.running))

    @precondition(lambda self: self.released)
    @rule()
    def release_again(self) -> None:
        self.cache.release(self.released.pop())

    @rule(namespace=st.sampled_from([None, "", "tenant"]), really=rarely)
    def drop(self, namespace: str | None, really: bool) -> None:
        if not really:
            return
        others = {n for n in self.cache.tree.nodes() if namespace not in (None, n.namespace)}
        self.dropped = True
        free = self.cache.stats().free_bytes
        assert self.cache.drop(namespace) == self.cache.stats().free_bytes - free
        left = set(self.cache.tree.nodes())
        assert others <= left
        assert left - others <= {n for r in self.running for n in [r.lease.root, *r.lease.nodes]}
        assert not any(n.checkpoint or n.ends for n in left - others)

    @rule(seconds=st.sampled_from([0.5, 2.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    def some(self, what: str) -> list[Running]:
        if what == "in_prompt":
            return [r for r in self.running if r.in_prompt]
        return [r for r in self.running if not r.in_prompt and not (r.decoded and what == "prompt done")]

    def pick(self, which: int, requests: Sequence[Running]) -> Running:
        return requests[which % len(requests)]

    def give_back(self, request: Running) -> None:
        self.cache.release(request.lease)
        self.running.remove(request)
        self.released.append(request.lease)

    # What holds after each rule

    @invariant()
    def books_agree(self) -> None:
        self.cache.check()
        stats = self.cache.stats()
        parts = stats.kv_bytes + stats.checkpoint_bytes + stats.prompt_end_bytes + stats.message_bytes
        parts += stats.working_bytes
        assert parts + stats.free_bytes == stats.budget_bytes // self.unit * self.unit <= self.budget

    @invariant()
    def tree_holds_what_was_published(self) -> None:
        for root in [n for n in self.cache.tree.nodes() if n.parent is None]:
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
        assert list(self.cache.tree.nodes()) == []
        assert self.cache.stats().free_bytes == self.budget // self.unit * self.unit


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
