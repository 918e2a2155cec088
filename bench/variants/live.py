"""`hybrid-cache bench pipeline`: agents that are variants of one base read one conversation in turn, on a real server.

Three ways, each with contexts of its own: every agent by itself (a `cache_salt` for each, so nothing goes from model to
model), exact sharing, and profiled sharing where a loss is given. Exact sharing has to answer with the bits that agents
have by themselves; what profiled sharing changes is counted.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated

import httpx
import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from hybrid_cache.bench.common.http_client import ServerFailed, Usage, refused, server_url

COLOURS = ("red", "blue", "green", "black", "white", "yellow")
QUESTIONS = ("What is the code for the {} box?", "Which code came last?", "Say again the code for the {} box.")


class Token(BaseModel):
    token: str
    logprob: float


class Logprobs(BaseModel):
    content: list[Token]


class Message(BaseModel):
    content: str | None = None


class Choice(BaseModel):
    message: Message
    logprobs: Logprobs


class Sharing(BaseModel):
    fidelity: str
    tokens: int = 0
    expected_loss: float | None = None


class Reply(BaseModel):
    choices: list[Choice]
    usage: Usage
    sharing: Sharing | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What one agent said."""

    seconds: float
    prompt: int
    cached: int
    received: int  # tokens that were made from another model's, in this turn
    logprobs: tuple[tuple[str, float], ...]


class Player:
    """Plays pipelines on a server."""

    def __init__(self, http: httpx.Client, agents: Sequence[str], sentences: int, answer: int) -> None:
        self._http = http
        self._agents = agents
        self._sentences = sentences
        self._answer = answer

    def play(self, seed: int, salts: Sequence[str], max_loss: float | None) -> list[Turn]:
        """One pipeline, of which all but the answers follows from the seed, so that ways can be compared.

        salts: for each agent
        """
        choose = random.Random(seed)
        facts = (
            f"The code for the {choose.choice(COLOURS)} box is {choose.randrange(10, 100)}."
            for _ in range(self._sentences)
        )
        messages = [
            {"role": "system", "content": "Answer from the notes."},
            {"role": "user", "content": " ".join(facts)},
        ]
        turns = list[Turn]()
        for number, (agent, salt) in enumerate(zip(self._agents, salts, strict=True)):
            question = QUESTIONS[number % len(QUESTIONS)].format(choose.choice(COLOURS))
            messages = [*messages, {"role": "assistant", "content": "Noted."}, {"role": "user", "content": question}]
            turns.append(self._ask(agent, messages, salt, max_loss))
        return turns

    def _ask(self, agent: str, messages: Sequence[dict[str, str]], salt: str, max_loss: float | None) -> Turn:
        sharing = {"fidelity": "exact"} if max_loss is None else {"fidelity": "profiled", "max_loss": max_loss}
        settings = {"temperature": 0, "max_tokens": self._answer, "logprobs": True}
        body = {"model": agent, "messages": messages, "cache_salt": salt, "sharing": sharing, **settings}
        start = time.perf_counter()
        try:
            response = self._http.post("/v1/chat/completions", json=body)
            seconds = time.perf_counter() - start
            if response.status_code != 200:
                raise refused(response)
            reply = Reply.model_validate_json(response.content)
        except httpx.TransportError as error:
            raise ServerFailed(f"{self._http.base_url}: {error or type(error).__name__}") from error
        except ValidationError as error:
            raise ServerFailed(f"{self._http.base_url}: no reply of this kind of server: {error}") from error
        details = reply.usage.prompt_tokens_details
        said = tuple((each.token, each.logprob) for each in reply.choices[0].logprobs.content)
        received = reply.sharing.tokens if reply.sharing else 0
        cached = details.cached_tokens if details and details.cached_tokens else 0
        return Turn(seconds, reply.usage.prompt_tokens or 0, cached, received, said)


