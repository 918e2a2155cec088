"""OpenAI's Responses API, asked by its own client and by hand, on models whose answers are known."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from hybrid_cache.api.server.openai.response_items import Output
from hybrid_cache.api.text.generation import CallArguments, CallBegin, CallEnd, Text, Thought
from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import (
    CALLS,
    TEXT,
    GatedModel,
    new_app,
    new_engine,
    over_the_wire,
    script_messages,
    write_text_model,
)

TOOLS: Any = [{"type": "function", "name": name, "parameters": {"type": "object"}, "strict": False} for name in "fg"]
LONG = "You answer in one word. " * 12
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder: Path = tmp_path_factory.mktemp("calls")
    write_text_model(folder, CALLS)
    return TextModel.load(folder)


@pytest.fixture(scope="module")
def caller(calling: TextModel) -> Iterator[openai.OpenAI]:
    with (
        over_the_wire(new_app(new_engine(), calling)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def ask(api: openai.OpenAI, **fields: Any) -> Any:
    return api.responses.create(**{"model": "sum", "max_output_tokens": 20, **fields})


def events_of(text: str) -> list[tuple[str, Any]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    lines = [block.split("\n") for block in blocks]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


def test_a_response(api: openai.OpenAI, sum_text: TextModel) -> None:
    reply = ask(api, input=script_messages(sum_text), metadata={"topic": "x"}, user="ann", prompt_cache_key="k")
    assert reply.output_text == TEXT
    assert [item.type for item in reply.output] == ["message"]
    assert (reply.status, reply.error, reply.incomplete_details, reply.model) == ("completed", None, None, "sum")
    assert (reply.metadata, reply.user, reply.prompt_cache_key) == ({"topic": "x"}, "ann", "k")
    assert (reply.usage.output_tokens, reply.usage.output_tokens_details.reasoning_tokens) == (10, 0)
    again = ask(api, input=script_messages(sum_text)).usage
    assert again.input_tokens == again.input_tokens_details.cached_tokens == reply.usage.input_tokens
    assert again.total_tokens == again.input_tokens + 10


def test_the_events_of_a_stream(client: httpx.Client, sum_text: TextModel) -> None:
    reply = client.post("/v1/responses", json={"input": script_messages(sum_text), "stream": True})
    events = events_of(reply.text)
    names = [name for name, _ in events]
    assert names[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert names[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(names[4:-4]) == {"response.output_text.delta"}
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert all(data["type"] == name for name, data in events)
    assert "".join(data["delta"] for name, data in events if name.endswith(".delta")) == TEXT
    final = events[-1][1]["response"]
    assert events[-2][1]["item"] == final["output"][0]
    assert events[0][1]["response"] == {
        **final,
        "output": [],
        "status": "in_progress",
        "usage": None,
        "completed_at": None,
    }
    assert client.get(f"/v1/responses/{final['id']}").json() == final


def test_the_clients_own_stream_helper(caller: openai.OpenAI, calling: TextModel) -> None:
    messages: Any = script_messages(calling, CALLS)
    with caller.responses.stream(model="sum", input=messages, tools=TOOLS) as stream:
        events = list(stream)
        final: Any = stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    assert final.output_text == "Let me see. "
    assert [(item.name, item.arguments) for item in final.output[1:]] == [("f", '{"x": [1]}'), ("g", "{}")]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    done = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == "".join(done) == '{"x": [1]}{}'
    assert len({item.id for item in final.output}) == len({item.call_id for item in final.output[1:]}) + 1 == 3


@pytest.mark.parametrize("stored", [True, False])
def test_a_loop_of_tools(caller: openai.OpenAI, calling: TextModel, stored: bool) -> None:
    """The same conversation from what is stored and from what the client hands back."""
    messages: Any = script_messages(calling, CALLS)
    first = ask(caller, input=messages, tools=TOOLS, store=stored, max_output_tokens=40)
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "2"}
        for item in first.output
        if item.type == "function_call"
    ]
    before = [] if stored else [*messages, *(item.to_dict() for item in first.output)]
    fields = {"previous_response_id": first.id} if stored else {}
    second = ask(caller, input=[*before, *results], tools=TOOLS, max_output_tokens=3, temperature=0, **fields)
    assert second.usage.input_tokens == _tokens_in_chat(caller, messages, first)
    assert second.previous_response_id == (first.id if stored else None)


def _tokens_in_chat(caller: openai.OpenAI, messages: Any, first: Any) -> int:
    """Of the same conversation in the form of chat, whose tools the template does not show."""
    calls = [
        {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
        for item in first.output
        if item.type == "function_call"
    ]
    said = {"role": "assistant", "content": first.output_text, "tool_calls": calls}
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "2"} for call in calls]
    reply: Any = caller.chat.completions.create(model="sum", messages=[*messages, said, *results], max_tokens=1)  # type: ignore[call-overload]
    return int(reply.usage.prompt_tokens)


def test_a_turn_by_name_hits_as_well_as_the_conversation_sent_whole(sum_text: TextModel) -> None:
    """The former as a stream."""
    turns = [{"role": "user", "content": f"{number} is what I ask. " * 8} for number in range(3)]
    cached: list[list[int]] = []
    for stored in (True, False):
        with (
            over_the_wire(new_app(new_engine(), sum_text)) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api,
        ):
            said: list[Any] = []
            previous, counts = None, []
            for turn in turns:
                said.append(turn)
                asked = {"previous_response_id": previous, "input": [turn]} if stored else {"input": said}
                fields = {"model": "sum", "instructions": LONG, "max_output_tokens": 5, "temperature": 0, **asked}
                if stored:
                    with api.responses.stream(**fields) as stream:
                        reply: Any = [event for event in stream][-1].response  # type: ignore[union-attr]
                else:
                    reply = ask(api, **fields)
                previous = reply.id
                said += [item.to_dict() for item in reply.output]
                counts.append((reply.usage.input_tokens, reply.usage.input_tokens_details.cached_tokens))
            cached.append(counts)
    assert cached[0] == cached[1]
    total, hit = cached[0][-1]
    assert hit >= 64 * ((total - len(turns[-1]["content"]) - 60) // 64) > 400


def test_items_are_the_same_conversation_as_a_chat_completion(api: openai.OpenAI, client: httpx.Client) -> None:
    """What one answer consists of is one message; what is said to the system at first, too."""
    call = {"name": "f", "arguments": '{"x": 1}'}
    theirs = [
        {"role": "system", "content": "Be kind.\nBe short."},
        {"role": "user", "content": "one\ntwo"},
        {
            "role": "assistant",
            "content": "I call. Done.",
            "tool_calls": [{"id": "c1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "4\n2"},
        {"role": "assistant", "content": "It is."},
        {"role": "assistant", "content": "And so on."},
        {"role": "user", "content": "Go on"},
    ]
    ours: Any = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "input_text", "text": text} for text in ("one", "two")]},
        {"type": "reasoning", "summary": [], "id": "rs_1"},
        {"role": "assistant", "content": "I call."},
        {"type": "function_call", "call_id": "c1", **call},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": " Done."}]},
        {
            "type": "function_call_output",
            "call_id": "c1",
            "output": [{"type": "input_text", "text": text} for text in "42"],
        },
        {"role": "assistant", "content": "It is."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "And so on."}]},
        {"role": "user", "content": "Go on"},
    ]
    first = client.post("/v1/chat/completions", json={"messages": theirs, "max_tokens": 4, "temperature": 0}).json()
    reply = ask(api, instructions="Be kind.", input=ours, max_output_tokens=4, temperature=0)
    assert reply.usage.input_tokens_details.cached_tokens == first["usage"]["prompt_tokens"] == reply.usage.input_tokens
    assert reply.output_text == first["choices"][0]["message"]["content"]
    stored: Any = list(api.responses.input_items.list(reply.id, order="asc"))
    assert [item.type for item in stored] == [item.get("type", "message") for item in ours]
    again = ask(api, instructions="Be kind.", input=[item.to_dict() for item in stored], max_output_tokens=1)
    assert again.usage.input_tokens == reply.usage.input_tokens


def test_items_follow_each_other_as_they_were_said() -> None:
    said = [Thought(0, "Hm", None), Text(0, "I ", None), Text(0, "call", None)]
    call = [
        CallBegin(0, "f", None, "own"),
        CallArguments(0, "{", None),
        CallArguments(0, "}", None),
        CallEnd(0, True, None),
    ]
    output = Output("key", lambda token: None)
    events = [each for event in (*said, *call, Text(0, "Done", None)) for each in output.take(event)]
    events += output.finish(whole=False)
    assert [(item["type"], item["id"], item["status"]) for item in output.items] == [
        ("reasoning", "rs_keyo0", "completed"),
        ("message", "msg_keyo1", "completed"),
        ("function_call", "fc_keyo2", "completed"),
        ("message", "msg_keyo3", "incomplete"),
    ]
    assert (output.items[2]["call_id"], output.items[2]["arguments"]) == ("own", "{}")
    done = [data["item"] for name, data in events if name == "response.output_item.done"]
    added = [data["item"]["id"] for name, data in events if name == "response.output_item.added"]  # type: ignore[index]
    assert (done, added) == (output.items, [item["id"] for item in output.items])
    assert [data["delta"] for name, data in events if name == "response.output_text.delta"] == ["I ", "call", "Done"]


def test_a_call_that_breaks_off_is_no_part_of_what_follows(api: openai.OpenAI) -> None:
    output = Output("key", lambda token: None)
    for event in (CallBegin(0, "f", None, "c1"), CallArguments(0, '{"x', None), CallEnd(0, False, None)):
        list(output.take(event))
    [call] = output.items
    assert (call["status"], call["arguments"]) == ("incomplete", '{"x')
    turns = [{"role": "user", "content": text} for text in ("one", "two")]
    counts = [
        ask(api, input=said, max_output_tokens=1).usage.input_tokens for said in ([turns[0], call, turns[1]], turns)
    ]
    assert counts[0] == counts[1]


def test_a_call_that_breaks_off_stays_if_the_client_has_answered_it(caller: openai.OpenAI) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x'}
    answer = {"type": "function_call_output", "call_id": "c1", "output": "these arguments are no JSON"}
    counts = [
        ask(
            caller, input=[*HI, {**call, "status": status}, answer], tools=TOOLS, max_output_tokens=1
        ).usage.input_tokens
        for status in ("incomplete", "completed")
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("whole", "kinds"), [(True, ["message"]), (False, [])])
def test_an_answer_without_a_word(whole: bool, kinds: list[str]) -> None:
    output = Output("key", lambda token: None)
    assert bool(list(output.finish(whole=whole))) == whole
    assert [item["type"] for item in output.items] == kinds


def test_tokens_are_counted_before_they_are_sent(api: openai.OpenAI) -> None:
    first = ask(api, input="Hi", instructions="Be brief.")
    turn: dict[str, Any] = {"input": "And?", "instructions": "Be brief.", "previous_response_id": first.id}
    counted = api.responses.input_tokens.count(model="sum", **turn, tools=TOOLS)
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == ask(api, **turn, tools=TOOLS).usage.input_tokens
    with pytest.raises(openai.NotFoundError):
        api.responses.input_tokens.count(model="sum", input="Hi", previous_response_id="resp_none")


def test_instructions_are_not_carried_over(api: openai.OpenAI) -> None:
    first = ask(api, input="one", instructions="Be brief.", max_output_tokens=1)
    plain = ask(api, input="two", previous_response_id=first.id, max_output_tokens=1)
    told = ask(api, input="two", previous_response_id=first.id, instructions="Be brief.", max_output_tokens=1)
    assert told.usage.input_tokens - plain.usage.input_tokens == len("<|im_start|>system\nBe brief.<|im_end|>\n") - 20
    assert (plain.instructions, told.instructions) == (None, "Be brief.")


def test_what_was_stored(api: openai.OpenAI, sum_text: TextModel) -> None:
    first = ask(api, input=[*script_messages(sum_text)])
    second = ask(api, input="And now?", previous_response_id=first.id, max_output_tokens=2)
    assert second.status == "incomplete"
    assert second.incomplete_details.reason == "max_output_tokens"
    assert second.output[0].status == "incomplete"
    assert api.responses.retrieve(second.id) == second
    items: Any = list(api.responses.input_items.list(second.id, order="asc"))
    assert [item.role for item in items] == ["user", "assistant", "user"]
    assert items[1].content[0].text == TEXT
    assert [item.id for item in api.responses.input_items.list(second.id, limit=1)] == [i.id for i in items[::-1]]
    api.responses.delete(second.id)
    for again in (api.responses.retrieve, api.responses.delete, api.responses.cancel, api.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="24 hours after their last use, in 64 MiB"):
            again(second.id)
    assert api.responses.retrieve(first.id) == first
    api.responses.delete(first.id)
    unstored = ask(api, input="x", store=False, max_output_tokens=1)
    with pytest.raises(openai.NotFoundError):
        api.responses.retrieve(unstored.id)


def test_a_synchronous_response_cannot_be_cancelled(api: openai.OpenAI) -> None:
    reply = ask(api, input="x", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        api.responses.cancel(reply.id)


def test_a_reference_stands_for_a_stored_item(api: openai.OpenAI, sum_text: TextModel) -> None:
    messages: Any = script_messages(sum_text)
    first = ask(api, input=messages)
    question = {"role": "user", "content": "And now?"}
    whole = ask(api, input=[*messages, {"role": "assistant", "content": TEXT}, question], max_output_tokens=1)
    [asked] = api.responses.input_items.list(first.id)
    references: Any = [{"type": "item_reference", "id": asked.id}, {"id": first.output[0].id}]
    reply = ask(api, input=[*references, question], max_output_tokens=1)
    assert reply.usage.input_tokens == whole.usage.input_tokens


def test_log_probabilities(client: httpx.Client, sum_text: TextModel) -> None:
    fields = {"input": script_messages(sum_text), "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    [part] = client.post("/v1/responses", json=fields).json()["output"][0]["content"]
    assert len(part["logprobs"]) == 10
    assert all(len(entry["top_logprobs"]) == 2 for entry in part["logprobs"])
    events = events_of(client.post("/v1/responses", json={**fields, "stream": True}).text)
    deltas = [entry for name, data in events if name.endswith(".delta") for entry in data["logprobs"]]
    assert deltas == part["logprobs"] == events[-1][1]["response"]["output"][0]["content"][0]["logprobs"]


def test_a_form_of_the_answer(api: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    reply = ask(api, input="Hi", text=form, max_output_tokens=200)
    assert json.loads(reply.output_text)["a"] in (1, 2)
    assert reply.text.format.to_dict() == form["format"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "g"}])
def test_a_call_that_cannot_fail(caller: openai.OpenAI, choice: Any) -> None:
    tool = {"type": "function", "name": "g", "parameters": {"type": "object", "properties": {}, "maxProperties": 0}}
    reply = ask(caller, input="Hi", tools=[*TOOLS[:0], tool], tool_choice=choice, max_output_tokens=200)
    assert [(item.type, item.name) for item in reply.output] == [("function_call", "g")]
    assert json.loads(reply.output[0].arguments) == {}


def test_truncation_keeps_the_latest_items_and_calls_with_their_results(sum_text: TextModel) -> None:
    """4,096 tokens, one a character: of a growing conversation the same beginning is dropped for a while."""
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": json.dumps({"x": "y" * 500})}
    result = {"type": "function_call_output", "call_id": "c1", "output": "z" * 1500}
    said: list[Any] = [{"role": "user", "content": "a" * 900}, call, result]
    sizes, counts = [], []
    with (
        over_the_wire(new_app(new_engine(), sum_text)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api,
    ):
        for number in range(6):
            said.append({"role": "user", "content": f"{number}" * 400})
            reply = ask(api, input=said, instructions="Keep me.", truncation="auto", max_output_tokens=8, store=False)
            sizes.append(reply.usage.input_tokens)
            counts.append(reply.usage.input_tokens_details.cached_tokens)
            said.append({"role": "assistant", "content": "ok"})
        assert max(sizes) <= 4096 - 8
        dropped = [i for i in range(1, 6) if sizes[i] < sizes[i - 1]]
        assert dropped
        first = dropped[0]
        assert sizes[first] < 4096 - 2000  # the call has gone with its result
        assert first + 1 < 6
        assert counts[first + 1] >= 64 * (sizes[first] // 64 - 1) > 0
        with pytest.raises(openai.BadRequestError, match="context") as caught:
            ask(api, input=said, truncation="disabled")
        assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")
        with pytest.raises(openai.BadRequestError, match="context"):
            ask(api, input=[*said, {"role": "user", "content": "b" * 5000}], truncation="auto")


@pytest.mark.parametrize("size", [1100, pytest.param(400, marks=pytest.mark.slow)])
def test_what_truncation_keeps_stays_for_several_turns_whatever_the_size_of_messages(
    sum_text: TextModel, size: int
) -> None:
    previous, cached, sizes = None, [], []
    with (
        over_the_wire(new_app(new_engine(), sum_text)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as api,
    ):
        for turn in range(4096 // size + 12):
            body = {"input": f"{turn:9}" * (size // 9), "previous_response_id": previous, "truncation": "auto"}
            reply = ask(api, max_output_tokens=1, **body)
            usage, previous = reply.usage, reply.id
            sizes.append(usage.input_tokens)
            cached.append(usage.input_tokens_details.cached_tokens)
    cut = next(turn for turn in range(1, len(sizes)) if sizes[turn] < sizes[turn - 1])
    assert cut + 8 < len(sizes)
    assert sum(count == 0 for count in cached[cut:]) <= (len(cached) - cut) * (size + 400) // 2400
    assert min(sizes[cut:]) >= 4096 // 3


def test_marks_and_salts_of_the_cache(api: openai.OpenAI) -> None:
    marked = {"type": "input_text", "text": "x" * 200, "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}
    system = {"role": "developer", "content": [marked]}
    fields = {"prompt_cache_options": {"mode": "explicit"}, "cache_salt": "responses-test"}
    counts = []
    for question, salt in (
        ("first question, over the end of a tile of the grid" * 2, 0),
        ("a second", 0),
        ("a third", 1),
    ):
        asked = [system, {"role": "user", "content": question}]
        body = {**fields, "cache_salt": f"responses-test-{salt}"}
        reply = ask(api, input=asked, extra_body=body, max_output_tokens=1)
        counts.append(reply.usage.input_tokens_details.cached_tokens)
    assert counts[0] == counts[2] == 0
    assert 128 <= counts[1] < 216


def test_a_report_about_the_cache_where_one_is_asked_for(client: httpx.Client) -> None:
    asked = {"input": "Why was this computed?" * 9, "max_output_tokens": 1, "cache_report": True}
    reply = client.post("/v1/responses", json=asked).json()
    assert reply["cache_report"]["prompt_tokens"] == reply["usage"]["input_tokens"]
    assert reply["cache_report"]["missed"][-1]["end"] == reply["usage"]["input_tokens"]
    events = events_of(client.post("/v1/responses", json={**asked, "stream": True}).text)
    assert events[-1][1]["response"]["cache_report"]["missed"] == []
    assert "cache_report" not in client.post("/v1/responses", json={**asked, "cache_report": False}).json()


def test_a_response_may_go_on_without_new_input(api: openai.OpenAI) -> None:
    first = ask(api, input="one", max_output_tokens=1)
    more = ask(api, previous_response_id=first.id, max_output_tokens=1)
    assert more.usage.input_tokens > first.usage.input_tokens


def test_each_key_and_each_salt_has_responses_of_its_own(sum_text: TextModel) -> None:
    with over_the_wire(new_app(new_engine(), sum_text, api_keys=("one", "two"))) as url:

        def of(key: str) -> openai.OpenAI:
            return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

        with of("one") as one, of("two") as two:
            mine = ask(one, input="x", max_output_tokens=1)
            lookups = (two.responses.retrieve, two.responses.delete, two.responses.cancel)
            for look in (*lookups, two.responses.input_items.list):
                with pytest.raises(openai.NotFoundError, match="not found"):
                    look(mine.id)
            with pytest.raises(openai.NotFoundError, match=mine.id) as caught:
                ask(two, input="x", previous_response_id=mine.id)
            assert (caught.value.param, caught.value.code) == ("previous_response_id", "previous_response_not_found")
            with pytest.raises(openai.NotFoundError, match="Item with id"):
                ask(two, input=[{"type": "item_reference", "id": mine.output[0].id}])
            assert one.responses.retrieve(mine.id) == mine
            salted = ask(one, input="x", extra_body={"cache_salt": "s"}, max_output_tokens=1)
            with pytest.raises(openai.NotFoundError):
                one.responses.retrieve(salted.id)
            assert one.responses.retrieve(salted.id, extra_query={"cache_salt": "s"}) == salted
            with pytest.raises(openai.NotFoundError):
                ask(one, input="x", previous_response_id=salted.id)


CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "1"}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
MINE = {"type": "message", "id": "m1", "role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"model": "gpt-5"}, 404, "gpt-5"),
        ({"input": []}, 400, "input"),
        ({"input": 5}, 400, "input"),
        ({"input": [5]}, 400, "input"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, 400, "'input_image'"),
        ({"input": [CALL, {**RESULT, "output": [IMAGE]}]}, 400, "'input_image'"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, 400, "'web_search_call'"),
        ({"input": [{"role": "tool", "content": "x"}]}, 400, "role"),
        ({"input": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}]}, 400, "'output_text'"),
        ({"input": [RESULT]}, 400, "No tool call found for function call output with call_id 'c1'"),
        ({"input": [CALL]}, 400, "No tool output found for function call 'c1'"),
        ({"input": [CALL, CALL, RESULT]}, 400, "two function calls have the call_id 'c1'"),
        ({"input": [CALL, RESULT, RESULT]}, 400, "No tool call found"),
        ({"input": [{**CALL, "call_id": "c" * 300}]}, 400, "call_id"),
        ({"input": [MINE, MINE]}, 400, "Duplicate item found with id 'm1'"),
        ({"input": [{"type": "item_reference", "id": "msg_" + "0" * 32 + "o0"}]}, 404, "Item with id 'msg_0"),
        ({"previous_response_id": "resp_" + "0" * 32}, 404, "'resp_0"),
        ({"previous_response_id": "resp_1'; DROP TABLE responses"}, 404, "DROP"),
        ({"tools": [{"type": "web_search"}]}, 400, "'web_search'"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "h"}, "tools": TOOLS}, 400, "'h'"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, 400, "'allowed_tools'"),
        ({"background": True}, 400, "background"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"prompt": {"id": "p"}}, 400, "prompt"),
        ({"max_tokens": 5}, 400, "max_tokens"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"top_logprobs": 2}, 400, "include"),
        ({"include": ["everything"]}, 400, "include"),
        ({"reasoning": {"effort": "high"}}, 400, "'high'"),
        ({"reasoning": {"summary": "detailed"}}, 400, "'detailed'"),
        ({"text": {"verbosity": "low"}}, 400, "'low'"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}}, 400, "nothing"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
        ({"stream_options": {"include_obfuscation": False}}, 400, "stream_options"),
        ({"input": "a" * 9000}, 400, "context"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_refused(client: httpx.Client, fields: dict[str, Any], status: int, named: str) -> None:
    reply = client.post("/v1/responses", json={"input": HI, **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (status, "invalid_request_error")
    assert named in f"{error['param']} {error['message']}"


def test_a_call_left_open_by_the_response_before(caller: openai.OpenAI, calling: TextModel) -> None:
    first = ask(caller, input=script_messages(calling, CALLS), tools=TOOLS, max_output_tokens=40)
    with pytest.raises(openai.BadRequestError, match="No tool output found"):
        ask(caller, input="Never mind.", previous_response_id=first.id)


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "order=up", "after=msg_1", "limit=x"])
def test_a_list_of_items_that_cannot_be(client: httpx.Client, query: str) -> None:
    name = client.post("/v1/responses", json={"input": "x", "max_output_tokens": 1}).json()["id"]
    reply = client.get(f"/v1/responses/{name}/input_items?{query}")
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, query.partition("=")[0])
    assert client.get(f"/v1/responses/{name}?stream=true").status_code == 400


def test_a_stream_that_fails_ends_with_the_failure(sum_text: TextModel) -> None:
    class Failing(GatedModel):
        def forward(self, *args: Any) -> Any:
            raise RuntimeError("no such luck")

    with over_the_wire(new_app(new_engine(Failing()), sum_text)) as url, httpx.Client(base_url=url) as client:
        reply = client.post("/v1/responses", json={"input": "x", "stream": True}, timeout=30)
        events = events_of(reply.text)
    assert [name for name, _ in events[-2:]] == ["error", "response.failed"]
    failed = events[-1][1]["response"]
    assert (failed["status"], failed["error"]["code"], failed["output"]) == ("failed", "server_error", [])
    assert events[-2][1]["message"] == failed["error"]["message"]


def test_the_store_is_counted(client: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        [line] = [line for line in lines if line.startswith(f"hybrid_cache_response_store_{name} ")]
        return float(line.split()[1])

    before = value("responses"), value("bytes")
    client.post("/v1/responses", json={"input": "x" * 1000, "max_output_tokens": 1})
    assert (value("responses"), value("bytes") > before[1] + 1000) == (before[0] + 1, True)
    assert value("limit_bytes") == 64 << 20
