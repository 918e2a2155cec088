"""Rounds of random requests to a busy engine, each followed by a plain engine that answers them one by one."""

import random
import time
import traceback
from collections.abc import Iterator, Mapping
from itertools import combinations, cycle

from rich.progress import Progress

from hybrid_cache.bench.exactness.judge import Judge
from hybrid_cache.bench.exactness.mix import MIXED, NO_VARIANTS, TIGHT, Phase
from hybrid_cache.bench.exactness.origins import Behind
from hybrid_cache.bench.exactness.report import Report
from hybrid_cache.bench.exactness.rows import Ledger
from hybrid_cache.bench.exactness.traffic import Stuck, Traffic
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.transfer import equal_layers

ROW_BYTES = 1 << 30  # of the logits of one round; bounds its requests where the vocabulary is large
ROUNDS = 5  # of an engine, before the next one with another budget; between the first two of them comes a tight one
MORE_ROUNDS = 12  # at most, for what a run has to meet and has not


class Comparison:
    """Rounds with one model, until enough rows have been compared."""

    def __init__(
        self, model: HybridModel, report: Report, phase: Phase, variants: Mapping[str, HybridModel] = NO_VARIANTS
    ) -> None:
        self.report = report
        self._model, self._phase = model, phase
        self._variants = variants
        self._rng = random.Random(f"{report.seed} {report.model} {report.dtype}")
        self._ledger = Ledger(report)
        most_tokens = max(p.most_tokens for p in (phase, TIGHT))
        self._judge = Judge({"": model, **self._variants}, most_tokens, self._ledger, report)
        kinds = tuple(kinds_of(model, self._variants))
        self._phases = cycle((phase.sharing, phase) if kinds else (phase,))  # of one engine and the next
        self._traffic = self._open(next(self._phases))
        if not model.cache_spec.page_bytes:
            report.needed = ("evictions",)  # an answer takes no more room than its prompt: nobody is preempted
        report.needed += tuple(kind.value for kind in kinds)

    def round(self, num_requests: int | None) -> None:
        """One more round, and a tight one now and then."""
        number = self.report.rounds
        if number % ROUNDS == 1:
            self.round_apart(TIGHT, num_requests)
            return
        if number and number % ROUNDS == 0:
            self._traffic.close()
            self._traffic = self._open(next(self._phases))
        self._run(self._traffic, self._phase, num_requests)

    def round_apart(self, phase: Phase, num_requests: int | None) -> None:
        """One round of an engine of its own; a tight one holds two states and the pages of one sequence."""
        traffic = self._open(phase)
        self._run(traffic, phase, num_requests)
        traffic.close()

    def round_for_the_rest(self, num_requests: int | None) -> None:
        """One more, of the kind that may meet what the run has not met yet."""
        shared = {kind.value for kind in Behind}
        self.round_apart(self._phase.sharing if shared.issuperset(self.report.untried) else TIGHT, num_requests)

    def _run(self, traffic: Traffic, phase: Phase, num_requests: int | None) -> None:
        self.report.rounds += 1
        most = max(4, ROW_BYTES // (4 * self._model.vocab_size * phase.longest))
        self._judge.round(traffic.round(min(num_requests or phase.requests, most)), traffic)

    def close(self) -> None:
        self._traffic.close()

    def _open(self, phase: Phase) -> Traffic:
        return Traffic(self._model, phase, self._ledger, self.report, self._rng, self._variants)


def compare(
    model: HybridModel,
    report: Report,
    num_rows: int,
    progress: Progress | None = None,
    requests_per_round: int | None = None,
    phase: Phase = MIXED,
    variants: Mapping[str, HybridModel] = NO_VARIANTS,
) -> Report:
    """Rounds until at least `num_rows` rows are compared, a tight one among them; fills in and returns the report.

    variants: other models of the same shape, which the busy engine runs beside the first; plain ones run one each
    More rounds follow while what the run has to meet has not been met.
    """
    started = time.perf_counter()
    task = progress.add_task(f"{report.model} {report.dtype}", total=num_rows) if progress else None
    comparison = Comparison(model, report, phase, variants)
    try:
        while report.rounds < 2 or (report.rows < num_rows and report.rounds < 10 * num_rows):
            comparison.round(requests_per_round)
            if progress and task is not None:
                progress.update(task, completed=report.rows)
        comparison.close()
        for _ in range(MORE_ROUNDS if report.untried else 0):
            comparison.round_for_the_rest(requests_per_round)
            if not report.untried:
                break
    except (HybridCacheError, AssertionError, Stuck) as error:
        report.note("the engine", _described(error))
    except Exception as error:
        error.add_note(f"{report.model} {report.dtype} seed {report.seed} round {report.rounds}")
        raise
    report.seconds = time.perf_counter() - started
    return report


def kinds_of(model: HybridModel, variants: Mapping[str, HybridModel]) -> Iterator[Behind]:
    """Rows that a run of these models has to meet."""
    chains = {each.fingerprint: each.chain for each in (model, *variants.values()) if not each.invocation}
    if any(equal_layers(one, other) for one, other in combinations(chains.values(), 2)):
        yield Behind.RECEIVED
    if any(each.invocation for each in variants.values()):
        yield from (Behind.INVOKED, Behind.FOUND)


def _described(error: Exception) -> str:
    """What went wrong, and where."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{place.filename.rpartition('/')[2]}:{place.lineno}"
    return f"{type(error).__name__} in {place.name} ({where}): {error or place.line}"
