"""What follows from a forward pass: what it has written is published, sequences move on, tokens are chosen."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.policies.signals import Finish
from hybrid_cache.choreography.stage import Stage
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.worker import Hidden, Worker
from hybrid_cache.engine.intake import Intake
from hybrid_cache.engine.listener import Listener, Nobody
from hybrid_cache.engine.prefills import Chunk
from hybrid_cache.engine.scheduler import Scheduler, Step
from hybrid_cache.engine.sequence import Phase, Sequence, grid_floor
from hybrid_cache.engine.tally import Tally
from hybrid_cache.errors import RequestError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import FailedOutput, FinishReason, Output, TokenOutput
from hybrid_cache.sampling import TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor

MOST_FORCED = TILE // 2 - 1  # tokens that are fed together with a chosen one

logger = logging.getLogger("hybrid_cache")

Outputs = list[tuple[str, Output | FailedOutput]]  # (request id, output), in the order in which they arose


class Outcomes:
    """Ends passes, and with them requests. It hands tensors from the worker back to the worker, and looks at none.

    open: request id -> choices that have not finished
    """

    def __init__(
        self, model: HybridModel, cache: Books, worker: Worker, stage: Stage, scheduler: Scheduler, intake: Intake
    ) -> None:
        self.open: dict[str, int] = {}
        self.tally = Tally()
        self.listener: Listener = Nobody()
        self._max_length = model.max_length
        self._cost = model.prefill_cost
        self._cache = cache
        self._worker = worker
        self._stage = stage
        self._scheduler = scheduler
        self._intake = intake

    def abort(self, request_id: str, finish: Finish = Finish.GONE) -> None:
        """Ends all choices of a request; what it has published stays. Unknown ids are ignored."""
        for sequence in [s for s in self._scheduler.sequences() if s.request.id == request_id]:
            self.listener.ended(sequence, None)
            self._scheduler.finish(sequence, finish)
        if self.open.pop(request_id, None) is not None:
            self.listener.closed(request_id)

    def give_up(self, request_id: str, why: str, fault: RequestError | None = None) -> Outputs:
        """Aborts a request after an error; `fault` if that is the request's own."""
        logger.log(logging.WARNING if fault else logging.ERROR, "request %s is given up: %s", request_id, why)
        self.abort(request_id, Finish.FAILED)
        return [(request_id, FailedOutput(why, fault))]

    def end(self, step: Step, hidden: Hidden, outputs: Outputs) -> None:
        """Publishes, moves sequences on, chooses tokens; adds what arises to `outputs`, also where it fails."""
        outputs += self._announce(step.resumed)
        ready: list[tuple[Sequence, Tensor]] = []  # sequences whose next token can be chosen, with its hidden row
        num_rows = 0
        leaps = hidden.chunks[len(step.chunks) :]
        for chunk, rows in zip(step.chunks, hidden.chunks, strict=False):
            num_rows += chunk.rows.num_wanted
            outputs += self._end_chunk(chunk, rows, num_rows - 1, ready)
        outputs += self._end_decodes(step.decodes, hidden.decodes, leaps, ready)
        for sequence, row in zip(step.resumed, hidden.kept, strict=True):
            ready += self._begin_decode(sequence, row)
        outputs += self._end_unanswered(ready)
        self._choose([each for each in ready if each[0].phase is Phase.DECODE], outputs)

    def _announce(self, sequences: Iterable[Sequence]) -> Outputs:
        """The PromptOutput of sequences that are about to give their first token."""
        outputs: Outputs = []
        for sequence in sequences:
            if sequence.announced or sequence.index > 0:
                continue
            sequence.announced = True
            cached, program = sequence.prefill.cached, sequence.prefill.program
            assert cached is not None
            plan = program.plan if program else self._intake.exact_plan(sequence.request, cached)
            outputs.append((sequence.request.id, self.tally.prompt(sequence, plan, self._cost)))
        return outputs

    def _end_chunk(
        self, chunk: Chunk, rows: "Tensor", last_row: int, ready: "list[tuple[Sequence, Tensor]]"
    ) -> Outputs:
        """Publishes what a chunk has written and, at the end of the prompt, starts decoding.

        rows: those that the chunk wanted   last_row: the last of them, among the rows of the whole pass
        """
        prefill, sequence = chunk.prefill, chunk.sequence
        assert prefill.lease is not None
        prefill.computed = chunk.end
        prefill.parts.append((chunk.end, self._cache.now_s))
        self._scheduler.wrote_twins(chunk)
        self._cache.publish(prefill.lease, grid_floor(min(chunk.end, prefill.wanted)))
        self.tally.flops_computed += chunk.flops
        if prefill.program is not None:
            prefill.computed = self._stage.advance(prefill.program, prefill.lease, prefill.computed)
        if sequence is None and prefill.program is not None:
            if prefill.done:
                self._scheduler.messages.end(prefill)
            return []
        if sequence is None:
            self.tally.commit_tokens += chunk.end - chunk.start
            if prefill.done:
                pauses = self._scheduler.tasks.pauses
                pauses.computed(prefill.of, prefill.origin.session, prefill.keys, prefill.lease.tip)
                self._scheduler.canonical.end(prefill)
            return []
        self.tally.computed_tokens += chunk.end - chunk.start
        if sequence.request.sampling.prompt_logprobs is not None:
            new, tokens = sequence.unscored(chunk.start, chunk.end)
            num_top = sequence.request.sampling.prompt_logprobs
            sequence.prompt_logprobs += self._worker.score(chunk.rows.model, rows[new], tokens, num_top)
        if prefill.leaves_stem(chunk.end):
            self._cache.publish_stem(prefill.lease, last_row)
        if not prefill.done:
            return []
        self._scheduler.tasks.began(sequence)  # before its end is kept, which might displace what its task returns to
        if prefill.publish and not prefill.only_marked:
            self._cache.publish_end(prefill.lease, last_row)
        outputs = self._announce([sequence])
        ready += self._begin_decode(sequence, rows[-1])
        return outputs

    def _begin_decode(self, sequence: Sequence, hidden: "Tensor") -> "list[tuple[Sequence, Tensor]]":
        """The prompt is in the state -> the sequence and its forks, which choose their next token from `hidden`."""
        sequence.phase = Phase.DECODE
        self._scheduler.tasks.began(sequence)
        self._watch_answer(sequence)
        started = [] if sequence.generated else [(sequence, hidden)]
        if sequence.index == 0 and not sequence.forked:
            self.listener.prompted(sequence)
            started += [(s, hidden) for s in self._fork(sequence)]
            sequence.forked = True
        return started

    def _fork(self, first: Sequence) -> list[Sequence]:
        """The other choices of a request, on copies of the state -> those that found room; the rest wait."""
        forks = []
        for index in range(1, first.request.n):
            sequence = self._intake.sequence(first.request, index)
            sequence.arrival, sequence.task = first.arrival, first.task
            sequence.prefill.follow(first.prefill)
            assert first.prefill.lease is not None
            room = self._scheduler.has_room
            lease = self._cache.fork(first.prefill.lease, len(first.prefill.tokens)) if room else None
            if lease is None:
                self._scheduler.add(sequence)
                continue
            sequence.prefill.lease, sequence.prefill.computed = lease, len(first.prefill.tokens)
            if first.prefill.program is not None:
                sequence.prefill.program = first.prefill.program.fork()
            sequence.fed = len(first.prefill.tokens)
            self._scheduler.adopt(sequence)
            forks.append(sequence)
        return forks

    def _end_decodes(
        self,
        decodes: tuple[Sequence, ...],
        singles: "Tensor",
        leaps: "Iterable[Tensor]",
        ready: "list[tuple[Sequence, Tensor]]",
    ) -> Outputs:
        """Moves each decoding sequence on by what it was fed; those with a token to choose are `ready`."""
        outputs: Outputs = []
        single, several = iter(singles), iter(leaps)
        for sequence in decodes:
            count, replayed = sequence.stride, sequence.replaying
            rows = next(several) if count > 1 else next(single)[None]
            sequence.fed += count
            if replayed:
                self.tally.replayed_tokens += count
            else:
                outputs += self._end_leap(sequence, rows)
                ready.append((sequence, rows[-1]))
            self._watch_answer(sequence)
        return outputs

    def _end_leap(self, sequence: Sequence, rows: "Tensor") -> Outputs:
        """Adds tokens that were forced, and are in the state by now. They draw no random numbers."""
        outputs: Outputs = []
        forced, sequence.forced = sequence.forced, ()
        num_top = sequence.request.sampling.logprobs
        scores: list[TokenLogprob | None] = [None] * len(forced)
        if forced and num_top is not None:
            scores = [*self._worker.score(sequence.prefill.model, rows[:-1], forced, num_top)]
        for token, score in zip(forced, scores, strict=True):
            if sequence.phase is Phase.DECODE:  # else it has ended, or its request was given up
                outputs += self._append(sequence, token, score)
        return outputs

    def _end_unanswered(self, ready: "list[tuple[Sequence, Tensor]]") -> Outputs:
        """Ends the sequences that want no token."""
        outputs: Outputs = []
        for sequence, _ in ready:
            if sequence.request.sampling.max_tokens == 0:
                outputs.append((sequence.request.id, TokenOutput(sequence.index, None, finish=FinishReason.LENGTH)))
                self._finish(sequence, FinishReason.LENGTH)
        return outputs

    def _choose(self, ready: "list[tuple[Sequence, Tensor]]", outputs: Outputs) -> None:
        """Chooses the next token of each sequence from its hidden row."""
        for sequence, _ in ready:
            outputs += self._prepare(sequence)
        ready = [each for each in ready if each[0].phase is Phase.DECODE]
        if not ready:
            return
        models, choosers = [s.prefill.model for s, _ in ready], [s.chooser for s, _ in ready]
        num_top = [s.request.sampling.logprobs for s, _ in ready]
        chosen = self._worker.choose([row for _, row in ready], models, choosers, num_top)
        for (sequence, _), (token, logprob) in zip(ready, chosen, strict=True):
            if sequence.phase is Phase.DECODE:  # else its request was given up
                outputs += self._append(sequence, token, logprob)
                outputs += self._look_ahead(sequence)

    def _look_ahead(self, sequence: Sequence) -> Outputs:
        """Has tokens about which a constraint leaves no choice fed together with the last one.

        The request and its tokens alone decide about that: a chunk has other bits than as many single tokens.
        """
        constraint, sampling = sequence.chooser.constraint, sequence.request.sampling
        if constraint is None or sequence.phase is not Phase.DECODE:
            return []
        most = min(MOST_FORCED, sampling.max_tokens - len(sequence.generated), self._max_length - sequence.num_tokens)
        held_back = bool(sampling.stop_token_ids) and len(sequence.generated) < sampling.min_tokens
        if sequence.prefill.arrangement is not None or sampling.logit_bias or held_back:
            most = 0
        try:
            sequence.leap(constraint.ahead(most))
        except Exception as error:
            return self._fault(sequence, error)
        return []

    def _prepare(self, sequence: Sequence) -> Outputs:
        try:
            sequence.chooser.prepare()
        except Exception as error:
            return self._fault(sequence, error)
        return []

    def _fault(self, sequence: Sequence, error: Exception) -> Outputs:
        """Gives up a request whose stopper or constraint, which are the caller's, has just raised an error."""
        if isinstance(error, RequestError):
            return self.give_up(sequence.request.id, str(error), error)
        logger.exception("a stopper or a constraint failed")
        return self.give_up(sequence.request.id, f"{type(error).__name__}: {error}")

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Outputs:
        """Adds a chosen token to its sequence, and ends the sequence when it is the last one."""
        sequence.generated.append(token)
        self.tally.generated_tokens += 1
        try:
            sequence.chooser.note(token)
            finish = sequence.finish_reason(self._max_length)
        except Exception as error:
            return self._fault(sequence, error)
        if finish is not None:
            self._scheduler.messages.keep_answer(sequence)
            self._scheduler.tasks.end_turn(sequence, finish)
            self._finish(sequence, finish)
            self._scheduler.canonical.add_turn(sequence)
        return [(sequence.request.id, TokenOutput(sequence.index, token, logprob, finish))]

    def _finish(self, sequence: Sequence, finish: FinishReason) -> None:
        self.listener.ended(sequence, finish)
        self._scheduler.finish(sequence, Finish(finish.value))
        self.open[sequence.request.id] -= 1
        if self.open[sequence.request.id] == 0:
            del self.open[sequence.request.id]
            self.listener.closed(sequence.request.id)

    def _watch_answer(self, sequence: Sequence) -> None:
        prefill = sequence.prefill
        if prefill.program is not None and prefill.lease is not None and sequence.request.n == 1:
            self._stage.before_decode(prefill.program, prefill.lease, sequence.fed)
