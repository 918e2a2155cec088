"""How much memory the cache gets, and what the process takes beside it.

Beside weights and cache a server needs at most

    step      TILE * max_tiles + max_running rows, for each two copies of what the widest part of the model computes
              and a few rows as wide as the model, all in float32; on a CPU twice, for a step between its layers
    keys      where a backend gathers the keys of one sequence: three copies of a layer's keys and values, and the
              scores of a tile, of the longest context
    logits    of the rows that choose a token, or of one tile whose prompt is scored: three copies in float32
    books     NODE_BYTES for each page or state that the cache can hold
    queue     the prompts of a full engine and a full queue, QUEUE_TOKENS each on average
    bodies    MOST_BODIES request bodies of the largest size
    messages  the message book
    responses stored responses, or what SQLite holds of their file
    history   places that prompts have returned to, with which the policy learns, what has left the cache, and what
              requests were, for `diagnostics`
    grammars  those that are kept, the ways of running answers through them, and the process that tries them out
    program   what Python, threads and allocators take after the model has been loaded

bytes. On a GPU the first three and what CUDA itself takes are in the GPU's memory, where the cache is as well.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_cache.api.server.anthropic.diagnostics import REQUESTS_BYTES
from hybrid_cache.api.server.gate import MOST_BODIES
from hybrid_cache.api.server.launch import Loaded
from hybrid_cache.api.text.grammar_trial import MOST_BYTES
from hybrid_cache.cache.disk.loading import MOST_LOADED_BYTES
from hybrid_cache.cache.disk.saving import MOST_QUEUED_BYTES
from hybrid_cache.cache.fates import RECORDS_BYTES
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.free_memory import ROOT, FreeMemory, free_memory, taken
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models.shapes import LayerShape, ModelShape
from hybrid_cache.sizes import format_bytes
from hybrid_cache.spec import AttentionSpec, CacheSpec

AUTO_SHARE = 0.75  # of what is free, and not needed beside the cache, that the cache gets by default
CONVERSATION_TOKENS = 2000
WIDE_ROWS = 6  # as wide as the model: the stream, a norm of it, what is added to it, and copies of these
NODE_BYTES = 1536  # measured: 1,100 at 16,000 nodes
QUEUE_TOKENS = 4096
TOKEN_BYTES = 16  # of a waiting prompt: as numbers, and as the keys of its pages
PROGRAM_BYTES = 256 << 20  # the most of it: what oneDNN prepares for each number of rows of float32 weights
HISTORY_BYTES = (64 << 20) + RECORDS_BYTES + REQUESTS_BYTES
KEPT_GRAMMARS_BYTES = 64 << 20  # measured: 26 MiB when MOST_KEPT characters of them are kept
WALK_BYTES = 2 << 20  # of one answer through a grammar; measured: 0.5 MiB after 60 tokens
GPU_BYTES = 512 << 20  # CUDA graphs, workspaces of libraries, and what torch keeps for itself
GATHERING = ("torch", "torch-compile", "mamba_ssm")  # backends that gather the keys of a sequence


@dataclass(frozen=True, slots=True)
class Beside:
    """Most bytes that a process takes beside weights and cache, see above."""

    step: int
    keys: int
    logits: int
    queue: int
    bodies: int
    messages: int
    books_per_byte: float  # of the cache
    responses: int = 0
    grammars: int = 0
    history: int = HISTORY_BYTES
    program: int = PROGRAM_BYTES
    disk: int = 0
    on_gpu: bool = False

    @property
    def shared(self) -> int:
        """Bytes in the memory that the cache is in, without the books."""
        passes = self.step + self.keys + self.logits
        if self.on_gpu:
            return passes + GPU_BYTES
        asked = self.queue + self.bodies + self.messages + self.responses
        return passes + asked + self.grammars + self.history + self.program + self.disk

    def total(self, budget_bytes: int) -> int:
        """Bytes in the memory that the cache is in."""
        return self.shared if self.on_gpu else self.shared + int(self.books_per_byte * budget_bytes)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the memory of a server goes, as it was when the model had been loaded."""

    budget_bytes: int
    beside_bytes: int  # at most, beside weights and cache
    free: FreeMemory
    taken_bytes: int | None  # by the program with the model; None where nothing says so

    def room(self, device: torch.device, later_bytes: int = 0, root: Path = ROOT) -> FreeMemory:
        """What is free for more weights: not what cache and process may still take of what was planned for them.

        later_bytes: of weights that were loaded since
        """
        free, now = free_memory(device, root), _taken(device, root)
        grown = 0 if now is None or self.taken_bytes is None else now - self.taken_bytes - later_bytes
        planned = max(self.budget_bytes + self.beside_bytes - max(grown, 0), 0)
        return FreeMemory(max(free.num_bytes - planned, 0), free.bound)

    def __str__(self) -> str:
        now = "" if self.taken_bytes is None else f"{format_bytes(self.taken_bytes)} with the model now, "
        cache, more = format_bytes(self.budget_bytes), format_bytes(self.beside_bytes)
        return f"{now}{cache} for the cache, up to {more} beside it; {format_bytes(self.free.num_bytes)} were free"


