"""The `openai` client against a real server."""

import threading
import time
from collections.abc import Iterator

import openai
import pytest

from hybrid_cache.api.text.tokenizer import TextModel
from tests.api.servers import TEXT, GatedModel, new_app, new_engine, over_the_wire, script_messages, script_prompt


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(api: openai.OpenAI, sum_text: TextModel) -> None:
    reply = api.chat.completions.create(model="sum", messages=script_messages(sum_text), temperature=0)
    assert reply.choices[0].message.content == TEXT
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == 10
    again = api.chat.completions.create(model="sum", messages=script_messages(sum_text), temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens
    assert again._request_id


def test_chat_stream(api: openai.OpenAI, sum_text: TextModel) -> None:
    chunks = list(
        api.chat.completions.create(
            model="sum",
            messages=script_messages(sum_text),
            stream=True,
            stream_options={"include_usage": True},
            n=2,
        )
    )
    for index in range(2):
        deltas = [c.delta for chunk in chunks for c in chunk.choices if c.index == index]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == TEXT
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 20


def test_the_clients_own_stream_helper(api: openai.OpenAI, sum_text: TextModel) -> None:
    with api.chat.completions.stream(model="sum", messages=script_messages(sum_text), logprobs=True) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT
    assert len(final.choices[0].logprobs.content) == 10


def test_completions_with_echo_and_logprobs(api: openai.OpenAI) -> None:
    reply = api.completions.create(model="sum", prompt="Hi!", max_tokens=0, echo=True, logprobs=1)
    assert reply.choices[0].text == "Hi!"
    assert reply.choices[0].logprobs.tokens == ["H", "i", "!"]
    assert reply.choices[0].logprobs.token_logprobs[0] is None
    pieces = api.completions.create(model="sum", prompt=script_prompt(), max_tokens=20, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == TEXT


def test_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == ["sum", "sum-alias"]
    assert api.models.retrieve("sum").id == "sum"


def test_cache_fields(api: openai.OpenAI) -> None:
    breakpoint_part = {"type": "text", "text": "x" * 200, "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}
    messages = [
        {"role": "system", "content": [breakpoint_part]},
        {"role": "user", "content": "first question, long enough to reach over the end of a tile of the grid"},
    ]
    fields = {"prompt_cache_options": {"mode": "explicit"}, "cache_salt": "openai-test"}
    api.chat.completions.create(model="sum", messages=messages, max_tokens=1, extra_body=fields)
    messages[1]["content"] = "a second question"
    reply = api.chat.completions.create(model="sum", messages=messages, max_tokens=1, extra_body=fields)
    assert 128 <= reply.usage.prompt_tokens_details.cached_tokens < 216


def test_errors_have_the_clients_classes(api: openai.OpenAI) -> None:
    hi = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.NotFoundError) as missing:
        api.chat.completions.create(model="gpt-9", messages=hi)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        api.chat.completions.create(model="sum", messages=hi, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        api.completions.create(model="sum", prompt=[1] * 5000)
    assert long.value.code == "context_length_exceeded"


def test_a_wrong_key_is_an_authentication_error(sum_text: TextModel) -> None:
    with over_the_wire(new_app(new_engine(), sum_text, api_keys=("secret",))) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="secret") as client:
            assert list(client.models.list())


def test_the_client_retries_while_the_queue_is_full(sum_text: TextModel) -> None:
    model = GatedModel()
    with over_the_wire(new_app(new_engine(model, max_running=1, max_waiting=1), sum_text)) as url:
        asked = {"model": "sum", "prompt": script_prompt(), "max_tokens": 1}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            threads = [threading.Thread(target=lambda: client.completions.create(**asked)) for _ in range(2)]
            threads[0].start()
            assert model.reached.wait(10)
            threads[1].start()
            time.sleep(0.5)  # until the second one waits
            with pytest.raises(openai.InternalServerError) as full:
                client.completions.create(**asked)
            assert full.value.status_code == 503
            assert full.value.response.headers["retry-after"] == "1"
            threading.Timer(0.3, model.gate.set).start()
            assert client.with_options(max_retries=2).completions.create(**asked).usage.completion_tokens == 1
            for thread in threads:
                thread.join(10)


def test_a_stream_that_is_closed_early_leaves_the_server_well(api: openai.OpenAI, sum_text: TextModel) -> None:
    for _ in range(3):
        fields = {"ignore_eos": True}
        messages = script_messages(sum_text)
        with api.chat.completions.create(
            model="sum", messages=messages, stream=True, max_tokens=4000, extra_body=fields
        ) as stream:
            next(iter(stream))
    assert api.chat.completions.create(model="sum", messages=messages).choices[0].message.content == TEXT
