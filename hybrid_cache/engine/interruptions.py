"""Requests that a caller stops in the middle, has a tool run for, and continues with the tool's tokens.

While it is interrupted a request holds nothing. Continued, it is computed as one whose prompt is all that there is so
far: its tokens, those that were generated, and those that are added. Random numbers and penalties go on.
"""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace

import numpy as np

from hybrid_cache.cache.policies.signals import Finish
from hybrid_cache.engine.intake import Intake
from hybrid_cache.engine.scheduler import Scheduler
from hybrid_cache.engine.sequence import Sequence
from hybrid_cache.errors import RequestError
from hybrid_cache.request import FailedOutput, FinishReason
from hybrid_cache.scheduling.pauses import FORGOTTEN_AFTER_S
from hybrid_cache.tokens import Prompt

MOST_INTERRUPTED = 1 << 14


@dataclass(frozen=True, slots=True)
class _Interrupted:
    sequence: Sequence
    since_s: float


class Interruptions:
    """Those of one engine."""

    def __init__(self, scheduler: Scheduler, intake: Intake) -> None:
        self._scheduler = scheduler
        self._intake = intake
        self._open: dict[str, _Interrupted] = {}  # by the id of the request, in the order of their interruptions

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def sequences(self) -> Iterator[Sequence]:
        """Those that are interrupted."""
        return (each.sequence for each in self._open.values())

    def begin(self, request_id: str) -> None:
        """Stops a request that waits or runs. Raises RequestError for one that cannot be continued."""
        sequences = [s for s in self._scheduler.sequences() if s.request.id == request_id]
        if not sequences or sequences[0].request.n > 1 or sequences[0].request.arrangement is not None:
            what = "has several choices or an arrangement" if sequences else "is not running"
            raise RequestError(f"request {request_id!r} {what}, and cannot be paused", param="id")
        if len(self._open) >= MOST_INTERRUPTED:
            raise RequestError(f"{len(self._open)} requests are paused, limit {MOST_INTERRUPTED}", param="id")
        (sequence,) = sequences
        self._scheduler.tasks.look()
        self._scheduler.tasks.end_turn(sequence, FinishReason.TOOL_CALL)
        self._scheduler.finish(sequence, Finish.TOOL_CALL)
        self._scheduler.canonical.add_turn(sequence)
        self._open[request_id] = _Interrupted(sequence, self._scheduler.tasks.load.now)

    def end(self, request_id: str, tokens: Tokens[int]) -> Sequence:
        """Continues a request behind these tokens -> what is to be scheduled of it.

        Raises RequestError for one that is not interrupted, ContextTooLong where it would not fit: then it still is.
        """
        if request_id not in self._open:
            raise RequestError(f"request {request_id!r} is not paused", param="id")
        before = self._open[request_id].sequence
        request, done = before.request, len(before.generated)
        all_tokens = np.concatenate([before.all_tokens(), self._intake.tokens_of(tokens)])
        prompt = Prompt(all_tokens, request.prompt.boundaries)
        most, least = request.sampling.max_tokens - done, max(request.sampling.min_tokens - done, 0)
        sampling = replace(request.sampling, max_tokens=most, min_tokens=least)
        request = replace(request, prompt=prompt, sampling=sampling)
        self._intake.check(request)
        sequence = self._intake.sequence(request, 0, before.prefill)
        sequence.chooser, sequence.stopper = before.chooser, before.stopper
        sequence.continues = request_id
        sequence.chooser.go_on(prompt.tokens)
        sequence.chooser.owe(before.forced, self._intake.vocab_size)
        del self._open[request_id]
        return sequence

    def abort(self, request_id: str) -> None:
        """Ends the task of a request that is interrupted; nothing happens to any other."""
        if self._open.pop(request_id, None) is not None:
            self._scheduler.tasks.pauses.over(request_id)

    @property
    def next_forgotten_s(self) -> float:
        """When the next one will be given up, by the engine's clock; infinite if there is none."""
        return next(iter(self._open.values())).since_s + FORGOTTEN_AFTER_S if self._open else math.inf

    def forgotten(self, now: float) -> list[tuple[str, FailedOutput]]:
        """Gives up those that nobody has continued for too long -> what their clients are told."""
        given_up = list[tuple[str, FailedOutput]]()
        if self.next_forgotten_s <= now:
            self._scheduler.tasks.look()
            self._scheduler.tasks.pauses.forget_old()
        while self.next_forgotten_s <= now:
            request_id = next(iter(self._open))
            self.abort(request_id)
            why = f"request {request_id!r} was paused for {FORGOTTEN_AFTER_S:.0f} s"
            given_up.append((request_id, FailedOutput(why, RequestError(why, param="id"))))
        return given_up
