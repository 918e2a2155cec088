"""The rates of a server as its clients see them: a `Machine` by which the same sessions can be simulated.

    decoding   one stream, several at once, and one behind a long prompt
    prefill    prompts of random words and several lengths, answered with one token; a parabola is fitted

What a request costs beside its steps (HTTP, template, tokenizer) is the part of a first token's time that does not
depend on the prompt's length.
"""

import asyncio
import random
from dataclasses import dataclass
from statistics import median

import numpy as np

from hybrid_cache.bench.agents.live.client import Answer, ChatClient
from hybrid_cache.bench.agents.machine import Machine
from hybrid_cache.bench.serving.scenarios import Vocabulary
from hybrid_cache.config import EngineConfig
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.spec import CacheSpec

STREAMS = 8
DECODED = 96
REPEATS = 3
LENGTHS = (TILE, 512, 1536, 3072)  # tokens of prompts
LONG = 4096
UNLIMITED = 1e15  # bytes a second, where contexts cost nothing that could be measured


@dataclass(frozen=True, slots=True)
class Probe:
    """Measures one server that nobody else uses. max_length: of a prompt and its answer"""

    client: ChatClient
    vocabulary: Vocabulary
    rng: random.Random
    max_length: int
    max_step_s: float = 0.05  # of a step with prefill, as the server was told

    async def machine(self, name: str, spec: CacheSpec) -> Machine:
        """Raises ServerFailed."""
        await self._decoded(TILE // 2)
        one = median([await self._decoded(TILE // 2) for _ in range(REPEATS)])
        many = median([await self._streams() for _ in range(REPEATS)])
        row_s = max((many - one) / (STREAMS - 1), 0.0)
        request_s, token_s, growth_s = await self._prefill()
        long = min(LONG, self.max_length - DECODED)
        behind = median([await self._decoded(long) for _ in range(REPEATS)])
        slower_s, num_bytes = behind - one, spec.kv_bytes_per_token * long
        base_s, usual = one - row_s, EngineConfig(TILE)
        return Machine(
            name,
            spec,
            base_s=base_s,
            row_s=row_s,
            token_s=token_s,
            token_per_position_s=growth_s,
            bytes_per_s=num_bytes / slower_s if slower_s > 0.01 * one and num_bytes else UNLIMITED,
            chunk_tokens=usual.max_tiles * TILE,
            chunk_tokens_beside_decode=usual.max_tiles_beside_decode * TILE,
            max_step_s=self.max_step_s,
            request_s=max(request_s - base_s, 0.0),
        )

    async def _prefill(self) -> tuple[float, float, float]:
        """Seconds of a request, of a token, and of a token for each position before it."""
        sizes, times = list[int](), list[float]()
        for length in LENGTHS:
            if length + 1 < self.max_length:
                answers = [await self._ask(length, 1) for _ in range(REPEATS)]
                sizes.append(round(median(answer.prompt_tokens for answer in answers)))
                times.append(median(answer.first_s - answer.sent_s for answer in answers))
        num = np.asarray(sizes, float)
        columns = np.stack([np.ones(len(num)), num, num * num / 2], 1)[:, : min(len(num), 3)]
        weights = 1 / np.asarray(times)
        found, *_ = np.linalg.lstsq(columns * weights[:, None], np.asarray(times) * weights, rcond=None)
        request_s, token_s, growth_s = (*map(float, found), 0.0, 0.0)[:3]
        if growth_s < 0:
            found, *_ = np.linalg.lstsq(columns[:, :2] * weights[:, None], np.asarray(times) * weights, rcond=None)
            (request_s, token_s), growth_s = map(float, found), 0.0
        return max(request_s, 0.0), max(token_s, 1e-9), growth_s

    async def _streams(self) -> float:
        return median(await asyncio.gather(*(self._decoded(TILE // 2) for _ in range(STREAMS))))

    async def _decoded(self, prompt_tokens: int) -> float:
        """Seconds a token."""
        answer = await self._ask(prompt_tokens, DECODED)
        return (answer.last_s - answer.first_s) / max(answer.completion_tokens - 1, 1)

    async def _ask(self, prompt_tokens: int, max_tokens: int) -> Answer:
        text = self.vocabulary.text(self.rng, prompt_tokens)
        limits = {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
        return await self.client.ask({"messages": [{"role": "user", "content": text}], **limits})
