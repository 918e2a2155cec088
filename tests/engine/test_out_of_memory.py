"""A step that the device has no memory for is taken back and tried again in smaller ones, with the same answers."""

import pytest
import torch
from torch import Tensor

from hybrid_cache.batch import CacheTensors, ForwardBatch
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine import Engine
from hybrid_cache.request import Prompt, Request, SamplingParams
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


def answer_all(model: SumModel, num_requests: int, max_tokens: int = 6, length: int = 300, n: int = 1) -> Engine:
    """Checks the answers to as many prompts at once, one of which grows a prefix of another."""
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    prompts = [tokens_of(seed, length + 10 * seed) for seed in range(num_requests)]
    for i, tokens in enumerate(prompts):
        engine.submit(make_request(str(i), tokens, max_tokens, n=n))
    outputs = engine.run_until_idle()
    engine.cache.check()
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


def test_a_step_that_cannot_be_smaller_is_an_error() -> None:
    engine = Engine(SmallDevice(tiles=0), EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("a", tokens_of(0, 300)))
    with pytest.raises(torch.OutOfMemoryError):
        engine.run_until_idle()


def test_a_commit_without_memory_is_given_up() -> None:
    model = SmallDevice()
    engine = Engine(model, EngineConfig(budget_bytes=1 << 22))
    engine.submit(make_request("a", tokens_of(0, 50), 40))
    while not engine.idle:
        engine.step()
    model.room = (0, 0, 0)
    assert engine.run_until_idle() == []
    assert engine.stats().num_out_of_memory == 1
    engine.cache.check()


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
