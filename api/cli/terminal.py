"""Chat in a terminal or through a pipe. Answers go to the standard output, everything else to the error stream."""

import asyncio
import sys
import time
import unicodedata
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import httpx
from pydantic import BaseModel, ValidationError
from rich.console import Console

from hybrid_cache.errors import HybridCacheError

HELP = """\
/reset         start over, with the same system prompt
/system TEXT   start over with this system prompt; without TEXT, with none
/retry         ask for the last answer again
/help          this list
/exit          leave, as does Ctrl-D

Ctrl-C stops an answer; at the prompt it leaves."""
PROMPT = "> "
CONNECT_TIMEOUT_S = 5.0


class ServerFailed(HybridCacheError):
    """The server cannot be reached, refused a request, or broke off."""


@dataclass(frozen=True, slots=True)
class Asked:
    """How answers are to be made; None leaves it to the model's own defaults."""

    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What one answer took; None was not reported."""

    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the conversation."""

    role: str
    content: str


class Partner(Protocol):
    """What answers in a chat."""

    name: str

    async def open(self) -> None:
        """Makes ready. Raises HybridCacheError."""
        ...

    async def close(self) -> None: ...

    def reply(self, turns: Sequence[Turn]) -> AsyncGenerator[str | Usage, None]:
        """Pieces of the answer, then its usage. Raises HybridCacheError. Cancelling it stops the work."""
        ...


class ServerPartner:
    """A server that speaks OpenAI's API."""

    def __init__(self, url: str, model: str | None, key: str | None, asked: Asked) -> None:
        """Raises ServerFailed for what is not an address."""
        self.name = model or ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        base = server_root(url)
        self._http = httpx.AsyncClient(base_url=base, headers=headers, timeout=timeout, trust_env=False)
        given = {"temperature": asked.temperature, "max_tokens": asked.max_tokens, "seed": asked.seed}
        self._options = {name: value for name, value in given.items() if value is not None}

    async def open(self) -> None:
        try:
            response = await self._http.get("/v1/models")
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            raise refused(response)
        try:
            self.name = self.name or _ModelList.model_validate_json(response.content).data[0].id
        except (ValidationError, IndexError) as error:
            raise ServerFailed(f"{response.url} lists no model, name one") from error

    async def close(self) -> None:
        await self._http.aclose()

    async def reply(self, turns: Sequence[Turn]) -> AsyncGenerator[str | Usage, None]:
        body = {
            "model": self.name,
            "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._options,
        }
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise refused(response)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        for item in _Event.model_validate_json(data).items():
                            yield item
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        except ValidationError as error:
            raise ServerFailed("the server sent something that is not an event of OpenAI's stream") from error

    def _unreachable(self, error: httpx.TransportError) -> ServerFailed:
        return ServerFailed(f"no connection to {self._http.base_url}: {str(error) or type(error).__name__}")


def server_root(url: str) -> httpx.URL:
    """The root of a server, also if the address of its `/v1` was given."""
    try:
        root = httpx.URL(url.rstrip("/").removesuffix("/v1"))
    except httpx.InvalidURL as error:
        raise ServerFailed(f"{url!r} is not an address: {error}") from error
    if root.scheme not in ("http", "https") or not root.host:
        raise ServerFailed(f"{url!r} is not an address, wanted one such as http://127.0.0.1:8000")
    return root


