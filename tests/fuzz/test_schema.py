"""schemathesis on the description that a real server gives of itself, for minutes: FUZZ_EXAMPLES for each operation and
mode (1,000), FUZZ_SEED. A few examples for a small model are in tests/api/server/test_openapi.py.

It takes seconds to import: so only the test does.
"""

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz.bodies import RESPONSES
from tests.fuzz.cases import COUNTS, Case
from tests.fuzz.judge import fault_of
from tests.soak.common import HEALTH_S
from tests.soak.server import serve
from tests.soak.watch import watching
from tests.soak.wire import Reply

if TYPE_CHECKING:
    import schemathesis

SEED = int(os.environ.get("FUZZ_SEED", "1"))
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
FEW_TOKENS = 2


def check(case: "schemathesis.Case", key: str) -> None:
    """Sends one case, and judges the answer as that to any other request."""
    if isinstance(case.body, dict):
        for name in COUNTS if case.path != RESPONSES else COUNTS[2:]:  # the answers are not the point
            if not isinstance(case.body.get(name), str | list | dict):
                case.body[name] = FEW_TOKENS
    reply = case.call(headers={"Authorization": f"Bearer {key}"})
    headers = {name.lower(): values[0] for name, values in reply.headers.items()}
    asked = Case(case.method, case.path, b"", {}, [])
    assert fault_of(asked, Reply(reply.status_code, headers, reply.content)) is None


@pytest.mark.slow
def test_no_operation_breaks_on_what_its_schema_allows_or_forbids() -> None:
    import schemathesis
    from schemathesis import GenerationMode

    many = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    with serve() as server, watching(server) as watch:
        headers = {"Authorization": f"Bearer {server.key}"}
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json", headers=headers)
        operations = [result.ok() for result in schema.get_all_operations()]
        assert {"/v1/chat/completions", "/v1/completions", "/tokenize", "/health"} <= {o.path for o in operations}
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                if mode is GenerationMode.NEGATIVE and not operation.body:
                    continue
                one = given(case=operation.as_strategy(generation_mode=mode))(lambda case: check(case, server.key))
                seed(SEED)(many(one))()
        assert server.alive
        assert "Traceback" not in server.log.read_text()
        assert watch.health().longest <= HEALTH_S
