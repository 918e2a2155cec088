"""Is it right, and is it exact? Every operation against the reference, and bit for bit in any batch; models too.

Parity runs in several processes at once, since most of its time goes into compiling kernels. A kernel with an
invalid access breaks its process, and the next few tasks of that process fail as well.
"""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import isnan, nan
from multiprocessing import TimeoutError, get_context

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_cache.bench.common.random_model import SMALL, random_model
from hybrid_cache.bench.gpu.report import Section
from hybrid_cache.bench.gpu.setting import Setting
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.worker import Worker
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.engine.selfcheck import check_model
from hybrid_cache.kernels import reference, sampling, selfcheck
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors, Ops
from hybrid_cache.kernels.parity import BATCHES, SHAPES, TOLERANCE, difference, play
from hybrid_cache.kernels.problems import RULES, move, some_draws
from hybrid_cache.request import Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
PROCESSES, TASKS_OF_A_PROCESS = 8, 8
QUICK_SHAPES = ("mamba2", "attention")
LINEARS = ((768, 384), (192, 50), (1536, 6448), (3072, 1536), (4096, 1536))
CUBLAS = ((1536, 6448), (3072, 1536), (2048, 2048), (4096, 14336))
ROWS = 70
ROW_OPERATIONS = "operations on rows"
TOLERATED = {**TOLERANCE, torch.bfloat16: 1e-2}  # scans on a GPU round once more

Pairs = list[tuple[Tensor, Tensor]]  # what was found, and what is right


def parity(setting: Setting, section: Section) -> None:
    """Against `kernels/reference.py`, each shape in each dtype, with the tolerances of the tests."""
    section.notes.append(
        "error: root mean square, as a share of the result's; worst: of all results and states, as a "
        "share of what is tolerated for their dtype"
    )
    table = section.table("operation", "dtype", "error", "worst", "left to torch, or why it failed")
    shapes = QUICK_SHAPES if setting.quick else tuple(SHAPES)
    tasks = [(name, dtype) for dtype in DTYPES[: 1 if setting.quick else None] for name in (ROW_OPERATIONS, *shapes)]
    for (name, dtype), found in _results(setting, tasks):
        table.add(name, _name(dtype), found.error, found.worst, found.reason)
        if not found.worst <= 1:
            problem = (
                found.reason.strip().splitlines()[-1]
                if isnan(found.worst)
                else f"{found.worst:.2g} times what is tolerated"
            )
            section.failures.append(f"{name} in {_name(dtype)}: {problem}")
    if len(table.rows) < len(tasks):
        section.notes.append(f"{len(tasks) - len(table.rows)} of {len(tasks)} were not tried for want of time")


Task = tuple[str, torch.dtype]


@dataclass(frozen=True, slots=True)
class Result:
    """Of one task. NaN where there is none."""

    error: float  # the largest of its outputs, as `difference` has it
    worst: float  # of all outputs and cache tensors, the largest share of a tolerance
    reason: str = ""  # why a kernel was not used, or failed


