"""What a model's generation_config.json asks for holds where a request says nothing, and no further."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import RequestError
from tests.api.servers import IM_END, SCRIPT, TEXT, new_app, new_engine, over_the_wire, prompt_for, script_ids

Complete = Callable[..., Any]


@pytest.fixture
def folder(sum_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sum_folder, tmp_path / "model"))


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., Complete]]:
    """A server of the model with these defaults -> what asks it for a completion."""
    with ExitStack() as stack:

        def start(**defaults: object) -> Complete:
            values = {"do_sample": False, "eos_token_id": [IM_END], **defaults}
            (folder / "generation_config.json").write_text(json.dumps(values))
            url = stack.enter_context(over_the_wire(new_app(new_engine(), TextModel.load(folder))))
            client = stack.enter_context(httpx.Client(base_url=url, timeout=30))

            def complete(**fields: object) -> Any:
                asked = {"prompt": prompt_for(script_ids()[0]), "return_token_ids": True, **fields}
                reply = client.post("/v1/completions", json=asked)
                assert reply.status_code == 200, reply.text
                return reply.json()["choices"][0]

            return complete

        yield start


def test_the_length_of_an_answer(serve: Callable[..., Complete]) -> None:
    complete = serve(max_new_tokens=3, max_length=100)
    assert len(complete()["token_ids"]) == 3
    assert complete(max_tokens=20)["text"] == TEXT


def test_the_length_of_prompt_and_answer(serve: Callable[..., Complete]) -> None:
    complete = serve(max_length=9)
    assert len(complete()["token_ids"]) == 4
    assert len(complete(prompt=prompt_for(script_ids()[0], length=40))["token_ids"]) == 1


def test_the_least_length_of_an_answer_gives_way_to_what_is_asked(serve: Callable[..., Complete]) -> None:
    complete = serve(min_new_tokens=15)
    assert len(complete(max_tokens=20)["token_ids"]) >= 15
    assert len(complete(max_tokens=20, min_tokens=0)["token_ids"]) == len(SCRIPT) + 1
    assert len(complete(max_tokens=5)["token_ids"]) == 5


def test_stop_strings_beside_those_of_a_request(serve: Callable[..., Complete]) -> None:
    complete = serve(stop_strings=["STOP"])
    assert complete(max_tokens=20)["text"] == TEXT.split("STOP")[0]
    assert complete(max_tokens=20, stop=["lo"])["text"] == "Hel"
    assert complete(max_tokens=10, stop=["never"])["text"] == TEXT.split("STOP")[0]
    assert complete(max_tokens=len(SCRIPT), ignore_eos=True)["text"] == TEXT


def test_the_least_probability_of_a_token(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"min_p": 0.25, "top_k": -1}')
    defaults = TextModel.load(folder).defaults
    assert (defaults.min_p, defaults.top_k) == (0.25, 0)


def test_a_text_at_which_the_tokenizer_fails_is_the_requests_fault(folder: Path) -> None:
    """Expressions may need more steps than the library gives them, which it reports as no ordinary exception."""
    values = json.loads((folder / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(z|z)+$"}, "content": "x"}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = TextModel.load(folder).tokenizer
    with pytest.raises(RequestError, match="tokenizer cannot read the text"):
        tokenizer.encode("z" * 40 + "b")
