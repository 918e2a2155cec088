"""Plays sessions of agents against a server, with tools that really sleep, and notes what was really asked and said.

Prompts are random words, of as many tokens as the workload says by the server's own count. A turn that ends in a call
is forced to: `tool_choice` names the tool, whose one argument is a text of a fixed length, so that answers which call
it have as many tokens as in the workload in the mean: a length of their own would change the prompt. Other turns give
`max_tokens` and `ignore_eos`, which is no field of OpenAI's. Each session names itself in `x-session-id`.
"""

import asyncio
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from hybrid_cache.bench.agents.live.client import Answer, ChatClient
from hybrid_cache.bench.agents.outcome import Outcome, SessionResult
from hybrid_cache.bench.agents.workload import AgentSession, Turn
from hybrid_cache.bench.common.http_client import ServerFailed
from hybrid_cache.bench.serving.scenarios import Vocabulary
from hybrid_cache.kernels.grid import TILE

MOST_CHARACTERS = 8_000  # of the text in a call
CALIBRATION_CHARACTERS = 8, 208
CALL_TOKENS = 512  # more than a call has beside its text
MOST_TOOLS = 64  # of a kind, which are offered
TOOL_TIME = "x-tool-time-ms"


@dataclass(frozen=True, slots=True)
class Played:
    """What was asked and said, by the server's counts, and what came of it."""

    arrivals: list[tuple[float, AgentSession]]
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class CallLengths:
    """Tokens of a call by the characters of the text in it."""

    frame: float = 20.0  # tokens around the text
    per_character: float = 0.4

    def characters(self, tokens: float) -> int:
        return min(max(round((tokens - self.frame) / self.per_character), 1), MOST_CHARACTERS)


@dataclass(frozen=True, slots=True)
class Offer:
    """What all sessions of a kind begin with."""

    system: str
    tools: dict[str, int]  # and how many characters the text in a call has
    num_tokens: int = 0  # of this, by the server's count

    @property
    def opening(self) -> list[dict[str, object]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def body(self, calls: str = "") -> dict[str, object]:
        """The part of a request that says what may be called. calls: the tool that has to be"""
        if not self.tools:
            return {}
        tools = [_tool(name, length) for name, length in self.tools.items()]
        if not calls:
            return {"tools": tools, "tool_choice": "none"}
        choice = {"type": "function", "function": {"name": calls}}
        return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}


@dataclass(slots=True)
class Tally:
    """Sums over all sessions."""

    first_tokens_s: list[float] = field(default_factory=list)
    waited_s: float = 0.0
    decoded_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_tokens: int | None = 0
    generated_tokens: int = 0
    num_returns: int = 0
    num_resident: int = 0


