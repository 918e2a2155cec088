"""Looks for prefixes across keys, salts, adapters and models: python -m tests.soak.prefix_tries --cases 100000

All namespaces are sent the same few prompts, which share their beginnings. A dictionary knows what each namespace was
sent; whoever finds more than that has found what is another's. Most tries are on the books of a cache, without a model;
one in fifty goes to a server, as a request of one of two keys with one of several salts. (A server has one model with
one adapter: those are told apart by the books alone.)
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch

from hybrid_cache.api.server.tenants import current_tenant, salt_of, tenant_of
from hybrid_cache.cache.books import Books
from hybrid_cache.cache.policies.registry import make_policy
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.namespaces import namespace_of
from hybrid_cache.spec import AttentionSpec, CacheSpec, PrefillCost, StateSpec
from hybrid_cache.tokens import Boundary, TokenArray
from tests.soak.common import Options, Report, Scene, parse, run
from tests.soak.server import KEYS
from tests.soak.wire import exchange, post

SPEC = CacheSpec(
    layers=(
        StateSpec(conv_shape=(3, 64), state_shape=(16, 64), conv_dtype=torch.float32),
        AttentionSpec(num_kv_heads=1, head_dim=8, dtype=torch.float32),
    ),
    hidden_size=64,
    hidden_dtype=torch.float32,
)
COST = PrefillCost(per_token=1e6, per_token_per_position=1e2)
BUDGET_BYTES = 24 << 20  # less than all prompts of all namespaces take: something is always evicted
FINGERPRINTS = ("model", "model-adapter", "model2", "m")  # weights with their adapter
SALTS = ("", "a", "b", "a/b", "model/a", "a:", ":a", "a\0", "A")
LETTERS, MOST_PAGES = 3, 5  # pages of equal tokens
HTTP_SHARE = 50  # of so many tries one goes to a server
CHECKED = 500  # after so many tries the books are checked
DEFAULTS = Options(cases=100_000, clients=4)


ALL = "*"  # stands for all namespaces together


@dataclass(slots=True)
class Seen:
    """How often each namespace was sent what; obviously right."""

    counts: Counter[tuple[str, bytes]] = field(default_factory=Counter)

    def add(self, namespace: str, tokens: TokenArray) -> None:
        self.counts.update((name, tokens[:end].tobytes()) for name in (namespace, ALL) for end in _ends(tokens))

    def longest(self, namespace: str, tokens: TokenArray, at_least: int = 1) -> int:
        """Tokens of the longest prefix that was sent so often: whole pages, or all of a prompt."""
        known = (end for end in _ends(tokens) if self.counts[namespace, tokens[:end].tobytes()] >= at_least)
        return max(known, default=0)


def _ends(tokens: TokenArray) -> Sequence[int]:
    return sorted({*range(TILE, len(tokens) + 1, TILE), len(tokens)})


def prompt(rng: Random) -> TokenArray:
    pages = [rng.randrange(LETTERS) + 10 for _ in range(rng.randint(1, MOST_PAGES))]
    return np.array([page for page in pages for _ in range(TILE)] + [9] * rng.choice((0, 1, 20)), dtype=np.int32)


def namespaces() -> list[str]:
    """Of every model with every adapter, every key (or none) and every salt."""
    found = []
    for key in ("", *KEYS):
        current_tenant.set(tenant_of(key) if key else "")
        found += [namespace_of(salt_of(salt), fingerprint) for fingerprint in FINGERPRINTS for salt in SALTS]
    current_tenant.set("")
    return found


@dataclass(slots=True)
class Tally:
    tries: int = 0
    hits: int = 0
    elsewhere: int = 0  # tries for what only others have been sent
    crossings: int = 0


def on_books(cases: int, seed: int, stored_as: Callable[[str], str] = str) -> Tally:
    """Tries as an engine would make them, without tensors. stored_as: what the books call a namespace"""
    rng, seen, tally = Random(seed), Seen(), Tally()
    names, books = namespaces(), Books(SPEC, COST, BUDGET_BYTES, make_policy("lru"))
    for number in range(cases):
        namespace, tokens = rng.choice(names), prompt(rng)
        allowed = seen.longest(namespace, tokens)
        match = books.match(stored_as(namespace), tokens)
        tally.tries += 1
        tally.hits += match.length > 0
        tally.elsewhere += seen.longest(ALL, tokens) > allowed
        tally.crossings += max(match.length, match.shared) > allowed
        _serve(books, stored_as(namespace), tokens)
        seen.add(namespace, tokens)
        if number % CHECKED == 0:
            books.check()
    return tally


def _serve(books: Books, namespace: str, tokens: TokenArray) -> None:
    lease = books.acquire(books.match(namespace, tokens), tokens)
    assert lease is not None
    for wish in books.propose(lease, [Boundary(len(tokens), role="user")]):
        books.reserve_checkpoint(lease, wish.position, wish.kind)
    books.publish(lease, len(tokens) // TILE * TILE)
    books.publish_end(lease, 0)
    books.release(lease)


async def over_http(scene: Scene, cases: int) -> Tally:
    """Tries by two keys with salts, side by side; whoever runs beside another of its namespace may find its pages."""
    rng, seen, tally = Random(scene.options.seed), Seen(), Tally()

    async def client() -> None:
        while tally.tries < cases:
            key, salt, tokens = rng.choice(scene.server.keys), rng.choice(SALTS), prompt(rng)
            namespace = f"{key} {salt}"
            tally.tries += 1
            tally.elsewhere += seen.longest(ALL, tokens) > seen.longest(namespace, tokens)
            seen.add(namespace, tokens)
            body = {"prompt": tokens.tolist(), "max_tokens": 1, "cache_salt": salt}
            reply = await exchange(scene.server.port, post("/v1/completions", body, key=key), timeout_s=60)
            cached = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]  # type: ignore[index]
            tally.hits += cached > 0
            tally.crossings += cached > seen.longest(namespace, tokens, at_least=2)  # by itself and another

    await asyncio.gather(*(client() for _ in range(scene.options.clients)))
    return tally


async def prefix_tries(scene: Scene) -> None:
    begin = time.monotonic()
    tally = await asyncio.to_thread(on_books, scene.options.cases, scene.options.seed)
    promise(scene.report, "books", tally, time.monotonic() - begin)
    begin = time.monotonic()
    tally = await over_http(scene, max(scene.options.cases // HTTP_SHARE, 50))
    promise(scene.report, "http", tally, time.monotonic() - begin)


def promise(report: Report, where: str, tally: Tally, seconds: float) -> None:
    """That nobody found what is another's, though there was something to find."""
    report.figure(f"{where}: tries, hits, tries for what only others sent", [tally.tries, tally.hits, tally.elsewhere])
    report.figure(f"{where}: seconds", seconds)
    report.at_most(f"{where}: crossings", tally.crossings, 0)
    report.at_least(f"{where}: hits", tally.hits, tally.tries / 50)
    report.at_least(f"{where}: tries for what only others sent", tally.elsewhere, tally.tries / 50)


if __name__ == "__main__":
    sys.exit(run(prefix_tries, parse(__doc__, DEFAULTS, "cases", "clients", "seed"), "prefix_tries"))
