"""How much the cache gets of what is free, and how much a server needs beside it."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid_cache.api.server.budget import (
    AUTO_SHARE,
    CONVERSATION_TOKENS,
    GPU_BYTES,
    Beside,
    MemoryPlan,
    beside,
    conversation_bytes,
    fitted,
    plan_memory,
)
from hybrid_cache.api.server.launch import Loaded, LoadOptions, load
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.free_memory import FreeMemory
from hybrid_cache.errors import ConfigError
from hybrid_cache.models.tools.presets import preset
from hybrid_cache.sizes import parse_budget
from hybrid_cache.spec import AttentionSpec, CacheSpec, StateSpec

MIB, GIB = 1 << 20, 1 << 30
FREE = FreeMemory(2 * GIB, "a box")
NEEDED = Beside(
    100 * MIB, 0, 50 * MIB, 10 * MIB, 40 * MIB, 56 * MIB, 0.25, history=0, program=0
)  # 256 MiB without the books
SPEC = CacheSpec(
    (AttentionSpec(2, 64, torch.bfloat16), StateSpec((3, 64), (64, 64, 64), torch.bfloat16)), 512, torch.bfloat16
)


def test_auto_is_a_share_of_what_is_free_and_not_needed() -> None:
    budget = fitted(None, FREE, NEEDED, SPEC)
    assert budget == int(AUTO_SHARE * (2 * GIB - 256 * MIB) / 1.25)
    assert fitted(budget, FREE, NEEDED, SPEC) == budget


def test_a_budget_that_fits_is_taken_to_the_byte() -> None:
    most = int((2 * GIB - 256 * MIB) / 1.25)
    assert fitted(most, FREE, NEEDED, SPEC) == most
    with pytest.raises(ConfigError) as caught:
        fitted(most + 2, FREE, NEEDED, SPEC)
    for number in ("1.4 GiB does not fit", "2 GiB are free by a box", "614 MiB are needed", "at most 1.4 GiB"):
        assert number in str(caught.value)


def test_without_room_for_a_conversation_auto_gives_up_and_a_small_budget_does_not() -> None:
    free = FreeMemory(256 * MIB + 2 * MIB, "a box")
    with pytest.raises(ConfigError, match=r"258 MiB are free by a box.*256 MiB are needed.*1.2 MiB, one.*2,000"):
        fitted(None, free, NEEDED, SPEC)
    assert fitted(MIB, free, NEEDED, SPEC) == MIB
    with pytest.raises(ConfigError, match="are 0 B, one conversation"):
        fitted(None, FreeMemory(MIB, "a box"), NEEDED, SPEC)


def test_on_a_gpu_only_what_is_in_its_memory_counts() -> None:
    assert replace(NEEDED, on_gpu=True).total(4 * GIB) == 150 * MIB + GPU_BYTES
    assert NEEDED.total(4 * GIB) == 256 * MIB + GIB


def test_the_word_auto_is_a_budget() -> None:
    assert parse_budget("auto") is None
    assert parse_budget("2GiB") == 2 * GIB
    with pytest.raises(ConfigError):
        parse_budget("much")


def test_two_gibibytes_hold_seven_conversations_of_zamba2() -> None:
    assert 2 * GIB // conversation_bytes(preset("zamba2-1.2b").cache_spec) == 7
    assert CONVERSATION_TOKENS == 2000


def test_each_part_grows_with_what_it_is_for() -> None:
    shape, config = preset("zamba2-1.2b"), EngineConfig()
    plain = beside(shape, config, max_length=4096)
    assert plain.keys == plain.messages == plain.bodies == 0
    assert beside(shape, config, max_length=4096, backend="torch").keys > 32 * 64 * 4096 * 4  # the scores of a tile
    assert beside(shape, replace(config, max_tiles=32), max_length=4096).step > 1.9 * plain.step
    assert beside(shape, replace(config, max_running=64), max_length=4096).logits == plain.logits
    assert beside(shape, replace(config, max_running=128), max_length=4096).logits == 2 * plain.logits
    assert plain.logits == 3 * 64 * 32_000 * 4
    assert beside(shape, config, max_length=4096, max_body_bytes=MIB, book_bytes=7).bodies == 16 * MIB
    plain, storing = (beside(shape, config, max_length=4096, response_bytes=size) for size in (0, 1000))
    assert storing.shared - plain.shared == 1000


@pytest.fixture(scope="module")
def embedded() -> Loaded:
    return load(LoadOptions())


def machine(folder: Path, free_bytes: int, taken_bytes: int) -> Path:
    """A folder that stands for a machine with so much free memory, of which this process has taken some."""
    (folder / "proc/self").mkdir(parents=True, exist_ok=True)
    (folder / "proc/meminfo").write_text(f"MemAvailable: {free_bytes // 1024} kB\n")
    (folder / "proc/self/statm").write_text(f"0 {taken_bytes // os.sysconf('SC_PAGE_SIZE')} 0 0\n")
    return folder


@pytest.mark.parametrize(
    ("free", "taken", "later", "room"),
    [
        (8 * GIB, GIB, 0, 5 * GIB),  # nothing of the 3 GiB that were planned is taken yet
        (6 * GIB, 3 * GIB, 0, 5 * GIB),  # two of them are
        (4 * GIB, 5 * GIB, 0, 4 * GIB),  # more than all are
        (6 * GIB, 3 * GIB, GIB, 4 * GIB),  # one of the two was for weights that came later
        (2 * GIB, GIB, 0, 0),  # somebody else has taken it
    ],
)
def test_room_for_more_weights_is_what_the_plan_does_not_need(
    tmp_path: Path, free: int, taken: int, later: int, room: int
) -> None:
    plan = MemoryPlan(2 * GIB, GIB, FREE, taken_bytes=GIB)
    assert plan.room(torch.device("cpu"), later, machine(tmp_path, free, taken)) == FreeMemory(room, "the machine")


def test_a_container_bounds_the_budget_of_a_loaded_model(embedded: Loaded, tmp_path: Path) -> None:
    for name, text in {
        "proc/meminfo": f"MemAvailable: {64 << 20} kB",
        "proc/self/cgroup": "0::/",
        "proc/self/statm": "1000 100 50 1 0 500 0",
        "sys/fs/cgroup/memory.max": str(2 * GIB),
        "sys/fs/cgroup/memory.current": str(GIB),
        "sys/fs/cgroup/memory.stat": f"inactive_file {100 * MIB}",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    plan = plan_memory(embedded, EngineConfig(), None, root=tmp_path)
    assert plan.free.num_bytes == GIB + 100 * MIB
    assert plan.budget_bytes < AUTO_SHARE * plan.free.num_bytes
    assert plan.budget_bytes + plan.beside_bytes < plan.free.num_bytes
    assert plan.taken_bytes is not None
    for words in ("for the cache", "beside it; 1.1 GiB were free", "with the model now"):
        assert words in str(plan)
    with pytest.raises(ConfigError, match=r"1.5 GiB does not fit: 1.1 GiB are free by the control group"):
        plan_memory(embedded, EngineConfig(), 3 * GIB // 2, root=tmp_path)


MEASURED = """
import sys

