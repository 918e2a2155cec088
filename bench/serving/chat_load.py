"""Conversations that go on side by side, against any OpenAI-compatible server: which share of their prompts was cached?

    python -m hybrid_cache.bench.serving.chat_load --url http://127.0.0.1:8000

A number of conversations is open; again and again one of them, by chance, says something more, and after some turns is
replaced by a new one, which begins with one of a few system prompts. Each sends back the answers it got. With the same
seed every server gets the same conversations, whatever stands behind its address.
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx

VOCABULARY = "box lamp row key door wall red blue old new upper lower left right open shut near far one two three four"
WORDS = VOCABULARY.split(" ")


@dataclass(frozen=True)
class Load:
    """What is sent."""

    open: int = 24  # conversations
    turns: int = 6  # of each
    requests: int = 240
    systems: int = 4
    system_words: int = 250
    words: int = 60  # of what a user says
    reply_tokens: int = 8
    workers: int = 2  # requests at once
    seed: int = 1
    sessions: bool = False  # conversations are named


@dataclass
class Talk:
    """A conversation."""

    number: int
    messages: list[dict[str, str]]
    left: int
    busy: bool = False
    replica: str = ""  # that gave the latest answer


@dataclass
class Counts:
    prompt: int = 0
    cached: int = 0
    failed: int = 0
    moved: int = 0  # turns that another replica answered than the turn before
    seconds: list[float] = field(default_factory=list)
    replicas: Counter[str] = field(default_factory=Counter)


def texts(load: Load, name: object, words: int) -> str:
    chance = random.Random(f"{load.seed} {name}")
    return " ".join(chance.choices(WORDS, k=words))


def talks(load: Load) -> Iterator[Talk]:
    number = 0
    while True:
        system = random.Random(f"{load.seed} {number}").randrange(load.systems)
        messages = [{"role": "system", "content": texts(load, f"system {system}", load.system_words)}]
        yield Talk(number, messages, load.turns)
        number += 1


async def run(client: httpx.AsyncClient, load: Load) -> Counts:
    """Sends everything."""
    counts, new, chance = Counts(), talks(load), random.Random(load.seed)
    open_talks, left = [next(new) for _ in range(load.open)], load.requests

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            place = chance.choice([i for i, talk in enumerate(open_talks) if not talk.busy])
            talk = open_talks[place]
            talk.busy = True
            await say(client, load, talk, counts)
            talk.busy, talk.left = False, talk.left - 1
            if not talk.left:
                open_talks[place] = next(new)

    await asyncio.gather(*(work() for _ in range(load.workers)))
    return counts


async def say(client: httpx.AsyncClient, load: Load, talk: Talk, counts: Counts) -> None:
    """One turn."""
    talk.messages.append({"role": "user", "content": texts(load, (talk.number, talk.left), load.words)})
    body: dict[str, Any] = {"messages": talk.messages, "max_tokens": load.reply_tokens, "temperature": 0}
    headers = {"x-session-id": f"{load.seed} {talk.number}"} if load.sessions else {}
    began_s = time.monotonic()
    answer = await client.post("/v1/chat/completions", json=body, headers=headers)
    counts.seconds.append(time.monotonic() - began_s)
    if answer.status_code != 200:
        counts.failed += 1
        talk.messages.pop()
        return
    reply = answer.json()
    talk.messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
    counts.prompt += reply["usage"]["prompt_tokens"]
    counts.cached += reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    replica = answer.headers.get("x-replica", "")
    counts.moved += talk.replica not in ("", replica)
    counts.replicas[replica] += 1
    talk.replica = replica


async def measure(url: str, load: Load) -> dict[str, object]:
    """What came of it."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        began_s = time.monotonic()
        counts = await run(client, load)
        passed_s = time.monotonic() - began_s
    return {
        "requests": len(counts.seconds),
        "failed": counts.failed,
        "moved": counts.moved,
        "prompt_tokens": counts.prompt,
        "cached_share": round(counts.cached / max(counts.prompt, 1), 4),
        "median_ms": round(median(counts.seconds) * 1000, 1),
        "seconds": round(passed_s, 1),
        "by_replica": dict(counts.replicas),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    for name, kind in (("open", int), ("turns", int), ("requests", int), ("systems", int), ("workers", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Load, name))
    parser.add_argument("--seed", type=int, default=Load.seed)
    parser.add_argument("--sessions", action="store_true", help="name conversations in x-session-id")
    given = vars(parser.parse_args())
    print(json.dumps(asyncio.run(measure(given.pop("url"), Load(**given)))))


if __name__ == "__main__":
    main()
