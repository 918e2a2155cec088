"""Of every architecture: what the next process finds on a disk has the bits that it would compute itself.

With `HYBRID_CACHE_CONVERSATIONS=4` in the environment, more of them; rows that were compared are printed.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_cache.cache.keys import Name
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models import loading
from hybrid_cache.request import PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, Prompt, TokenArray
from tests.models import checkpoints

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONVERSATIONS = int(os.environ.get("HYBRID_CACHE_CONVERSATIONS", "1"))
TURNS = (200, 330, 700, 960)  # tokens of the prompt in each
BUDGET_BYTES = 1 << 27
CASES = [
    pytest.param(case, id=str(case), marks=() if case in checkpoints.ONE_OF_A_KIND else pytest.mark.slow)
    for case in checkpoints.FIRST_CASES
]


def answer(engine: Engine, name: str, tokens: TokenArray) -> tuple[int, list[TokenOutput]]:
    """-> cached tokens, and what was said with log-probabilities."""
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=20)
    boundaries = tuple(Boundary(end) for end in TURNS if end <= len(tokens))
    engine.submit(Request(name, Prompt(tokens, boundaries), sampling))
    outputs = engine.run_until_idle()
    cached = next(o.cached_tokens for _, o in outputs if isinstance(o, PromptOutput))
    return cached, [o for _, o in outputs if isinstance(o, TokenOutput)]


def contents_of(engine: Engine) -> dict[tuple[Name, str], bytes]:
    """All bytes of each page and state of the tree, by the name of the prefix."""
    engine.settle()
    memory, found = engine.worker.memory, dict[tuple[Name, str], bytes]()
    for node in engine.cache.tree.nodes():
        if node.parent is not None:
            found[node.name, "page"] = memory.contents(node.page, None)
        if node.checkpoint is not None:
            found[node.name, "state"] = memory.contents(-1, node.checkpoint.slot)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", CASES)
def test_what_another_process_left_has_the_bits_of_a_pass(first, dtype, folders, tmp_path: Path) -> None:
    model = loading.load(folders(first, DTYPES[dtype]), ops=dispatch.select())
    rng = np.random.default_rng(3)
    texts = [rng.integers(3, model.vocab_size, TURNS[-1]).astype(np.int32) for _ in range(CONVERSATIONS)]
    with_disk = EngineConfig(BUDGET_BYTES, disk=tmp_path, verify=True)
    computing = Engine(model, EngineConfig(BUDGET_BYTES, prefix_cache=False))
    in_memory = Engine(model, EngineConfig(BUDGET_BYTES))
    num_rows = 0
    for length in TURNS:
        engine = Engine(model, with_disk)
        for number, text in enumerate(texts):
            cached, said = answer(engine, f"{number}", text[:length])
            assert said == answer(computing, f"{number}", text[:length])[1]
            answer(in_memory, f"{number}", text[:length])
            before = max((turn for turn in TURNS if turn < length), default=0)
            assert cached >= before // TILE * TILE
        ours, theirs = contents_of(engine), contents_of(in_memory)
        for key in ours.keys() & theirs.keys():
            assert ours[key] == theirs[key]
            num_rows += TILE if key[1] == "page" else 1
        assert engine.flush(30.0)
        engine.check()
        engine.close()
    assert num_rows > 30 * TILE
    print(f"{num_rows} rows")
