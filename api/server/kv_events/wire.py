"""KV events as vLLM sends them: maps of MessagePack in batches, which routers of several projects read.

A batch is `[seconds since 1970, events, data parallel rank]`. The fields are those of vLLM's documentation ("KV cache
events"). What readers make of them, and what they do not forgive, is in docs/kv-events.md.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from hybrid_cache.cache.keys import Name, tokens_in
from hybrid_cache.cache.resumable import Change, Cleared, Group, Removed, Stored, Tier
from hybrid_cache.kernels.grid import TILE

BLOCK_TOKENS = TILE
MOST_BLOCKS = 256  # of one event
HASH_BYTES = 8

Event = dict[str, object]
FULL_ATTENTION, MAMBA = "full_attention", "mamba"
MEDIA = {Tier.MEMORY: "GPU", Tier.DISK: "STORAGE"}  # vLLM's words; the first is where the model computes
KINDS = {Group.PAGES: FULL_ATTENTION, Group.STATES: MAMBA, Group.ENDS: MAMBA}


@dataclass(frozen=True, slots=True)
class Origin:
    """By what routers tell equal tokens apart."""

    lora_name: str | None = None
    cache_salt: str | None = None


def hash_of(name: Name) -> int:
    """The hash of a block with all before it: unsigned, and the same in every process for a model and a salt."""
    return int.from_bytes(name[:HASH_BYTES], "big")


def event_of(change: Change, origin: Callable[[str], Origin], *, grouped: bool) -> Event:
    """origin: of a namespace   grouped: pages and states are told apart"""
    if isinstance(change, Cleared):
        return {"type": "AllBlocksCleared"}
    group: Event = {"group_idx": int(change.group)} if grouped else {}
    if isinstance(change, Removed):
        return {
            "type": "BlockRemoved",
            "block_hashes": [hash_of(name) for name in change.names],
            "medium": MEDIA[change.tier],
            **group,
        }
    of = origin(change.namespace)
    kind: Event = {"kv_cache_spec_kind": KINDS[change.group]} if grouped else {}
    salt: Event = {"cache_salt": of.cache_salt} if of.cache_salt is not None else {}
    return {
        "type": "BlockStored",
        "block_hashes": [hash_of(name) for name in change.names],
        "parent_block_hash": None if change.before is None else hash_of(change.before),
        "token_ids": np.frombuffer(b"".join(map(tokens_in, change.keys)), "<i4").tolist(),
        "block_size": BLOCK_TOKENS,
        "lora_id": None,
        "medium": MEDIA[change.tier],
        "lora_name": of.lora_name,
        **group,
        **kind,
        **salt,
    }


def sized(changes: Iterable[Change]) -> Iterator[Change]:
    """The same, where pages that come one after the other are one change, of at most MOST_BLOCKS."""
    held: Stored | None = None
    for change in changes:
        if held is not None and isinstance(change, Stored) and _goes_on(held, change):
            held = replace(held, names=held.names + change.names, keys=held.keys + change.keys)
            continue
        if held is not None:
            yield from _split(held)
        held = change if isinstance(change, Stored) else None
        if not isinstance(change, Stored):
            yield from _split(change)
    if held is not None:
        yield from _split(held)


def _goes_on(held: Stored, change: Stored) -> bool:
    alike = held.group is change.group is Group.PAGES and held.tier is change.tier
    follows = alike and held.namespace == change.namespace and change.before == held.names[-1]
    return follows and len(held.names) < MOST_BLOCKS


def _split(change: Change) -> Iterator[Change]:
    if isinstance(change, Stored) and len(change.names) > MOST_BLOCKS:
        for start in range(0, len(change.names), MOST_BLOCKS):
            names, keys = (each[start : start + MOST_BLOCKS] for each in (change.names, change.keys))
            before = change.names[start - 1] if start else change.before
            yield replace(change, before=before, names=names, keys=keys)
    elif isinstance(change, Removed) and len(change.names) > MOST_BLOCKS:
        for start in range(0, len(change.names), MOST_BLOCKS):
            yield replace(change, names=change.names[start : start + MOST_BLOCKS])
    else:
        yield change
