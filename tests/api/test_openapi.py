"""The server does what its own description says, whatever it is sent."""

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from hybrid_cache.api.tokenizer import TextModel
from tests.api.servers import new_app, new_engine, write_text_model

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/v1/models",
    "/v1/models/{name}",
    "/health",
    "/ready",
    "/ping",
    "/version",
    "/metrics",
]


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("described")
    write_text_model(folder)
    app: FastAPI = new_app(new_engine(), TextModel.load(folder))
    return app.openapi()


def test_every_route_is_described(description: dict[str, dict[str, object]]) -> None:
    assert sorted(description["paths"]) == sorted(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_answers_are_those_described(url: str, description: dict[str, object], path: str) -> None:
    """Random requests, some right and most wrong: no 5xx, no status, type or body that is not in the description."""
    schema = schemathesis.openapi.from_dict(description)
    (operation,) = [found.ok() for found in schema.get_all_operations() if found.ok().path == path]

    @settings(
        max_examples=8,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def ask(case: Case) -> None:
        case.validate_response(case.call(base_url=url, timeout=30), checks=CHECKS)

    ask()
