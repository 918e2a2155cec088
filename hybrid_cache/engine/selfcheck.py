"""Is a loaded model exact on this machine? One prompt by itself with the cache off, and again in a batch with it on.

The kernels have their own probes; this one runs the very weights and shapes that will be served, in about the time of a
prompt of a thousand tokens.
"""

from math import isfinite

import numpy as np

from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import ModelError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, Prompt, TokenArray

PROMPT_TOKENS = 2 * TILE + 21
NEW_TOKENS = 6
ADAPTER = "adapter"  # what it is called for the check


def check_model(model: HybridModel, base: HybridModel | None = None) -> list[str]:
    """What differs in tokens or in bits of log-probabilities; empty if the model is exact.

    base: of an activated adapter, the model that it stands beside
    Raises ModelError if they are not finite: some weight or setting makes more of them than numbers can be.
    """
    rng = np.random.default_rng(0)
    prompt, *others = (rng.integers(0, model.vocab_size, PROMPT_TOKENS).astype(np.int32) for _ in range(4))
    prompt = np.concatenate([prompt[: TILE + 13], np.array(model.invocation, np.int32), prompt[TILE + 13 :]])
    sibling = np.concatenate([prompt[: TILE + 40 + len(model.invocation)], others[0][:30]])
    num_pages = 4 + len(model.invocation) // TILE
    room = 8 * (2 * model.cache_spec.slot_bytes + num_pages * model.cache_spec.page_bytes + (1 << 16))
    plain = _engine(model, base, EngineConfig(budget_bytes=room, prefix_cache=False))
    busy = _engine(model, base, EngineConfig(budget_bytes=room, max_tiles=1))
    alone = _answer(plain, [("alone", prompt)])["alone"]
    if not all(output.logprob is not None and isfinite(output.logprob.logprob) for output in alone):
        raise ModelError("the model computes values that are not finite from its weights and its config.json")
    company = _answer(busy, [("sibling", sibling), ("resumed", prompt), *zip("xyz", others, strict=False)])
    repeated = _answer(busy, [("repeated", prompt)])
    found = {"resumed beside others": company["resumed"], "repeated from its kept end": repeated["repeated"]}
    return [f"a prompt {how} differs from the prompt alone" for how, answer in found.items() if answer != alone]


def _engine(model: HybridModel, base: HybridModel | None, config: EngineConfig) -> Engine:
    if base is None or not model.invocation:
        return Engine(model, config)
    return Engine(base, config, variants={ADAPTER: model})


def _answer(engine: Engine, prompts: list[tuple[str, TokenArray]]) -> dict[str, list[TokenOutput]]:
    """Greedy answers with log-probabilities to prompts that arrive together, by name."""
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=5)
    for name, tokens in prompts:
        prompt = Prompt(tokens, (Boundary(TILE), Boundary(2 * TILE)))
        engine.submit(Request(name, prompt, sampling, model=ADAPTER if ADAPTER in engine.models else ""))
    outputs: Outputs = engine.run_until_idle()
    return {name: [o for i, o in outputs if i == name and isinstance(o, TokenOutput)] for name, _ in prompts}
