"""Everything that models of one engine share, at once: what is cached of each has the bytes that it has alone."""

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybrid_cache.bench.common.random_model import SMALL, activated_by, random_adapter, random_model
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine import twins
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.models.loading import beside
from hybrid_cache.namespaces import fingerprint_in, lane_in
from hybrid_cache.profile import Plan, Profile
from hybrid_cache.request import CacheMode, Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, Prompt, TokenArray
from hybrid_cache.transfer import Transfer, Way

INVOCATION = (11, 12)
SALTS = ("", "a")


def models_of(name: str, seed: int) -> dict[str, HybridModel]:
    """A base, another one from layer 1 on, one with nothing in common, an adapter, and one that is invoked."""
    ops, dtype = select(), torch.bfloat16
    base, _ = random_model(SMALL[name], ops, dtype, seed, adaptable=True)
    upper, _ = random_model(SMALL[name], ops, dtype, seed, other=seed + 1, first=1)
    far, _ = random_model(SMALL[name], ops, dtype, seed + 2)
    adapter, invoked = random_adapter(base, 5, seed), random_adapter(base, 8, seed + 1)
    return {
        "": base,
        "upper": upper,
        "far": far,
        "beside": beside(base, adapter),
        "invoked": activated_by(base, invoked, INVOCATION),
    }


def text(rng: np.random.Generator, length: int) -> TokenArray:
    return rng.integers(20, 500, length).astype(np.int32)


def entries(engine: Engine, model: HybridModel) -> Iterator[tuple[bytes, str, list[torch.Tensor]]]:
    """What is cached of a model under its own name: prefix, what it is, and copies of all of its tensors."""
    engine.settle()
    tensors = engine.worker.memory.tensors
    for node in engine.cache.tree.nodes():
        if node.parent is None or fingerprint_in(node.namespace) != model.fingerprint or lane_in(node.namespace):
            continue
        pages = [each for each in tensors if isinstance(each, KVTensors)]
        yield node.name, "page", [half[node.page].clone() for kv in pages for half in (kv.k, kv.v)]
        if node.checkpoint is not None:
            slot = node.checkpoint.slot
            states = [each for each in tensors if not isinstance(each, KVTensors)]
            yield node.name, "state", [part[slot].clone() for each in states for part in (each.conv, each.state)]


def alone(
    model: HybridModel, base: HybridModel, prompts: list[tuple[str, TokenArray]]
) -> dict[tuple[bytes, str], list]:
    """The same of an engine that runs one model, one prompt after the other, with a state at each grid position."""
    own = model if not model.invocation else base
    engine, found = Engine(own, EngineConfig(budget_bytes=256 << 20, policy="lru", verify=True)), {}
    for number, (salt, tokens) in enumerate(prompts):
        places = tuple(Boundary(place) for place in range(TILE, len(tokens) + 1, TILE))
        sampling = SamplingParams(temperature=0, max_tokens=0)
        engine.submit(Request(f"{number}", Prompt(tokens, places), sampling, namespace=salt))
        engine.run_until_idle()
    for name, what, tensors in entries(engine, own):
        found[name, what] = tensors
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["granite", "jamba", "qwen3 next"])
def test_whatever_is_shared_what_is_cached_has_the_bytes_that_it_has_alone(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if seed:  # whoever may read is expected to
        monkeypatch.setattr(twins.Readers, "expects", lambda self, lane: True)
        monkeypatch.setattr(twins, "MOST_COST", 2)
    choose, rng = random.Random(seed), np.random.default_rng(seed)
    models = models_of(name, seed)
    base, num = models[""], len(models[""].layers)
    config = EngineConfig(
        budget_bytes=choose.choice([6 << 20, 64 << 20]), max_tiles=choose.choice([1, 2, 8]), max_running=4, verify=True
    )
    engine = Engine(base, config, variants={key: model for key, model in models.items() if key})
    for sender, receiver in (("", "far"), ("upper", "far"), ("far", "")):
        ways = Transfer(tuple(choose.choice(list(Way)) for _ in range(num)))
        plan = Plan(ways, 0.01, 1.0, 0.5, 0)
        engine.add_profile(Profile(models[sender].fingerprint, models[receiver].fingerprint, num, "", (plan,)))
    talks, prompts = [text(rng, choose.randrange(60, 300)) for _ in range(3)], list[tuple[str, TokenArray]]()
    checked = 0
    for number in range(60):
        talk = choose.randrange(3)
        key, salt = choose.choice(list(models)), choose.choice(SALTS)
        read = talks[talk][: choose.choice([len(talks[talk]), choose.randrange(40, len(talks[talk]) + 1)])]
        more = [read, text(rng, choose.randrange(1, 90))]
        if key == "invoked" or choose.random() < 0.1:
            more.insert(1, np.array(INVOCATION, np.int32))
        tokens = np.concatenate(more)[:1000]
        if choose.random() < 0.5:
            talks[talk] = tokens
        sampling = SamplingParams(temperature=1.0, seed=number, max_tokens=choose.choice([0, 1, 5, 70]))
        request = Request(f"{number}", Prompt(tokens, (Boundary(len(read)),)), sampling, model=key, namespace=salt)
        mode = choose.choice([CacheMode.OFF, *[CacheMode.IMPLICIT] * 5])
        allowed = choose.choice([None, None, 1.0])
        engine.submit(replace(request, n=choose.choice([1, 1, 2]), cache_mode=mode, max_loss=allowed))
        for _ in range(choose.randrange(6)):
            engine.step()
        if choose.random() < 0.15:
            engine.abort(f"{number - choose.randrange(3)}")
        if choose.random() < 0.05:
            engine.cache.drop()
        if number % 20 == 19:
            engine.run_until_idle()
            engine.check()
    for node in engine.cache.tree.nodes():  # the prefixes that are there, as prompts
        if not node.children and node.parent is not None and not lane_in(node.namespace):
            keys, at = [], node
            while at.parent is not None:
                keys.append(at.key)
                at = at.parent
            if all(len(key) == TILE * 4 for key in keys):
                tokens = np.frombuffer(b"".join(reversed(keys)), "<i4").astype(np.int32)
                prompts.append((node.namespace.partition("/")[2], np.append(tokens, 7).astype(np.int32)))
    assert engine.stats().received_tokens > 0
    assert (engine.stats().twin_tokens > 0) == (seed > 0)
    for key in ("", "upper", "far", "beside"):
        expected = alone(models[key], base, prompts)
        for prefix, what, tensors in entries(engine, models[key]):
            if (prefix, what) in expected:
                checked += 1
                assert all(map(torch.equal, tensors, expected[prefix, what])), (key, what)
    assert checked > 10
