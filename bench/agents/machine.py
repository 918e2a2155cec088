"""Servers that compute nothing: how long the work of a step would take on a machine, by given or measured rates.

A step takes

    base + rows that decode * (row + bytes of their contexts / bandwidth)
         + tokens of prefill, in whole tiles * (token + token_per_position * position)

seconds. The presets are estimates for one accelerator, of the size that published studies of paused requests used; the
long ones have a faster machine and larger chunks, for contexts of 100,000 tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hybrid_cache.cache.commands import Load, Store
from hybrid_cache.cache.geometry import Kind
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.device.worker import Hidden, Worker
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.sampling import TokenChooser, TokenLogprob
from hybrid_cache.spec import AttentionSpec, CacheSpec, LayerSpec, PrefillCost, StateSpec
from hybrid_cache.work import Work

GENERATED = 1  # the token of which every answer consists
BF16 = torch.bfloat16


class Clock:
    """Simulated seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, slots=True)
class Machine:
    """A model on an accelerator. All times in seconds."""

    name: str
    spec: CacheSpec
    base_s: float
    row_s: float
    token_s: float
    token_per_position_s: float
    bytes_per_s: float  # at which contexts are read
    chunk_tokens: int  # of prefill in a step, at most
    max_running: int = 256
    copy_bytes_per_s: float = 20e9  # to host memory and back
    chunk_tokens_beside_decode: int | None = None  # the same while others decode; None: as many
    max_step_s: float | None = None  # that a step with prefill should take at most; None: any time
    request_s: float = 0.0  # from a client's asking to the engine

    @property
    def cost(self) -> PrefillCost:
        """In seconds instead of FLOPs."""
        return PrefillCost(self.token_s, self.token_per_position_s)


def attention(num_layers: int, num_kv_heads: int, head_dim: int) -> CacheSpec:
    return CacheSpec(tuple(AttentionSpec(num_kv_heads, head_dim, BF16) for _ in range(num_layers)), 4096, BF16)


