"""`hybrid_cache.LLM` says what the server says, from any thread, until it is closed."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hybrid_cache import LLM
from hybrid_cache.errors import EngineStopped, HybridCacheError, RequestError
from tests.api.server.test_server_process import server

SYSTEM = {"role": "system", "content": "You are brief, and answer in one sentence what you were told. " * 6}
TALK = [SYSTEM, {"role": "user", "content": "The box has 4 pencils in it. How many pencils are in the box?"}]
BUDGET = "64MiB"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(budget=BUDGET) as opened:
        yield opened


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server() as started:
        yield started.url


def posted(url: str, path: str, **body: Any) -> dict[str, Any]:
    reply = httpx.post(f"{url}/v1/{path}", json={"return_token_ids": True, **body}, timeout=60)
    found: dict[str, Any] = reply.raise_for_status().json()
    return found


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 7, "max_tokens": 24}, {"stop": ["pencil"]}])
def test_chat_says_what_the_server_says(llm: LLM, url: str, options: dict[str, Any]) -> None:
    reply = posted(url, "chat/completions", messages=TALK, **options)
    choice, usage = reply["choices"][0], reply["usage"]
    own = llm.chat(TALK, **options)
    assert own.text == choice["message"]["content"]
    assert list(own.token_ids) == choice["token_ids"]
    assert own.finish_reason == choice["finish_reason"]
    assert (own.prompt_tokens, own.completion_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])


def test_generate_says_what_the_server_says_also_to_several_texts(llm: LLM, url: str) -> None:
    texts = ["The lamp is", "The box has", "Nobody knows"]
    reply = posted(url, "completions", prompt=texts, temperature=0, max_tokens=9)
    own = llm.generate(texts, temperature=0, max_tokens=9)
    assert [each.text for each in own] == [choice["text"] for choice in reply["choices"]]
    assert [list(each.token_ids) for each in own] == [choice["token_ids"] for choice in reply["choices"]]
    assert own[1].token_ids == llm.generate(texts[1], temperature=0, max_tokens=9).token_ids


def test_the_second_turn_is_cached_and_says_the_same_without_a_cache(llm: LLM) -> None:
    first = llm.chat(TALK)
    turn = [*TALK, {"role": "assistant", "content": first.text}, {"role": "user", "content": "Who are you?"}]
    second, computed = llm.chat(turn), llm.chat(turn, use_cache=False)
    assert second.cached_tokens >= 64
    assert second.cached_tokens < second.prompt_tokens
    assert computed.cached_tokens == 0
    assert second.token_ids == computed.token_ids


def test_a_batch_of_conversations_answers_each(llm: LLM) -> None:
    talks = [[SYSTEM, {"role": "user", "content": f"The box has {n} pencils in it. How many?"}] for n in range(1, 6)]
    alone = [llm.chat(talk, use_cache=False).token_ids for talk in talks]
    assert [each.token_ids for each in llm.chat(talks)] == alone
    assert [each.token_ids for each in llm.chat(talks[:1])] == alone[:1]


def test_more_prompts_than_can_wait_are_answered_in_turn() -> None:
    with LLM(budget=BUDGET, max_waiting=2) as small:
        assert len(small.generate([f"{n} boxes" for n in range(9)], max_tokens=1)) == 9


def test_a_stream_is_the_same_text_and_may_be_left(llm: LLM) -> None:
    assert "".join(llm.stream(TALK)) == llm.chat(TALK).text
    pieces = llm.stream(TALK)
    assert next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert llm.chat(TALK).text


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda llm: llm.chat("Hello!"), "messages is 'Hello!', must be a list of objects"),
        (lambda llm: llm.chat([]), "messages is []"),
        (lambda llm: llm.chat([{"role": "usr", "content": "x"}]), "messages.0.role is 'usr'"),
        (lambda llm: llm.chat([[*TALK], ["x"]]), "messages.0 is 'x'"),
        (lambda llm: llm.chat(TALK, temperature=-1), "temperature is -1"),
        (lambda llm: llm.chat(TALK, max_tokens=1.5), "max_tokens is 1.5"),
        (lambda llm: llm.generate(3), "a prompt is 3, must be a text"),
        (lambda llm: llm.generate(["x", None]), "a prompt is None, must be a text"),
        (lambda llm: llm.generate("box " * 40_000), "context"),
        (lambda llm: llm.stream([{"role": "user"}]), "messages.0"),
    ],
)
def test_bad_input_is_refused_with_the_value(llm: LLM, call: Any, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        call(llm)
    assert said in str(refused.value)


def test_answers_in_a_form_and_adapters_are_as_on_the_server() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [4, 5]}}}
    with LLM(budget=BUDGET, adapter="embedded-choreo", threads=1) as adapted:
        assert repr(adapted) == "LLM('embedded+embedded-choreo')"
        assert adapted.chat(TALK, response_format=form).text in ("4", "5")


def test_a_shorter_context_and_another_template_are_as_on_the_server(tmp_path: Path) -> None:
    template = tmp_path / "short.jinja"
    template.write_text("{{ messages[-1].content }}")
    with LLM(budget=BUDGET, max_model_len=256, chat_template=template) as short:
        question = [{"role": "user", "content": "The box has"}]
        asked, plain = short.chat(question, max_tokens=4), short.generate("The box has", max_tokens=4)
        assert asked.prompt_tokens == plain.prompt_tokens
        with pytest.raises(RequestError, match="256"):
            short.generate("box " * 300)
    with pytest.raises(HybridCacheError, match="max_model_len is 255"):
        LLM(budget=BUDGET, max_model_len=255)
    with pytest.raises(HybridCacheError, match="revision 'v1' is for names of the hub"):
        LLM(revision="v1")


def test_an_option_that_there_is_not_is_named(llm: LLM) -> None:
    with pytest.raises(TypeError, match="'temprature' is no option of an answer"):
        llm.chat(TALK, temprature=0)  # type: ignore[call-arg]


def test_a_model_that_is_not_there_and_a_budget_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HybridCacheError, match="nowhere"):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(HybridCacheError, match="holds no sequence"):
        LLM(budget="1B")


def test_it_answers_while_an_event_loop_runs_and_on_several_threads(llm: LLM) -> None:
    expected = llm.chat(TALK).token_ids

    async def ask() -> tuple[int, ...]:
        return llm.chat(TALK).token_ids

    assert asyncio.run(ask()) == expected
    found: list[tuple[int, ...]] = []
    threads = [threading.Thread(target=lambda: found.append(llm.chat(TALK).token_ids)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 4


def test_what_is_closed_says_so_and_another_one_can_be_opened() -> None:
    texts, before = [], threads_of_ours()
    for _ in range(2):
        with LLM(budget=BUDGET) as opened:
            texts.append(opened.chat(TALK).text)
            pieces = opened.stream(TALK)
            next(pieces)
        assert repr(opened) == "LLM('embedded', closed)"
        with pytest.raises(EngineStopped, match="closed"):
            opened.chat(TALK)
        with pytest.raises(EngineStopped, match="closed"):
            next(pieces)
        opened.close()
    assert texts[0] == texts[1]
    assert threads_of_ours() == before


def test_what_is_closed_holds_no_memory() -> None:
    opened = LLM(budget=BUDGET)
    engine = weakref.ref(opened._text.engine)
    opened.chat(TALK)
    opened.close()
    gc.collect()
    assert engine() is None


def threads_of_ours() -> int:
    return sum(thread.name == "hybrid-cache-llm" for thread in threading.enumerate())


def test_a_program_that_does_not_close_it_ends() -> None:
    code = (
        f"from hybrid_cache import LLM; print(LLM(budget={BUDGET!r}).generate('The box', max_tokens=2).finish_reason)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "length", "")
