"""Runs arranged prompts through an engine and looks at the logits."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.choreography.arrangement import Arrangement, Encoding, Fidelity, Part, message_id
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.worker import Worker
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.ops import RowAdapters
from hybrid_cache.request import PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt, TokenArray

VOCAB = 199
HEADER = np.array([11, 12, 13], np.int32)


def message(length: int, seed: int) -> TokenArray:
    return np.random.default_rng(seed).integers(3, VOCAB, length).astype(np.int32)


class Conductor:
    """An engine for one model, and the logits of the last prompt's end."""

    def __init__(
        self, model: HybridModel, budget_bytes: int = 64 << 20, worker: type[Worker] = Worker, **config: object
    ) -> None:
        seen: list[Tensor] = []

        class Watched(worker):  # type: ignore[valid-type, misc]
            def logits(self, model: HybridModel, hidden: Tensor, adapters: RowAdapters | None = None) -> Tensor:
                seen.append(super().logits(model, hidden, adapters))
                return seen[-1]

        self.engine = Engine(model, EngineConfig(budget_bytes=budget_bytes, **config), worker=Watched)
        self.namespace = f"{model.fingerprint}/"
        self._seen = seen
        self._count = 0

    def part(self, tokens: TokenArray, encoding: Encoding, context: tuple[str, ...] = ()) -> Part:
        return Part(len(tokens), message_id(self.namespace, tokens, context), encoding)

    def arrangement(
        self,
        messages: Sequence[TokenArray],
        encoding: Encoding = Encoding.ALONE,
        fidelity: Fidelity = Fidelity.COMPOSED,
        **options: object,
    ) -> Arrangement:
        """Messages in this order, each named by its tokens alone, then the header."""
        parts = tuple(self.part(m, encoding) for m in messages)
        return Arrangement((*parts, Part(len(HEADER))), fidelity, **options)

    def request(
        self, messages: Sequence[TokenArray], arrangement: Arrangement | None = None, max_tokens: int = 1
    ) -> Request:
        self._count += 1
        prompt = Prompt(np.concatenate([*messages, HEADER]))
        return Request(
            str(self._count), prompt, SamplingParams(temperature=0, max_tokens=max_tokens), arrangement=arrangement
        )

    def run(
        self, messages: Sequence[TokenArray], arrangement: Arrangement | None = None, max_tokens: int = 1
    ) -> tuple[Tensor, PromptOutput, list[int]]:
        """-> the first token's logits [V], what was told of the prompt, the answer."""
        self._seen.clear()
        self.engine.submit(self.request(messages, arrangement, max_tokens))
        outputs = [output for _, output in self.engine.run_until_idle()]
        self.engine.check()
        told = next(o for o in outputs if isinstance(o, PromptOutput))
        answer = [o.token for o in outputs if isinstance(o, TokenOutput) and o.token is not None]
        return self._seen[0][0], told, answer


def exact_logits(model: HybridModel, messages: Sequence[TokenArray]) -> Tensor:
    with torch.inference_mode():
        return Conductor(model, prefix_cache=False).run(messages)[0]
