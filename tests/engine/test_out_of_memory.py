"""A step that the device has no memory for is taken back and tried again in smaller ones, with the same answers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_cache.cache.commands import Copy
from hybrid_cache.choreography.arrangement import Arrangement, Encoding, Fidelity, Part
from hybrid_cache.choreography.commands import KeepEffect
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.device.worker import Worker
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.prefills import Chunk
from hybrid_cache.kernels.ops import KVTensors, StateTensors
from hybrid_cache.request import FailedOutput, Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from hybrid_cache.work import Command, OutOfDeviceMemory
from tests.engine.test_engine import answers, make_request
from tests.fakes import SumModel, sum_model_answer, tokens_of


class SmallDevice(SumModel):
    """Has memory for so many tiles, decode rows, and rows of logits. It notices too late: states have moved on."""

    def __init__(self, tiles: int = 1000, decodes: int = 1000, logits: int = 1000) -> None:
        super().__init__()
        self.room = (tiles, decodes, logits)

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = super().forward(batch, cache)
        if batch.layout.num_tiles > self.room[0] or batch.layout.num_decode > self.room[1]:
            raise torch.OutOfMemoryError("tried to allocate 20.00 MiB")
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        if len(hidden) > self.room[2]:
            raise torch.OutOfMemoryError("tried to allocate 20.00 MiB")
        return super().logits(hidden)


class SmallStage(SmallDevice):
    """A small device whose model stores messages. What tokens do to a sum does not fade."""

    fidelities = ("composed",)

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        hidden = super().forward(batch, cache)
        kv, states = cache
        assert isinstance(kv, KVTensors)
        assert isinstance(states, StateTensors)
        if batch.effects is not None:
            batch.effects.keys(kv, None)
            batch.effects.decay(states.state, torch.zeros(batch.layout.num_rows, 600))
        return hidden


def arranged(*lengths: int, encoding: Encoding = Encoding.ALONE, names: str = "m", **more: Any) -> Request:
    """Messages and a header; what is encoded alone, all but the first, is computed before the prompt begins."""
    prompt = tokens_of(1, sum(lengths))
    *messages, header = lengths
    parts = (*(Part(length, f"{names}{i}", encoding) for i, length in enumerate(messages)), Part(header))
    arrangement = Arrangement(parts, Fidelity.COMPOSED, **more)
    return Request("b", Prompt(prompt), SamplingParams(temperature=0, max_tokens=6), arrangement=arrangement)


def answer_all(model: SumModel, num_requests: int, max_tokens: int = 6, length: int = 300, n: int = 1) -> Engine:
    """Checks the answers to as many prompts at once, one of which grows a prefix of another."""
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    prompts = [tokens_of(seed, length + 10 * seed) for seed in range(num_requests)]
    for i, tokens in enumerate(prompts):
        engine.submit(make_request(str(i), tokens, max_tokens, n=n))
    outputs = engine.run_until_idle()
    engine.check()
    for i, tokens in enumerate(prompts):
        for index in range(n):
            assert answers(outputs, str(i), index) == sum_model_answer(tokens, max_tokens)
    return engine


def test_too_many_tiles_become_fewer(caplog: pytest.LogCaptureFixture) -> None:
    engine = answer_all(SmallDevice(tiles=3), 4)
    assert engine.stats().num_out_of_memory == 3  # 16 tiles, 8, 4
    assert "no device memory for 16 prefill tiles and 0 decode rows" in caplog.text


def test_too_many_decode_rows_become_fewer() -> None:
    engine = answer_all(SmallDevice(decodes=2), 7, length=20)
    assert engine.stats().num_out_of_memory >= 1
    assert engine.stats().num_preemptions >= 3


def test_choices_of_one_request_wait_for_each_other() -> None:
    assert answer_all(SmallDevice(decodes=2), 1, n=5).stats().num_out_of_memory >= 1


def test_what_fits_is_never_taken_back() -> None:
    assert answer_all(SmallDevice(tiles=16, decodes=4), 4).stats().num_out_of_memory == 0


@pytest.mark.parametrize("answered", [0, 1], ids=["a tile", "a decode row"])
def test_a_step_that_cannot_be_smaller_ends_its_request_and_changes_nothing_else(answered: int) -> None:
    model = SmallDevice()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("a", tokens_of(0, 50)))
    for _ in range(answered):
        engine.step()
    model.room = (0, 0, 1000)
    assert engine.step() == [("a", FailedOutput("tried to allocate 20.00 MiB"))]
    after = engine.stats()
    assert (after.num_out_of_memory, after.running, after.cache.working_bytes) == (0, 0, 0)
    engine.check()
    model.room = (16, 4, 1000)  # as much as ever
    engine.submit(make_request("b", tokens := tokens_of(1, 1000), 6))
    assert answers(engine.run_until_idle(), "b") == sum_model_answer(tokens, 6)
    assert engine.stats().num_out_of_memory == 0


@pytest.mark.parametrize("lengths", [(30, 40, 3), (30, 400, 3)], ids=["one tile", "many tiles"])
def test_a_message_without_memory_is_given_up_and_its_prompt_computes_it_in_place(lengths: tuple[int, ...]) -> None:
    model = SmallStage(tiles=0)
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    request = arranged(*lengths)
    engine.submit(request)
    assert engine.step() == []
    model.room = (1000, 1000, 1000)
    chunks = list[Chunk]()
    engine.watch = lambda step: chunks.extend(step.chunks)
    assert answers(engine.run_until_idle(), "b") == sum_model_answer(request.prompt.tokens, 6)
    assert engine.stats().num_out_of_memory == 1
    assert engine.stats().num_preemptions == 0
    assert all(chunk.sequence is not None for chunk in chunks)
    engine.check()


def test_an_answer_without_memory_is_not_stored_and_stays_as_it_is() -> None:
    model = SmallStage()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    request = arranged(30, 40, 3, encoding=Encoding.IN_PLACE, closing=(7, 8), answer_start=70)
    engine.submit(request)
    outputs = []
    while len(answers(outputs, "b")) < 6:
        outputs += engine.step()
    model.room = (0, 0, 0)  # the answer's last token and its closing are still to be computed
    stored = engine.stats().cache.messages
    assert engine.run_until_idle() == []
    assert engine.stats().num_out_of_memory == 1
    assert engine.stats().cache.messages == stored
    assert engine.stats().cache.working_bytes == 0
    engine.check()


def test_a_message_beside_other_work_is_given_up_with_it() -> None:
    model = SmallStage()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    other = tokens_of(3, 100)
    engine.submit(make_request("a", other, 6))
    outputs = engine.step()
    engine.submit(request := arranged(30, 40, 3))
    model.room = (0, 1000, 1000)  # for the message, beside a decode row
    outputs += engine.step()
    model.room = (2, 1, 1000)
    outputs += engine.run_until_idle()
    assert answers(outputs, "a") == sum_model_answer(other, 6)
    assert answers(outputs, "b") == sum_model_answer(request.prompt.tokens, 6)
    engine.check()


def test_messages_in_a_step_do_not_make_room_for_more_sequences(caplog: pytest.LogCaptureFixture) -> None:
    model = SmallStage()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22, max_running=2, max_tiles_beside_decode=8))
    engine.submit(make_request("a", tokens_of(3, 100)))
    engine.step()
    engine.submit(arranged(*[20] * 7, 3))
    model.room = (5, 1000, 1000)
    engine.step()
    assert "no device memory for 6 prefill tiles and 1 decode rows" in caplog.text
    assert "and 2 sequences" in caplog.text
    assert len(answers(engine.run_until_idle(), "b")) == 6
    engine.check()


def test_a_commit_without_memory_is_given_up() -> None:
    model = SmallDevice()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("a", tokens_of(0, 50), 40))
    while not engine.idle:
        engine.step()
    model.room = (0, 0, 0)
    assert engine.run_until_idle() == []
    assert engine.stats().num_out_of_memory == 1
    engine.check()


def test_logits_are_computed_in_parts() -> None:
    tokens = tokens_of(0, 100)
    requests = [Request("a", Prompt(tokens), SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))]
    found = []
    for model in (SmallDevice(), SmallDevice(logits=7)):
        engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
        for request in requests:
            engine.submit(request)
        found.append([(o.logprobs if hasattr(o, "logprobs") else o) for _, o in engine.run_until_idle()])
    assert found[0] == found[1]


def short_of(kind: type, times: int) -> type[Worker]:
    """A worker whose device has no memory for the first commands of a kind."""

    class ShortWorker(Worker):
        left = times

        def do(self, command: Command) -> None:
            if isinstance(command, kind) and self.left:
                self.left -= 1
                raise torch.OutOfMemoryError("tried to allocate 20.00 MiB")
            super().do(command)

    return ShortWorker


def test_a_message_that_could_not_be_written_is_not_there() -> None:
    engine = Engine(SmallStage(), EngineConfig(budget_bytes=1 << 22), worker=short_of(KeepEffect, 1))
    engine.submit(arranged(30, 40, 3, encoding=Encoding.IN_PLACE))
    engine.run_until_idle()
    engine.check()
    assert engine.stats().cache.messages == 1
    assert (engine.is_stored("m0"), engine.is_stored("m1")) == (False, True)


def test_messages_beside_one_that_could_not_be_written_are_given_up_with_it() -> None:
    """Of two prompts, which then compute theirs in place."""
    engine = Engine(SmallStage(), EngineConfig(budget_bytes=1 << 22, max_tiles=8), worker=short_of(KeepEffect, 1))
    chunks = list[Chunk]()
    engine.watch = lambda step: chunks.extend(step.chunks)
    requests = [arranged(30, 100, 3), replace(arranged(20, 900, 3, names="n"), id="c")]
    for request in requests:
        engine.submit(request)
    while not engine.stats().num_out_of_memory:
        engine.step()
    assert any(chunk.sequence is None for chunk in chunks)
    chunks.clear()
    outputs = engine.run_until_idle()
    assert chunks
    assert all(chunk.sequence is not None for chunk in chunks)
    for request in requests:
        assert answers(outputs, request.id) == sum_model_answer(request.prompt.tokens, 6)
    engine.check()


def test_what_the_books_need_is_an_error_without_memory() -> None:
    engine = Engine(SmallDevice(), EngineConfig(budget_bytes=1 << 22), worker=short_of(Copy, 1))
    engine.submit(make_request("a", tokens_of(0, 130)))
    with pytest.raises(OutOfDeviceMemory):
        engine.run_until_idle()
