"""Random requests on tiny budgets, next to sets of what was published that are obviously right."""

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hybrid_cache.kernels.layout import TILE
from hybrid_cache.policy import POLICIES, make_policy
from hybrid_cache.tree import CheckpointKind
from tests.cache.driver import SPECS, Clock, Run, begin, content, forward, new_cache, reserve, start, tokens_of, verify

NAMESPACES = ("", "other")
PROMPTS = st.builds(tokens_of, st.text("ab", max_size=4), st.sampled_from([0, 1, 40, 63])).filter(len)
KINDS = [kind for kind in CheckpointKind if kind is not CheckpointKind.PROMPT_END]


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        spec=st.sampled_from(sorted(SPECS)),
        slots=st.integers(1, 6),
        pages=st.integers(1, 14),
        policy=st.sampled_from(sorted(POLICIES)),
    )
    def make(self, spec: str, slots: int, pages: int, policy: str) -> None:
        self.clock = Clock()
        self.cache = new_cache(SPECS[spec], slots=slots, pages=pages, policy=make_policy(policy), clock=self.clock)
        self.stateless = spec == "only attention"
        self.runs: list[Run] = []
        self.pages: set[tuple[str, bytes]] = set()  # prefixes whose last page was published
        self.states: set[tuple[str, bytes]] = set()
        self.ends: set[tuple[str, bytes]] = set()

    def choose(self, data: st.DataObject, *, in_prompt: bool | None = None) -> Run | None:
        runs = [run for run in self.runs if in_prompt is None or run.in_prompt == in_prompt]
        return data.draw(st.sampled_from(runs)) if runs else None

    @rule(tokens=PROMPTS, namespace=st.sampled_from(NAMESPACES), publish=st.sampled_from([True, True, False]))
    def arrive(self, tokens: np.ndarray, namespace: str, publish: bool) -> None:
        match = self.cache.match(namespace, tokens)
        assert match.shared % TILE == 0
        for i in range(0, match.shared, TILE):
            assert (namespace, tokens[: i + TILE].tobytes()) in self.pages
        if match.end:
            assert match.length == len(tokens)
            assert (namespace, tokens.tobytes()) in self.ends
        else:
            assert match.length % TILE == 0
            assert match.length < len(tokens)
            assert match.length <= match.shared
            known = self.pages if self.stateless else self.states
            assert match.length == 0 or (namespace, tokens[: match.length].tobytes()) in known
        run = start(self.cache, tokens, namespace=namespace, publish=publish, must=False)
        if run is None:
            assert self.runs or not self.cache.fits(len(tokens)), "an idle cache has to take what fits"
            return
        assert run.lease.length <= match.length
        if run.lease.end is not None:
            assert float(self.cache.hidden(run.lease)[0]) == content(tokens)
        self.runs.append(run)

    @rule(data=st.data(), kind=st.sampled_from(KINDS), ttl_s=st.sampled_from([None, None, 10.0]))
    def wish(self, data: st.DataObject, kind: CheckpointKind, ttl_s: float | None) -> None:
        run = self.choose(data, in_prompt=True)
        if run and (first := run.done // TILE + 1) <= run.prompt_len // TILE:
            reserve(self.cache, run, TILE * data.draw(st.integers(first, run.prompt_len // TILE)), kind, ttl_s)

    @rule(data=st.data())
    def prefill(self, data: st.DataObject) -> None:
        run = self.choose(data, in_prompt=True)
        if run is None:
            return
        last = -(-run.prompt_len // TILE)
        forward(self.cache, run, min(TILE * data.draw(st.integers(run.done // TILE + 1, last)), run.prompt_len))

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        run = self.choose(data)
        if run is None:
            return
        end = min(run.done, run.prompt_len) // TILE * TILE
        filled = [r.position for r in run.lease.reserved if r.position <= end]
        self.cache.commit(run.lease, end)
        if run.lease.publish:
            name = run.lease.namespace
            self.pages.update((name, run.tokens[:i].tobytes()) for i in range(TILE, end + 1, TILE))
            self.states.update((name, run.tokens[:i].tobytes()) for i in filled)

    @rule(data=st.data())
    def keep_end(self, data: st.DataObject) -> None:
        run = self.choose(data, in_prompt=False)
        if run and run.done == run.prompt_len:
            prompt = run.tokens[: run.prompt_len]
            if self.cache.commit_end(run.lease, prompt, torch.tensor([content(prompt), 0.0])):
                self.ends.add((run.lease.namespace, prompt.tobytes()))

    @rule(data=st.data(), count=st.sampled_from([1, 30, 64]))
    def decode(self, data: st.DataObject, count: int) -> None:
        run = self.choose(data, in_prompt=False)
        if run and self.cache.extend(run.lease, run.done + count):
            run.tokens = np.append(run.tokens, np.full(count, 99, np.int32))
            forward(self.cache, run, run.done + count)

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        run = self.choose(data, in_prompt=False)
        lease = self.cache.fork(run.lease, run.done) if run else None
        if run and lease:
            self.runs.append(Run(lease, run.tokens, run.prompt_len, run.done))

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        run = self.choose(data)
        if run:
            self.runs.remove(run)
            self.cache.release(run.lease)
            self.cache.release(run.lease)

    @rule(tokens=PROMPTS)
    def everyone_leaves_and_one_arrives(self, tokens: np.ndarray) -> None:
        while self.runs:
            self.cache.release(self.runs.pop().lease)
        self.cache.check()
        if self.cache.fits(len(tokens)):
            self.runs.append(begin(self.cache, tokens))

    @rule(namespace=st.sampled_from([None, *NAMESPACES]))
    @precondition(lambda self: self.states)
    def drop(self, namespace: str | None) -> None:
        before = self.cache.stats().free_bytes
        assert self.cache.drop(namespace) == self.cache.stats().free_bytes - before
        if not self.runs and namespace is None:
            assert self.cache.stats().nodes == 0

    @rule()
    def wait(self) -> None:
        self.clock.now += 7

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check()
            for run in self.runs:
                verify(self.cache, run)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
