"""Messages in the making stay inside the budget: the process is measured, with states as large as real models have.

What a message does to the states of delta nets is a matrix for each head: 6 MiB here, 75 MiB in Qwen3-Next.
"""

import os
import subprocess
import sys

import pytest

from hybrid_cache.kernels import dispatch

MIB = 1 << 20
BUDGET = 112 * MIB
SCRIPT = """
import gc
import resource

import numpy as np
import torch

from hybrid_cache.bench.common.random_model import SMALL, random_model
from hybrid_cache.choreography.arrangement import Encoding
from hybrid_cache.kernels import dispatch
from tests.choreography.conductor import Conductor, message

torch.set_num_threads(1)
LAYERS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
HEADS = {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
SIZES = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
MODEL = {"layer_types": LAYERS, "num_hidden_layers": 4, "max_position_embeddings": 8192}
config = {**SMALL["qwen3 next"], **HEADS, **SIZES, **MODEL}
model, _ = random_model(config, dispatch.select(), torch.float32)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run(encoding, budget, count):
    conductor = Conductor(model, budget)
    messages = [message(40, seed) for seed in range(count)]
    arrangement = conductor.arrangement(messages, encoding)
    told = [conductor.run(messages, arrangement)[1] for _ in range(2)][-1]
    return conductor.engine.stats().cache, told


# All that passes need for themselves, with as many rows in a step, in a budget that is given back.
plain = Conductor(model, BUDGET)
plain.run([message(40, seed) for seed in range(26)])
plain.run([message(40, seed) for seed in range(2)], plain.arrangement([message(40, seed) for seed in range(2)]))
del plain
gc.collect()
before = peak()
for encoding in (Encoding.ALONE, Encoding.IN_PLACE):
    stats, told = run(encoding, BUDGET, 32)
    gc.collect()
    print(model.cache_spec.effect_size * 4, stats.messages, told.cached_tokens, peak() - before)
"""


def test_many_new_messages_at_once_take_no_more_than_the_budget():
    if "native" not in dispatch.exact_backends():
        pytest.skip("takes minutes without the native backend")
    environment = {**os.environ, "HYBRID_CACHE_VERIFY": "0"}  # digests need memory of their own
    command = [sys.executable, "-c", f"BUDGET = {BUDGET}\n{SCRIPT}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    alone, in_place = done.stdout.splitlines()
    for said in (alone, in_place):
        effect_bytes, messages, cached, grown = map(int, said.split())
        assert effect_bytes == 3 * 32 * 128 * 128 * 4
        assert messages > 2
        assert cached > 0
        assert 32 * effect_bytes > 1.5 * BUDGET
        assert grown < BUDGET + 24 * MIB, f"{grown / MIB:.0f} MiB"
