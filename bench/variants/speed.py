"""Time to the first token over a prefix that another model has read, on a hybrid of 152 M random parameters."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from hybrid_cache.bench.common.random_model import MID_GRANITE, activated_by, random_adapter, random_model
from hybrid_cache.bench.variants.doubling import Texts
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.models.tools.plans import group
from hybrid_cache.profile import Plan, Profile
from hybrid_cache.request import CacheMode, PromptOutput, Received, Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, Prompt, TokenArray
from hybrid_cache.transfer import Transfer, projected, upper

INVOCATION = (11, 12)
BUDGET_BYTES = 2 << 30
NUM_TIMINGS = 11
LOSS = 0.01  # that the profiles claim: random weights say nothing of it


@dataclass(frozen=True, slots=True)
class Timing:
    """Processor seconds to the first token."""

    name: str
    whole_s: float  # everything computed
    shared_s: float
    tokens: int  # that came from the sender
    layers: str

    @property
    def ratio(self) -> float:
        return self.whole_s / self.shared_s


class Stage:
    """The models, one engine, and a prefix."""

    def __init__(self, ops: Ops, num_tokens: int, num_new: int, seed: int) -> None:
        self.base, _ = random_model(MID_GRANITE, ops, torch.bfloat16, adaptable=True)
        self.num_layers = len(self.base.layers)
        self._ops = ops
        self._rng = np.random.default_rng(seed)
        self._shared = self._tokens(num_tokens)
        self._num_new = num_new

    def _tokens(self, num: int) -> TokenArray:
        return self._rng.integers(100, self.base.vocab_size, num).astype(np.int32)

    def variant(self, first: int) -> HybridModel:
        """Other weights from a layer on."""
        return random_model(MID_GRANITE, self._ops, torch.bfloat16, other=1 + first, first=first)[0]

    def exact(self, name: str, model: HybridModel) -> Timing:
        """What the base has read is used to the bit, by itself or by another model."""
        engine = Engine(self.base, EngineConfig(BUDGET_BYTES), variants={"other": model})
        invoked = np.array(model.invocation, np.int32)
        prompt = np.concatenate([self._shared, invoked, self._tokens(self._num_new - len(invoked))])
        asked = "" if model is self.base else "other"
        whole_s, _ = self._ask(engine, prompt, asked, None, CacheMode.OFF)
        self._read(engine, prompt)
        if len(invoked):  # the first call leaves the base's state at the invocation
            self._ask(engine, np.concatenate([self._shared, invoked, self._tokens(5)]), "other")
            engine.run_until_idle()
        shared_s, received = self._ask(engine, prompt, asked)
        tokens = len(self._shared) if received is None else received.end - received.start
        return Timing(name, whole_s, shared_s, tokens, "" if received is None else received.transfer)

    def profiled(self, ways: Sequence[tuple[str, Transfer]]) -> Iterator[Timing]:
        """The base's prefix is used as profiles allow, one after the other. The first one reads all that others do."""
        other = self.variant(0)
        engine = Engine(self.base, EngineConfig(BUDGET_BYTES), variants={"other": other})
        prompt = np.concatenate([self._shared, self._tokens(self._num_new)])
        whole_s = min(self._ask(engine, prompt, "other", None, CacheMode.OFF)[0] for _ in range(2))
        for number, (name, transfer) in enumerate(ways):
            plan = Plan(transfer, LOSS, 1.0, 0.5, 0)
            engine.add_profile(Profile(self.base.fingerprint, other.fingerprint, self.num_layers, "", (plan,)))
            if not number:
                self._ask(engine, self._tokens(9), "other", LOSS)  # such entries are asked for
                self._read(engine, prompt)
            shared_s, received = self._ask(engine, prompt, "other", LOSS)
            assert received is not None
            yield Timing(name, whole_s, shared_s, received.end - received.start, received.transfer)

    def _read(self, engine: Engine, prompt: TokenArray) -> None:
        """The base reads what is shared."""
        self._ask(engine, np.append(self._shared, prompt[-1:]), "")
        engine.run_until_idle()

    def _ask(
        self,
        engine: Engine,
        tokens: TokenArray,
        model: str,
        max_loss: float | None = None,
        mode: CacheMode = CacheMode.IMPLICIT,
    ) -> tuple[float, Received | None]:
        prompt = Prompt(tokens, (Boundary(min(len(self._shared), len(tokens))),))
        sampling, received = SamplingParams(temperature=0, max_tokens=1), None
        start = time.process_time()
        engine.submit(Request("r", prompt, sampling, cache_mode=mode, model=model, max_loss=max_loss))
        while engine.is_open("r"):
            for _, output in engine.step():
                received = output.received if isinstance(output, PromptOutput) else received
        return time.process_time() - start, received


def timings(ops: Ops, num_tokens: int, num_new: int, seed: int) -> Iterator[Timing]:
    """One after the other, `NUM_TIMINGS` in all."""
    stage = Stage(ops, num_tokens, num_new, seed)
    layers, num = stage.base.layers, stage.num_layers
    adapter = activated_by(stage.base, random_adapter(stage.base, 16, seed), INVOCATION)
    yield stage.exact("its own exact prefix cache", stage.base)
    yield stage.exact("activated adapter, exact", adapter)
    for share, first in (("quarter", num - num // 4), ("half", num // 2)):
        yield stage.exact(f"exact bands, other weights in the top {share}", stage.variant(first))
    states = [index for index, layer in enumerate(layers) if "attention" not in layer.kind]
    middle = num // 3
    ways = (
        ("project all", projected(num, range(num))),
        ("project states", projected(num, states)),
        ("project a random half", projected(num, Random(seed).sample(range(num), num // 2))),
        ("project one layer", projected(num, [middle])),
        (f"recompute {middle}-{middle + 4}, DroidSpeak's way", group(num, middle, middle + 4)),
        ("take all", upper(num, num)),
    )
    yield from stage.profiled(ways)
    twice = Texts(ops, num_tokens, num_new, seed).time("double writing of all", projected(num, range(num)), 1)
    paid = f"the sender's prefill takes {twice.sender - 1:.0%} longer"
    yield Timing(twice.name, twice.whole_s, twice.read_s, num_tokens // TILE * TILE, paid)
