"""A whole hybrid of random weights in an engine: decode and prefill, exact and fast, with CUDA graphs and without."""

from collections.abc import Mapping
from statistics import median
from time import perf_counter

import torch

from hybrid_cache.bench.common.random_model import SMALL, random_model
from hybrid_cache.bench.gpu.correctness import EagerWorker
from hybrid_cache.bench.gpu.kernel_speed import ceilings_note
from hybrid_cache.bench.gpu.report import Section
from hybrid_cache.bench.gpu.setting import Setting
from hybrid_cache.bench.gpu.timing import synchronize
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.worker import Worker
from hybrid_cache.engine.engine import Engine
from hybrid_cache.models.registry import ShapedModel
from hybrid_cache.models.tools.published import CONFIGS
from hybrid_cache.request import Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt

BF16 = torch.bfloat16
MODEL = "granite-4-h-1b"
WARM_STEPS, TIMED_STEPS = 6, 24

RUNS: Mapping[str, tuple[bool, type[Worker]]] = {  # label -> products by cuBLAS, worker
    "exact": (False, Worker),
    "exact, no graphs": (False, EagerWorker),
    "fast": (True, Worker),
}


def whole_model(setting: Setting, section: Section) -> None:
    ceilings = setting.ceilings()
    config: Mapping[str, object] = (
        SMALL["granite"] if setting.quick else {**CONFIGS[MODEL], "attention_multiplier": 0.1}
    )
    prompt, prompts, batches = (70, 2, (1, 2)) if setting.quick else (1024, 16, (1, 4, 16, 64))
    section.notes += [
        ceilings_note(ceilings),
        f"{'a small hybrid' if setting.quick else MODEL}, random weights, bfloat16, prompts of {prompt:,} tokens; "
        "whole steps of the engine, sampling and bookkeeping included, by the host's clock",
        "share of bandwidth: weights, KV and states of a step once (states in and out), over its time, over the read's",
    ]
    decode = section.table(
        "decode", "batch", "ms a step", "tokens/s", "share of bandwidth", "replayed", "left to torch"
    )
    prefill = section.table("prefill", "tokens a step", "tokens/s", "share of the matrix rate")
    step_s: dict[tuple[str, int], float] = {}
    prefill_s: dict[tuple[str, int], float] = {}
    for label, (fast, worker) in RUNS.items():
        ops = setting.ops(fast=fast)
        net, weight_bytes = random_model(config, ops, BF16)
        for batch in batches:
            if setting.late:
                section.notes.append(f"no time left for {label}, batch {batch}, and what follows it")
                return
            seconds, engine = _decode(net, worker, batch, prompt, setting)
            spec = net.cache_spec
            moved = weight_bytes + batch * (2 * spec.slot_bytes + prompt * spec.kv_bytes_per_token)
            reasons = {**getattr(ops, "reasons", {}), **engine.fallbacks}
            notes = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            replayed = engine.stats().num_graph_replays
            share = ceilings.seconds(moved, 0) / seconds
            decode.add(label, batch, 1e3 * seconds, batch / seconds, share, replayed, notes)
            step_s[label, batch] = seconds
        for tiles in () if label not in ("exact", "fast") else (2,) if setting.quick else (16, 64):
            seconds = prefill_s[label, tiles] = _prefill(net, prompts, prompt, tiles, setting)
            rate = net.prefill_cost.flops(0, prompt) * prompts / seconds
            prefill.add(label, 64 * tiles, prompts * prompt / seconds, rate / ceilings.gigaflops_per_s / 1e9)
    for batch in batches:
        exact = step_s["exact", batch]
        graphs, fast_ratio = step_s["exact, no graphs", batch] / exact, exact / step_s["fast", batch]
        section.notes.append(
            f"batch {batch}: graphs make exact decode {graphs:.2f} times as fast; it takes {fast_ratio:.2f} times as "
            "long as with cuBLAS"
        )
    for (label, tiles), seconds in prefill_s.items():
        if label == "exact":
            ratio = seconds / prefill_s["fast", tiles]
            section.notes.append(
                f"prefill of {64 * tiles:,} tokens: exact takes {ratio:.2f} times as long as with cuBLAS"
            )


def _decode(net: ShapedModel, worker: type[Worker], batch: int, prompt: int, setting: Setting) -> tuple[float, Engine]:
    """-> seconds of a step in which `batch` sequences decode and nothing else happens."""
    warm, timed = (2, 3) if setting.quick else (WARM_STEPS, TIMED_STEPS)
    engine = _engine(net, worker, batch, prompt, max_tiles=64, max_tokens=warm + timed + batch + 2)
    while engine.stats().computed_tokens < batch * prompt:
        engine.step()
    for _ in range(warm):
        engine.step()
    times = []
    for _ in range(timed):
        synchronize(setting.device)
        begin = perf_counter()
        engine.step()
        synchronize(setting.device)
        times.append(perf_counter() - begin)
    assert engine.stats().running == batch
    return median(times), engine


def _prefill(net: ShapedModel, prompts: int, prompt: int, tiles: int, setting: Setting) -> float:
    """Seconds of the prefill of `prompts` prompts, the second time."""
    for _ in range(2):
        engine = _engine(net, Worker, prompts, prompt, max_tiles=tiles, max_tokens=0)
        synchronize(setting.device)
        begin = perf_counter()
        engine.run_until_idle()
        synchronize(setting.device)
        seconds = perf_counter() - begin
    return seconds


def _engine(net: ShapedModel, worker: type[Worker], batch: int, prompt: int, max_tiles: int, max_tokens: int) -> Engine:
    """With `batch` prompts in its queue."""
    spec = net.cache_spec
    pages = batch * (prompt // 64 + 4)
    budget = 2 * ((batch + 2) * (spec.slot_bytes + (1 << 16)) + (pages + 4) * spec.page_bytes)
    config = EngineConfig(
        budget, max_running=batch, max_tiles=max_tiles, max_tiles_beside_decode=max_tiles, prefix_cache=False
    )
    engine = Engine(net, config, worker=worker)
    rng = torch.Generator().manual_seed(0)
    for i in range(batch):
        tokens = torch.randint(0, net.vocab_size, (prompt,), generator=rng, dtype=torch.int32).numpy()
        engine.submit(Request(str(i), Prompt(tokens), SamplingParams(temperature=0, max_tokens=max_tokens)))
    return engine
