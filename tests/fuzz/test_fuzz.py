"""Mutated requests against a real server: a few hundred, and in the slow tests FUZZ_CASES (50,000) with FUZZ_SEED."""

import asyncio
import os
from collections.abc import Iterator
from copy import deepcopy

import pytest

from tests.fuzz.__main__ import fuzz
from tests.fuzz.bodies import BODIES
from tests.fuzz.cases import Case, build
from tests.fuzz.judge import fault_of
from tests.fuzz.trees import EMPTY
from tests.soak.common import Options, Report, play
from tests.soak.server import Server, get, serve
from tests.soak.wire import Reply, exchange, post, read

SEED = int(os.environ.get("FUZZ_SEED", "1"))
MANY = int(os.environ.get("FUZZ_CASES", "50000"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as started:
        yield started


def run(server: Server, cases: int) -> None:
    report = Report("fuzz")
    play(fuzz, server, Options(clients=12, cases=cases, seed=SEED), report)
    report.show()
    assert report.kept, [promise for promise in report.promises if not promise.kept]


def test_valid_requests_are_answered(server: Server) -> None:
    for path, body in BODIES:
        reply = asyncio.run(exchange(server.port, post(path, body, key=server.key), timeout_s=30))
        assert reply.status == 200, (path, body, reply.body)
        assert fault_of(case_of(), reply) is None


def test_a_few_hundred_mutated_requests_break_nothing(server: Server) -> None:
    run(server, 300)


@pytest.mark.slow
def test_fifty_thousand_mutated_requests_break_nothing(server: Server) -> None:
    run(server, MANY)


def test_a_case_does_not_depend_on_those_before_it() -> None:
    """Or `--replay` would send another, and bodies would grow with every edit."""
    known = deepcopy(EMPTY)
    whole = [build(SEED, number).body for number in range(3000)]
    assert known == EMPTY
    assert [build(SEED, number).body for number in range(2999, -1, -30)] == whole[::-30]


def case_of(**fields: object) -> Case:
    case = Case("POST", "/v1/completions", b"{}", {}, [])
    for name, value in fields.items():
        setattr(case, name, value)
    return case


def reply_of(status: int, body: bytes, kind: str = "application/json") -> Reply:
    return Reply(status, {"content-type": kind}, body)


OVERLOADED = b'{"error": {"message": "full", "type": "t", "param": null, "code": "server_overloaded"}}'
FAULTS = {
    "a bug": reply_of(500, OVERLOADED),
    "an engine that is gone": reply_of(503, OVERLOADED.replace(b"overloaded", b"unavailable")),
    "an error of the framework": reply_of(422, b'{"detail": []}'),
    "a page for people": reply_of(400, b"<html>", "text/html"),
    "no answer": Reply(),
    "NaN": reply_of(200, b'{"logprob": NaN}'),
    "half an answer": reply_of(200, b'{"id": '),
    "a stream without an end": reply_of(200, b'data: {"id": 1}\n\n', "text/event-stream"),
    "a stream that fails": reply_of(
        200, b'data: {"error": {"code": "internal_error"}}\n\ndata: [DONE]\n\n', "text/event-stream"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen(name: str) -> None:
    assert fault_of(case_of(), FAULTS[name]) is not None


def test_being_full_and_being_wrong_are_no_faults() -> None:
    assert fault_of(case_of(), reply_of(503, OVERLOADED)) is None
    assert fault_of(case_of(), reply_of(400, OVERLOADED)) is None
    assert fault_of(case_of(framed=False), Reply()) is None


def test_a_seed_and_a_number_name_one_request() -> None:
    assert [build(3, n).raw("k") for n in range(200)] == [build(3, n).raw("k") for n in range(200)]
    assert len({build(3, n).raw("k") for n in range(200)}) > 150


def test_without_its_edits_a_case_is_a_valid_request(server: Server) -> None:
    for number in range(20):
        case = build(SEED, number, frozenset())
        assert case.told == []
        assert asyncio.run(exchange(server.port, case.raw(server.key), timeout_s=30)).status == 200


def test_replies_are_read_whatever_their_framing(server: Server) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    assert read(chunked).body == b"abcde"
    assert read(b"HTTP/1.1 100 Continue\r\n\r\n" + chunked).status == 200
    assert read(b"HTTP/1.1 400 Bad\r\nContent-Length: 2\r\n\r\nabHTTP/1.1 200 OK\r\n\r\n").body == b"ab"
    assert read(b"") == read(b"nonsense") == Reply()
    assert get(server.port, "/health")[0] == 200
