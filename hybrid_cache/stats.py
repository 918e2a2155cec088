"""What the cache and the engine count, for metrics and for people."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheStats:
    """A snapshot. Bytes are what items take from the budget."""

    budget_bytes: int
    free_bytes: int
    kv_bytes: int  # pages of the tree
    checkpoint_bytes: int
    prompt_end_bytes: int
    message_bytes: int  # rows, states and transitions of messages that a choreography keeps
    input_bytes: int  # what layers were given, for models that share a base
    working_bytes: int  # pages and states of running sequences, and slots about to be filled
    nodes: int
    checkpoints: int
    prompt_ends: int
    messages: int
    hit_tokens: int  # tokens skipped
    kv_only_tokens: int  # tokens whose pages were there but whose state was not, computed again
    miss_tokens: int
    admissions: dict[str, int]  # by kind
    declines: dict[str, int]  # by kind
    evictions: dict[str, int]  # by kind, and "page"
    misses: dict[str, int]  # prompts that did not find all, by the reason for their largest part, see `cache.misses`
    missed_tokens: dict[str, int]  # of all parts, by reason
    compactions: int
    host_bytes: int = 0  # of a second tier
    host_stores: int = 0  # pages and states that were copied there
    host_loads: int = 0  # pages that came back
    disk: "DiskStats | None" = None

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Where the budget is, by what takes it."""
        return {
            "kv": self.kv_bytes,
            "checkpoint": self.checkpoint_bytes,
            "prompt_end": self.prompt_end_bytes,
            "message": self.message_bytes,
            "layer_inputs": self.input_bytes,
            "working": self.working_bytes,
            "free": self.free_bytes,
        }

    @property
    def num_evictions(self) -> int:
        return sum(self.evictions.values())


@dataclass(frozen=True, slots=True)
class DiskStats:
    """The tier on a disk. Totals are since the start."""

    budget_bytes: int
    used_bytes: int  # of all files in the folder, of whatever model
    entries: int  # of the models that are served
    waiting: int  # states that wait to be copied
    saved: dict[str, int]  # entries, by kind
    not_saved: dict[str, int]  # states, by why
    loads: dict[str, int]  # of prompts that could have been resumed from there, by outcome
    refused: dict[str, int]  # entries that could not be read, or were not what they had been, by why
    loaded_tokens: int
    loaded_bytes: int
    spent_s: float  # processor time of copies and of writing


@dataclass(frozen=True, slots=True)
class PauseStats:
    """Tasks that wait for a tool. Totals are since the start."""

    num_paused: int = 0  # now
    num_resumed: int = 0
    num_resident: int = 0  # of these, tasks of whose context the cache still had half or more
    num_forgotten: int = 0  # that nobody came back to in time


@dataclass(slots=True)
class Counters:
    """Running totals since the start."""

    steps: int = 0
    failures: int = 0  # steps that ended with an error
    prompt_tokens: int = 0
    cached_tokens: int = 0
    moved_tokens: int = 0  # of these, taken from stored messages by a choreography
    received_tokens: int = 0  # beside them, made from what another model has of the prompt
    computed_tokens: int = 0  # prompt tokens, including what preemption repeats
    generated_tokens: int = 0
    replayed_tokens: int = 0  # generated tokens fed again after a preemption
    commit_tokens: int = 0  # generated tokens computed again by canonical passes
    flops_saved: float = 0.0
    flops_computed: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics and for people."""

    running: int
    waiting: int
    loading: int  # of these, wait for the disk
    num_preemptions: int
    num_out_of_memory: int  # steps that the device had no memory for
    num_graph_replays: int  # decode steps that were one launch
    steps: int
    failures: int
    prompt_tokens: int
    cached_tokens: int
    moved_tokens: int
    received_tokens: int
    computed_tokens: int
    generated_tokens: int
    commit_tokens: int
    twin_tokens: int  # prompt tokens that were written for another model, too, while they were computed
    committing: int  # finished turns that are still to be computed again
    flops_saved: float
    flops_computed: float
    pauses: PauseStats
    cache: CacheStats
    step_age_s: float = 0.0  # seconds since the step under way began; 0 between steps
