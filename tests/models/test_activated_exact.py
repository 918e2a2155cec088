"""Activated adapters on hybrids of every kind: whatever the cache held, the bits of a run without one and of an adapter
that is served alone: tokens, log-probabilities, keys, values, states and windows."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybrid_cache.bench.common.random_model import SMALL, activated_by, random_adapter, random_model
from hybrid_cache.bench.exactness.models import PURE
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.sequence import Phase
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.kernels.ops import StateTensors
from hybrid_cache.request import CacheMode, PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from tests.engine.test_host_tier import room_for

# A residual stream in float32, Mamba-1 with attention, Mamba-2 with attention, the gated delta rule.
KINDS = {**{name: SMALL[name] for name in ("granite", "jamba", "qwen3 next")}, "mamba2": PURE["mamba2"]}
INVOKED = {"judge": (11, 12), "guard": (13,)}


@pytest.fixture(scope="module", params=[*KINDS])
def family(request):
    """A base, and adapters of different ranks beside it."""
    base, _ = random_model(KINDS[request.param], select(), torch.bfloat16, adaptable=True)
    adapters = {name: random_adapter(base, 8 * len(part), seed=len(part)) for name, part in INVOKED.items()}
    return {"": base, **{name: activated_by(base, adapter, INVOKED[name]) for name, adapter in adapters.items()}}


def engine_of(family, names, budget_bytes=64 << 20, **config):
    return Engine(
        family[""], EngineConfig(budget_bytes=budget_bytes, **config), variants={name: family[name] for name in names}
    )


def text_of(seed, length):
    """Tokens that invoke nothing."""
    return np.random.default_rng(seed).integers(20, 500, length).astype(np.int32)


def invoked(before, name, num_more, seed=9):
    return np.concatenate([before, np.array(INVOKED[name], np.int32), text_of(seed, num_more)])


def outputs_of(engine, request):
    """All that a request is told, by choice, but for what the cache did."""
    engine.submit(request)
    return told(engine.run_until_idle(), request.id)


def told(outputs, name):
    found = {}
    for request_id, output in outputs:
        if request_id == name and isinstance(output, TokenOutput):
            found.setdefault(output.index, []).append(output)
        elif request_id == name and isinstance(output, PromptOutput):
            found["prompt"] = output.logprobs
    return found


def kept_of(engine, request):
    """Keys, values, states and windows of a prompt once it is computed, and tokens that were not."""
    engine.submit(request)
    sequence = next(s for s in engine._scheduler.sequences() if s.request.id == request.id)
    while sequence.phase is not Phase.DECODE:
        engine.step()
    engine.settle()
    lease, found = sequence.prefill.lease, []
    rows = torch.from_numpy(lease.rows(0, len(request.prompt.tokens)))
    for tensors in engine.worker.memory.tensors:
        if isinstance(tensors, StateTensors):
            found += [tensors.state[lease.slot].clone(), tensors.conv[lease.slot].clone()]
        else:
            found += [t.flatten(0, 1)[rows].clone() for t in (tensors.k, tensors.v)]
    engine.run_until_idle()
    return found, sequence.prefill.cached


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 130, 191])
@pytest.mark.parametrize("more", [0, 70])
def test_pages_states_and_windows_have_the_bits_of_a_run_without_a_cache(family, at, more):
    sampling = SamplingParams(temperature=0, max_tokens=3)
    before = text_of(1, at)
    busy = engine_of(family, INVOKED, verify=True)
    if at:
        outputs_of(busy, Request("base", Prompt(before), sampling, commits=False))
    for name in ("judge", "guard", "judge"):
        tokens = invoked(before, name, more)
        request = Request("a", Prompt(tokens), sampling, model=name, commits=False)
        expected, _ = kept_of(engine_of(family, [name], prefix_cache=False), request)
        found, cached = kept_of(busy, replace(request, id=f"b{name}{len(busy.cache.pool.slot_owner)}"))
        assert cached in (at, len(tokens))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        base, _ = kept_of(busy, Request("c", Prompt(before), sampling, commits=False)) if at else (None, 0)
        if at:
            plain, _ = kept_of(engine_of(family, [], prefix_cache=False), Request("d", Prompt(before), sampling))
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(base, plain, strict=True))
    busy.check()


@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_mixed_each_answer_is_the_one_that_it_gets_alone(family, seed):
    rng = random.Random(seed)
    room = room_for(family[""], rng.choice((4, 12)), rng.choice((16, 40)))
    sizes = {"max_running": rng.choice((2, 5)), "max_tiles": rng.choice((1, 3)), "host_bytes": rng.choice((0, room))}
    busy = engine_of(family, INVOKED, room, verify=True, **sizes)
    plain = {name: engine_of(family, [name] if name else [], prefix_cache=False) for name in family}
    talks, asked, outputs = [text_of(seed * 10 + i, rng.choice((40, 64, 150))) for i in range(2)], [], []
    for number in range(28):
        place, name = rng.randrange(2), rng.choice(["", *INVOKED, *INVOKED])
        before = talks[place]
        if rng.random() < 0.3:
            before = before[: max(1, len(before) // 64 * 64 + rng.choice((-1, 0, 1)))]
        more = rng.choice((0, 1, 20, 63, 100))
        tokens = invoked(before, name, more, number) if name else np.concatenate([before, text_of(number, more + 1)])
        sampling = SamplingParams(
            temperature=rng.choice((0.0, 1.0)),
            seed=number,
            max_tokens=rng.choice((1, 4, 70)),
            logprobs=2,
            prompt_logprobs=rng.choice((None, None, None, 1)),
        )
        mode, salt = rng.choice([*CacheMode, CacheMode.IMPLICIT, CacheMode.IMPLICIT]), rng.choice(("", "", "s"))
        request = Request(
            str(number),
            Prompt(tokens),
            sampling,
            rng.choice((1, 1, 2)),
            salt,
            mode,
            model=name,
            tenant=rng.choice("ab"),
        )
        asked.append(request)
        busy.submit(request)
        for _ in range(rng.choice((0, 2, 10))):
            outputs += busy.step()
        if rng.random() < 0.4:
            outputs += busy.run_until_idle()
            busy.check()
            said = [o.token for o in told(outputs, request.id)[0]]
            if len(tokens) + len(said) < 400:
                talks[place] = np.concatenate([tokens, np.array(said, np.int32)])
    outputs += busy.run_until_idle()
    busy.check()
    for request in asked:
        assert told(outputs, request.id) == outputs_of(plain[request.model], request), request
    assert busy.stats().cached_tokens > 0
