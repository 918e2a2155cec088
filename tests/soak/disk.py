"""Processes that share a folder of the disk tier and are killed at random: python -m tests.soak.disk --kills 500

Each one holds conversations with a model whose answers are known, on a small cache, over a disk that is full now and
then, with clocks that jump. Between two lives files are damaged. A wrong token, an error, or an entry in the index
that is not what it says ends it. With --mixed, some are with the embedded model in either type of numbers, with an
adapter and without, for several tenants; a new tenant must find nothing.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import numpy as np
import torch

from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.models import adapters
from hybrid_cache.models.loading import beside, embedded_path, load_trunk
from hybrid_cache.request import PromptOutput, Request
from hybrid_cache.storage.folder import BadEntry, Folder
from tests.engine.test_engine import answers, make_request
from tests.fakes import PageSumModel, SumModel, sum_model_answer, tokens_of

BUDGET_BYTES, DISK_BYTES = 1 << 17, 8 << 20
ADAPTERS_HERE, ADAPTER = embedded_path().parent, "embedded_polite"
LENGTHS = (70, 200, 330)  # of prompts to the embedded model
NEW = "new"  # tenants whose names begin so come once
TEXTS, LONGEST = 12, 700
LIFE_S = 1.2
FULL = 0.02  # writes that fail
CONTEXT = multiprocessing.get_context("fork")
COUNTED = ("answers", "cached", "loaded", "refused", "saved", "not saved")


class Tally:
    """Numbers that outlive the processes which add to them."""

    def __init__(self) -> None:
        self._values: dict[str, Synchronized[int]] = {name: CONTEXT.Value("q", 0) for name in COUNTED}

    def add(self, name: str, count: int) -> None:
        with self._values[name].get_lock():
            self._values[name].value += count

    def read(self) -> dict[str, int]:
        return {name: value.value for name, value in self._values.items()}


class Sums:
    """Conversations with a model whose answers can be told."""

    budget_bytes = BUDGET_BYTES

    def __init__(self, model: type[SumModel]) -> None:
        self._model = model
        self._texts = [tokens_of(i, LONGEST) for i in range(TEXTS)]

    def engine(self, config: EngineConfig, clock: Callable[[], float]) -> Engine:
        return Engine(self._model(), config, clock=clock)

    def draw(self, rng: random.Random, name: str) -> tuple[Request, list[int]]:
        """-> a request, and the answer to it."""
        text = rng.choice(self._texts)[: rng.randrange(1, LONGEST)]
        tokens = np.concatenate([text, tokens_of(rng.randrange(40), rng.randrange(70))])
        return make_request(name, tokens, 2), sum_model_answer(tokens, 2)


class Embedded:
    """Conversations with the embedded model and an adapter; what they say without a cache was noted before."""

    budget_bytes = 16 << 20

    def __init__(self, dtype: str) -> None:
        trunk = load_trunk(embedded_path(), dtype=dtype, ops=select("auto"))
        self._models = {"": trunk, ADAPTER: beside(trunk, adapters.load(ADAPTERS_HERE / ADAPTER))}
        rng = np.random.default_rng(1)
        self._texts = [rng.integers(3, 4000, max(LENGTHS)).astype(np.int32) for _ in range(3)]
        cold = self.engine(EngineConfig(1 << 28, prefix_cache=False), time.monotonic)
        self._known = {key: self._asked(cold, *key) for key in product(self._models, range(3), LENGTHS)}

    def _asked(self, engine: Engine, model: str, text: int, length: int) -> list[int]:
        engine.submit(make_request("x", self._texts[text][:length], 3, model=model))
        return answers(engine.run_until_idle(), "x")

    def engine(self, config: EngineConfig, clock: Callable[[], float]) -> Engine:
        return Engine(self._models[""], config, variants={ADAPTER: self._models[ADAPTER]}, clock=clock)

    def draw(self, rng: random.Random, name: str) -> tuple[Request, list[int]]:
        model, text, length = rng.choice((*self._models,)), rng.randrange(3), rng.choice(LENGTHS)
        tenant = rng.choice(("one", "two", f"{NEW} {rng.random()}"))
        tokens = self._texts[text][:length]
        return make_request(name, tokens, 3, model=model, namespace=tenant), self._known[model, text, length]


Subject = Sums | Embedded


def live(folder: Path, seed: int, subject: Subject, tally: Tally) -> None:
    """Until it is killed, or for a time; leaves with 1 after anything that is wrong."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    write = Folder.write

    def full_at_times(self: Folder, *args: object) -> bytes:
        if rng.random() < FULL:
            raise OSError(28, "No space left on device")
        return write(self, *args)  # type: ignore[arg-type]

    Folder.write = full_at_times  # type: ignore[method-assign, assignment]
    jump = [0.0]

    def clock() -> float:
        if rng.random() < 0.001:
            jump[0] += rng.choice((1.0, 1e4))
        return time.monotonic() + jump[0]

    engine = subject.engine(EngineConfig(subject.budget_bytes, disk=folder, disk_bytes=DISK_BYTES), clock)
    assert engine._store is not None
    engine._store._index._now = lambda: rng.uniform(-1e9, 1e10)
    until_s, number, before = time.monotonic() + LIFE_S, 0, Counter[str]()
    while time.monotonic() < until_s:
        asked = dict[str, tuple[Request, list[int]]]()
        for _ in range(rng.randrange(1, 4)):
            number += 1
            asked[f"{number}"] = subject.draw(rng, f"{number}")
            engine.submit(asked[f"{number}"][0])
        outputs = engine.run_until_idle()
        for name, (_, right) in asked.items():
            assert answers(outputs, name) == right, (seed, name)
        for name, output in outputs:
            if isinstance(output, PromptOutput) and asked[name][0].namespace.startswith(NEW):
                assert output.cached_tokens == 0, (seed, name)
        tally.add("answers", len(asked))
        tally.add("cached", sum(o.cached_tokens for _, o in outputs if isinstance(o, PromptOutput)))
        before = _count(engine, before, tally)
    engine.check()
    if rng.random() < 0.5:
        engine.close()


