"""What clients talk to: sends each request to a replica, and to another one where that could not answer.

Nothing of an answer is let out before its status and the first of its body are here. Up to there a request whose
replica has gone, or that is full, or does not know what the request names, is sent to another replica, to each at most
once. Later a stream that breaks ends with an error event of its dialect.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrid_cache.api.ray.call import NAMED, REPLICA, Call, names_in
from hybrid_cache.api.ray.chain import chain_of
from hybrid_cache.api.ray.fleet import Fleet
from hybrid_cache.api.ray.sessions import session_in
from hybrid_cache.api.server.bodies import MAX_VALUES, parse_json
from hybrid_cache.api.server.errors import ANTHROPIC_PATH, Problem, current_request_id, problem_of
from hybrid_cache.api.server.exposure import LOOPBACK_NAMES
from hybrid_cache.api.server.gate import LOOKING
from hybrid_cache.api.server.middleware import ApiKeys, BodyLimit, Hosts
from hybrid_cache.api.server.process import ServeOptions
from hybrid_cache.api.server.refusal import send_problem
from hybrid_cache.api.server.responses import event, named_event
from hybrid_cache.api.server.tenants import salt_of
from hybrid_cache.errors import EngineStopped

SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
EVERYWHERE = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})  # asked of each replica
NAMING = ("/v1/responses", "choreography")  # a path and a field: their answers give names to what is kept
FULL = 503
UNKNOWN = (404, 409)
MOST_TRIES = 8  # of a request whose replicas go one after the other
BROKEN = "The replica that was answering is gone; what it has said so far is all there is. Send the request again."

Reach = Callable[[Call], AsyncGenerator[list[Message]]]
"""Sends a call to the replica that a router chooses -> the ASGI messages of its answer. Raises `Gone` where that ends
before the answer does.
"""


class Gone(Exception):
    """The replica of a call has gone."""


def ingress(options: ServeOptions, fleet: Fleet, reach: Reach, secret: bytes) -> ASGIApp:
    """An application in front of replicas that serve with these options."""
    app: ASGIApp = Ingress(fleet, reach, secret)
    app = BodyLimit(app, options.max_body_bytes, MAX_VALUES, options.exposure.patience.body_timeout_s)
    keys = tuple(dict.fromkeys((*options.api_keys, *options.operator_keys)))
    if keys:
        app = ApiKeys(app, keys, shared=options.shared_cache, operator_keys=options.operator_keys)
    if options.exposure.allow_hosts:
        app = Hosts(app, (*LOOPBACK_NAMES, *options.exposure.allow_hosts))
    return _Alive(app)


@dataclass(slots=True)
class Answer:
    """As much of one as has come."""

    start: Message | None = None  # held back
    is_out: bool = False  # some of it has been sent to the client
    is_whole: bool = False

    @property
    def status(self) -> int:
        return int(self.start["status"]) if self.start is not None else FULL

    @property
    def headers(self) -> Headers:
        return Headers(raw=self.start["headers"]) if self.start is not None else Headers()

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")


@dataclass(slots=True)
class Ingress:
    """See the module docstring. An ASGI application behind those that read bodies and check keys."""

    fleet: Fleet
    reach: Reach
    secret: bytes
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call(scope, await _body(receive))
        if scope["path"] in EVERYWHERE and call.to is None:
            work = self._everywhere(call, send)
        else:
            work = self._somewhere(call, send)
        await _unless_gone(work, receive)

    def _call(self, scope: Scope, body: bytes) -> Call:
        headers, path = Headers(scope=scope), scope["path"]
        kept = {name: scope[name] for name in SCOPE if name in scope}
        kept["headers"] = [each for each in scope["headers"] if each[0] != REPLICA.encode()]
        call = Call(next(self._numbers), {**kept, "client": scope.get("client")}, body, fleet=self.fleet)
        parsed = _parsed(body) if scope["method"] not in LOOKING else None
        call.to, call.names = headers.get(REPLICA), names_in(path, parsed)
        if scope["method"] in LOOKING and call.to is None and not call.names:
            call.to = next(iter(self.fleet.marks), None)  # pages and lists are of one replica
        if isinstance(parsed, Mapping):
            salt = parsed.get("cache_salt")
            call.chain = chain_of(parsed, salt_of(salt if isinstance(salt, str) else None), self.secret)
            call.session = session_in(headers, parsed)
            call.gives_names = path.startswith(NAMING[0]) or NAMING[1] in parsed
            call.names_model = bool(parsed.get("model"))
        return call

    async def _everywhere(self, call: Call, send: Send) -> None:
        """Asks each replica -> the answer of the first that refuses, else of the last one."""
        marks = self.fleet.marks or [""]
        for mark in marks:
            held = list[Message]()
            each = replace(call, id=next(self._numbers), to=mark, tried=set())

            async def keep(message: Message, held: list[Message] = held) -> None:
                held.append(message)

            await self._somewhere(each, keep)
            if mark == marks[-1] or held[0]["status"] >= 400:
                for message in held:
                    await send(message)
                return

    async def _somewhere(self, call: Call, send: Send) -> None:
        for _ in range(MOST_TRIES + len(self.fleet.marks)):
            answer = Answer()
            try:
                await self._once(call, answer, send)
            except Gone:
                self.fleet.failed(call)
            finally:
                self.fleet.ended(call, time.monotonic())
            if answer.is_whole:
                return
            if answer.is_out:
                return await self._break_off(call, answer, send)
        problem = problem_of(EngineStopped("no replica could answer"))
        await send_problem(problem, dict(call.scope), _nothing, send)

    async def _once(self, call: Call, answer: Answer, send: Send) -> None:
        """Sends it to one replica, and lets its answer out unless another one is to be asked."""
        async with aclosing(self.reach(call)) as batches:
            async for batch in batches:
                for message in batch:
                    if message["type"] == "http.response.start":
                        answer.start = message
                        if self._goes_on(call, answer):
                            return
                        continue
                    if not answer.is_out and answer.start is not None:
                        self._begin(call, answer, message)
                        await send(_without_request_id(answer.start))
                        answer.is_out = True
                    await send(message)
                    answer.is_whole = not message.get("more_body", False)

    def _begin(self, call: Call, answer: Answer, first: Message) -> None:
        """The first of the body is here, so that the answer is to be let out."""
        self.fleet.answers(call)
        mark = answer.headers.get(REPLICA, "")
        if call.tried and call.names and answer.status < 400:
            self.fleet.place(call.names, mark)
        if call.gives_names and answer.status < 400:
            self.fleet.place(NAMED.findall(first.get("body", b"").decode("utf-8", "replace")), mark)

    def _goes_on(self, call: Call, answer: Answer) -> bool:
        """Whether another replica is to be asked, as this one is full or does not know what the request names."""
        unknown = answer.status in UNKNOWN and (call.names or call.names_model)
        if call.to is not None or not (answer.status == FULL or unknown):
            return False
        call.tried.add(answer.headers.get(REPLICA, ""))
        return not call.tried.issuperset(self.fleet.marks)

    async def _break_off(self, call: Call, answer: Answer, send: Send) -> None:
        """Raises Gone where the client can only see that by its connection."""
        if not answer.is_stream:
            raise Gone
        await send({"type": "http.response.body", "body": broken(call.scope["path"]), "more_body": False})


def broken(path: str) -> bytes:
    """The last event of a stream whose replica has gone."""
    problem = Problem(FULL, BROKEN, "server_unavailable", code="replica_gone", retry=True)
    if path.startswith(ANTHROPIC_PATH):
        return named_event("error", problem.body_for(path))
    if path.startswith(NAMING[0]):
        return named_event("error", {"code": problem.code, "message": problem.message, "param": None})
    return event(problem.body())


async def _body(receive: Receive) -> bytes:
    parts, more = list[bytes](), True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _parsed(body: bytes) -> object:
    """None for what a replica will refuse."""
    try:
        return parse_json(body)
    except (ValueError, RecursionError):
        return None


async def _unless_gone(work: Coroutine[object, object, None], receive: Receive) -> None:
    """Does the work, unless the client goes away before its end."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
    finally:
        for each in (task, gone):
            each.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(each, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _without_request_id(start: Message) -> Message:
    """What stands before us gives each request its id, and names it to the client."""
    return {**start, "headers": [each for each in start["headers"] if each[0].lower() != b"x-request-id"]}


class _Alive:
    """Has a beginning and an end, which take no time, and knows the id that a request has got before it came here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for event_name in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event_name}.complete"})
        elif scope["type"] == "http":
            current_request_id.set(Headers(scope=scope).get("x-request-id"))
            await self._app(scope, receive, send)
