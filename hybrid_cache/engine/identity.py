"""By what entries on a disk are known to hold the very bits that would be computed here.

Names of weights, types and kernels are not enough: the same names may compute other bits on another machine. So a
prompt is computed, and what it leaves in pages and states is part of the identity.
"""

from hashlib import blake2b

import numpy as np

from hybrid_cache.cache.disk.entries import FORMAT
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.device.worker import Worker
from hybrid_cache.kernels.grid import MIN_ROWS, TILE
from hybrid_cache.kernels.identity import kernels_of
from hybrid_cache.work import Rows, Work

PROBE_TILES = 6  # of the prompt; it ends off the grid


def identity_of(model: HybridModel) -> str:
    """32 hexadecimal digits."""
    facts = [FORMAT, model.fingerprint, kernels_of(model.ops), f"grid {TILE}, {MIN_ROWS}", str(model.cache_spec)]
    return blake2b("\n".join(facts).encode() + _probe(model), digest_size=16).hexdigest()


def _probe(model: HybridModel) -> bytes:
    """A digest of what a prompt leaves in the cache, with a state at the end of each tile."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, model.vocab_size, PROBE_TILES * TILE + 13).astype(np.int32)
    slots, pages = PROBE_TILES + 2, PROBE_TILES + 1
    geometry = Geometry.of(model.cache_spec, 1 << 50)
    num_bytes = slots * geometry.stride_bytes(Kind.SLOT) + (pages + 1) * geometry.stride_bytes(Kind.PAGE)
    memory = CacheMemory(model.cache_spec, num_bytes, str(model.device))
    memory.clear()  # not every model writes to all of it
    rows = Rows(
        model=model.fingerprint,
        tokens=tokens,
        start=0,
        shift=0,
        slot=0,
        pages=tuple(range(first := geometry.first_page(slots), first + pages)),
        kv_rows=np.arange(first * TILE, first * TILE + len(tokens), dtype=np.int64),
        fresh=True,
        captures=tuple((tile * TILE, tile) for tile in range(1, PROBE_TILES + 1)),
        num_wanted=1,
    )
    hidden = Worker(model, memory).run(Work(chunks=(rows,))).chunks[0]
    digest = blake2b(memory.contents(-1, 0), digest_size=16)
    for tile in range(PROBE_TILES):
        digest.update(memory.contents(first + tile, tile + 1))
    digest.update(hidden.float().cpu().numpy().tobytes())
    return digest.digest()
