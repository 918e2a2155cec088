"""A plain engine answers what a busy one has answered, and says whether that was right."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hybrid_cache.bench.exactness.asked import Asked
from hybrid_cache.bench.exactness.mix import salt_of
from hybrid_cache.bench.exactness.report import Report
from hybrid_cache.bench.exactness.rows import Ledger, PlainWatcher, watched_engine
from hybrid_cache.bench.exactness.traffic import Traffic, room
from hybrid_cache.cache.keys import Mark
from hybrid_cache.choreography.arrangement import Fidelity
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.namespaces import namespace_of
from hybrid_cache.request import PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt, TokenArray, last_occurrence


class Judge:
    """A plain engine: no reuse, one request at a time. Says whether what a busy one did was right."""

    def __init__(self, models: Mapping[str, HybridModel], most_tokens: int, ledger: Ledger, report: Report) -> None:
        """models: by the name that requests have for them; each is run by itself, or beside the first one if it is
        invoked
        """
        self._ledger, self._report, self._models = ledger, report, models
        self._engines = dict[str, Engine]()
        for name, model in models.items():
            config = EngineConfig(
                budget_bytes=room(model, most_tokens, 4), max_running=1, prefix_cache=False, verify=True, max_tiles=64
            )
            if model.invocation:
                engine = watched_engine(models[""], config, PlainWatcher(ledger), variants={name: model})
            else:
                engine = watched_engine(model, config, PlainWatcher(ledger))
            self._engines[name] = engine

    def round(self, asked: Sequence[Asked], traffic: Traffic) -> None:
        for one in asked:
            self._judge(one, traffic)
        turns = traffic.watcher.turns
        for key, (fingerprint, tokens) in sorted(turns.items(), key=lambda turn: -len(turn[1][1])):
            if self._ledger.waits(key):
                name = next(name for name, engine in self._engines.items() if engine.fingerprint("") == fingerprint)
                self._answer(Request("turn", Prompt(tokens), SamplingParams(max_tokens=0), model=name))
        turns.clear()
        self._ledger.end_round()
        traffic.watcher.end_round()
        if foreign := traffic.given.foreign(traffic.engine.cache):
            self._report.note("the cache", f"holds {foreign}")

    def _judge(self, asked: Asked, traffic: Traffic) -> None:
        request, name = asked.request, asked.request.id
        prompt = traffic.watcher.prompts.pop(name, None)
        if asked.reported is not None:
            self._check_told(asked)
            if asked.reported.plan is not None and asked.reported.plan.fidelity is not Fidelity.EXACT:
                self._report.mixed["labelled approximate"] += 1
                return
            reported = asked.reported_prompt()
            if prompt is not None and not np.array_equal(prompt, reported):
                self._report.note(name, "the order that the plan names is not the one that was computed")
            self._report.mixed["reordered"] += not np.array_equal(reported, request.prompt.tokens)
            prompt = reported
        if prompt is None:
            return  # aborted before anything was computed, or approximate
        if asked.publishes:
            self._give(asked, prompt, traffic)
        sampling = request.sampling if asked.reported else SamplingParams(max_tokens=0)
        again = Request(name, Prompt(prompt), sampling, request.n, model=request.model)
        again = replace(again, make_stopper=request.make_stopper, make_constraint=request.make_constraint)
        outputs = self._answer(again)
        if not asked.aborted:
            self._compare(asked, outputs)

    def _give(self, asked: Asked, prompt: TokenArray, traffic: Traffic) -> None:
        namespace = traffic.mix.namespaces[salt_of(asked.request)]
        traffic.given.prompt(namespace, prompt, self._mark(asked.request, prompt))
        for index in range(asked.request.n):
            if asked.finished(index):
                traffic.given.text(namespace, np.concatenate([prompt, asked.answer(index)]))

    def _mark(self, request: Request, prompt: TokenArray) -> Mark | None:
        """From where on a prompt is an activated adapter's."""
        model = self._models[request.model]
        position = last_occurrence(prompt, model.invocation) if model.invocation else None
        return None if position is None else Mark(position, namespace_of(request.namespace, model.fingerprint))

    def _answer(self, request: Request) -> Outputs:
        engine = self._engines[request.model]
        engine.submit(request if self._models[request.model].invocation else replace(request, model=""))
        return engine.run_until_idle()

    def _compare(self, asked: Asked, outputs: Outputs) -> None:
        expected: dict[int, list[TokenOutput]] = defaultdict(list)
        report, name = self._report, asked.request.id
        for _, output in outputs:
            if isinstance(output, TokenOutput):
                expected[output.index].append(output)
            elif isinstance(output, PromptOutput) and asked.reported and output.logprobs != asked.reported.logprobs:
                report.note(name, "log-probabilities of the prompt differ")
        for index in range(asked.request.n):
            report.answers += 1
            if asked.choices.get(index) != expected[index]:
                report.differing_answers += 1
                report.note(name, f"choice {index} of {asked.request.n} differs")

    def _check_told(self, asked: Asked) -> None:
        """What a reply says of its prompt must be possible."""
        reported, received = asked.reported, asked.reported.received if asked.reported else None
        assert reported is not None
        if received is not None:
            self._report.mixed[f"prompts received, {received.transfer}"] += 1
            if received.loss is not None:
                self._report.note(asked.request.id, f"took entries of {received.sender!r} that are not exact")
        n, cached = len(asked.request.prompt.tokens), reported.cached_tokens
        approximate = reported.plan is not None and reported.plan.fidelity is not Fidelity.EXACT
        prefix = reported.plan.prefix if reported.plan is not None else cached
        mark = self._mark(asked.request, asked.request.prompt.tokens)
        self._report.mixed["gone on from at an invocation"] += mark is not None and prefix == mark.position
        if prefix % TILE and (approximate or prefix < n) and (mark is None or prefix != mark.position):
            self._report.note(asked.request.id, f"goes on behind token {prefix}, where no state is good for that")
        if not asked.publishes and not approximate and (cached or reported.written_tokens):
            self._report.note(
                asked.request.id, f"took {cached} tokens and left {reported.written_tokens}, wanted neither"
            )
