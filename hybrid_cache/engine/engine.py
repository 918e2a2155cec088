"""The engine's synchronous core: schedule -> forward -> sample -> publish, one step at a time.

Nothing is published before the write that fills it has completed. `async_engine` runs this on a thread.
"""

import bisect
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hybrid_cache.cache.policies.registry import make_policy
from hybrid_cache.choreography.arrangement import Order, closed, message_id
from hybrid_cache.choreography.order import best_order
from hybrid_cache.choreography.plan import Action, Plan
from hybrid_cache.choreography.stage import Stage
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.memory import HybridCache
from hybrid_cache.device.runner import ModelRunner, StepHidden
from hybrid_cache.device.sampler import TokenChooser, choose_tokens, log_probabilities
from hybrid_cache.engine.scheduler import Chunk, Scheduler, Step
from hybrid_cache.engine.sequence import Phase, Prefill, Sequence, grid_floor, new_prefill
from hybrid_cache.errors import BadSampling, ContextTooLong, Overloaded, RequestError
from hybrid_cache.request import (
    CacheMode,
    FinishReason,
    Output,
    PromptOutput,
    Request,
    TokenLogprob,
    TokenOutput,
    namespace_of,
)
from hybrid_cache.stats import Counters, EngineStats

Outputs = list[tuple[str, Output]]  # (request id, output), in the order in which they arose


