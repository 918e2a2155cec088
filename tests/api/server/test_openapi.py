"""schemathesis reads the server's own description and tries to break it: no 5xx, and errors in the form of the dialect.

It takes seconds to import, in every process that collects tests: so only the test does.
"""

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings

if TYPE_CHECKING:
    from schemathesis import Case

EXAMPLES = 15  # for each operation, valid and invalid ones


def check(case: "Case") -> None:
    from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

    if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
        case.body["max_tokens"] = min(case.body["max_tokens"], 2)  # the answers are not the point
    if isinstance(case.body, dict) and case.path == "/v1/responses":
        case.body["max_output_tokens"] = 2
    reply = case.call()
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        theirs = {"type", "message"} if case.path.startswith("/v1/messages") else {"message", "type", "param", "code"}
        assert set(reply.json()["error"]) == theirs
    elif case.path != "/metrics":
        case.validate_response(reply, checks=[content_type_conformance, status_code_conformance])


def test_whatever_is_asked_no_5xx(url: str) -> None:
    import schemathesis
    from schemathesis import GenerationMode

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/health"} <= {o.path for o in operations}
    few = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not operation.body:
                continue
            few(given(case=operation.as_strategy(generation_mode=mode))(check))()
