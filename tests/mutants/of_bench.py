"""Faults of the bench: what the bound charges, whose policy is compared with whose, which processes stay."""

from functools import partial

from tests.mutants.mutant import Mutant

BOUND = ("tests/bench/policy/test_bound.py",)
FOREIGN = ("tests/cache/test_foreign.py",)
ROWS = ("tests/bench/policy/test_policy_command.py::test_a_policy_that_knows_the_trace_is_no_rival",)
PROCESSES = ("tests/bench/common/test_processes.py",)

bound = partial(Mutant, "bench/policy/bound.py")

MUTANTS = [
    bound(
        "a running request takes no room",
        "    room[::2] -= np.where(fits, pages * page_bytes + slot_bytes, 0)\n",
        "",
        BOUND,
    ),
    bound(
        "a request pays for pages that its own source holds",
        "(end - until[2 * self.previous + 1])",
        "(end - until[2 * self.previous])",
        BOUND,
    ),
    bound(
        "a state is left without a slot beside the working state",
        "np.where(during[v.previous] < slot_bytes, 0, start + pages)",
        "start + pages",
        BOUND,
    ),
    bound(
        "a request that does not fit is a visitor",
        "            if -(-r.num_prompt_tokens // trace.page_tokens) > most:\n                continue\n",
        "",
        BOUND,
    ),
    Mutant(
        "bench/policy/rows.py",
        "a policy that knows the trace is a rival",
        "if policy not in (row.policy, *LIMITS, *CLAIRVOYANT)}",
        "if policy not in (row.policy, *LIMITS)}",
        ROWS,
    ),
    Mutant(
        "hybrid_cache/cache/policies/foreign.py",
        "a foreign policy without a score is taken",
        "found._score is ScoredPolicy._score:",
        "False:",
        FOREIGN,
    ),
    Mutant(
        "bench/common/processes.py",
        "a worker does not notice that its parent was killed",
        "    Thread(target=_wait_for_parent, daemon=True).start()\n",
        "",
        PROCESSES,
    ),
]
