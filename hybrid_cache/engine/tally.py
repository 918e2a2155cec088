"""What an engine counts: totals since its start, and what became of each prompt."""

from hybrid_cache.choreography.plan import Action, Plan
from hybrid_cache.engine.scheduler import Scheduler
from hybrid_cache.engine.sequence import Prefill, Sequence
from hybrid_cache.request import PromptOutput, Received
from hybrid_cache.spec import PrefillCost
from hybrid_cache.stats import CacheStats, Counters, EngineStats


class Tally(Counters):
    """Running totals of one engine."""

    def prompt(self, sequence: Sequence, plan: Plan | None, cost: PrefillCost) -> PromptOutput:
        """Counts a prompt that is complete -> what its client is told. plan: of a request that names messages

        What the request itself has computed before it was preempted was not cached.
        """
        prefill, num_tokens = sequence.prefill, len(sequence.prefill.tokens)
        assert prefill.lease is not None
        length = prefill.cached or 0
        cached = length if plan is None else num_tokens - plan.computed
        self.prompt_tokens += num_tokens
        self.cached_tokens += cached
        if plan is not None:
            self.moved_tokens += plan.tokens(Action.RELOCATED) + plan.tokens(Action.COMPOSED)
        self.flops_saved += plan.flops_of_encoding - plan.flops if plan else cost.flops(0, length)
        source = prefill.received
        received = _received(prefill)
        if source is not None:
            self.received_tokens += source.end - source.start
            self.flops_saved += source.offer.spares.flops(source.start, source.end)
        wants_logprobs = sequence.request.sampling.prompt_logprobs is not None
        return PromptOutput(
            cached_tokens=cached,
            loaded_tokens=min(prefill.num_loaded, cached),
            written_tokens=min(prefill.written + prefill.lease.written_tokens, num_tokens - cached),
            logprobs=tuple(sequence.prompt_logprobs) if wants_logprobs else None,
            queued_s=sequence.started_s - sequence.submitted_s,
            plan=plan,
            found=prefill.found,
            received=received,
        )

    def stats(self, scheduler: Scheduler, num_graph_replays: int, cache: CacheStats) -> EngineStats:
        """The totals as they are now, beside what the scheduler and the cache have counted."""
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            loading=scheduler.num_loading,
            num_preemptions=scheduler.num_preemptions,
            num_out_of_memory=scheduler.num_out_of_memory,
            num_graph_replays=num_graph_replays,
            steps=self.steps,
            failures=self.failures,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            moved_tokens=self.moved_tokens,
            received_tokens=self.received_tokens,
            computed_tokens=self.computed_tokens,
            generated_tokens=self.generated_tokens,
            commit_tokens=self.commit_tokens,
            twin_tokens=scheduler.twins.num_tokens,
            committing=len(scheduler.canonical),
            flops_saved=self.flops_saved,
            flops_computed=self.flops_computed,
            pauses=scheduler.tasks.pauses.stats,
            cache=cache,
        )


def _received(prefill: Prefill) -> Received | None:
    """What was made of a prompt from another model's entries, now or by an earlier request in its lane."""
    source = prefill.received
    offer = prefill.lane if source is None else source.offer
    if offer is None:
        return None
    start, end = (0, 0) if source is None else (source.start, source.end)
    return Received(offer.name, start, end, str(offer.transfer), offer.loss if offer.lane else None)