import numpy as np
import torch

from hybrid_cache.api.server.budget import HISTORY_BYTES, PROGRAM_BYTES, beside
from hybrid_cache.bench.common.random_model import SMALL, random_model
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.request import Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt

torch.set_num_threads(1)
backend, family, sizes = sys.argv[1], sys.argv[2], eval(sys.argv[3])
config = {**SMALL[family], "vocab_size": 20_000, "max_position_embeddings": 8192, **sizes}
model, _ = random_model(config, dispatch.select(backend), torch.float32)
info = loading.describe(config, dtype="float32")
settings = EngineConfig(budget_bytes=96 << 20, max_running=8)


def peak(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))


def run(lengths, **sampling):
    rng, engine = np.random.default_rng(0), Engine(model, settings)
    prompts = [Prompt(rng.integers(0, 20_000, length).astype(np.int32)) for length in lengths]
    requests = [Request(str(i), prompt, SamplingParams(max_tokens=3, **sampling)) for i, prompt in enumerate(prompts)]

    def between_layers():
        while len(requests) < len(prompts) and requests:
            engine.submit(requests.pop(0))
        engine.step_between()

    engine.between_layers = between_layers
    engine.submit(requests.pop(0))
    engine.run_until_idle()
    assert not requests
    stats = engine.stats().cache
    return stats.budget_bytes - stats.free_bytes


def grown():
    # Bytes that the process takes at the most beside the cache, more than before.
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = peak("VmRSS:")
    cached = run([2000, *[300] * 8], temperature=1.0, top_p=0.9, presence_penalty=1.0, logprobs=5)
    cached += run([1100], prompt_logprobs=5)
    return peak("VmHWM:") - before - cached


run([65, 3])
said = beside(info.shape, settings, max_length=8192, backend=backend)
limit = said.total(settings.budget_bytes) - HISTORY_BYTES - said.grammars
print(grown(), grown(), limit, PROGRAM_BYTES)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("backend", "family", "sizes"),
    [
        pytest.param("torch", "jamba", {"hidden_size": 512, "intermediate_size": 2048}, marks=pytest.mark.slow),
        pytest.param("torch", "granite", {"hidden_size": 512, "num_local_experts": 0}, marks=pytest.mark.slow),
        pytest.param("native", "granite", {"hidden_size": 512, "num_local_experts": 0}, marks=pytest.mark.slow),
        ("native", "qwen3 next", {"hidden_size": 512}),
    ],
)
def test_a_server_takes_no_more_beside_its_cache_than_is_said(backend: str, family: str, sizes: dict[str, int]) -> None:
    command = [sys.executable, "-c", MEASURED, backend, family, repr(sizes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    first, later, limit, program = map(int, done.stdout.split())
    assert first <= limit
    assert later <= limit - program  # once allocators and libraries have what they keep
    assert first > (limit - program) / 4  # or the bound says nothing
