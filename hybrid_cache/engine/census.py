"""Who is in an engine now: what waits, what runs and what is paused, for people who ask a running server."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.intake import OWN
from hybrid_cache.engine.sequence import Phase, Sequence

State = Literal["waiting", "loading", "prefill", "decoding", "paused"]
STATES: dict[Phase, State] = {
    Phase.WAITING: "waiting",
    Phase.PREFILL: "prefill",
    Phase.DECODE: "decoding",
    Phase.FINISHED: "paused",
}


@dataclass(frozen=True, slots=True)
class Occupant:
    """One choice of a request. Tokens are those of its prompt, but for those that it has generated."""

    request_id: str
    choice: int
    model: str  # as in `Request`
    state: State  # loading: waits for its beginning to come from a disk
    prompt_tokens: int
    computed_tokens: int  # in its state by now, cached ones included
    cached_tokens: int | None  # None until it was first admitted
    generated_tokens: int
    age_s: float  # since it was submitted


def census(engine: Engine, may_see: Callable[[str], bool], now: float) -> list[Occupant]:
    """Those whose tenant may be seen, the oldest first. To be called on the engine's thread. now: by its clock"""
    return sorted(_occupants(engine, may_see, now), key=lambda each: (-each.age_s, each.request_id, each.choice))


def _occupants(engine: Engine, may_see: Callable[[str], bool], now: float) -> Iterator[Occupant]:
    for sequence in engine.sequences():
        if sequence.request.id != OWN and may_see(sequence.request.tenant):
            yield _occupant(sequence, now)


def _occupant(sequence: Sequence, now: float) -> Occupant:
    prefill, request = sequence.prefill, sequence.request
    return Occupant(
        request_id=request.id,
        choice=sequence.index,
        model=request.model,
        state="loading" if sequence.prefill.loads else STATES[sequence.phase],
        prompt_tokens=len(prefill.tokens),
        computed_tokens=min(prefill.computed, len(prefill.tokens)) if prefill.lease is not None else 0,
        cached_tokens=prefill.cached,
        generated_tokens=len(sequence.generated),
        age_s=now - sequence.submitted_s,
    )