def pipeline(
    url: Annotated[str, typer.Option(help="Root of the server.")] = "http://127.0.0.1:8000",
    agent: Annotated[
        list[str] | None, typer.Option(help="A model of the server, in the order in which they read. Several times.")
    ] = None,
    sentences: Annotated[int, typer.Option(min=1, help="Of the text that all read; about eleven tokens each.")] = 120,
    answer: Annotated[int, typer.Option(min=1, help="Tokens that each agent says.")] = 8,
    pipelines: Annotated[int, typer.Option(min=1, help="In each way.")] = 5,
    max_loss: Annotated[
        float | None, typer.Option(min=0, help="Play it with profiled sharing, too: nats a token that may be lost.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of texts and questions.")] = 1,
    key: Annotated[str | None, typer.Option(help="API key.", envvar="HYBRID_CACHE_API_KEY")] = None,
) -> None:
    """Agents that are variants of one base read one text in turn: each by itself, with exact and profiled sharing."""
    agents = agent or []
    if len(agents) < 2:
        raise typer.BadParameter(f"{len(agents)} agents, at least 2 (--agent MODEL --agent MODEL ...)")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=server_url(url), headers=headers, timeout=600) as http:
        player, run = Player(http, agents, sentences, answer), f"{time.time_ns()}"
        ways: dict[str, list[list[Turn]]] = {"each by itself": [], "exact sharing": []}
        if max_loss is not None:
            ways[f"profiled {max_loss:g}"] = []
        try:
            for number in range(pipelines):  # the ways in turn, so that all meet the same machine
                for way, played in ways.items():
                    alone = way == "each by itself"
                    salts = [f"{run} {number} {way} {place if alone else ''}" for place in range(len(agents))]
                    allowed = max_loss if way.startswith("profiled") else None
                    played.append(player.play(seed + number, [salt.strip() for salt in salts], allowed))
        except ServerFailed as error:
            raise typer.BadParameter(str(error)) from error
    show(agents, ways, Console(highlight=False))
    differing = sum(a.logprobs != b.logprobs for a, b in _pairs(ways["each by itself"], ways["exact sharing"]))
    if differing:
        raise SystemExit(f"{differing} answers differ in their bits between exact sharing and agents by themselves")


def _pairs(one: Sequence[Sequence[Turn]], other: Sequence[Sequence[Turn]]) -> list[tuple[Turn, Turn]]:
    return [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True)]


def _apart(pairs: Sequence[tuple[Turn, Turn]]) -> float:
    """By how much log-probabilities of tokens differ that both said, up to the first that differs: a mean."""
    both = (takewhile(lambda two: two[0][0] == two[1][0], zip(a.logprobs, b.logprobs, strict=False)) for a, b in pairs)
    differences = [abs(one[1] - other[1]) for said in both for one, other in said]
    return statistics.fmean(differences) if differences else 0.0


def show(agents: Sequence[str], ways: dict[str, list[list[Turn]]], console: Console) -> None:
    """Tables: a row for each agent and way; what differs from agents by themselves."""
    first, *_ = ways.values()
    table = Table(title=f"{len(first)} pipelines of {len(agents)} agents, medians")
    for column in ("", "seconds", "of alone", "same tokens", "same bits", "nats apart"):
        table.add_column(column, justify="left" if not column else "right")
    for way, played in ways.items():
        seconds = statistics.median(sum(turn.seconds for turn in turns) for turns in played)
        ratio = statistics.median(
            sum(t.seconds for t in turns) / sum(t.seconds for t in own)
            for turns, own in zip(played, first, strict=True)
        )
        pairs = _pairs(first, played)
        tokens = sum([t for t, _ in a.logprobs] == [t for t, _ in b.logprobs] for a, b in pairs)
        bits = sum(a.logprobs == b.logprobs for a, b in pairs)
        same = f"{tokens}/{len(pairs)}", f"{bits}/{len(pairs)}"
        table.add_row(way, f"{seconds:.3f}", f"{ratio:.2f}", *same, f"{_apart(pairs):.6f}")
    console.print(table)
    table = Table(title="tokens of prompts: all, cached, received from another model; medians")
    for column in ("agent", "way", "prompt", "cached", "received", "seconds"):
        table.add_column(column, justify="left" if column in ("agent", "way") else "right")
    for place, name in enumerate(agents):
        for way, played in ways.items():
            turns = [turns[place] for turns in played]
            facts = [[turn.prompt, turn.cached, turn.received] for turn in turns]
            counts = (f"{statistics.median(column):,.0f}" for column in zip(*facts, strict=True))
            table.add_row(name, way, *counts, f"{statistics.median(turn.seconds for turn in turns):.3f}")
    console.print(table)
