"""Decode steps as graphs, with a stand-in for the device's recorder that repeats a call on the recorded memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hybrid_cache.config import EngineConfig
from hybrid_cache.device import cuda_graphs
from hybrid_cache.device.adapted import AdaptedModel
from hybrid_cache.device.batch import CacheTensors, ForwardBatch, HybridModel
from hybrid_cache.device.cuda_graphs import DecodeGraphs, pad_decodes, rounded
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.device.worker import Worker
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.ops import KVTensors, StateTensors
from hybrid_cache.kernels.problems import AttentionProblem, Mamba2Problem, cache_on
from hybrid_cache.kernels.runs import Run, arrange
from hybrid_cache.kernels.torch_ops import TorchOps
from tests.cache.at_once import HybridCache
from tests.engine.test_engine import answers, make_request
from tests.fakes import SumModel, sum_model_answer, tokens_of


class Recorder:
    """Runs the call again at each replay and puts the result where the first one was, as a graph does."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __call__(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.error is not None:
            raise self.error
        hidden = torch.full((600, 2), torch.nan)

        def replay() -> None:
            result = forward()
            hidden.resize_(result.shape).copy_(result)

        return replay, hidden


class LookingModel(SumModel):
    """`SumModel`, which computes rows by what the tensors of a batch hold, and lets rows of nobody pass."""

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        if batch.layout.num_tiles:
            return super().forward(batch, cache)
        kv, states = cache
        assert isinstance(kv, KVTensors)
        assert isinstance(states, StateTensors)
        layout = batch.layout
        writes = layout.kv_rows >= 0
        places = layout.kv_rows[writes]
        kv.k[places // 64, places % 64, 0, 0] = batch.token_ids[writes].float()
        rows = slice(0, layout.num_decode)
        sums = states.state[layout.decode_slot, 0] + batch.token_ids[rows]
        states.state[layout.decode_slot] = sums[:, None].expand(-1, 600)
        keys = kv.k[layout.page_table, :, 0, 0].flatten(1)
        seen = torch.arange(keys.shape[1]) < layout.decode_len[:, None]
        real = writes[rows]
        assert torch.equal(torch.where(seen, keys, 0.0).sum(1)[real], sums[real])
        return torch.stack([sums, layout.decode_len.float()], dim=1)[batch.output_rows]


def worker_with(capture: cuda_graphs.Capture) -> type[Worker]:
    class GraphWorker(Worker):
        def __init__(self, model: HybridModel, memory: CacheMemory, spare_slot: Callable[[], int | None]) -> None:
            super().__init__(model, memory, spare_slot)
            self.graphs = {model.fingerprint: DecodeGraphs(model, memory, spare_slot(), capture)}

    return GraphWorker


def engine_with(capture: cuda_graphs.Capture, budget_bytes: int = 1 << 20) -> Engine:
    return Engine(LookingModel(), EngineConfig(budget_bytes=budget_bytes), worker=worker_with(capture))


def check_answers(engine: Engine, lengths: list[int], max_tokens: list[int]) -> None:
    for i, length in enumerate(lengths):
        engine.submit(make_request(str(i), tokens_of(i, length), max_tokens[i]))
    outputs = engine.run_until_idle()
    engine.check()
    for i, length in enumerate(lengths):
        assert answers(outputs, str(i)) == sum_model_answer(tokens_of(i, length), max_tokens[i])


def test_sizes_come_in_few_steps() -> None:
    assert [rounded(n) for n in range(14)] == [1, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert all(n <= rounded(n) <= 1.5 * n for n in range(1, 3000))


def test_answers_are_those_of_plain_steps() -> None:
    engine = engine_with(Recorder())
    check_answers(engine, [20, 100, 64, 63, 129, 5, 200], [30, 9, 40, 17, 3, 70, 25])
    assert engine.stats().num_graph_replays > 40
    assert engine.fallbacks == {}


def test_memory_of_the_least_used_graph_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    engine = engine_with(Recorder())
    check_answers(engine, [20, 30, 40, 50], [40, 30, 20, 10])
    check_answers(engine, [21, 31, 41, 51], [40, 30, 20, 10])
    (graphs,) = engine.worker.graphs.values()
    assert graphs.num_captures > 2
    assert len(graphs._recorded) == 2


def test_where_recording_fails_steps_are_plain_and_the_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_with(Recorder(RuntimeError("operation not permitted when stream is capturing\nCompile with")))
    check_answers(engine, [20, 100, 64], [12, 9, 14])
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert engine.fallbacks == {"cuda graphs": reason}
    assert reason in caplog.text
    assert engine.stats().num_graph_replays == 0


def test_without_room_for_a_spare_state_steps_are_plain() -> None:
    spec = SumModel.cache_spec
    engine = engine_with(Recorder(), budget_bytes=2 * spec.slot_bytes + spec.page_bytes)
    check_answers(engine, [20], [5])
    assert "no room for a spare state" in engine.fallbacks["cuda graphs"]


def test_the_spare_state_is_taken_from_the_budget_once() -> None:
    cache = HybridCache(SumModel.cache_spec, SumModel.prefill_cost, 1 << 16)
    longest = max(n for n in range(6000) if cache.fits(n))
    slot = cache.scratch_slot()
    assert slot is not None
    assert cache.scratch_slot() == slot
    cache.check()
    assert max(n for n in range(6000) if cache.fits(n)) < longest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["mamba2", "attention"])
def test_rows_that_fill_a_batch_up_change_no_bit_of_the_others(kind: str, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    problem = Mamba2Problem(dtype, rng) if kind == "mamba2" else AttentionProblem(dtype)
    runs = [Run(0, 1, 70 + i, i, False, [2 * i, 2 * i + 1], []) for i in range(5)]
    layout, _ = arrange([], runs, packed=True)
    rows = torch.arange(layout.num_rows)
    plain = ForwardBatch(rows, rows, layout, torch.arange(5))
    padded = pad_decodes(plain, 8, 4, scratch_slot=9)
    assert padded.layout.num_rows == 8
    results = []
    for batch in (plain, padded):
        inputs = problem.inputs(5, torch.Generator().manual_seed(1))
        filled = [torch.cat([x, x.new_full((batch.layout.num_rows - 5, *x.shape[1:]), 3.0)]) for x in inputs]
        cache = cache_on(torch.device("cpu"), problem, 10, 0.5)
        out = problem.apply(TorchOps(), filled, batch.layout, cache)
        results.append([out[:5], *(entries[:9] for entries in cache)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_batch_of_one_row_is_not_made_larger_than_it_has_to_be() -> None:
    layout, _ = arrange([], [Run(0, 1, 0, 0, False, [3], [])])
    rows = torch.arange(layout.num_rows)
    padded = pad_decodes(ForwardBatch(rows, rows, layout, torch.arange(1)), 1, 4, scratch_slot=7)
    assert padded.layout.num_rows == padded.layout.num_decode
    assert padded.layout.num_decode == 1
    assert padded.layout.decode_slot.tolist() == [0]
    assert padded.layout.page_table.tolist() == [[3, 0, 0, 0]]


class NoFactors:
    num_bytes = 0


def test_a_pass_with_rows_of_an_adapter_is_not_replayed() -> None:
    """What a graph has recorded adds nothing to any row."""
    trunk = LookingModel()
    adapted = AdaptedModel(trunk, NoFactors(), "adapted", (), adapts_head=False)
    config = EngineConfig(budget_bytes=1 << 20)
    engine = Engine(trunk, config, worker=worker_with(Recorder()), variants={"a": adapted})
    (graphs,) = engine.worker.graphs.values()
    engine.submit(make_request("alone", tokens_of(1, 70), 12))
    engine.run_until_idle()
    num_replays = graphs.num_replays
    assert num_replays > 5
    engine.submit(make_request("one", tokens_of(2, 70), 12, model="a"))
    engine.submit(make_request("other", tokens_of(3, 70), 12))
    outputs = engine.run_until_idle()
    assert graphs.num_replays == num_replays
    assert answers(outputs, "one") == sum_model_answer(tokens_of(2, 70), 12)
    assert answers(outputs, "other") == sum_model_answer(tokens_of(3, 70), 12)
