"""The default order: tasks in the order of their arrival, but those with less to do somewhat earlier, and what is
dear to compute again is spared for those who will soon be back.

A paused context is spared while

    E[time left | time so far, tool] * m(C) < w * t_replay(C) * (m(C) / 2 + bytes that run)

which weighs memory times time on both sides (InferCept's minimum of waste) with what tools of that name took. A request
goes by

    arrival of its task + W * min(3.5 * machine seconds that it is expected to take / their mean, 16)

where W is how long a new task waits now. The machine seconds are the mean of the task's kind, and of what its first
prompt lets guess as much as such guesses have been worth (`outlook.Sizes`): what the cache lacks of the prompt, the
answer, the share of memory that both hold while they take, and the same for all calls that are expected to follow. So
the order has no unit of its own: where nobody waits, or all tasks are alike, they go as they came; nobody is put back
by more than 16 * W; and a task keeps its place while it goes on.
"""

import math

from hybrid_cache.scheduling.base import Job, Load, Pause

WEIGHT = 2.0  # w
EAGERNESS = 3.5  # waits by which a task of mean length is put back
MOST_LATER = 16.0  # waits by which any is, at most
LEAST_DRIFT_S = 0.5  # and seconds
DRIFT = 0.2  # part by which W changes before all who wait are placed again


class Learned:
    """See the module docstring."""

    name = "learned"
    resumes = True
    patience_s = math.inf

    def __init__(self, weight: float = WEIGHT, eagerness: float = EAGERNESS, most_later: float = MOST_LATER) -> None:
        self._weight = weight
        self._eagerness = eagerness
        self._most_later = most_later
        self._wait_s = 0.0  # by which those who wait are placed

    def came(self, job: Job, load: Load) -> None:
        task = job.task
        if not task.num_calls and task.guess_s is None:
            task.guess_s = machine_s(job, load)
            load.outlook.guessed(task.tenant, task.kind, task.guess_s)

    def turns(self, load: Load) -> bool:
        if abs(load.wait_s - self._wait_s) <= DRIFT * self._wait_s + LEAST_DRIFT_S:
            return False
        self._wait_s = load.wait_s
        return True

    def key(self, job: Job, load: Load) -> float:
        task = job.task
        size = 0.0 if task.guess_s is None else load.outlook.size(task.tenant, task.kind, task.guess_s)
        return task.arrival_s + self._wait_s * min(self._eagerness * size, self._most_later)

    def paused(self, pause: Pause, load: Load) -> None:
        pass

    def reserves(self, job: Job, load: Load) -> bool:
        return worth_reserving(job, load, self._weight)

    def keeps(self, pause: Pause, load: Load) -> bool:
        num_tokens = pause.num_resumed
        return load.time_left(pause) * load.memory(num_tokens) < self._weight * load.waste(
            num_tokens, load.again_s(num_tokens)
        )


def machine_s(job: Job, load: Load) -> float:
    """Machine seconds of a request and of those that are expected to follow it, by what is known of this one."""
    habits = load.outlook.of(job.task.tenant, job.task.kind)
    call = job.task.num_calls
    output, calls_left, new = habits.answer(call), habits.calls_left(call), habits.new.value
    end = job.num_tokens + output
    return load.call_s(job.num_cached, job.num_tokens, output) + calls_left * load.call_s(end, end + new, output)


def worth_reserving(job: Job, load: Load, weight: float) -> bool:
    """Whether a request takes room for the state that its task will return to, whatever the cache's policy says.

    While those who run hold little of the memory, the policy knows better. Else the rule above is asked before the
    turn: a state beside the running one while the answer takes, and the whole context while the tool takes, against the
    odds that it ends in a call. Where a second tier takes what leaves, the context need not stay.
    """
    if 2 * load.running_bytes < load.budget_bytes:
        return False
    task, habits = job.task, load.outlook.of(job.task.tenant, job.task.kind)
    answer = habits.answer(task.num_calls)
    end = int(job.num_tokens + answer)
    cost = load.state_bytes * answer * load.step_s
    if not load.host_bytes_per_s:
        cost += load.memory(end) * habits.pause_s(task.num_calls)
    return cost < weight * habits.calls(task.num_calls) * load.waste(end, load.prefill_s(0, end))
