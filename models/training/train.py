"""Train the embedded model, tokenizer included.

    python -m hybrid_cache.models.training.train --out DIR [--seed N] [--books PATH] [--steps N]

Writes an ordinary model folder to DIR and, in it, `DIR/run/` with a checkpoint to resume from and a log of the
accuracy by kind. Only answers and replies are targets; a twentieth of the rows are passages of books, if given.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid_cache.models.training import network as net
from hybrid_cache.models.training import rows as rw
from hybrid_cache.models.training import tokenizer as tok
from hybrid_cache.models.training.dialogues import KINDS, examined, mixture

# What share of the training dialogues is about what.
WEIGHTS = {"recall": 0.25, "likes": 0.07, "last": 0.10, "count": 0.31, "order": 0.21, "chat": 0.06}
LATE_WEIGHTS = {"recall": 0.38, "likes": 0.09, "last": 0.08, "count": 0.22, "order": 0.17, "chat": 0.06}
LAST_WEIGHTS = {"recall": 0.22, "likes": 0.05, "last": 0.06, "count": 0.28, "order": 0.34, "chat": 0.05}
COOLING = 0.35  # last share of a phase, while the learning rate falls
# Share of questions that are answered without attention to the dialogue: the recurrent state must hold the answer.
BLIND = {"last": 0.5, "count": 0.5, "order": 0.5}


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the run with its own learning rates, which rise at its start and fall at its end."""

    steps: int
    peak: float  # of the highest learning rate
    weights: dict[str, float]
    late_weights: dict[str, float]  # while the learning rate falls


# All kinds are learned, and looking up among several codes is sharpened while the learning rate falls; then once more
# with stress on what the state has to carry.
PHASES = (Phase(9000, 1.0, WEIGHTS, LATE_WEIGHTS), Phase(2000, 0.4, LAST_WEIGHTS, LAST_WEIGHTS))


@dataclass(frozen=True, slots=True)
class Settings:
    out: Path
    seed: int
    phases: tuple[Phase, ...]
    books: Path | None
    lr: float
    batch_tokens: int
    every: int
    shape: net.Shape
    compiled: bool


def corpus(seed: int, books: Path | None) -> Iterator[str]:
    """What the tokenizer learns from: 40,000 dialogues and, if there are books, as many of their passages."""
    rng = Random(seed)
    for _ in range(40_000):
        dialogue = mixture(rng, WEIGHTS, 8)
        yield "\n".join([*(t.text for t in dialogue.turns), *(f"{q.ask}\n{q.answer}" for q in dialogue.questions)])
    yield "system\nuser\nassistant\ntool\n" * 1000
    if books:
        yield from (p for p, _ in zip(tok.passages(books), range(40_000), strict=False))


def longest(progress: float) -> int:
    """Most messages of a scenario at this point of the run: short dialogues first."""
    return 2 if progress < 0.06 else 4 if progress < 0.18 else 6 if progress < 0.35 else 9


def learning_rate(progress: float, peak: float) -> float:
    """Warm up for 2 %, hold, and fall to 2 % of the peak at the end."""
    warm, cool = min(1.0, progress / 0.02), min(1.0, (1.0 - progress) / COOLING)
    return peak * max(0.02, min(warm, cool))


class TrainingRows:
    """Endless training rows of one phase; the part of the first phase that is done sets how long they are."""

    def __init__(self, settings: Settings, phase: Phase, codec: tok.Codec, seed: int) -> None:
        self.settings, self.phase, self.codec, self.rng = settings, phase, codec, Random(seed)
        self.progress = 0.0
        self.passages: list[str] = []
        if settings.books:
            self.passages = [p for p, _ in zip(tok.passages(settings.books), range(40_000), strict=False)]

    def __iter__(self) -> Iterator[rw.TrainingRow]:
        while True:
            if self.passages and self.rng.random() < 0.05:
                tokens = self.codec.tokenizer.encode(self.rng.choice(self.passages)).ids
                yield rw.text_row(tokens[:192])
            else:
                phase = self.phase
                weights = phase.late_weights if self.progress > 1.0 - COOLING else phase.weights
                first = phase is self.settings.phases[0]
                dialogue = mixture(self.rng, weights, longest(self.progress if first else 1.0))
                yield rw.row(self.codec, dialogue, self.rng, BLIND)