class Player:
    """Plays once. on_done: called when a session has ended"""

    def __init__(
        self,
        client: ChatClient,
        vocabulary: Vocabulary,
        seed: str,
        *,
        hints: bool = False,
        on_done: Callable[[], None] = lambda: None,
    ) -> None:
        """hints: tells the server how long each tool takes"""
        self._client = client
        self._words = vocabulary
        self._seed = seed
        self._hints = hints
        self._on_done = on_done
        self._offers: dict[str, Offer] = {}
        self._tally = Tally()
        self._begin_s = 0.0

    async def play(self, arrivals: Sequence[tuple[float, AgentSession]]) -> Played:
        """Until the last session has ended. Raises ServerFailed."""
        kinds = _by_kind(session for _, session in arrivals)
        lengths = await self._call_lengths() if any(_calls(sessions) for sessions in kinds.values()) else CallLengths()
        for kind, sessions in kinds.items():
            self._offers[kind] = await self._offer(kind, sessions, lengths)
        self._begin_s = time.perf_counter()
        tasks = []
        try:
            async with asyncio.TaskGroup() as group:
                for number, (arrival_s, session) in enumerate(arrivals):
                    tasks.append(group.create_task(self._session(number, arrival_s, session)))
        except* ServerFailed as failures:
            raise failures.exceptions[0] from None
        ended = [task.result() for task in tasks]
        played = [(result.arrival_s, session) for result, session in ended]
        return Played(played, self._outcome([result for result, _ in ended]))

    async def _call_lengths(self) -> CallLengths:
        """From two calls of different length."""
        found = []
        for num in CALIBRATION_CHARACTERS:
            offer = Offer("", {"calibrate": num})
            body = {"max_tokens": num + CALL_TOKENS, "temperature": 0, **offer.body("calibrate")}
            answer = await self._client.ask({"messages": [{"role": "user", "content": "."}], **body})
            _check_called(answer, "calibrate")
            found.append(answer.completion_tokens)
        few, many = CALIBRATION_CHARACTERS
        rate = max((found[1] - found[0]) / (many - few), 0.05)
        return CallLengths(found[0] - rate * few, rate)

    async def _offer(self, kind: str, sessions: Sequence[AgentSession], lengths: CallLengths) -> Offer:
        """What the sessions of a kind begin with, and how many tokens the server makes of it."""
        outputs: dict[str, list[int]] = {}
        for turn in _calls(sessions):
            outputs.setdefault(_named(turn.tool), []).append(turn.output_tokens)
        if len(outputs) > MOST_TOOLS:
            raise ServerFailed(f"kind {kind!r}: {len(outputs)} tools, at most {MOST_TOOLS} are offered to a model")
        bare = Offer("", {tool: lengths.characters(fmean(outputs[tool])) for tool in sorted(outputs)})
        rng, shared = random.Random(f"{self._seed} {kind}"), sessions[0].shared_tokens
        lacking = shared - (await self._size(bare) if shared else 0)
        offer = replace(bare, system=self._words.text(rng, lacking)) if lacking > 0 else bare
        return replace(offer, num_tokens=await self._size(offer))

    async def _size(self, offer: Offer) -> int:
        messages = [*offer.opening, {"role": "user", "content": "."}]
        answer = await self._client.ask({"messages": messages, "max_tokens": 1, "temperature": 0, **offer.body()})
        return answer.prompt_tokens

    async def _session(
        self, number: int, arrival_s: float, session: AgentSession
    ) -> tuple[SessionResult, AgentSession]:
        await asyncio.sleep(max(self._begin_s + arrival_s - time.perf_counter(), 0.0))
        talk = _Talk(self._offers[session.kind], random.Random(f"{self._seed} {number}"))
        paused_s, first_s, longest_s, due_s = 0.0, 0.0, 0.0, time.perf_counter()
        began_s, slept_s = due_s, 0.0
        for place, turn in enumerate(session.turns):
            answer = await self._turn(talk, turn, f"{self._seed}-{number}")
            waited_s = answer.first_s - answer.sent_s
            longest_s = max(longest_s, waited_s)
            if place:
                self._tally.first_tokens_s.append(waited_s)
                talk.turns[-1] = replace(talk.turns[-1], pause_s=slept_s)
            else:
                first_s = waited_s
            talk.turns.append(self._note(talk, turn, answer))
            if turn.pause_s is None:
                break
            due_s = time.perf_counter() + turn.pause_s
            await asyncio.sleep(turn.pause_s)
            slept_s = turn.pause_s + max(time.perf_counter() - due_s, 0.0)
            paused_s += slept_s
        self._on_done()
        arrived_s, end_s = began_s - self._begin_s, answer.last_s - self._begin_s
        offer = self._offers[session.kind]
        played = AgentSession(session.kind, offer.num_tokens, tuple(talk.turns))
        return SessionResult(arrived_s, end_s, paused_s, first_s, longest_s), played

    async def _turn(self, talk: "_Talk", turn: Turn, session: str) -> Answer:
        talk.say(self._words.text(talk.rng, talk.keep(turn)))
        headers = {"x-session-id": session}
        if turn.tool and self._hints and turn.pause_s is not None:
            headers[TOOL_TIME] = f"{turn.pause_s * 1000:.3f}"
        offer, tool = talk.offer, _named(turn.tool)
        limits: dict[str, object] = {"max_tokens": turn.output_tokens, "ignore_eos": True}
        if tool:
            limits = {"max_tokens": offer.tools[tool] + CALL_TOKENS}
        answer = await self._client.ask(
            {"messages": talk.messages, "temperature": 0, **limits, **offer.body(tool)}, headers
        )
        if tool:
            _check_called(answer, tool)
        talk.answered(answer)
        return answer

    def _note(self, talk: "_Talk", turn: Turn, answer: Answer) -> Turn:
        """Adds a turn to the sums -> the turn as it was played."""
        tally, last = self._tally, talk.turns[-1] if talk.turns else None
        kept = min(talk.kept_tokens, answer.prompt_tokens - 1)
        tally.waited_s += answer.first_s - answer.sent_s
        tally.decoded_s += answer.last_s - answer.first_s
        tally.prompt_tokens += answer.prompt_tokens
        tally.new_tokens += answer.prompt_tokens - kept
        tally.generated_tokens += answer.completion_tokens
        if answer.cached_tokens is None or tally.cached_tokens is None:
            tally.cached_tokens = None
        else:
            tally.cached_tokens += answer.cached_tokens
        if last is not None and kept >= last.prompt_tokens >= TILE:
            tally.num_returns += 1
            tally.num_resident += (answer.cached_tokens or 0) >= last.prompt_tokens // TILE * TILE
        steps = min(max(answer.num_events, 1), answer.completion_tokens)
        return Turn(answer.prompt_tokens, kept, answer.completion_tokens, turn.tool, turn.pause_s, steps)

    def _outcome(self, sessions: list[SessionResult]) -> Outcome:
        tally = self._tally
        known = tally.cached_tokens is not None
        return Outcome(
            sessions=tuple(sessions),
            first_tokens_s=tuple(tally.first_tokens_s),
            waited_s=tally.waited_s,
            decoded_s=tally.decoded_s,
            prompt_tokens=tally.prompt_tokens,
            new_tokens=tally.new_tokens,
            computed_tokens=None if tally.cached_tokens is None else tally.prompt_tokens - tally.cached_tokens,
            generated_tokens=tally.generated_tokens,
            num_returns=tally.num_returns,
            num_resident=tally.num_resident if known else None,
            end_s=max(session.end_s for session in sessions),
        )


