"""Orders of other systems, as their papers describe them, on our cache.

    vllm           a call ends the request; first come, first served, call by call
    fcfs           first come, first served by task
    sjf            the shortest request first
    infercept      InferCept (arXiv 2402.01869): tasks in order; preserves while the waste of that is less than that
                   of discarding, with the time since the call as the estimate of how long it will take
    lamps          LAMPS (arXiv 2410.18248): least memory times time first, promoted after some waiting; preserves or
                   discards by the predicted time of the call
    continuum      Continuum (arXiv 2511.02230): tasks in order; keeps for the time that maximises
                   P(returned by then) * benefit - cost over the tool's empirical times
    progress-ttl   vllm-router's way: tasks in order; keeps for ten seconds

What these systems pin is spared here when others are admitted, and given up before a running request would have to
be, so that no order can deadlock.
"""

import math

from hybrid_cache.scheduling.base import Job, Load, Pause
from hybrid_cache.scheduling.learned import WEIGHT, worth_reserving
from hybrid_cache.scheduling.outlook import Habits

PATIENCE_S = 60.0  # of LAMPS: its threshold is in iterations, 100 in its experiments
TTL_S = 10.0


class VLLM:
    name = "vllm"
    resumes = False
    patience_s = math.inf

    def key(self, job: Job, load: Load) -> float:
        return job.submitted_s

    def came(self, job: Job, load: Load) -> None:
        pass

    def turns(self, load: Load) -> bool:
        return False

    def paused(self, pause: Pause, load: Load) -> None:
        pass

    def keeps(self, pause: Pause, load: Load) -> bool:
        return False

    def reserves(self, job: Job, load: Load) -> bool:
        return self.resumes and worth_reserving(job, load, WEIGHT)


class FCFS(VLLM):
    name = "fcfs"

    def key(self, job: Job, load: Load) -> float:
        return job.task.arrival_s


class SJF(VLLM):
    name = "sjf"

    def key(self, job: Job, load: Load) -> float:
        return load.prefill_s(0, job.num_tokens) + _output(job, load) * load.step_s


class InferCept(FCFS):
    name = "infercept"
    resumes = True

    def __init__(self, weight: float = 1.0, *, knows: bool = False) -> None:
        """weight: of the waste of discarding   knows: go by the client's hints"""
        self._weight, self._knows = weight, knows

    def keeps(self, pause: Pause, load: Load) -> bool:
        num_tokens, elapsed = pause.num_resumed, load.now - pause.began_s
        taken = load.time_left(pause) if self._knows else elapsed
        return taken * load.memory(num_tokens) < self._weight * load.waste(num_tokens, load.again_s(num_tokens))


class LAMPS(VLLM):
    name = "lamps"
    resumes = True

    def __init__(self, patience_s: float = PATIENCE_S, *, knows: bool = False) -> None:
        """knows: go by the length of the answer, which is then `max_tokens`; hints are gone by in any case"""
        self.patience_s, self._knows = patience_s, knows

    def key(self, job: Job, load: Load) -> float:
        output = job.max_tokens if self._knows else _output(job, load)
        end, task = job.num_tokens + output, job.task
        before = (load.prefill_s(0, job.num_tokens) + output * load.step_s) * load.memory(end)
        if _habits(job, load).calls_left(task.num_calls) < 0.5:
            return before
        keep = load.tools.left(task.tenant, task.tool, 0.0) * load.memory(end)
        again = load.prefill_s(0, end) * load.memory(end)
        return before + min(keep, again) + output * load.step_s * load.memory(end + output)

    def paused(self, pause: Pause, load: Load) -> None:
        keeps = load.time_left(pause) * load.memory(pause.num_tokens) < load.waste(
            pause.num_tokens, load.again_s(pause.num_tokens)
        )
        pause.keep_until_s = math.inf if keeps else 0.0

    def keeps(self, pause: Pause, load: Load) -> bool:
        return load.now < pause.keep_until_s


class ProgressTTL(FCFS):
    name = "progress-ttl"
    resumes = True

    def paused(self, pause: Pause, load: Load) -> None:
        pause.keep_until_s = load.now + TTL_S

    def keeps(self, pause: Pause, load: Load) -> bool:
        return load.now < pause.keep_until_s


class Continuum(ProgressTTL):
    name = "continuum"

    def paused(self, pause: Pause, load: Load) -> None:
        times = load.tools.times(pause.task.tenant, pause.tool or "")
        ttl_s = self._best(times, pause, load) if len(times) >= 10 else TTL_S
        pause.keep_until_s = load.now + ttl_s

    @staticmethod
    def _best(times: list[float], pause: Pause, load: Load) -> float:
        """Benefit: the prefill that is spared and the queue that is not entered again; cost: its share of memory."""
        benefit = load.prefill_s(0, pause.num_tokens) + load.wait_s
        rate = load.memory(pause.num_tokens) / load.budget_bytes * 30
        best, best_s, n = 0.0, 0.0, len(times)
        for i in range(0, n, max(1, n // 40)):
            returned = (i + 1) / n
            value = returned * benefit - rate * times[i] * (1 - returned / 2)
            if value > best:
                best, best_s = value, times[i]
        return best_s * 1.02 + 1e-3 if best > 0 else 0.0


def _output(job: Job, load: Load) -> float:
    return _habits(job, load).answer(job.task.num_calls)


def _habits(job: Job, load: Load) -> Habits:
    return load.outlook.of(job.task.tenant, job.task.kind)
