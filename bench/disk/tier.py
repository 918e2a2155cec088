"""What the disk tier gives and costs: python -m hybrid_cache.bench.disk.tier --model granite-150m

load     a prompt of --tokens tokens: computed, against loaded and checked, until its first token
cost     conversations on an engine with the tier and on one without, in alternation, in processor time
start    an engine on a folder with --entries entries, against one without a disk
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from hybrid_cache.api.server.launch import LoadOptions
from hybrid_cache.bench.choreography.models import open_subject
from hybrid_cache.cache.disk.entries import EntryKind, Facts, NewEntry
from hybrid_cache.cache.disk.index import Index
from hybrid_cache.cache.geometry import Geometry
from hybrid_cache.cache.keys import Name
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.identity import identity_of
from hybrid_cache.request import PromptOutput, Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt

Tokens = NDArray[np.int32]
BUDGET_BYTES = 2 << 30
FLUSH_S = 60.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="granite-150m", help="a folder, or granite-150m")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--parts", nargs="*", default=["load", "cost", "start"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    model = open_subject(LoadOptions(asked.model, threads=asked.threads)).model
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[Path], dict[str, float]]] = {
            "load": lambda place: load(model, place, asked.tokens, asked.pairs, asked.seed),
            "cost": lambda place: cost(model, place, asked.pairs, asked.seed, asked.streams),
            "start": lambda place: start(model, place, asked.entries),
        }
        found = {name: part(Path(folder) / name) for name, part in parts.items() if name in asked.parts}
    text = json.dumps(found, indent=1)
    print(text)
    if asked.json:
        asked.json.write_text(text)
    return 0


def load(model: HybridModel, folder: Path, num_tokens: int, num_prompts: int, seed: int) -> dict[str, float]:
    """Medians in seconds. The files are read from the disk, not from what the system keeps of them."""
    rng = np.random.default_rng(seed)
    prompts = [_tokens(model, rng, num_tokens) for _ in range(num_prompts + 1)]
    engine = _engine(model, folder)
    computed = [_first_token(engine, prompt, 0) for prompt in prompts]
    assert engine.flush(FLUSH_S)
    engine.close()
    num_bytes = sum(path.stat().st_size for path in (folder / "entries").iterdir()) / len(prompts)
    engine = _engine(model, folder)
    for path in (folder / "entries").iterdir():
        _let_go(path)
    loaded = [_first_token(engine, prompt, num_tokens) for prompt in prompts]
    engine.close(0.0)
    compute_s, load_s = median(computed[1:]), median(loaded[1:])  # the first one warms up
    return {"bytes": num_bytes, "compute_s": compute_s, "load_s": load_s, "ratio": compute_s / load_s}


def cost(model: HybridModel, folder: Path, num_pairs: int, seed: int, num_streams: int) -> dict[str, float]:
    """Processor time with the tier over that without it, minus 1: the median of pairs, each in turn first."""
    ratios, walls = list[float](), list[float]()
    for number in range(num_pairs):
        times = {}
        for disk in (True, False) if number % 2 else (False, True):
            engine = _engine(model, folder / f"{number}" if disk else None)
            times[disk] = _converse(engine, np.random.default_rng(seed + number), num_streams)
            engine.close(0.0)
        ratios.append(times[True][0] / times[False][0] - 1)
        walls.append(times[True][1] / times[False][1] - 1)
    return {"processor_time": median(ratios), "wall_time": median(walls), "most": max(ratios)}


def _converse(engine: Engine, rng: np.random.Generator, num_streams: int) -> tuple[float, float]:
    """Streams of two turns -> processor time and wall time while somebody waits."""
    model, began_s, began_cpu_s = engine.model, time.perf_counter(), time.process_time()
    for turn in range(2):
        for number in range(num_streams):
            prompt = np.random.default_rng(number).integers(3, model.vocab_size, 400 * (turn + 1)).astype(np.int32)
            prompt[:64] = rng.integers(3, model.vocab_size) if turn == 0 else prompt[:64]
            sampling = SamplingParams(temperature=0, max_tokens=48)
            engine.submit(Request(f"{turn} {number}", Prompt(prompt), sampling))
        while not engine.idle:
            engine.step()
    return time.process_time() - began_cpu_s, time.perf_counter() - began_s


def start(model: HybridModel, folder: Path, num_entries: int) -> dict[str, float]:
    """Seconds until an engine is there, the computed probe left out."""
    began_s = time.perf_counter()
    identity = identity_of(model)
    probe_s = time.perf_counter() - began_s
    _fill(folder, identity, num_entries, Geometry.of(model.cache_spec, BUDGET_BYTES))
    times = {}
    for disk in (folder, None):
        began_s = time.perf_counter()
        engine = _engine(model, disk)
        times[disk] = time.perf_counter() - began_s
        engine.close(0.0)
    return {"with_s": times[folder], "without_s": times[None], "probe_s": probe_s}


def _fill(folder: Path, identity: str, num_entries: int, sizes: Geometry) -> None:
    """Entries in the index, each with a name of its own, and files without bytes."""
    Index(_made(folder), 1 << 50, "bench").close()
    _made(folder / "entries")
    index, rng = Index(folder, 1 << 50, "bench"), np.random.default_rng(0)
    for _ in range(0, num_entries, 1000):
        names = [rng.bytes(16) for _ in range(1000)]
        facts = [_run(identity, n, names[:3], 4 * sizes.page_bytes) for n in names[::2]]
        facts += [_state(identity, n, sizes.slot_bytes) for n in names[::2]]
        taken = index.reserve([NewEntry(each, (), None) for each in facts])
        index.commit((entry, bytes(32)) for entry in taken.ids if entry is not None)
    for entry in index.ids():
        (folder / "entries" / f"{entry:016x}.safetensors").touch()
    index.close()


def _run(identity: str, name: Name, before: list[Name], num_bytes: int) -> Facts:
    return Facts(identity, EntryKind.PAGES, name, "x/", "", 0, 256, b"".join((*before, name)), num_bytes)


def _state(identity: str, name: Name, num_bytes: int) -> Facts:
    return Facts(identity, EntryKind.STATE, name, "x/", "message_end", 4, 256, b"", num_bytes, 1.0)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _engine(model: HybridModel, disk: Path | None) -> Engine:
    return Engine(model, EngineConfig(BUDGET_BYTES, disk=disk, verify=False))


def _tokens(model: HybridModel, rng: np.random.Generator, count: int) -> Tokens:
    return rng.integers(3, model.vocab_size, count).astype(np.int32)


def _first_token(engine: Engine, prompt: Tokens, cached: int) -> float:
    """Seconds to the first token of a prompt, of which so many tokens must have been cached."""
    began_s = time.perf_counter()
    engine.submit(Request("prompt", Prompt(prompt), SamplingParams(temperature=0, max_tokens=1)))
    outputs = []
    while not engine.idle:
        outputs += engine.step()
    seconds = time.perf_counter() - began_s
    assert [o.cached_tokens for _, o in outputs if isinstance(o, PromptOutput)] == [cached]
    return seconds


def _let_go(path: Path) -> None:
    """The system forgets what it has of a file."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


if __name__ == "__main__":
    sys.exit(main())