def plan_memory(
    loaded: Loaded,
    config: EngineConfig,
    asked: int | None,
    *,
    max_body_bytes: int = 0,
    book_bytes: int = 0,
    response_bytes: int = 0,
    root: Path = ROOT,
) -> MemoryPlan:
    """To be called once the model has run: `asked` is the budget, None for what is sensible. Raises ConfigError."""
    model, shape = loaded.model, loaded.info.shape
    free, spec = free_memory(model.device, root), model.cache_spec
    needed = beside(
        shape,
        config,
        max_length=min(model.max_length, free.num_bytes // max(spec.kv_bytes_per_token, 1)),
        backend=loaded.ops.name,
        max_body_bytes=max_body_bytes,
        book_bytes=book_bytes,
        response_bytes=response_bytes,
        device=model.device,
    )
    budget_bytes = fitted(asked, free, needed, spec)
    return MemoryPlan(budget_bytes, needed.total(budget_bytes), free, _taken(model.device, root))


def _taken(device: torch.device, root: Path) -> int | None:
    """Bytes of the memory that the cache is in which this process has; None where nothing says so."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else taken(root)


def beside(
    shape: ModelShape,
    config: EngineConfig,
    *,
    max_length: int,
    backend: str = "native",
    max_body_bytes: int = 0,
    book_bytes: int = 0,
    response_bytes: int = 0,
    device: torch.device | None = None,
) -> Beside:
    """What a process with these settings takes beside weights and cache."""
    spec, hidden = shape.cache_spec, shape.hidden_size
    widest = max(layer.cost.per_token for layer in shape.layers) / (2 * hidden)  # a number is a product of `hidden`
    rows = TILE * config.max_tiles + config.max_running
    on_gpu = device is not None and device.type == "cuda"
    return Beside(
        step=int(rows * (2 * widest + WIDE_ROWS * hidden) * 4) * (1 if on_gpu else 2),
        keys=max(map(_bytes_per_key, shape.layers)) * max_length if backend in GATHERING else 0,
        logits=3 * 4 * shape.vocab_size * max(config.max_running, TILE),
        queue=(config.max_running + config.max_waiting) * min(max_length, QUEUE_TOKENS) * TOKEN_BYTES,
        bodies=MOST_BODIES * max_body_bytes,
        messages=book_bytes,
        responses=response_bytes,
        books_per_byte=NODE_BYTES / (spec.page_bytes or spec.slot_bytes / TILE),
        grammars=KEPT_GRAMMARS_BYTES + WALK_BYTES * config.max_running + MOST_BYTES,
        disk=0 if config.disk is None else MOST_QUEUED_BYTES + MOST_LOADED_BYTES,
        on_gpu=on_gpu,
    )


def _bytes_per_key(layer: LayerShape) -> int:
    cache = layer.cache
    if not isinstance(cache, AttentionSpec):
        return 0
    num_heads = layer.cost.per_token_per_position / (4 * cache.head_dim)
    return 3 * 4 * int(2 * cache.num_kv_heads * cache.head_dim + TILE * num_heads)


def conversation_bytes(spec: CacheSpec) -> int:
    """What one conversation of CONVERSATION_TOKENS with a checkpoint takes of the cache."""
    return -(-CONVERSATION_TOKENS // TILE) * spec.page_bytes + spec.slot_bytes


def fitted(asked: int | None, free: FreeMemory, beside: Beside, spec: CacheSpec) -> int:
    """The bytes of the cache: those asked for, or AUTO_SHARE of what is free.

    Raises ConfigError if there is no room for them, or by default not for one conversation and the state that runs it.
    """
    room = free.num_bytes - beside.shared
    if asked is None:
        budget_bytes = int(AUTO_SHARE * max(room, 0) / (1 + beside.books_per_byte))
        least = conversation_bytes(spec) + spec.slot_bytes
        if budget_bytes < least:
            raise ConfigError(
                f"{_sizes(free, beside, 0)}: {AUTO_SHARE:.0%} of the rest are {format_bytes(budget_bytes)}, one "
                f"conversation of {CONVERSATION_TOKENS:,} tokens takes {format_bytes(least)}; --budget SIZE takes less"
            )
        return budget_bytes
    if asked + beside.total(asked) > free.num_bytes:
        most = max(int(room / (1 + beside.books_per_byte)), 0)
        raise ConfigError(
            f"a cache budget of {format_bytes(asked)} does not fit: {_sizes(free, beside, asked)}; at most "
            f"{format_bytes(most)} fit, and --budget auto takes {AUTO_SHARE:.0%} of that"
        )
    return asked


def _sizes(free: FreeMemory, beside: Beside, budget_bytes: int) -> str:
    needed = format_bytes(beside.total(budget_bytes))
    return (
        f"{format_bytes(free.num_bytes)} are free by {free.bound}, of which up to {needed} are needed beside the cache"
    )
