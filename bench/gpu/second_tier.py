"""The second tier on a card: does what comes back from host memory have the same bits, and do the copies overlap?"""

from collections.abc import Callable

import torch

from hybrid_cache.bench.common.random_model import SMALL, random_model
from hybrid_cache.bench.gpu.report import Section
from hybrid_cache.bench.gpu.setting import Setting
from hybrid_cache.bench.gpu.timing import Clock, synchronize
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.lanes import LARGEST, CudaLanes, Overlapped
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.request import Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.stats import EngineStats
from hybrid_cache.tokens import Prompt

CONVERSATIONS, ROUNDS = 12, 3
HOST_BYTES = 1 << 28
ROW_BYTES = 54 << 20  # of a state of a model of seven billion parameters
COPIES = 16


def second_tier(setting: Setting, section: Section) -> None:
    """Conversations that come back in a memory for a quarter of them, with host memory behind it and without cache."""
    table = section.table("model", "exact", "stored", "loaded")
    for name, config in list(SMALL.items())[: 1 if setting.quick else None]:
        if setting.late:
            section.notes.append(f"no time left for {name} and what follows it")
            break
        model, _ = random_model(config, setting.ops(), torch.bfloat16)
        alone, _ = _answers(model, host_bytes=0, prefix_cache=False)
        found, stats = _answers(model, host_bytes=HOST_BYTES, prefix_cache=True)
        table.add(name, found == alone, stats.cache.host_stores, stats.cache.host_loads)
        if found != alone:
            section.failures.append(f"{name}: answers differ after a way through host memory")
        if not stats.cache.host_loads:
            section.failures.append(f"{name}: nothing came back from host memory, so nothing was compared")
    if setting.device.type == "cuda" and not setting.late:
        _time_copies(setting, section)


def _answers(model: HybridModel, *, host_bytes: int, prefix_cache: bool) -> tuple[list[object], EngineStats]:
    spec = model.cache_spec
    room = CONVERSATIONS // 4 * (2 * spec.slot_bytes + 10 * spec.page_bytes + (1 << 12))
    config = EngineConfig(room, host_bytes=host_bytes, prefix_cache=prefix_cache)
    engine, rng = Engine(model, config), torch.Generator().manual_seed(0)
    talks = [torch.randint(0, model.vocab_size, (3 * TILE,), generator=rng) for _ in range(CONVERSATIONS)]
    found: list[object] = []
    for number in range(ROUNDS):
        for i, talk in enumerate(talks):
            tokens = talk[: (number + 1) * TILE + 7].to(torch.int32).numpy()
            sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=5)
            engine.submit(Request(f"{number} {i}", Prompt(tokens), sampling))
            outputs = engine.run_until_idle()
            found += [output for _, output in outputs if hasattr(output, "token")]
    return found, engine.stats()


def _time_copies(setting: Setting, section: Section) -> None:
    """A pass of products alone, copies to the host alone, and both at once."""
    device, clock = setting.device, Clock(setting.device)
    weights = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    rows = torch.zeros(LARGEST, ROW_BYTES, dtype=torch.uint8, device=device)
    hosts = torch.zeros(LARGEST, ROW_BYTES, dtype=torch.uint8, pin_memory=True)
    overlapped = Overlapped(CudaLanes(device), ROW_BYTES, device)

    def passes() -> None:
        for _ in range(40):
            weights @ weights

    def copies() -> None:
        for i in range(COPIES):
            overlapped.store(i % LARGEST, hosts[i % LARGEST], rows[i % LARGEST])

    def both() -> None:
        copies()
        passes()

    def to_its_end(call: Callable[[], None]) -> Callable[[], None]:
        def whole() -> None:
            call()
            overlapped.finish()

        return whole

    table = section.table("what", "ms", "GB/s", title="copies to host memory beside a pass")
    num_bytes = COPIES * ROW_BYTES
    for name, call, copied in (("pass", passes, 0), ("copies", copies, num_bytes), ("both", both, num_bytes)):
        seconds = clock.seconds(to_its_end(call))
        table.add(name, seconds * 1e3, copied / seconds / 1e9 if copied else None)
    synchronize(device)