@dataclass(slots=True, eq=False)
class _Talk:
    """One session so far."""

    offer: Offer
    rng: random.Random
    turns: list[Turn] = field(default_factory=list)  # as they were played; the pause of the last is still to come
    messages: list[dict[str, object]] = field(default_factory=list)
    kept_tokens: int = 0  # leading ones of the next prompt that were there before
    _wanted: list[Turn] = field(default_factory=list)  # the same turns in the workload
    _ends: list[int] = field(default_factory=list)  # messages, after each answer
    _calls: list[str] = field(default_factory=list)  # that are to be answered

    def __post_init__(self) -> None:
        self.messages = list(self.offer.opening)

    def keep(self, turn: Turn) -> int:
        """Drops what a turn leaves out of what was said -> how many tokens are to be added."""
        if not self.turns:
            lacking = turn.prompt_tokens - self.offer.num_tokens
        elif turn.kept_tokens >= self._wanted[-1].prompt_tokens:
            self.kept_tokens = _end(self.turns[-1])
            lacking = turn.prompt_tokens - max(turn.kept_tokens, min(_end(self._wanted[-1]), turn.prompt_tokens))
        else:
            num = sum(_end(each) <= turn.kept_tokens for each in self._wanted)
            self._drop_behind(num)
            lacking = turn.prompt_tokens - (_end(self._wanted[num - 1]) if num else self.offer.num_tokens)
        self._wanted.append(turn)
        return max(lacking, 1)

    def _drop_behind(self, num_turns: int) -> None:
        """What was edited; the turns stay, for they were played."""
        self.kept_tokens = _end(self.turns[num_turns - 1]) if num_turns else 0
        del self.messages[self._ends[num_turns - 1] if num_turns else len(self.offer.opening) :]
        answer = self.messages[-1] if num_turns else {}
        calls = answer.get("tool_calls")
        self._calls = [str(call["id"]) for call in calls] if isinstance(calls, list) else []

    def say(self, text: str) -> None:
        """What tools have found, or a person says."""
        if not self._calls:
            self.messages.append({"role": "user", "content": text})
        for i, call in enumerate(self._calls):
            self.messages.append({"role": "tool", "tool_call_id": call, "content": "." if i else text})
        self._calls = []

    def answered(self, answer: Answer) -> None:
        self.messages.append(answer.message)
        self._calls = [call.id for call in answer.calls]
        self._ends.append(len(self.messages))


def _check_called(answer: Answer, tool: str) -> None:
    if not answer.calls:
        raise ServerFailed(f"the answer calls no tool, though tool_choice names {tool!r}")


def _calls(sessions: Iterable[AgentSession]) -> list[Turn]:
    return [turn for session in sessions for turn in session.turns if turn.tool]


def _end(turn: Turn) -> int:
    return turn.prompt_tokens + turn.output_tokens


def _by_kind(sessions: Iterable[AgentSession]) -> dict[str, list[AgentSession]]:
    found: dict[str, list[AgentSession]] = {}
    for session in sessions:
        found.setdefault(session.kind, []).append(session)
    return found


def _named(tool: str) -> str:
    """As a function may be named."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", tool)[:64]


def _tool(name: str, num_characters: int) -> dict[str, object]:
    text = {"type": "string", "minLength": num_characters, "maxLength": num_characters}
    schema = {"type": "object", "properties": {"text": text}, "required": ["text"], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}