class _Details(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None

    def read(self) -> Usage:
        details = self.prompt_tokens_details
        return Usage(self.prompt_tokens, details.cached_tokens if details else None, self.completion_tokens)


class _Delta(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    delta: _Delta = _Delta()


class _Error(BaseModel):
    message: str = "no reason given"


class _Event(BaseModel):
    """The parts of an event that are read; the rest is ignored."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None

    def items(self) -> list[str | Usage]:
        if self.error is not None:
            raise ServerFailed(f"the server broke off: {self.error.message}")
        text: list[str | Usage] = [c.delta.content for c in self.choices if c.delta.content]
        return text if self.usage is None else [*text, self.usage.read()]


class _Model(BaseModel):
    id: str


class _ModelList(BaseModel):
    data: list[_Model]


def refused(response: httpx.Response) -> ServerFailed:
    try:
        error = _Event.model_validate_json(response.content).error
    except ValidationError:
        error = None
    reason = error.message if error else f"HTTP {response.status_code} from {response.url}"
    return ServerFailed(f"the server refused: {reason}")


class Chat:
    """One conversation."""

    def __init__(self, partner: Partner, system: str | None, answers: Console, notes: Console) -> None:
        self._partner = partner
        self._system = system
        self._turns: list[Turn] = []
        self._answers = answers
        self._notes = notes
        self.num_failed = 0  # messages without a whole answer

    def take(self, line: str, runner: asyncio.Runner) -> bool:
        """Answers a message or obeys a command -> False to leave."""
        command, _, rest = line.strip().partition(" ")
        match command:
            case "":
                pass
            case "/exit":
                return False
            case "/help":
                self._notes.print(HELP)
            case "/reset":
                self._turns.clear()
            case "/system":
                self._system = rest.strip() or None
                self._turns.clear()
            case "/retry":
                self._retry(runner)
            case _ if command.startswith("/"):
                self._notes.print(f"there is no {command}; /help lists what there is")
            case _:
                self._answer([*self._turns, Turn("user", line.strip())], runner)
        return True

    def _retry(self, runner: asyncio.Runner) -> None:
        asked = self._turns[:-1]
        if asked:
            self._answer(asked, runner)
        else:
            self._notes.print("nothing was said yet")

    def _answer(self, turns: list[Turn], runner: asyncio.Runner) -> None:
        """Prints the answer as it comes. The conversation goes on from there, unless nothing came of it."""
        pieces: list[str] = []
        try:
            runner.run(self._print_answer(turns, pieces))
        except KeyboardInterrupt:
            self._break_off("stopped")
        except HybridCacheError as error:
            self._break_off(f"error: {error}")
        if pieces:
            self._turns = [*turns, Turn("assistant", "".join(pieces))]

    def _break_off(self, reason: str) -> None:
        self.num_failed += 1
        self._answers.print()
        self._notes.print(reason, style="red")

    async def _print_answer(self, turns: Sequence[Turn], pieces: list[str]) -> None:
        opening = [Turn("system", self._system)] if self._system else []
        usage, begin, stamps = None, time.perf_counter(), []
        async with aclosing(self._partner.reply([*opening, *turns])) as items:
            async for item in items:
                if isinstance(item, Usage):
                    usage = item
                    continue
                stamps.append(time.perf_counter())
                pieces.append(item)
                self._answers.print(harmless(item), end="", soft_wrap=True)
        self._answers.print()
        self._notes.print(_summary(usage, begin, stamps), style="dim")


def harmless(text: str) -> str:
    """Without characters that a terminal would interpret."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _summary(usage: Usage | None, begin: float, stamps: Sequence[float]) -> str:
    """One line: where the prompt came from, and how fast the answer was."""
    facts = []
    if usage is not None and usage.prompt_tokens is not None:
        cached = usage.cached_tokens or 0
        facts.append(f"{cached} cached + {usage.prompt_tokens - cached} computed prompt tokens")
    if stamps:
        facts.append(f"first token after {1000 * (stamps[0] - begin):.0f} ms")
    num_tokens = usage.completion_tokens if usage is not None else None
    if num_tokens is not None and len(stamps) > 1 and stamps[-1] > stamps[0]:
        facts.append(f"{(num_tokens - 1) / (stamps[-1] - stamps[0]):.0f} tokens/s")
    return ", ".join(facts) or "an empty answer"


def run(partner: Partner, system: str | None) -> int:
    """Talks until the input ends -> the number of messages without a whole answer.

    Raises HybridCacheError when the partner cannot be reached at all.
    """
    answers = Console(highlight=False, markup=False, emoji=False)
    notes = Console(stderr=True, highlight=False, markup=False, emoji=False)
    chat = Chat(partner, system, answers, notes)
    with asyncio.Runner() as runner:
        try:
            runner.run(partner.open())
            if sys.stdin.isatty():
                _greet(partner.name, notes)
            while (line := _read_line()) is not None and chat.take(line, runner):
                pass
        finally:
            runner.run(partner.close())
    return chat.num_failed


def _greet(name: str, notes: Console) -> None:
    with suppress(ImportError):
        import_module("readline")  # gives `input` its line editing and history
    notes.print(f"{name}; /help lists what you can do", style="dim")


def _read_line() -> str | None:
    """The next line of input; None at its end, and for Ctrl-C."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    try:
        return input(PROMPT)
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
