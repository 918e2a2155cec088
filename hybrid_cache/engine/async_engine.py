"""The engine on a thread of its own: requests in from an event loop that never blocks, streams of outputs back."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from hybrid_cache.cache.journal import Journal
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.canonical import MAX_WAITING
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.listener import Listener
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import EngineStopped, Overloaded, RequestError, RequestFailed
from hybrid_cache.profile import Profile
from hybrid_cache.request import FailedOutput, Output, Request, TokenOutput
from hybrid_cache.stats import EngineStats
from hybrid_cache.tokens import Prompt

T = TypeVar("T")
HUNG_AFTER_S = 120.0  # a first step may wait for a compiler
MOST_TURNS = 4096  # ends of turns that the engine's thread has not heard of yet; the oldest is dropped
END_S = 0.5  # for a step under way to end, once the engine is stopped


class Stream:
    """The outputs of one request, as an async iterator. Closing it, or cancelling a wait on it, aborts the request."""

    def __init__(self, engine: "AsyncEngine", request: Request) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Output | FailedOutput | Exception] = asyncio.Queue()
        self._open_choices = request.n
        self.request = request
        self.taken = False  # the engine has the request; until then outputs under its id are of an earlier one

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Output:
        if self._open_choices == 0:
            raise StopAsyncIteration
        try:
            item = await self._queue.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        return self._take(item)

    def _take(self, item: Output | FailedOutput | Exception) -> Output:
        if isinstance(item, FailedOutput):
            item = item.fault or RequestFailed("the engine gave this request up after an error of its own")
        if isinstance(item, Exception):
            self._open_choices = 0
            raise item
        if isinstance(item, TokenOutput) and item.finish is not None:
            self._open_choices -= 1
        return item

    async def pause(self, tool: str = "", seconds: float | None = None) -> list[Output]:
        """Stops the request until `resume`, while a tool runs -> those of its outputs that nobody has read.

        tool, seconds: as for `Engine.pause`
        Raises RequestError for a request that has ended or cannot be continued, and EngineStopped.
        """

        def pause(engine: Engine) -> None:
            if not engine.is_open(self.request.id):
                raise RequestError(f"request {self.request.id!r} has ended, and cannot be paused", param="id")
            engine.pause(self.request.id, tool, seconds)

        await self._engine.ask(pause)
        return [self._take(self._queue.get_nowait()) for _ in range(self._queue.qsize())]

    async def resume(self, tokens: Sequence[int]) -> None:
        """Continues the request behind these tokens; the next output is a PromptOutput again.

        Raises as `Engine.resume`, and EngineStopped.
        """
        await self._engine.ask(lambda engine: engine.resume(self.request.id, tokens))

    async def aclose(self) -> None:
        """Aborts the request if it is still running. Idempotent."""
        if self._open_choices:
            self._open_choices = 0
            self._engine.abort(self.request.id)

    def put(self, items: list[Output | FailedOutput | Exception]) -> None:
        """Hands items to the waiting reader; callable from any thread. Where its loop has ended, nobody waits."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._put, items)

    def _put(self, items: list[Output | FailedOutput | Exception]) -> None:
        for item in items:
            self._queue.put_nowait(item)


@dataclass(slots=True)
class _Question:
    """A function of the engine, and whoever waits for its result."""

    function: Callable[[Engine], Any]
    answer: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop

    def ask(self, engine: Engine) -> Callable[[], None]:
        """-> what tells the answer."""
        try:
            return partial(self._put, self.function(engine), None)
        except Exception as raised:
            return partial(self._put, None, raised)

    def fail(self, error: Exception) -> None:
        self._put(None, error)

    def _put(self, result: object, error: Exception | None) -> None:
        def put() -> None:
            if self.answer.done():  # nobody waits any more
                return
            if error is None:
                self.answer.set_result(result)
            else:
                self.answer.set_exception(error)

        with suppress(RuntimeError):  # as for `Stream.put`
            self.loop.call_soon_threadsafe(put)