def _results(setting: Setting, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
    """In any order, as long as there is time."""
    if setting.device.type != "cuda":
        yield from (_compare_task(setting, task) for task in tasks)
        return
    one_thread = (torch.set_num_threads, (1,))
    with get_context("spawn").Pool(PROCESSES, *one_thread, maxtasksperchild=TASKS_OF_A_PROCESS) as pool:
        found = pool.imap_unordered(partial(_compare_task, setting), tasks)
        with suppress(TimeoutError):
            for _ in tasks:
                yield found.next(setting.seconds_left)


def _compare_task(setting: Setting, task: Task) -> tuple[Task, Result]:
    return task, compare(setting, *task)


def compare(setting: Setting, name: str, dtype: torch.dtype) -> Result:
    """One shape of `parity.SHAPES`, or the operations on rows."""
    try:
        with torch.inference_mode():
            return _compare_rows(setting, dtype) if name == ROW_OPERATIONS else _compare_tokens(setting, name, dtype)
    except Exception:
        return Result(nan, nan, traceback.format_exc(limit=-3))


def _compare_tokens(setting: Setting, name: str, dtype: torch.dtype) -> Result:
    ops, device = setting.ops(checked=False), setting.device
    problem = SHAPES[name](dtype, torch.Generator().manual_seed(0))
    batches = [BATCHES["prefill and decode"]] if setting.quick else list(BATCHES.values())
    expected = [play(_reference(), problem, calls) for calls in batches]
    problem = move(problem, device)
    outputs: Pairs = []
    caches: Pairs = []
    for calls, right in zip(batches, expected, strict=True):
        found = play(ops, problem, calls, device)
        outputs += zip(found[0], right[0], strict=True)
        caches += zip(found[1], right[1], strict=True)
    checked = setting.ops()
    play(checked, problem, BATCHES["prefill and decode"], device)
    reasons: Mapping[str, str] = {**getattr(ops, "reasons", {}), **getattr(checked, "reasons", {})}
    return _result(outputs, caches, "; ".join(reasons.values()))


def _compare_rows(setting: Setting, dtype: torch.dtype) -> Result:
    checked = setting.ops()
    pairs = [pair for ops in (setting.ops(checked=False), checked) for pair in _row_pairs(ops, setting.device, dtype)]
    reasons: Mapping[str, str] = getattr(checked, "reasons", {})
    return _result(pairs, [], "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def _result(outputs: Pairs, caches: Pairs, reason: str) -> Result:
    error = max(difference(found.cpu(), right) for found, right in outputs)
    shares = (difference(found.cpu(), right) / TOLERATED[right.dtype] for found, right in [*outputs, *caches])
    return Result(error, max(shares), reason)


def _row_pairs(ops: Ops, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """What an operation says, and what is right."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=rng)).to(dtype)

    def here(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    for width in (6, 200, 1536):
        x, weight = normal(ROWS, width, scale=3.0), normal(width)
        yield ops.rms_norm(here(x), here(weight), 1e-5), reference.rms_norm(x, weight, 1e-5)
        yield ops.silu_mul(here(x)), reference.silu_mul(x)
        yield ops.gelu_mul(here(x)), reference.gelu_mul(x)
        yield ops.gelu_tanh_mul(here(x)), reference.gelu_tanh_mul(x)
    positions = torch.randint(0, 5000, (ROWS,), generator=rng)
    for size in (16, 128):
        x, inv_freq = normal(ROWS, 4, size), 1e4 ** -(torch.arange(size // 2) / (size // 2))
        yield ops.rotary(here(x), here(positions), here(inv_freq)), reference.rotary(x, positions, inv_freq)
    for size_in, size_out in ((100, 36), (1536, 264)):
        x, weight, bias = normal(ROWS, size_in), normal(size_out, size_in), normal(size_out)
        yield ops.linear(here(weight), here(bias))(here(x)), reference.linear(x, weight, bias)
    x, w_in, w_out = normal(ROWS, 48), normal(6, 80, 48, scale=0.2), normal(6, 48, 40, scale=0.2)
    shares, ids = torch.rand(ROWS, 6, generator=rng).topk(2)
    experts = ops.experts([*here(w_in)], [*here(w_out)])
    yield experts(here(x), here(ids), here(shares)), reference.experts(x, ids, shares, [*w_in], [*w_out])
    pages = torch.randn(2, 4, TILE, 3, 16, generator=rng).to(dtype)
    moved, right = KVTensors(*here(pages)), KVTensors(*pages.clone())
    sources, targets, turns = torch.arange(60, 68), torch.arange(190, 198), torch.arange(-4, 4)
    inv_freq = 1e4 ** -(torch.arange(8) / 8)
    ops.relocate_keys(moved, here(sources), here(targets), here(turns), here(inv_freq))
    reference.relocate_keys(right, sources, targets, turns, inv_freq)
    yield from ((moved.k, right.k), (moved.v, right.v))
    logits, draws = 3 * torch.randn(2 * len(RULES), 5000, generator=rng), some_draws(2 * len(RULES))
    tokens = ops.sample(here(logits), some_draws(len(logits), device)).cpu()
    expected = reference.sample(logits, draws)
    # Rounding may move a choice to a neighbour.
    yield sampling.points(logits, draws, tokens), sampling.points(logits, draws, expected)
    yield ops.log_sum_exp(here(logits)), reference.log_sum_exp(logits)
    rows, words = torch.tensor([4, 0]), torch.randint(-(2**31), 2**31 - 1, (2, 157), generator=rng).int()
    masked = here(logits.clone())
    ops.mask_tokens(masked, here(rows), here(words))
    reference.mask_tokens(logits, rows, words)
    yield masked.clamp(-99), logits.clamp(-99)  # minus infinity is no number to compare


def _reference() -> Ops:
    ops: Ops = reference  # type: ignore[assignment]  # a module with the functions that problems use
    return ops


def exactness(setting: Setting, section: Section) -> None:
    """The two promises of `kernels/ops.py`, operation by operation."""
    ops = setting.ops()
    table = section.table("operation", "exact", "where it is not")
    linears = LINEARS[: 2 if setting.quick else None]
    with torch.inference_mode():
        failed = selfcheck.check_exact(ops, torch.bfloat16, linears)
        table.add("the probes of the server's start", not failed, "; ".join(failed))
        section.failures += failed
        for name in QUICK_SHAPES if setting.quick else SHAPES:
            if setting.late:
                section.notes.append(f"no time left for {name} and what follows it")
                break
            problem = move(SHAPES[name](torch.bfloat16, torch.Generator().manual_seed(0)), setting.device)
            wrong = selfcheck.mismatches(ops, problem, setting.device)
            table.add(name, not wrong, "; ".join(wrong))
            section.failures += [f"{name}: {what}" for what in wrong]
        rows = section.table("in", "out", "numbers of rows that change a row's bits", title="cuBLAS, for comparison")
        for size in CUBLAS[: 1 if setting.quick else None]:
            rows.add(*size, ", ".join(map(str, _rows_that_differ(setting, *size))) or "none")
    reasons: Mapping[str, str] = getattr(ops, "reasons", {})
    section.notes += [f"{name} is left to torch: {reason}" for name, reason in reasons.items()]


def _rows_that_differ(setting: Setting, size_in: int, size_out: int) -> list[int]:
    rng = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(n, size_in, generator=rng).to(setting.device, torch.bfloat16) for n in (5 * TILE, size_out)
    )
    expected = F.linear(x[:TILE], weight)
    sizes = [1, 2, *selfcheck.NUM_ROWS]
    return [n for n in sizes if not torch.equal(F.linear(x[:n], weight)[:TILE], expected[:n])]


class EagerWorker(Worker):
    """Launches each kernel by itself."""

    def _record(self, model: HybridModel) -> None:
        """Nothing is recorded."""


def models(setting: Setting, section: Section) -> None:
    """Hybrids of random weights in an engine: cache on against off, single and in batches, graphs against none."""
    table = section.table("model", "exact", "graphs agree", "steps replayed", "left to torch", "where it is not")
    for name, config in list(SMALL.items())[: 1 if setting.quick else None]:
        if setting.late:
            section.notes.append(f"no time left for {name} and what follows it")
            break
        ops = setting.ops()
        model, _ = random_model(config, ops, torch.bfloat16)
        failed = check_model(model)
        eager, graphs = (answers_of(model, worker) for worker in (EagerWorker, Worker))
        agree = eager[0] == graphs[0]
        failed += [] if agree else ["CUDA graphs change the answers"]
        section.failures += [f"{name}: {what}" for what in failed]
        reasons: Mapping[str, str] = getattr(ops, "reasons", {})
        notes = [f"{name}: {reason}" for name, reason in {**reasons, **graphs[2]}.items()]
        table.add(name, not failed, agree, graphs[1], "; ".join(notes), "; ".join(failed))


def answers_of(model: HybridModel, worker: type[Worker]) -> tuple[Outputs, int, dict[str, str]]:
    """Greedy answers of some lengths, with log-probabilities -> outputs, steps that were replayed, why others not."""
    spec = model.cache_spec
    room = 12 * (2 * spec.slot_bytes + 6 * spec.page_bytes + (1 << 16))
    engine = Engine(model, EngineConfig(budget_bytes=room, prefix_cache=False), worker=worker)
    rng = torch.Generator().manual_seed(0)
    for i, length in enumerate((20, 300, 130, 64, 5)):
        tokens = torch.randint(0, model.vocab_size, (length,), generator=rng, dtype=torch.int32).numpy()
        sampling = SamplingParams(temperature=0, max_tokens=8 + 5 * i, logprobs=5)
        engine.submit(Request(str(i), Prompt(tokens), sampling))
    outputs = engine.run_until_idle()
    answers = [(name, output) for name, output in outputs if hasattr(output, "token")]
    return answers, engine.stats().num_graph_replays, engine.fallbacks


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