def loss_of(network: net.Network, batch: net.Batch, targets: rw.Targets) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy [], and which targets [n] bool are the network's first choice."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = network.hidden(batch).flatten(0, 1).index_select(0, targets.position)
        logits = network.logits(hidden)
    losses = F.cross_entropy(logits.float(), targets.token, reduction="none")
    return (losses * targets.weight).sum() / targets.weight.sum(), logits.argmax(-1) == targets.token


def optimizers_for(network: net.Network, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest of what is not frozen."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    inner = [p for name, p in trained.items() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in trained.items() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inner, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=lr / 2, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def right(hits: Tensor, targets: rw.Targets) -> list[tuple[str, bool]]:
    """For each branch its kind, and whether the whole answer is what greedy decoding would write.

    hits  [targets] bool, for each target token
    """
    wrong = set(targets.branch[~hits].tolist())
    return [(kind, i not in wrong) for i, kind in enumerate(targets.kinds)]


class Exam:
    """The same fresh dialogues every time, scored with and without the recurrent state at the question."""

    def __init__(self, codec: tok.Codec, each: int = 64) -> None:
        rng = Random("exam")
        dialogues = [examined(kind, rng) for kind in KINDS for _ in range(each)]
        rows = sorted((rw.row(codec, d, rng, {}) for d in dialogues), key=len)
        self.batches = [rows[i : i + 32] for i in range(0, len(rows), 32)]

    @torch.no_grad()
    def score(self, network: net.Network, keep_state: bool) -> dict[str, float]:
        marks: dict[str, list[bool]] = defaultdict(list)
        for rows in self.batches:
            batch, targets = rw.collate(rows, keep_state)
            _, hits = loss_of(network, batch, targets)
            for kind, good in right(hits, targets):
                marks[kind].append(good)
        return {kind: sum(marks[kind]) / len(marks[kind]) for kind in KINDS}


def save_run(
    network: net.Network, optimizers: list[torch.optim.Optimizer], state: dict[str, float], folder: Path
) -> None:
    """A checkpoint to resume from; replaces the old one only when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{k}": v.contiguous() for k, v in network.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{k}": v for k, v in moments.items()}
    save_file(tensors, folder / "next.safetensors", metadata={"run": json.dumps(state)})
    (folder / "next.safetensors").replace(folder / "checkpoint.safetensors")


def load_run(network: net.Network, optimizers: list[torch.optim.Optimizer], folder: Path) -> dict[str, float]:
    from safetensors import safe_open

    path = folder / "checkpoint.safetensors"
    tensors = load_file(path)
    network.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for o, optimizer in enumerate(optimizers):
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{o}."):
                i, key = name.split(".")[2:]
                moments[int(i)][key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(moments)})
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["run"]))


def make_tokenizer(settings: Settings) -> tok.Codec:
    if not (settings.out / "tokenizer.json").exists():
        tok.save(tok.train(corpus(settings.seed, settings.books)), settings.out)
    return tok.Codec.load(settings.out)


def train(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    run = settings.out / "run"
    codec = make_tokenizer(settings)
    network = net.Network(settings.shape)
    optimizers = optimizers_for(network, settings.lr)
    state = {"step": 0.0, "tokens": 0.0, "seconds": 0.0, "answers": 0.0}
    if (run / "checkpoint.safetensors").exists():
        state = load_run(network, optimizers, run)
    run.mkdir(parents=True, exist_ok=True)
    exam = Exam(codec)
    if settings.compiled:
        network.hidden = torch.compile(network.hidden, dynamic=True)  # type: ignore[method-assign]
    print(f"{net.num_parameters(network):,} parameters, {codec.tokenizer.get_vocab_size()} tokens", flush=True)
    began = time.monotonic() - state["seconds"]
    end = 0
    for phase in settings.phases:
        start, end = end, end + phase.steps
        if state["step"] < end:
            source = TrainingRows(settings, phase, codec, hash((settings.seed, state["step"])))
            run_phase(settings, phase, start, source, network, optimizers, state, exam, began)


def run_phase(
    settings: Settings,
    phase: Phase,
    start: int,
    source: TrainingRows,
    network: net.Network,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, float],
    exam: Exam,
    began: float,
) -> None:
    """Takes the steps that are left of a phase which begins at step `start`; advances `state`."""
    batches = rw.bucketed(iter(source), settings.batch_tokens, Random(settings.seed))
    marks: dict[str, list[bool]] = defaultdict(list)
    recent: list[float] = []
    while (progress := (state["step"] - start) / phase.steps) < 1.0:
        source.progress = progress
        for optimizer, peak in zip(optimizers, (settings.lr, settings.lr / 2), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, peak * phase.peak)
        batch, targets = rw.collate(next(batches))
        loss, hits = loss_of(network, batch, targets)
        network.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        recent.append(loss.item())
        for kind, good in right(hits, targets):
            marks[kind].append(good)
        state["step"] += 1
        state["tokens"] += batch.tokens.numel()
        state["answers"] += len(targets.kinds)
        state["seconds"] = time.monotonic() - began
        if state["step"] % 50 == 0:
            shares = " ".join(f"{k} {sum(m) / len(m):.2f}" for k, m in sorted(marks.items()))
            speed = state["tokens"] / state["seconds"]
            print(
                f"step {state['step']:.0f} ({progress:.1%}) loss {sum(recent) / len(recent):.4f} "
                f"{state['tokens'] / 1e6:.2f}M tokens {speed:.0f}/s {state['seconds']:.0f}s | {shares}",
                flush=True,
            )
            recent.clear()
            marks.clear()
        if state["step"] % settings.every == 0 and progress < 1.0 - 1.0 / phase.steps:
            keep(settings, network, optimizers, state, exam)
    keep(settings, network, optimizers, state, exam)


def keep(
    settings: Settings,
    network: net.Network,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, float],
    exam: Exam,
) -> None:
    """Examines the network and writes it, with a checkpoint to go on from."""
    run = settings.out / "run"
    report(network, exam, state, run)
    save_run(network, optimizers, state, run)
    net.save(network, settings.out)


def report(network: net.Network, exam: Exam, state: dict[str, float], run: Path) -> None:
    kept, zeroed = exam.score(network, True), exam.score(network, False)
    shares = " ".join(f"{k} {kept[k]:.3f}/{zeroed[k]:.2f}" for k in kept)
    print(f"exam at step {state['step']:.0f}, with state / zeroed: {shares}", flush=True)
    with (run / "exam.jsonl").open("a") as file:
        file.write(json.dumps({**state, "kept": kept, "zeroed": zeroed}) + "\n")


def parsed() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="one phase of this many steps instead of the two")
    parser.add_argument("--books", type=Path, help="folder with public-domain text, see tokenizer.passages")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--every", type=int, default=600, help="steps between two exams, each with a checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--shape", type=json.loads, default={}, help="JSON, fields of network.Shape")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    phases = (Phase(given.steps, 1.0, WEIGHTS, LATE_WEIGHTS),) if given.steps else PHASES
    if "layer_types" in given.shape:
        names = {"M": "mamba", "A": "attention"}
        given.shape["layer_types"] = tuple(names[c] for c in given.shape["layer_types"])
    return Settings(
        out=given.out,
        seed=given.seed,
        phases=phases,
        books=given.books,
        lr=given.lr,
        batch_tokens=given.batch_tokens,
        every=given.every,
        shape=net.Shape(**given.shape),
        compiled=given.compile,
    )


if __name__ == "__main__":
    train(parsed())