@dataclass(frozen=True, slots=True)
class _Turn:
    """What is said of a request that has ended."""

    request_id: str
    tool: str | None  # that it called; None: it was the last of its task
    seconds: float | None = None


@dataclass(slots=True)
class _Inbox:
    """What other threads ask of the engine's thread."""

    questions: deque[_Question] = field(default_factory=deque)
    requests: deque[Request] = field(default_factory=deque)
    commits: deque[tuple[str, Prompt, str, str]] = field(default_factory=lambda: deque(maxlen=MAX_WAITING))
    turns: deque[_Turn] = field(default_factory=lambda: deque(maxlen=MOST_TURNS))
    aborts: deque[str] = field(default_factory=deque)
    left: deque[str] = field(default_factory=lambda: deque(maxlen=MOST_TURNS))  # requests whose clients have gone

    def __bool__(self) -> bool:
        return bool(self.questions or self.requests or self.commits or self.turns or self.aborts or self.left)


class AsyncEngine:
    """Runs an `Engine` on a thread of its own. `submit` and the streams belong to an event loop, which never blocks."""

    def __init__(
        self,
        model: HybridModel,
        config: EngineConfig,
        *,
        hung_after_s: float = HUNG_AFTER_S,
        variants: Mapping[str, HybridModel] = MappingProxyType({}),
        profiles: Iterable[Profile] = (),
    ) -> None:
        """hung_after_s: seconds without an end after which a step counts as hung   variants: as for `Engine`
        profiles: of pairs of these models, see `Engine.add_profile`
        """
        self._engine = Engine(model, config, variants=variants)
        for profile in profiles:
            self._engine.add_profile(profile)
        self._engine.between_layers = self._between_layers
        self._config = config
        self._hung_after_s = hung_after_s
        self._wake = threading.Condition()
        self._inbox, self._taken = _Inbox(), _Inbox()
        self._streams: dict[str, Stream] = {}
        self._stats = self._engine.stats()
        self._stopping = False
        self._draining = False
        self._failure: BaseException | None = None
        self._step_began_s: float | None = None  # None between steps
        self._thread = threading.Thread(target=self._run, name="hybrid-cache-engine", daemon=True)

    def record(self, journal: Journal) -> None:
        """What requests may start from goes into a journal. To be called before `start`."""
        self._engine.cache.pool.watch(journal)

    @property
    def disk_folder(self) -> Path | None:
        """Where the disk tier lies; None without one."""
        return self._config.disk

    def disk_identities(self) -> list[str]:
        """Of the models that are served from there. On any thread."""
        return self._engine.disk_identities

    @property
    def alive(self) -> bool:
        """True while the engine's thread runs."""
        return self._thread.is_alive() and self._failure is None

    @property
    def failed(self) -> bool:
        """True once the engine's thread has ended with an error."""
        return self._failure is not None

    @property
    def stopped(self) -> bool:
        """True unless the engine's thread runs, maybe in a step that hangs."""
        return not self._thread.is_alive()

    @property
    def step_age_s(self) -> float:
        """Seconds since the step under way began; 0 between steps."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    @property
    def hung(self) -> bool:
        """True while a step takes far too long; it may still end."""
        return self.alive and self.step_age_s > self._hung_after_s

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def model(self) -> HybridModel:
        return self._engine.model

    @property
    def longest_sequence(self) -> int:
        """Tokens that the model's context and an empty cache both hold."""
        return self._engine.longest_sequence

    @property
    def max_running(self) -> int:
        return self._config.max_running

    @property
    def max_waiting(self) -> int:
        return self._config.max_waiting

    def fingerprint(self, model: str) -> str:
        """Of a variant by its name; of the engine's own model for the empty one. Raises RequestError for any other."""
        return self._engine.fingerprint(model)

    @property
    def max_requests(self) -> int:
        """How many may wait or run at once."""
        return self._config.max_running + self._config.max_waiting

    @property
    def fallbacks(self) -> dict[str, str]:
        """What runs in a slower way than it could on this device, and why."""
        return self._engine.fallbacks

    def listen(self, listener: Listener) -> None:
        """As `Engine.listen`, before `start`."""
        self._engine.listen(listener)

    def start(self) -> None:
        self._thread.start()

    def stats(self) -> EngineStats:
        """The state after the latest step."""
        committing = len(self._inbox.commits) + len(self._taken.commits) + self._stats.committing
        return replace(self._stats, step_age_s=self.step_age_s, committing=committing)

    def submit(self, request: Request) -> Stream:
        """Queues a request -> its outputs. Raises RequestError, Overloaded or EngineStopped at once."""
        self._check_open()
        self._engine.check_request(request)
        stream = Stream(self, request)
        with self._wake:
            self._check_open()  # since then the engine may have failed, and with it all streams that it knew
            if request.id in self._streams:
                raise RequestError(f"request id {request.id!r} is in use", param="id")
            waiting = self._stats.waiting + len(self._inbox.requests)
            if waiting >= self._config.max_waiting:
                raise Overloaded(f"{waiting} requests wait, limit {self._config.max_waiting}")
            self._streams[request.id] = stream
            self._inbox.requests.append(request)
            self._wake.notify()
        return stream

    def _check_open(self) -> None:
        """Raises EngineStopped unless new requests are welcome."""
        if self._failure is not None:
            raise EngineStopped(_why(self._failure))
        if self._draining or not self.alive:
            raise EngineStopped("the engine is draining" if self._draining else "the engine has stopped")
        if self.hung:
            raise EngineStopped(f"the engine hangs: a step has not ended for {self.step_age_s:.0f} s")

    def abort(self, request_id: str) -> None:
        """Frees what a request holds before the next step begins."""
        with self._wake:
            self._streams.pop(request_id, None)
            others = [request for request in self._inbox.requests if request.id != request_id]
            if len(others) < len(self._inbox.requests):  # it has not been taken yet
                self._inbox.requests = deque(others)
            else:
                self._inbox.aborts.append(request_id)
            self._wake.notify()

    def commit(self, namespace: str, prompt: Prompt, session: str = "", model: str = "") -> None:
        """As `Engine.commit`; nothing happens where that would raise."""
        with self._wake:
            self._inbox.commits.append((namespace, prompt, session, model))
            self._wake.notify()

    def pause(self, request_id: str, tool: str = "", seconds: float | None = None) -> None:
        """As `Engine.pause` for a request that has ended; nothing happens to another, or where that would raise.

        Requests that are submitted later find it paused.
        """
        self._say(_Turn(request_id, tool, seconds))

    def end_task(self, request_id: str) -> None:
        """As `Engine.end_task`."""
        self._say(_Turn(request_id, None))

    def left(self, request_ids: Iterable[str]) -> None:
        """As `Engine.left`, for each of them."""
        with self._wake:
            self._inbox.left.extend(request_ids)
            self._wake.notify()

    def _say(self, turn: _Turn) -> None:
        with self._wake:
            self._inbox.turns.append(turn)
            self._wake.notify()

    async def ask(self, function: Callable[[Engine], T]) -> T:
        """The result of a function of the engine, called on its thread between two steps. It must not take long.

        Raises EngineStopped, and what the function raises.
        """
        loop = asyncio.get_running_loop()
        question = _Question(function, loop.create_future(), loop)
        with self._wake:
            if not self.alive or self.hung or self._stopping:
                raise EngineStopped("the engine hangs" if self.hung else "the engine has stopped")
            self._inbox.questions.append(question)
            self._wake.notify()
        result: T = await question.answer
        return result

    async def stop(self, grace_s: float) -> None:
        """Refuses new requests, gives running ones `grace_s` seconds to finish, aborts the rest, ends the thread.

        A step that hangs is not waited for: then the thread is still there, see `stopped`.
        """
        self._draining = True
        deadline = time.monotonic() + grace_s
        while self._streams and self.alive and not self.hung and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        deadline = time.monotonic() + END_S + self._engine.ends_in_s
        while self._thread.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        self._fail_streams(EngineStopped("the engine has stopped"))

    # On the engine's thread

    def _run(self) -> None:
        try:
            while self._take_inbox():
                outputs = self._engine.step()
                self._stats = self._engine.stats()
                self._deliver(outputs)
                self._step_began_s = None
            self._engine.close()
        except BaseException as failure:
            self._failure, self._step_began_s = failure, None
            self._fail_streams(EngineStopped(_why(failure)))
            raise

    def _take_inbox(self) -> bool:
        """Waits for work, then moves requests and aborts into the engine -> False to end the thread."""
        with self._wake:
            while not (self._engine.has_work or self._inbox or self._stopping):
                looks_in_s = self._engine.looks_in_s
                self._wake.wait(None if looks_in_s == math.inf else max(looks_in_s, 0.0))
                if looks_in_s < math.inf:
                    break
            self._step_began_s = time.monotonic()
            inbox, self._inbox = self._inbox, _Inbox()
            self._taken = inbox
        self._end_turns(inbox.turns)
        for request_id in inbox.aborts:  # of earlier requests, whose ids may be used again by now
            self._engine.abort(request_id)
        for request in inbox.requests:
            self._submit_now(request)
        for commit in inbox.commits:
            with suppress(RequestError):
                self._engine.commit(*commit)
        for request_id in inbox.left:
            self._engine.left(request_id)
        answers = [question.ask(self._engine) for question in inbox.questions]
        if inbox.aborts or inbox.commits or inbox.turns or answers:
            self._stats = self._engine.stats()
            self._taken = _Inbox()
        for tell in answers:  # whoever is told finds in `stats` what the answer came from
            tell()
        return not self._stopping

    def _between_layers(self) -> None:
        """Short prompts that came since the pass began need not wait for its end."""
        if not self._inbox.requests:
            return
        with self._wake:
            aborted = set(self._inbox.aborts)  # still to come: who has the id of one waits for that
            requests = [request for request in self._inbox.requests if request.id not in aborted]
            self._inbox.requests = deque(request for request in self._inbox.requests if request.id in aborted)
            turns, self._inbox.turns = self._inbox.turns, _Inbox().turns
        self._end_turns(turns)
        for request in requests:
            self._submit_now(request)
        outputs = self._engine.step_between()
        self._stats = self._engine.stats()
        self._deliver(outputs)

    def _end_turns(self, turns: Iterable[_Turn]) -> None:
        for turn in turns:
            if turn.tool is None:
                self._engine.end_task(turn.request_id)
            elif not self._engine.is_open(turn.request_id):
                with suppress(RequestError):
                    self._engine.pause(turn.request_id, turn.tool, turn.seconds)

    def _submit_now(self, request: Request) -> None:
        with self._wake:
            stream = self._streams.get(request.id)
            stream = stream if stream is not None and stream.request is request else None  # it may have been aborted
        try:
            self._engine.submit(request)
        except (RequestError, Overloaded) as error:
            if stream is not None:
                self._forget(stream)
                stream.put([error])
            return
        if stream is not None:
            stream.taken = True

    def _forget(self, stream: Stream) -> None:
        """No outputs go to a stream any more."""
        with self._wake:
            if self._streams.get(stream.request.id) is stream:
                del self._streams[stream.request.id]

    def _deliver(self, outputs: Outputs) -> None:
        """Hands each stream its outputs in one call, and forgets requests that have ended."""
        by_request: dict[str, list[Output | FailedOutput | Exception]] = {}
        for request_id, output in outputs:
            by_request.setdefault(request_id, []).append(output)
        for request_id, items in by_request.items():
            stream = self._streams.get(request_id)
            if stream is None or not stream.taken:
                continue
            if not self._engine.is_open(request_id):  # its id is free once its reader has the last of them
                self._forget(stream)
            stream.put(items)

    def _fail_streams(self, error: EngineStopped) -> None:
        with self._wake:
            streams, self._streams = list(self._streams.values()), {}
            questions = [*self._taken.questions, *self._inbox.questions]  # some of the first are answered
            self._inbox.questions.clear()
        for stream in streams:
            stream.put([error])
        for question in questions:
            question.fail(error)


def _why(failure: BaseException) -> str:
    return f"the engine has failed: {type(failure).__name__}: {failure}"