def _count(engine: Engine, before: Counter[str], tally: Tally) -> Counter[str]:
    disk = engine.stats().cache.disk
    assert disk is not None
    now = Counter(
        {
            "loaded": disk.loads.get("loaded", 0),
            "refused": sum(disk.refused.values()),
            "saved": sum(disk.saved.values()),
            "not saved": sum(disk.not_saved.values()),
        }
    )
    for name, value in now.items():
        tally.add(name, value - before[name])
    return now


def damage(folder: Path, rng: random.Random, num_flips: int) -> set[Path]:
    """Flips bits, cuts a file off, deletes one -> those that were touched."""
    files = sorted((folder / "entries").glob("*.safetensors"))
    touched = set[Path]()
    for _ in range(num_flips if files else 0):
        path = rng.choice(files)
        if path in touched:
            continue
        data = bytearray(path.read_bytes())
        how = rng.random()
        if how < 0.02:
            path.unlink()
        elif how < 0.1 or not data:
            path.write_bytes(data[: rng.randrange(len(data) + 1) - 1])
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        touched.add(path)
    return touched


def flip_bits(folder: Path, count: int, rng: random.Random) -> int:
    """Flips one bit of one file, which must be noticed, and flips it back; again and again -> how often."""
    opened = Folder(folder, DISK_BYTES)
    entries = opened.index.all()
    for _ in range(count if entries else 0):
        entry = rng.choice(entries)
        path = folder / "entries" / entry.file_name
        data = path.read_bytes()
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        try:
            opened.read(entry)
        except BadEntry:
            path.write_bytes(data)
            continue
        raise AssertionError(f"bit {bit} of byte {at} of {path.name} was not noticed")
    opened.close()
    return count if entries else 0


def check(folder: Path) -> tuple[int, int]:
    """Every entry of the index has a file that is what it says -> how many there are, and bytes of all files."""
    opened = Folder(folder, DISK_BYTES)
    num_bytes = sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())
    try:
        entries = opened.index.all()
        for entry in entries:
            try:
                opened.read(entry)
            except BadEntry as error:
                raise AssertionError(f"entry {entry.id} is committed, and {error}") from error
        files = {path.name for path in (folder / "entries").iterdir()}
        assert files == {entry.file_name for entry in entries}, "a file that nobody knows"
        return len(entries), num_bytes
    finally:
        opened.close()


def run(kills: int, flips: int, seed: int, folder: Path, *, mixed: bool = False) -> dict[str, int]:
    """-> what was counted. Raises AssertionError for anything that is wrong."""
    rng, tally = random.Random(seed), Tally()
    subjects: list[Subject] = [Sums(SumModel), Sums(PageSumModel)]
    subjects += [Embedded("float32"), Embedded("bfloat16")] if mixed else []
    num_killed = num_flips = num_entries = most_bytes = 0
    while num_killed < kills:
        kinds = [rng.choice(subjects) for _ in range(rng.choice((1, 1, 2)))]
        processes = [CONTEXT.Process(target=live, args=(folder, rng.randrange(1 << 30), kind, tally)) for kind in kinds]
        for process in processes:
            process.start()
        num_killed += sum(map(_kill, processes, [rng.uniform(0.02, LIFE_S) for _ in processes]))
        found, num_bytes = check(folder)
        num_entries += found
        most_bytes = max(most_bytes, num_bytes)
        assert num_bytes <= DISK_BYTES, f"{num_bytes} bytes, the budget is {DISK_BYTES}"
        if rng.random() < 0.5:
            num_flips += len(damage(folder, rng, flips))
            process = CONTEXT.Process(target=live, args=(folder, rng.randrange(1 << 30), rng.choice(kinds), tally))
            process.start()
            num_killed += _kill(process, LIFE_S * 0.9)
            _sweep(folder)
    return {"killed": num_killed, "damaged": num_flips, "entries checked": num_entries, "most bytes": most_bytes} | (
        tally.read()
    )


def _kill(process: BaseProcess, after_s: float) -> bool:
    """-> whether it still ran. Raises AssertionError if it had ended with an error."""
    process.join(after_s)
    killed = process.is_alive()
    if killed:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"a process left with {process.exitcode}"
    return killed


def _sweep(folder: Path) -> None:
    """Drops what is damaged, as a process would at its next use."""
    opened = Folder(folder, DISK_BYTES)
    for entry in opened.index.all():
        try:
            opened.read(entry)
        except BadEntry:
            opened.erase(opened.index.remove((entry.id,)))
    opened.close()


def _fill(folder: Path, seed: int) -> None:
    """Has one process live to its end, so that something is there."""
    process = CONTEXT.Process(target=live, args=(folder, seed, Sums(SumModel), Tally()))
    process.start()
    process.join()
    assert process.exitcode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=20, help="files that are damaged at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed", action="store_true", help="real models, an adapter and tenants, too")
    parser.add_argument("--bits", type=int, default=200, help="bits that are flipped at the end, one at a time")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, value in run(asked.kills, asked.flips, asked.seed, Path(folder), mixed=asked.mixed).items():
            print(f"{name:16} {value:,}")
        _sweep(Path(folder))
        _fill(Path(folder), asked.seed)
        print(f"{'bits noticed':16} {flip_bits(Path(folder), asked.bits, random.Random(asked.seed)):,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