class Engine:
    """Requests in, outputs out, one step at a time. Not thread-safe."""

    def __init__(
        self,
        model: HybridModel,
        config: EngineConfig,
        *,
        runner: type[ModelRunner] = ModelRunner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: seconds, by which the cache tells how long things have not been used"""
        self.model = model
        self._config = config
        fit = model.cache_spec, model.prefill_cost, config.budget_bytes
        policy = make_policy(config.policy, *fit)
        self.cache = HybridCache(*fit, policy, device=str(model.device), clock=clock, verify=config.verify)
        self._runner = runner(model, self.cache)
        self.stage = Stage(self.cache, model, self._runner.anatomy)
        self._scheduler = Scheduler(self.cache, config, self.stage)
        self._arrivals = 0
        self._open: dict[str, int] = {}  # request id -> choices that have not finished
        self._counters = Counters()

    @property
    def has_work(self) -> bool:
        """True while a step would do something, canonical commits included."""
        return self._scheduler.has_work

    @property
    def idle(self) -> bool:
        """True while no request waits for an answer."""
        return self._scheduler.idle

    @property
    def longest_sequence(self) -> int:
        """Tokens that the model's context and an empty cache both hold."""
        return bisect.bisect_left(range(self.model.max_length), True, key=lambda n: not self.cache.fits(n + 1))

    def check_request(self, request: Request) -> None:
        """Raises RequestError for a request that can never be served."""
        n, limit = len(request.prompt.tokens), self.model.max_length
        if n == 0:
            raise RequestError("the prompt has 0 tokens, must have at least 1", param="prompt")
        if (n >= limit and request.sampling.max_tokens > 0) or n > limit:
            raise ContextTooLong(f"the prompt has {n} tokens, the context holds {limit} with the answer")
        longest = min(n + request.sampling.max_tokens, limit)
        if not self.cache.fits(longest):
            raise ContextTooLong(
                f"{longest} tokens need more than the cache budget of {self._config.budget_bytes} bytes"
            )
        if request.arrangement is not None:
            request.arrangement.check(n)
        if request.n < 1:
            raise BadSampling(f"n is {request.n}, must be at least 1", param="n")
        low, high = int(request.prompt.tokens.min()), int(request.prompt.tokens.max())
        if low < 0 or high >= self.model.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(
                f"prompt token {wrong} is outside the vocabulary [0, {self.model.vocab_size})", param="prompt"
            )
        for token in (*request.sampling.logit_bias, *request.sampling.stop_token_ids):
            if not 0 <= token < self.model.vocab_size:
                raise BadSampling(f"token {token} is outside the vocabulary [0, {self.model.vocab_size})")

    @property
    def has_room(self) -> bool:
        """False while the waiting queue is full."""
        return self._scheduler.num_waiting < self._config.max_waiting

    def submit(self, request: Request) -> None:
        """Queues a request, whose id must not be that of an open one. Raises RequestError, or Overloaded when the queue
        is full.
        """
        self.check_request(request)
        if self.is_open(request.id):
            raise RequestError(f"request id {request.id!r} is in use", param="id")
        if not self.has_room:
            raise Overloaded(f"{self._scheduler.num_waiting} requests wait, limit {self._config.max_waiting}")
        self._open[request.id] = request.n
        # The first choice computes the prompt; the others fork from its end.
        self._scheduler.add(self._new_sequence(request, 0))

    def abort(self, request_id: str) -> None:
        """Ends all choices of a request; what it has published stays. Unknown ids are ignored."""
        for sequence in [s for s in self._scheduler.sequences() if s.request.id == request_id]:
            self._scheduler.finish(sequence)
        self._open.pop(request_id, None)

    def is_open(self, request_id: str) -> bool:
        """True from `submit` until the last choice has finished or the request was aborted."""
        return request_id in self._open

    def step(self) -> Outputs:
        """Runs one step -> the outputs that arose from it."""
        step = self._scheduler.schedule()
        if step.empty:
            return []
        self._counters.steps += 1
        with torch.inference_mode():
            outputs = self._announce(step.resumed)
            ready: list[tuple[Sequence, Tensor]] = []  # sequences whose next token can be chosen, with its hidden row
            hidden = self._forward(step) if step.chunks or step.decodes else None
            if hidden is not None:
                for chunk, rows in zip(step.chunks, hidden.chunks, strict=True):
                    outputs += self._end_chunk(chunk, rows, ready)
                ready += self._end_decodes(step.decodes, hidden.decodes)
            for sequence in step.resumed:
                ready += self._begin_decode(sequence, self._kept_hidden(sequence))
            return outputs + self._choose(ready)

    def _forward(self, step: Step) -> StepHidden | None:
        """None where the device had no memory: then the step is taken back, and smaller ones follow."""
        try:
            return self._runner.run(step)
        except torch.OutOfMemoryError:
            if not self._scheduler.out_of_memory(step):
                raise
        torch.cuda.empty_cache()  # now that nothing holds the tensors of the step
        return None

    def plan(self, request: Request) -> Plan:
        """What would be done for an arranged request if it came now. Changes nothing.

        Raises RequestError for one that can never be served, or is not arranged.
        """
        if request.arrangement is None:
            raise RequestError("the request names no messages: there is nothing to plan", param="arrangement")
        self.check_request(request)
        sequence = self._new_sequence(request, 0)
        arrangement, prompt = sequence.request.arrangement, sequence.prefill
        assert arrangement is not None
        prefix = self._scheduler.prefix_of(prompt)
        if prompt.arrangement is None:
            return self.stage.exact_plan(arrangement, prefix, self._why_exact(request))
        return self.stage.plan(arrangement, prefix)

    def run_until_idle(self) -> Outputs:
        """Steps until all requests are answered and all commits are done -> all outputs."""
        outputs: Outputs = []
        while self.has_work:
            outputs += self.step()
        return outputs

    def stats(self) -> EngineStats:
        c, graphs = self._counters, self._runner.graphs
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            num_preemptions=self._scheduler.num_preemptions,
            num_out_of_memory=self._scheduler.num_out_of_memory,
            num_graph_replays=graphs.num_replays if graphs else 0,
            steps=c.steps,
            prompt_tokens=c.prompt_tokens,
            cached_tokens=c.cached_tokens,
            moved_tokens=c.moved_tokens,
            computed_tokens=c.computed_tokens,
            generated_tokens=c.generated_tokens,
            commit_tokens=c.commit_tokens,
            flops_saved=c.flops_saved,
            flops_computed=c.flops_computed,
            cache=self.cache.stats(),
        )

    @property
    def fallbacks(self) -> dict[str, str]:
        """What runs in a slower way than it could on this device, and why."""
        graphs = self._runner.graphs
        return {"cuda graphs": graphs.reason} if graphs and graphs.reason else {}

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        asked = request.arrangement
        arranged = asked is not None and not self._why_exact(request)
        if index == 0 and asked is not None and asked.order is Order.ANY and not arranged:  # forks have its prompt
            namespace = namespace_of(request.namespace, self.model.fingerprint)
            known = partial(self._scheduler.known, namespace)
            prompt, asked = best_order(request.prompt, asked, known)
            request = replace(request, prompt=prompt, arrangement=asked)
        prefill = new_prefill(request, self.model.fingerprint, enabled=self._config.prefix_cache, arranged=arranged)
        self._arrivals += 1
        return Sequence(
            request=request,
            index=index,
            arrival=self._arrivals,
            prefill=prefill,
            chooser=TokenChooser(request.sampling, request.prompt.tokens, index),
            stopper=request.make_stopper() if request.make_stopper else None,
            submitted_s=time.monotonic(),
        )

    def _why_exact(self, request: Request) -> str:
        """Why a request that names messages is computed exactly; empty if it may be arranged."""
        if not self._config.prefix_cache or request.cache_mode is CacheMode.OFF:
            return "the cache is off"
        if request.sampling.prompt_logprobs is not None:
            return "log-probabilities of a prompt take all of it"
        return self.stage.can(request.arrangement) if request.arrangement else "as asked"

    # After the forward pass

    def _announce(self, sequences: Iterable[Sequence]) -> Outputs:
        """The PromptOutput of sequences that are about to give their first token."""
        outputs: Outputs = []
        for sequence in sequences:
            if sequence.announced or sequence.index > 0:
                continue
            sequence.announced = True
            lease, n, program = sequence.prefill.lease, len(sequence.prefill.tokens), sequence.prefill.program
            assert lease is not None
            asked = sequence.request.arrangement
            plan = program.plan if program else None
            if asked is not None and plan is None:
                plan = self.stage.exact_plan(asked, lease.length, self._why_exact(sequence.request))
            cached = lease.length if plan is None else n - plan.computed
            cost = self.model.prefill_cost
            self._counters.prompt_tokens += n
            self._counters.cached_tokens += cached
            if plan is not None:
                self._counters.moved_tokens += plan.tokens(Action.RELOCATED) + plan.tokens(Action.COMPOSED)
            self._counters.flops_saved += plan.flops_of_encoding - plan.flops if plan else cost.flops(0, lease.length)
            wants_logprobs = sequence.request.sampling.prompt_logprobs is not None
            output = PromptOutput(
                cached_tokens=cached,
                written_tokens=lease.written_tokens,
                logprobs=tuple(sequence.prompt_logprobs) if wants_logprobs else None,
                queued_s=sequence.started_s - sequence.submitted_s,
                plan=plan,
            )
            outputs.append((sequence.request.id, output))
        return outputs

    def _end_chunk(self, chunk: Chunk, rows: Tensor, ready: list[tuple[Sequence, Tensor]]) -> Outputs:
        """Publishes what a chunk has written and, at the end of the prompt, starts decoding."""
        prefill, sequence = chunk.prefill, chunk.sequence
        assert prefill.lease is not None
        prefill.computed = chunk.end
        self.cache.publish(prefill.lease, grid_floor(chunk.end))
        self._counters.flops_computed += self.model.prefill_cost.flops(chunk.start, chunk.end)
        if prefill.program is not None:
            prefill.computed = self.stage.advance(prefill.program, prefill.lease, prefill.computed)
        if sequence is None and prefill.program is not None:
            if prefill.done:
                self._scheduler.end_message(prefill)
            return []
        if sequence is None:
            self._counters.commit_tokens += chunk.end - chunk.start
            if prefill.done:
                self._scheduler.end_commit(prefill)
            return []
        self._counters.computed_tokens += chunk.end - chunk.start
        if sequence.request.sampling.prompt_logprobs is not None:
            self._score_prompt(sequence, chunk, rows)
        if not prefill.done:
            return []
        if prefill.publish:
            self.cache.memory.rows = rows
            self.cache.publish_end(prefill.lease, len(rows) - 1)
        outputs = self._announce([sequence])
        ready += self._begin_decode(sequence, rows[-1])
        return outputs

    def _score_prompt(self, sequence: Sequence, chunk: Chunk, rows: Tensor) -> None:
        """Log-probabilities of the prompt's own tokens that the rows of a chunk predict."""
        known, num_top = sequence.prompt_logprobs, sequence.request.sampling.prompt_logprobs or 0
        if not known:
            known.append(None)  # nothing predicts the first token
        tokens = chunk.prefill.tokens[chunk.start + 1 : chunk.end + 1]
        new = slice(len(known) - 1 - chunk.start, len(tokens))  # rows whose tokens are not scored yet
        logits, following = self._runner.logits(rows[new]), tokens[new].tolist()
        known += log_probabilities(logits, following, [num_top] * len(following), self.model.ops)

    def _kept_hidden(self, sequence: Sequence) -> Tensor:
        assert sequence.prefill.lease is not None
        return self.cache.hidden(sequence.prefill.lease)

    def _begin_decode(self, sequence: Sequence, hidden: Tensor) -> list[tuple[Sequence, Tensor]]:
        """The prompt is in the state -> the sequence and its forks, which choose their next token from `hidden`."""
        sequence.phase = Phase.DECODE
        self._watch_answer(sequence)
        started = [] if sequence.generated else [(sequence, hidden)]
        if sequence.index == 0 and not sequence.generated:
            started += [(s, hidden) for s in self._fork(sequence)]
        return started

    def _fork(self, first: Sequence) -> list[Sequence]:
        """The other choices of a request, on copies of the state -> those that found room; the rest wait."""
        forks = []
        for index in range(1, first.request.n):
            sequence = self._new_sequence(first.request, index)
            sequence.arrival = first.arrival
            assert first.prefill.lease is not None
            room = self._scheduler.has_room
            lease = self.cache.fork(first.prefill.lease, len(first.prefill.tokens)) if room else None
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

    def _end_decodes(self, decodes: tuple[Sequence, ...], hidden: Tensor) -> list[tuple[Sequence, Tensor]]:
        """Moves each decoding sequence on by the token it was fed -> those with a new token to choose."""
        ready = []
        for sequence, row in zip(decodes, hidden, strict=True):
            if sequence.replaying:
                self._counters.replayed_tokens += 1
            else:
                ready.append((sequence, row))
            sequence.fed += 1
            self._watch_answer(sequence)
        return ready

    def _choose(self, ready: list[tuple[Sequence, Tensor]]) -> Outputs:
        """Chooses the next token of each sequence from its hidden row."""
        outputs: Outputs = []
        for sequence, _ in [r for r in ready if r[0].request.sampling.max_tokens == 0]:
            outputs.append((sequence.request.id, TokenOutput(sequence.index, None, finish=FinishReason.LENGTH)))
            self._finish(sequence)
        ready = [r for r in ready if r[0].phase is Phase.DECODE]
        if not ready:
            return outputs
        logits = self._runner.logits(torch.stack([row for _, row in ready]))
        tokens = self._pick([s for s, _ in ready], logits)
        wanted = {i: n for i, (s, _) in enumerate(ready) if (n := s.request.sampling.logprobs) is not None}
        scored = list(wanted)
        scores = log_probabilities(
            logits if len(scored) == len(tokens) else logits[scored],
            [tokens[i] for i in scored],
            list(wanted.values()),
            self.model.ops,
        )
        logprobs = dict(zip(scored, scores, strict=True))
        for i, ((sequence, _), token) in enumerate(zip(ready, tokens, strict=True)):
            outputs.append((sequence.request.id, self._append(sequence, token, logprobs.get(i))))
        return outputs

    def _pick(self, sequences: list[Sequence], logits: Tensor) -> list[int]:
        """The next token of each sequence, from logits [S, V]."""
        return choose_tokens(logits, [sequence.chooser for sequence in sequences], self.model.ops)

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> TokenOutput:
        """Adds a chosen token to its sequence, and ends the sequence when it is the last one."""
        sequence.generated.append(token)
        self._counters.generated_tokens += 1
        finish = sequence.finish_reason(self.model.max_length)
        if finish is not None:
            self._keep_answer(sequence)
            self._finish(sequence)
            self._commit_later(sequence)
        return TokenOutput(sequence.index, token, logprob, finish)

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        self._open[sequence.request.id] -= 1
        if self._open[sequence.request.id] == 0:
            del self._open[sequence.request.id]

    def _watch_answer(self, sequence: Sequence) -> None:
        prefill = sequence.prefill
        if prefill.program is not None and prefill.lease is not None and sequence.request.n == 1:
            self.stage.decoded(prefill.program, prefill.lease, sequence.fed)

    def _keep_answer(self, sequence: Sequence) -> None:
        """Has the last tokens of an arranged answer computed, and the answer stored as a message."""
        prefill, arrangement = sequence.prefill, sequence.prefill.arrangement
        lease, program = prefill.lease, prefill.program
        if arrangement is None or arrangement.closing is None or program is None or lease is None:
            return
        tokens = closed(sequence.all_tokens(), arrangement.closing)
        name = message_id(prefill.namespace, tokens[arrangement.answer_start :], arrangement.context)
        if len(tokens) - arrangement.answer_start <= arrangement.seam or not self.cache.extend(lease, len(tokens)):
            return
        last = self.stage.answer(program, self.stage.key(arrangement, name), len(tokens), sequence.fed)
        if last is not None:
            message = Prefill(prefill.namespace, tokens, False, False, lease=lease, computed=sequence.fed, program=last)
            prefill.lease = None
            self._scheduler.store(message)

    def _commit_later(self, sequence: Sequence) -> None:
        """Has the generated tokens of a finished turn computed again by the prefill path, when nobody waits."""
        end = grid_floor(sequence.num_tokens)
        if not sequence.prefill.publish or end <= grid_floor(len(sequence.prefill.tokens)):
            return
        commit = Prefill(sequence.prefill.namespace, sequence.all_tokens()[:end], True, True, generated=True)
        self._scheduler.commit_later(commit)