def hybrid(num_kv_heads: int, state_bytes: int) -> CacheSpec:
    """8 attention layers with heads of 128 numbers, and 24 layers that share the bytes of the state."""
    states = tuple(StateSpec((0, 0), (state_bytes // (24 * 4 * 128), 128), BF16) for _ in range(24))
    return CacheSpec((*states, *(AttentionSpec(num_kv_heads, 128, BF16) for _ in range(8))), 4096, BF16)


ATTENTION_6B, ATTENTION_8B = attention(28, 16, 256), attention(32, 8, 128)
HYBRID_7B, JAMBA_MINI = hybrid(16, 54_000_000), hybrid(4, 16_000_000)

MACHINES = {
    machine.name: machine
    for machine in (
        Machine("attention-6b", ATTENTION_6B, 0.017, 4e-5, 6.7e-5, 6.7e-5 / 26_000, 1.5e12, 512),
        Machine("hybrid-7b", HYBRID_7B, 0.017, 4e-5, 7.8e-5, 7.8e-5 / 180_000, 1.5e12, 512),
        Machine("hybrid-7b-wide-state", hybrid(16, 216_000_000), 0.017, 4e-5, 7.8e-5, 7.8e-5 / 180_000, 1.5e12, 512),
        Machine("hybrid-7b-thin-kv", hybrid(4, 54_000_000), 0.017, 4e-5, 7.8e-5, 7.8e-5 / 180_000, 1.5e12, 512),
        Machine("jamba-mini", JAMBA_MINI, 0.025, 6e-5, 1.0e-4, 1.0e-4 / 200_000, 1.5e12, 512),
        Machine("attention-8b-long", ATTENTION_8B, 0.010, 4e-5, 5.0e-5, 5.0e-5 / 30_000, 3e12, 2048),
        Machine("hybrid-7b-long", HYBRID_7B, 0.010, 4e-5, 4.5e-5, 4.5e-5 / 180_000, 3e12, 2048),
        Machine("jamba-mini-long", JAMBA_MINI, 0.014, 6e-5, 6.0e-5, 6.0e-5 / 200_000, 3e12, 2048),
    )
}


def machine_named(name: str) -> Machine:
    """Raises ConfigError for an unknown one."""
    if name not in MACHINES:
        raise ConfigError(f"model {name!r}: expected one of {', '.join(MACHINES)}")
    return MACHINES[name]


class SimulatedModel:
    """What an engine asks of a model, without weights."""

    packs = False
    commutes = True
    invocation = ()
    fidelities: tuple[str, ...] = ()
    vocab_size = 1 << 31
    max_length = 1 << 20
    fingerprint = "simulated"
    chain: tuple[str, ...] = ()
    layers: tuple[LayerSpec, ...] = ()

    def __init__(self, machine: Machine) -> None:
        self.cache_spec = machine.spec
        self.prefill_cost = machine.cost

    @cached_property
    def device(self) -> torch.device:
        """One whose tensors take no memory."""
        return torch.device("meta")

    @property
    def ops(self) -> Ops:
        raise AssertionError("nothing is computed")

    def forward(self, batch: object, cache: object) -> torch.Tensor:
        raise AssertionError("nothing is computed")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nothing is computed")


class _Rows:
    """Stands for hidden rows, whose numbers nobody reads."""

    def __getitem__(self, index: object) -> "_Rows":
        return self

    def __iter__(self) -> "Iterator[_Rows]":
        while True:
            yield self


_ROWS = _Rows()


class SimulatedWorker(Worker):
    """Lets time pass instead of computing. Every token is `GENERATED`."""

    def __init__(self, machine: Machine, clock: Clock, memory: CacheMemory) -> None:
        self.memory = memory
        self.graphs = {}
        self.busy_s = 0.0
        self._machine = machine
        self._clock = clock
        self._cost = machine.cost
        spec = machine.spec
        self._state_bytes, self._token_bytes = spec.slot_bytes, spec.kv_bytes_per_token
        self._page_bytes = spec.page_bytes

    def run(self, work: Work, pause: Callable[[], None] = lambda: None) -> Hidden:
        seconds = self._pass_s(work) if work.chunks or work.decodes else 0.0
        seconds = self._copy_s(work, Load) + max(seconds, self._copy_s(work, Store))
        if seconds:
            self.busy_s += seconds
            self._clock.now += seconds
        return Hidden((_ROWS,) * len(work.chunks), _ROWS, (_ROWS,) * len(work.kept))  # type: ignore[arg-type]

    def _pass_s(self, work: Work) -> float:
        machine, num_decodes = self._machine, len(work.decodes)
        ends = ((rows.start, rows.start + -(-len(rows.tokens) // TILE) * TILE) for rows in work.chunks)
        prefill = sum(self._cost.flops(start, end) for start, end in ends)
        num_bytes = num_decodes * self._state_bytes + sum(rows.start for rows in work.decodes) * self._token_bytes
        return machine.base_s + machine.row_s * num_decodes + num_bytes / machine.bytes_per_s + prefill

    def _copy_s(self, work: Work, way: type[Load] | type[Store]) -> float:
        """Of pages and states from the host, for which a pass waits, or to it, for which it does not."""
        kinds = [command.kind for command in work.commands if isinstance(command, way)]
        slots = sum(kind is Kind.SLOT for kind in kinds)
        num_bytes = slots * self._state_bytes + (len(kinds) - slots) * self._page_bytes
        return num_bytes / self._machine.copy_bytes_per_s

    def choose(
        self,
        rows: Sequence[object],
        models: Sequence[str],
        choosers: Sequence[TokenChooser],
        num_top: Sequence[int | None],
    ) -> list[tuple[int, TokenLogprob | None]]:
        return [(GENERATED, None)] * len(choosers)
