"""instructor: nested models by its several modes, and once more where a model does not validate."""

from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, ConfigDict, field_validator

from tests.conformance.conftest import MODEL

WHY = "instructor needs versions of its own: make conformance"
instructor = pytest.importorskip("instructor", reason=WHY)

ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "What is where?"}], "max_tokens": 300}


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    row: Literal["upper", "lower"]
    box: Literal[1, 2, 3]


class Find(BaseModel):
    """What was found, and where."""

    model_config = ConfigDict(extra="forbid")
    place: Place
    lamps: Literal[0, 1]


@pytest.fixture(scope="module")
def of_openai(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def of_anthropic(server: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(params=["openai TOOLS", "openai JSON_SCHEMA", "openai MD_JSON", "anthropic TOOLS", "anthropic JSON"])
def client(request: pytest.FixtureRequest) -> Any:
    """By dialect and mode. One that only says in the prompt what it wants needs the server's help with this model."""
    dialect, mode = request.param.split()
    schema, more = Find.model_json_schema(), {}
    if mode == "MD_JSON":
        more["extra_body"] = {"structured_outputs": {"json": schema}}
    if mode == "JSON":
        more["extra_body"] = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    if dialect == "openai":
        return instructor.from_openai(request.getfixturevalue("of_openai"), mode=instructor.Mode[mode], **more)
    return instructor.from_anthropic(request.getfixturevalue("of_anthropic"), mode=instructor.Mode[mode], **more)


def test_a_nested_model(client: Any) -> None:
    found, completion = client.chat.completions.create_with_completion(response_model=Find, max_retries=0, **ASKED)
    assert isinstance(found, Find)
    assert completion.usage
    *_, last = client.chat.completions.create_partial(response_model=Find, max_retries=0, **ASKED)
    assert last.model_dump() == found.model_dump()


def test_once_more(client: Any) -> None:
    tries: list[Find] = []

    class Picky(Find):
        @field_validator("lamps")
        @classmethod
        def at_the_third_try(cls, value: int) -> int:
            tries.append(value)  # type: ignore[arg-type]
            if len(tries) < 3:
                raise ValueError("that is too dark")
            return value

    assert isinstance(client.chat.completions.create(response_model=Picky, max_retries=3, **ASKED), Picky)
    assert len(tries) == 3
