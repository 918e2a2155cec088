"""Runs sequences on a cache the way the engine does, writing numbers that tell which tokens they belong to.

The rows and states of every prefix have one right content, so whatever a lease reads can be checked against its tokens.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.policies.base import Policy
from hybrid_cache.cache.policies.value import FlopsPerByte
from hybrid_cache.cache.tree import CheckpointKind
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors, StateTensors
from hybrid_cache.spec import AttentionSpec, CacheSpec, PrefillCost, StateSpec
from hybrid_cache.tokens import TokenArray
from tests.cache.at_once import HybridCache

KV = AttentionSpec(num_kv_heads=1, head_dim=2, dtype=torch.float32)  # a page takes 1024 bytes


def state_spec(num_floats: int) -> StateSpec:
    return StateSpec(conv_shape=(1, 2), state_shape=(2, num_floats // 2), conv_dtype=torch.float32)


def cache_spec(*layers: AttentionSpec | StateSpec) -> CacheSpec:
    return CacheSpec(layers=layers, hidden_size=2, hidden_dtype=torch.float32)


SPECS = {
    "slot of four pages": cache_spec(state_spec(480), KV, state_spec(400)),
    "slot as large as a page": cache_spec(KV, state_spec(224)),
    "page of four slots": cache_spec(KV, state_spec(30), KV),
    "only states": cache_spec(state_spec(30), state_spec(2)),
    "only attention": cache_spec(KV, KV),
}
COST = PrefillCost(per_token=100.0, per_token_per_position=1.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def new_cache(
    spec: CacheSpec, *, slots: int = 0, pages: int = 0, policy: Policy | None = None, clock: Clock | None = None
) -> HybridCache:
    """A cache whose budget holds about so many slots and pages."""
    geometry = Geometry.of(spec, 1 << 24)
    budget = slots * geometry.stride_bytes(Kind.SLOT) + pages * geometry.stride_bytes(Kind.PAGE)
    return HybridCache(spec, COST, budget, policy or FlopsPerByte(), clock=clock or Clock())


def tokens_of(pages: str, tail: int = 0) -> TokenArray:
    """One page of equal tokens for each letter, and then `tail` tokens more."""
    return np.array([ord(c) for c in pages for _ in range(TILE)] + [7] * tail, dtype=np.int32)


def content(tokens: TokenArray) -> float:
    """What the state after these tokens, and the KV row of the last one, must be: exact in float32."""
    return float(crc32(tokens.tobytes()) >> 9)


@lru_cache(1000)
def contents(data: bytes) -> Tensor:
    """`content` of every non-empty prefix of tokens given as bytes."""
    words = (data[i : i + 4] for i in range(0, len(data), 4))
    sums = accumulate(words, lambda crc, word: crc32(word, crc), initial=0)
    return torch.tensor([float(crc >> 9) for crc in sums][1:])


@dataclass(eq=False)
class Run:
    """A sequence in progress: a lease, all tokens so far, and how many of them are in pages and state."""

    lease: Lease
    tokens: TokenArray
    prompt_len: int
    done: int
    reserved: dict[int, int] = field(default_factory=dict)  # position -> slot, to be filled on the way

    @property
    def in_prompt(self) -> bool:
        return self.done < self.prompt_len


def start(
    cache: HybridCache, tokens: TokenArray, *, namespace: str = "", publish: bool = True, must: bool = True
) -> Run | None:
    """Matches and acquires."""
    lease = cache.acquire(cache.match(namespace, tokens), tokens, publish=publish)
    assert lease is not None or not must
    return None if lease is None else Run(lease, tokens, len(tokens), lease.length)


def begin(cache: HybridCache, tokens: TokenArray, *, namespace: str = "", publish: bool = True) -> Run:
    """As `start`, where there must be room."""
    run = start(cache, tokens, namespace=namespace, publish=publish)
    assert run is not None
    return run


def reserve(cache: HybridCache, run: Run, position: int, kind: CheckpointKind, ttl_s: float | None = None) -> bool:
    slot = cache.reserve_checkpoint(run.lease, position, kind, ttl_s=ttl_s)
    if slot is None:
        return False
    run.reserved[position] = slot
    return True


def forward(cache: HybridCache, run: Run, end: int) -> None:
    """Writes pages and states of the tokens [run.done, end), and fills reserved slots on the way."""
    first = max(run.done, run.lease.shared)
    if first < end:
        positions = torch.arange(first, end)
        pages = torch.tensor(run.lease.pages)[positions // TILE]
        write_rows(cache, pages, positions % TILE, contents(run.tokens[:end].tobytes())[first:])
    for position in [p for p in run.reserved if p <= end]:
        write_state(cache, run.reserved.pop(position), content(run.tokens[:position]))
    write_state(cache, run.lease.slot, content(run.tokens[:end]))
    run.done = end


def write_rows(cache: HybridCache, pages: Tensor, rows: Tensor, values: Tensor) -> None:
    for layer in cache.tensors:
        if isinstance(layer, KVTensors):
            layer.k[pages, rows] = values[:, None, None]
            layer.v[pages, rows] = -values[:, None, None]


def write_state(cache: HybridCache, slot: int, value: float) -> None:
    for layer in cache.tensors:
        if isinstance(layer, StateTensors):
            layer.conv[slot] = value
            layer.state[slot] = -value


def verify(cache: HybridCache, run: Run) -> None:
    """Everything that the lease reads is what was written for exactly these tokens."""
    want = contents(run.tokens[: run.done].tobytes())
    pages = torch.tensor(run.lease.pages[: -(-run.done // TILE)], dtype=torch.int64)
    for layer in cache.tensors:
        if isinstance(layer, KVTensors):
            for rows, sign in ((layer.k, 1), (layer.v, -1)):
                assert torch.equal(rows[pages].flatten(0, 1)[: run.done, 0], (want * sign)[:, None].expand(-1, 2))
        elif run.done:
            assert bool((layer.conv[run.lease.slot] == want[-1]).all())
            assert bool((layer.state[run.lease.slot] == -want[-1]).all())


def keep_end(cache: HybridCache, run: Run, hidden: Tensor | None = None) -> bool:
    """Keeps the end of a prompt, with a hidden row."""
    cache.memory.rows = torch.zeros(1, 2) if hidden is None else hidden[None]
    return cache.publish_end(run.lease, 0)


def fill(cache: HybridCache, tokens: TokenArray, *checkpoints: int, end: bool = False, namespace: str = "") -> None:
    """Runs a whole prompt, keeping checkpoints at these positions (and its end) when the policy agrees."""
    run = begin(cache, tokens, namespace=namespace)
    for position in checkpoints:
        reserve(cache, run, position, CheckpointKind.MESSAGE_END)
    forward(cache, run, len(tokens))
    cache.publish(run.lease, len(tokens) // TILE * TILE)
    if end:
        keep_end(cache, run, torch.tensor([1.0, 2.0]))
    cache.release(run.lease)
    cache.check()
