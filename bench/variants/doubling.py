"""Double writing on a hybrid of 152 M random parameters: what it costs the sender, and what it leaves the receiver."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hybrid_cache.bench.common.random_model import MID_GRANITE, random_model
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.profile import Plan, Profile
from hybrid_cache.request import PromptOutput, Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, Prompt, TokenArray
from hybrid_cache.transfer import Transfer, projected, upper

BUDGET_BYTES = 1 << 30
LOSS = 0.01  # that the profiles claim: random weights say nothing of it
LEARNED = 2  # texts after which a reader is expected


@dataclass(frozen=True, slots=True)
class Doubling:
    """Medians of processor seconds to the first token."""

    name: str
    sender: float  # with writing twice, over the same prompt without
    layer: float  # of what that adds, the part of each layer that is written
    whole_s: float  # the receiver computes everything
    read_s: float  # it finds what was written for it
    later_s: float  # it makes it when it comes, from what the sender's layers were given


class Texts:
    """Prompts that are not repeated, and engines that read them."""

    def __init__(self, ops: Ops, num_tokens: int, num_new: int, seed: int) -> None:
        self.base = random_model(MID_GRANITE, ops, torch.bfloat16)[0]
        self.other = random_model(MID_GRANITE, ops, torch.bfloat16, other=1, first=0)[0]
        self._rng = np.random.default_rng(seed)
        self._num_tokens = num_tokens
        self._num_new = num_new

    def _tokens(self, num: int) -> TokenArray:
        return self._rng.integers(100, self.base.vocab_size, num).astype(np.int32)

    def engine(self, transfer: Transfer, *, twice: bool) -> Engine:
        """One whose other model is expected to read the base's prompts."""
        config = EngineConfig(BUDGET_BYTES, double_writing=twice)
        engine = Engine(self.base, config, variants={"other": self.other})
        plan = Plan(transfer, LOSS, 1.0, 0.5, 0)
        engine.add_profile(
            Profile(self.base.fingerprint, self.other.fingerprint, len(self.base.layers), "by hand", (plan,))
        )
        for _ in range(LEARNED):
            text = self._tokens(256)
            self.ask(engine, np.append(text, 5), "", len(text))
            self.ask(engine, np.append(text, 6), "other", len(text))
        return engine

    def ask(self, engine: Engine, tokens: TokenArray, model: str, boundary: int) -> tuple[float, int]:
        """-> seconds to the first token, and how many of the prompt were cached"""
        sampling, cached = SamplingParams(temperature=0, max_tokens=1), 0
        prompt = Prompt(tokens.astype(np.int32), (Boundary(boundary),))
        start = time.process_time()
        engine.submit(Request("r", prompt, sampling, model=model, max_loss=LOSS if model else None))
        while engine.is_open("r"):
            for _, output in engine.step():
                cached = output.cached_tokens if isinstance(output, PromptOutput) else cached
        return time.process_time() - start, cached

    def time(self, name: str, transfer: Transfer, repeats: int) -> Doubling:
        """Engines with and without take turns. Raises RuntimeError if the receiver had to compute its prefix."""
        engines = [self.engine(transfer, twice=twice) for twice in (True, False)]
        senders: list[list[float]] = [[], []]
        receivers: list[list[float]] = [[], []]
        wholes = list[float]()
        for _ in range(repeats):
            text, new = self._tokens(self._num_tokens), self._tokens(self._num_new)
            for place, engine in enumerate(engines):
                senders[place].append(self.ask(engine, np.append(text, 5), "", len(text))[0])
                seconds, cached = self.ask(engine, np.concatenate([text, new]), "other", len(text))
                receivers[place].append(seconds)
                if place == 0 and cached < len(text) // TILE * TILE:
                    raise RuntimeError(f"{name}: {cached} of {len(text)} tokens were written for the receiver")
                engine.cache.drop()
            wholes.append(self.ask(engines[1], np.concatenate([text, new]), "other", len(text))[0])
            engines[1].cache.drop()
        ratio = statistics.median(a / b for a, b in zip(*senders, strict=True))
        written = sum(way.value != "take" for way in transfer.ways)
        read_s, later_s = map(statistics.median, receivers)
        return Doubling(name, ratio, (ratio - 1) / max(written, 1), statistics.median(wholes), read_s, later_s)


def doublings(ops: Ops, num_tokens: int, num_new: int, seed: int, repeats: int = 3) -> Iterator[Doubling]:
    """One transfer after the other."""
    texts = Texts(ops, num_tokens, num_new, seed)
    layers, num = texts.base.layers, len(texts.base.layers)
    states = [index for index, layer in enumerate(layers) if "attention" not in layer.kind]
    yield texts.time("project all", projected(num, range(num)), repeats)
    yield texts.time("project states", projected(num, states), repeats)
    yield texts.time("project one layer", projected(num, [num // 3]), repeats)
    yield texts.time("take all", upper(num, num), repeats)
