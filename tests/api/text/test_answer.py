"""The seam between dialects and the engine: what is asked in a spec comes back as events."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from hybrid_cache.api.text.answer import Answer, Events
from hybrid_cache.api.text.answer_parser import AnswerForm
from hybrid_cache.api.text.generation import Begin, End, GenerationSpec, Text, Usage
from hybrid_cache.api.text.records import RequestRecord
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.api.text.tool_formats import DEFAULT
from hybrid_cache.api.text.whole_calls import ToolCall, WholeCalls
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.errors import ContextTooLong, RequestError
from hybrid_cache.request import FinishReason
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from tests.api.servers import (
    IM_END,
    SCRIPT,
    TEXT,
    GatedModel,
    Script,
    new_engine,
    prompt_for,
    script_ids,
    until_free,
    write_text_model,
)

CALLS: Script = ("Let me", " see.", " <tool", "_call>", '{"name": "f", "argu', 'ments": {"x": [1]}}', "</tool_call>")


def prompt_of(tokens: Sequence[int]) -> Prompt:
    return Prompt(np.asarray(tokens, np.int32))


def spec_for(script: Script = SCRIPT, **fields: object) -> GenerationSpec:
    """After its prompt `SumModel` says the script."""
    sampling = SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=(IM_END,))
    return GenerationSpec(**{"prompt": prompt_of(prompt_for(script_ids(script)[0])), "sampling": sampling, **fields})


def steps_of(
    text: TextModel, specs: Sequence[GenerationSpec], records: list[RequestRecord] | None = None
) -> list[Events]:
    async def run() -> list[Events]:
        engine = new_engine()
        engine.start()
        seen = records if records is not None else []
        async with await Answer.to(TextEngine.of(engine, text), specs, seen.append) as answer:
            steps = [step async for step in answer]
        await engine.stop(1)
        return steps

    return asyncio.run(run())


def test_a_prompt_begins_and_its_choice_says_its_tokens_one_by_one_and_ends(sum_text: TextModel) -> None:
    begin, *said = steps_of(sum_text, [spec_for()])
    assert begin == (Begin(0, prompt_for(script_ids()[0]), None),)
    texts = [step[0] for step in said]
    assert all(isinstance(event, Text) for event in texts)
    assert [event.token.id for event in texts if isinstance(event, Text) and event.token] == script_ids()
    assert "".join(event.text for event in texts if isinstance(event, Text)) == TEXT
    end = said[-1][1]
    assert [len(step) for step in said] == [1] * len(SCRIPT) + [2]
    assert end == End(0, FinishReason.STOP, None, Usage(5, len(SCRIPT) + 1, 0, 0), None)


def test_choices_are_counted_through_all_prompts(sum_text: TextModel) -> None:
    records: list[RequestRecord] = []
    steps = steps_of(sum_text, [spec_for(n=2), spec_for(n=3)], records)
    events = [event for step in steps for event in step]
    assert sorted(event.prompt for event in events if isinstance(event, Begin)) == [0, 1]
    assert sorted(event.choice for event in events if isinstance(event, End)) == [0, 1, 2, 3, 4]
    for choice in range(5):
        texts = [event.text for event in events if isinstance(event, Text) and event.choice == choice]
        assert "".join(texts) == TEXT
    assert sorted(record.finish_reasons for record in records) == [("stop",) * 2, ("stop",) * 3]


def test_a_stop_string_that_the_client_named_is_told(sum_text: TextModel) -> None:
    events = [event for step in steps_of(sum_text, [spec_for(stops=("STOP",))]) for event in step]
    assert "".join(event.text for event in events if isinstance(event, Text)) == TEXT.partition("STOP")[0]
    end = events[-1]
    assert isinstance(end, End)
    assert (end.finish, end.stop) == (FinishReason.STOP, "STOP")


def test_a_stop_token_is_told_only_if_the_client_named_it(sum_text: TextModel) -> None:
    for named in ((), (IM_END,)):
        end = steps_of(sum_text, [spec_for(named_stop_ids=named)])[-1][-1]
        assert isinstance(end, End)
        assert end.stop == (IM_END if named else None)


def test_each_token_comes_once_though_it_lets_out_text_and_a_call(tmp_path: Path) -> None:
    write_text_model(tmp_path, CALLS)
    text = TextModel.load(tmp_path)
    events = [event for step in steps_of(text, [spec_for(CALLS, form=AnswerForm(DEFAULT))]) for event in step]
    whole = WholeCalls()
    said = [part for event in events for part in whole.take(event) if isinstance(part, Text | ToolCall)]
    calls = [part for part in said if isinstance(part, ToolCall)]
    assert [(call.name, call.arguments, call.complete) for call in calls] == [("f", '{"x": [1]}', True)]
    of_parts = [event for event in events if not isinstance(event, Begin | End)]
    assert [event.token.id for event in of_parts if event.token is not None] == script_ids(CALLS)
    assert [event.token.id for event in said if event.token is not None] == script_ids(CALLS)
    assert "".join(event.text for event in said if isinstance(event, Text)) == "Let me see. "


def test_none_is_queued_if_one_is_refused(sum_text: TextModel) -> None:
    async def run() -> None:
        model = GatedModel()
        engine, records = new_engine(model), list[RequestRecord]()
        engine.start()
        outside = spec_for(prompt=prompt_of([10**6]))
        with pytest.raises(RequestError):
            await Answer.to(TextEngine.of(engine, sum_text), [spec_for(), outside], records.append)
        model.gate.set()
        await until_free(engine)
        await engine.stop(1)
        assert [record.finish_reasons for record in records] == [("abort",)]

    asyncio.run(run())


def test_leaving_early_aborts_what_runs(sum_text: TextModel) -> None:
    async def run(engine: AsyncEngine) -> None:
        engine.start()
        long = SamplingParams(temperature=0.0, max_tokens=3000)
        with suppress(ZeroDivisionError):
            async with await Answer.to(TextEngine.of(engine, sum_text), [spec_for(sampling=long)] * 2) as answer:
                async for _ in answer:
                    raise ZeroDivisionError
        await until_free(engine)
        await engine.stop(1)

    asyncio.run(run(new_engine()))


@pytest.mark.parametrize(("max_tokens", "otherwise", "length"), [(7, 16, 7), (None, 16, 16), (5000, 16, 4091)])
def test_an_answer_ends_where_the_context_does(
    sum_text: TextModel, max_tokens: int | None, otherwise: int, length: int
) -> None:
    text = TextEngine.of(new_engine(), sum_text)
    assert text.answer_length(prompt_of([1] * 5), max_tokens, otherwise, "prompt") == length


def test_an_open_answer_ends_where_the_budget_does(sum_text: TextModel) -> None:
    text = TextEngine.of(new_engine(budget_bytes=1 << 15), sum_text)
    room = text.engine.longest_sequence
    assert room < text.max_length
    assert text.answer_length(prompt_of([1] * 5), None, text.max_length, "prompt") == room - 5
    assert text.answer_length(prompt_of([1] * 5), text.max_length, 16, "prompt") == room - 5
    with pytest.raises(ContextTooLong, match="the cache budget"):
        text.answer_length(prompt_of([1] * room), None, text.max_length, "prompt")
