"""/v1/completions over a real server, on a model whose answers are known."""

from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.api.servers import BOS, IM_END, SCRIPT, TEXT, events_of, prompt_for, script_ids, script_prompt
from tests.fakes import sum_model_answer


def complete(client: httpx.Client, **fields: object) -> Any:
    reply = client.post("/v1/completions", json={"prompt": script_prompt(), "max_tokens": 20, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def choice(body: Any, index: int = 0) -> Any:
    found = body["choices"][index]
    assert found["index"] == index
    return found


def streamed(client: httpx.Client, **fields: object) -> Any:
    asked = {"prompt": script_prompt(), "max_tokens": 20, "stream": True, **fields}
    return events_of(client.post("/v1/completions", json=asked).text)


def text_of(events: Any, index: int = 0) -> str:
    choices = [c for e in events for c in e["choices"] if c["index"] == index]
    return "".join(c["text"] for c in choices)


def test_a_completion_is_the_script_and_ends_at_the_end_token(client: httpx.Client) -> None:
    body = complete(client, return_token_ids=True)
    assert choice(body)["text"] == TEXT
    assert choice(body)["finish_reason"] == "stop"
    assert choice(body)["token_ids"] == script_ids()
    assert body["object"] == "text_completion"
    assert body["model"] == "sum"
    assert body["usage"]["completion_tokens"] == len(SCRIPT) + 1


def test_a_stream_has_the_same_text_and_only_whole_characters(client: httpx.Client) -> None:
    events = streamed(client)
    pieces = [e["choices"][0]["text"] for e in events]
    assert pieces == ["Hel", "lo", " ", "€", " ST", "OP", " and", " on", ""]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("stop", "expected", "tokens"),
    [
        (["TO"], "Hello € S", 7),
        ("STOP", "Hello € ", 7),
        ("O", "Hello € ST", 7),
        (["lo €"], "Hel", 5),
        (["€", "lo"], "Hel", 2),
        (["never", "STOPPED"], TEXT, 10),
        (["H"], "", 1),
        (["on"], "Hello € STOP and ", 9),
    ],
)
def test_a_stop_string_ends_the_text_before_it_and_at_its_token(
    client: httpx.Client, stop: str | list[str], expected: str, tokens: int
) -> None:
    body = complete(client, stop=stop)
    assert choice(body)["text"] == expected
    assert choice(body)["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == tokens
    assert text_of(streamed(client, stop=stop)) == expected


def test_a_stop_string_is_kept_on_request(client: httpx.Client) -> None:
    body = complete(client, stop="TO", include_stop_str_in_output=True)
    assert choice(body)["text"] == "Hello € STO"
    assert choice(body)["stop_reason"] == "TO"
    assert text_of(streamed(client, stop="TO", include_stop_str_in_output=True)) == "Hello € STO"


def test_text_that_only_began_like_a_stop_string_is_released(client: httpx.Client) -> None:
    assert choice(complete(client, stop=" on and on"))["text"] == TEXT
    assert choice(complete(client, stop="STOP an action", max_tokens=8))["text"] == "Hello € STOP and"


def test_a_character_cut_off_by_the_limit_becomes_a_replacement_character(client: httpx.Client) -> None:
    body = complete(client, max_tokens=4)
    assert choice(body)["text"] == "Hello \ufffd"
    assert choice(body)["finish_reason"] == "length"
    assert text_of(streamed(client, max_tokens=4)) == "Hello \ufffd"


def test_a_stop_token_ends_the_answer_and_is_named(client: httpx.Client) -> None:
    body = complete(client, stop_token_ids=[script_ids()[5]])
    assert choice(body)["text"] == "Hello €"
    assert choice(body)["stop_reason"] == script_ids()[5]


def test_min_tokens_lets_stop_strings_and_end_tokens_pass(client: httpx.Client) -> None:
    assert choice(complete(client, stop="lo", min_tokens=3))["text"] == TEXT
    assert complete(client, min_tokens=12)["usage"]["completion_tokens"] == 20


def test_ignore_eos_goes_on_to_the_limit(client: httpx.Client) -> None:
    body = complete(client, ignore_eos=True, max_tokens=12, skip_special_tokens=False)
    assert choice(body)["finish_reason"] == "length"
    assert sum_model_answer(script_prompt(), 12)[10:] == [521, ord(".")]
    assert choice(body)["text"] == f"{TEXT}<|im_end|> w521."


def test_sixteen_tokens_are_the_default(client: httpx.Client) -> None:
    reply = client.post("/v1/completions", json={"prompt": prompt_for(400), "ignore_eos": True}).json()
    assert reply["usage"]["completion_tokens"] == 16


def test_several_prompts_and_choices_come_in_order(client: httpx.Client) -> None:
    prompts = [prompt_for(400), prompt_for(401), script_prompt()]
    body = complete(client, prompt=prompts, n=2, max_tokens=3, return_token_ids=True)
    assert [choice(body, i)["token_ids"] for i in range(6)] == [sum_model_answer(prompts[i // 2], 3) for i in range(6)]
    events = streamed(client, prompt=prompts, n=2, max_tokens=3)
    assert [text_of(events, i) for i in range(6)] == [choice(body, i)["text"] for i in range(6)]
    assert sum(c["finish_reason"] is not None for e in events for c in e["choices"]) == 6


def test_a_text_prompt_is_its_bytes_with_special_tokens_recognised(client: httpx.Client) -> None:
    body = complete(client, prompt="Hi<|im_end|>", max_tokens=0, echo=True, logprobs=0, return_token_ids=True)
    assert choice(body)["prompt_token_ids"] == [*b"Hi", IM_END]
    assert choice(body)["text"] == "Hi<|im_end|>"


def test_token_prompts_get_no_bos(client: httpx.Client) -> None:
    body = complete(client, prompt=[7, 8, 9], max_tokens=1, return_token_ids=True)
    assert choice(body)["prompt_token_ids"] == [7, 8, 9]
    assert BOS not in choice(body)["prompt_token_ids"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_every_prompt_token(client: httpx.Client, max_tokens: int) -> None:
    prompt = [300, 400, 500, 600, 700, 800]
    body = complete(client, prompt=[prompt], echo=True, logprobs=1, max_tokens=max_tokens, ignore_eos=True)
    logprobs = choice(body)["logprobs"]
    count = len(prompt) + max_tokens
    assert [len(logprobs[name]) for name in logprobs] == [count] * 4
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for i in range(1, count):
        top = logprobs["top_logprobs"][i]
        assert top[logprobs["tokens"][i]] == logprobs["token_logprobs"][i] <= max(top.values())
    if max_tokens:
        assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())
    text = choice(body)["text"]
    offsets = [*logprobs["text_offset"], len(text)]
    assert [text[a:b] for a, b in pairwise(offsets)] == logprobs["tokens"]
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}


def test_lm_eval_gets_exactly_one_token_even_at_the_end_token(client: httpx.Client) -> None:
    asked = {"max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    body = complete(client, prompt=[prompt_for(IM_END)], **asked)
    logprobs = choice(body)["logprobs"]
    assert len(logprobs["tokens"]) == 6
    assert logprobs["tokens"][-1] == "<|im_end|>"
    assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())


def test_streamed_logprobs_are_those_of_the_whole_answer(client: httpx.Client) -> None:
    fields = {"echo": True, "logprobs": 2, "stop": "STOP an action"}
    whole = choice(complete(client, **fields))
    events = streamed(client, **fields)
    parts = [e["choices"][0]["logprobs"] for e in events]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for part in parts for x in part[name]] == whole["logprobs"][name]
    assert text_of(events) == whole["text"]


def test_the_usage_chunk_comes_last_and_only_on_request(client: httpx.Client) -> None:
    events = streamed(client, stream_options={"include_usage": True})
    assert all(e["usage"] is None for e in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 10
    assert all("usage" not in e for e in streamed(client))


def test_the_second_request_finds_the_first_one_in_the_cache(client: httpx.Client) -> None:
    prompt = [int(t) for t in range(300, 600)]
    first = complete(client, prompt=prompt, max_tokens=1, cache_salt="a")["usage"]["prompt_tokens_details"]
    again = complete(client, prompt=prompt, max_tokens=1, cache_salt="a")["usage"]["prompt_tokens_details"]
    other = complete(client, prompt=prompt, max_tokens=1, cache_salt="b")["usage"]["prompt_tokens_details"]
    assert first["cached_tokens"] == 0
    assert first["cache_write_tokens"] > 0
    assert again["cached_tokens"] == 300
    assert other["cached_tokens"] == 0


def test_explicit_mode_without_a_mark_keeps_nothing(client: httpx.Client) -> None:
    fields = {"prompt": list(range(300, 600)), "max_tokens": 1, "cache_salt": "c"}
    for _ in range(2):
        usage = complete(client, **fields, prompt_cache_options={"mode": "explicit"})["usage"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}


def test_logit_bias_and_penalties_reach_the_model(client: httpx.Client) -> None:
    body = complete(client, logit_bias={"400": 50}, max_tokens=3, return_token_ids=True)
    assert choice(body)["token_ids"] == [400, 400, 400]


def test_an_answer_ends_with_length_where_the_context_ends(client: httpx.Client) -> None:
    body = complete(client, prompt=[5] * 4090, max_tokens=100, ignore_eos=True)
    assert choice(body)["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 4096
