"""Train a shipped variant: a fine-tune or an adapter of the embedded model, or the recall model and its fine-tune.

    python -m hybrid_cache.models.training.variants NAME --out DIR [--start DIR] [--steps N] [--seed N] [--lr RATE]

    style         answers in another frame; all layers are trained, the embedding stays
    style-whole   the same, with the embedding
    half          the same frame; the embedding and layers 0 to 2 stay as they are in the embedded model
    half-names    goes on from half (--start), with stress on answers that name a thing or a person
    polite        an activated adapter: answers, and asks back; active from the start of the assistant's turn on
    recall        a smaller model of four layers and a small state, which looks codes up by attention
    recall-style  the recall model, in the frame of `style`; its embedding stays

DIR gets the weights, rounded to bfloat16, and `scores.json`: right answers by kind of question on dialogues of a seed
that no training draws from, with the recurrent state zeroed and with attention blind to the dialogue. Batches depend
on the seed and the step only.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import nn

from hybrid_cache.models import adapters, deltas
from hybrid_cache.models.adapters import LoraConfig
from hybrid_cache.models.training import activated, lessons, lookup, scores
from hybrid_cache.models.training import network as net
from hybrid_cache.models.training import rows as rw
from hybrid_cache.models.training.dialogues import KINDS
from hybrid_cache.models.training.lora import LINEAR
from hybrid_cache.models.training.tokenizer import Codec
from hybrid_cache.models.training.train import learning_rate, loss_of, optimizers_for, right

MODELS = Path(__file__).parents[1]
BATCH_TOKENS = 2048
POOL = 128  # rows that are sorted by length together
EXAM_SEEDS = (2201, 2202, 2203)
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
EVERY = 50  # steps between two lines of the log
RECENT = 0.95  # how much of what a line says is older


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one variant is made: what it starts from, what it is taught, and what of it stays as it is."""

    base: str  # a folder beside `training`
    lesson: lessons.Lesson
    exam: lessons.Exam
    steps: int
    lr: float
    kinds: tuple[str, ...] = KINDS
    embedding_stays: bool = True
    frozen_layers: int = 0  # from the first on
    adapter: LoraConfig | None = None  # that is activated by the start of the assistant's turn
    blind: dict[str, float] = field(default_factory=dict)  # as in `rows.row`
    forgets: dict[str, float] = field(default_factory=dict)
    layers: tuple[str, ...] | None = None  # of a new network that has only the embedding from its base
    d_state: int = 8  # of those


STYLE = Recipe("embedded", lessons.framed_lesson, lessons.framed_exam, 700, 1e-3)
RECALL = Recipe(
    "embedded",
    lessons.recall_lesson,
    lessons.recall_exam,
    1200,
    3e-3,
    ("recall", "last", "count"),
    embedding_stays=False,
    blind={"last": 0.5, "count": 0.5},
    forgets={"recall": 0.5},
    layers=("mamba", "attention", "mamba", "attention"),
)
RECIPES = {
    "style": STYLE,
    "style-whole": replace(STYLE, embedding_stays=False),
    "half": replace(STYLE, steps=600, lr=1.5e-3, frozen_layers=3),
    "half-names": replace(STYLE, lesson=lessons.naming_lesson, steps=450, lr=1.5e-3, frozen_layers=3),
    "polite": Recipe(
        "embedded",
        lessons.polite_lesson,
        lessons.polite_exam,
        250,
        1e-3,
        adapter=LoraConfig(rank=16, alpha=16.0, targets=LINEAR, base="embedded"),
    ),
    "recall": RECALL,
    "recall-style": replace(
        STYLE,
        base="recall",
        steps=400,
        lesson=lessons.framed_recall_lesson,
        exam=lessons.framed_recall_exam,
        kinds=RECALL.kinds,
        forgets=RECALL.forgets,
        blind=RECALL.blind,
    ),
}


@dataclass(frozen=True, slots=True)
class Pupil:
    """A network that is taught, or was; `factors` by module and parameter are those of its adapter."""

    network: net.Network
    before: scores.Before = lambda batch: None  # to call with each batch
    factors: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def optimizers(self, lr: float) -> list[torch.optim.Optimizer]:
        if self.factors:
            return [torch.optim.AdamW(self.factors.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)]
        return optimizers_for(self.network, lr)


def started(recipe: Recipe, codec: Codec, start: Path | None = None) -> Pupil:
    """The base, a new network over its embedding, or what an earlier run has written; with what stays frozen."""
    pupil = _fresh(recipe, codec) if start is None else opened(recipe, start, codec)
    if recipe.adapter is None:
        trunk = pupil.network.model
        trunk.embed_tokens.requires_grad_(not recipe.embedding_stays)
        for layer in trunk.layers[: recipe.frozen_layers]:
            layer.requires_grad_(False)
    return pupil


def _fresh(recipe: Recipe, codec: Codec) -> Pupil:
    network = net.load(MODELS / recipe.base)
    if recipe.adapter is not None:
        return with_adapter(network, recipe.adapter, codec)
    if recipe.layers is not None:
        network = lookup.network_of(network, recipe.layers, recipe.d_state)
    return Pupil(network)


def with_adapter(network: net.Network, config: LoraConfig, codec: Codec) -> Pupil:
    switch, factors = activated.attach(network, config, invocation(codec))
    return Pupil(network, switch.set, factors)


def invocation(codec: Codec) -> list[int]:
    """What a chat prompt ends in when it is the assistant's turn."""
    return list(codec.opening("assistant"))


def rows_of(recipe: Recipe, codec: Codec, seed: int, progress: Callable[[], float]) -> Iterator[rw.TrainingRow]:
    rng = Random(f"variant {seed}")
    while True:
        row = rw.row(codec, recipe.lesson(rng, progress()), rng, recipe.blind)
        yield replace(
            row, branches=[replace(b, forgets=rng.random() < recipe.forgets.get(b.kind, 0.0)) for b in row.branches]
        )


def train(
    recipe: Recipe, pupil: Pupil, codec: Codec, seed: int, on_step: Callable[[int, str], None] = lambda step, said: None
) -> None:
    """Teaches the network in place; `on_step` gets each step, and loss and shares of right answers in words."""
    network, step = pupil.network, 0
    optimizers = pupil.optimizers(recipe.lr)
    trained = [p for p in network.parameters() if p.requires_grad]
    batches = rw.bucketed(rows_of(recipe, codec, seed, lambda: step / recipe.steps), BATCH_TOKENS, Random(seed), POOL)
    shown: dict[str, float] = {}
    for step in range(recipe.steps):
        for optimizer, peak in zip(optimizers, (recipe.lr, recipe.lr / 2), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step / recipe.steps, peak)
        batch, targets = rw.collate(next(batches))
        pupil.before(batch)
        loss, hits = loss_of(network, batch, targets)
        network.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        marks = defaultdict(list, {"loss": [loss.item()]})
        for kind, good in right(hits, targets):
            marks[kind].append(float(good))
        for name, values in marks.items():
            mean = sum(values) / len(values)
            shown[name] = RECENT * shown.get(name, mean) + (1 - RECENT) * mean
        on_step(step + 1, " ".join(f"{name} {value:.3f}" for name, value in sorted(shown.items())))


def save(recipe: Recipe, pupil: Pupil, codec: Codec, out: Path) -> None:
    """Writes a model folder, a delta over the base, or an adapter; all in bfloat16."""
    if recipe.adapter is not None:
        adapters.save(out, recipe.adapter, {name: p.bfloat16() for name, p in pupil.factors.items()})
        values = json.loads((out / adapters.CONFIG).read_text())
        values["alora_invocation_tokens"] = invocation(codec)
        (out / adapters.CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    elif recipe.layers is not None:
        net.save(pupil.network, out)
        for name in TEXT_FILES:
            (out / name).write_bytes((MODELS / recipe.base / name).read_bytes())
    else:
        base = load_file(MODELS / recipe.base / "model.safetensors")
        ours = {name: p.detach().bfloat16() for name, p in pupil.network.state_dict().items()}
        deltas.save(out, MODELS / recipe.base, {n: t for n, t in ours.items() if not torch.equal(t, base[n])})


def opened(recipe: Recipe, folder: Path, codec: Codec) -> Pupil:
    """The network of a folder that was written by `save`."""
    if recipe.adapter is not None:
        pupil = with_adapter(net.load(MODELS / recipe.base), recipe.adapter, codec)
        tensors = load_file(folder / adapters.WEIGHTS)
        with torch.no_grad():
            for name, p in pupil.factors.items():
                p.copy_(tensors[adapters.PREFIX + name])
        return pupil
    return Pupil(net.load(folder))


def scored(recipe: Recipe, pupil: Pupil, codec: Codec, seeds: Sequence[int], each: int) -> list[scores.Score]:
    """By kind, over all seeds."""
    return [
        scores.joined([scores.score(pupil.network, codec, recipe.exam, kind, s, each, pupil.before) for s in seeds])
        for kind in recipe.kinds
    ]


def run(name: str, recipe: Recipe, out: Path, seed: int, each: int, start: Path | None = None) -> None:
    """Trains, writes and examines one variant, with a progress bar."""
    codec, began = Codec.load(MODELS / "embedded"), time.process_time()
    torch.manual_seed(seed)
    pupil = started(recipe, codec, start)
    with Progress(*COLUMNS, console=Console(stderr=True, highlight=False)) as progress:
        task = progress.add_task(name, total=recipe.steps)

        def on_step(step: int, said: str) -> None:
            progress.update(task, completed=step)
            if step % EVERY == 0:
                progress.console.print(f"step {step}: {said}", soft_wrap=True)

        train(recipe, pupil, codec, seed, on_step)
    minutes = (time.process_time() - began) / 60
    save(recipe, pupil, codec, out)
    found = scored(recipe, opened(recipe, out, codec), codec, EXAM_SEEDS, each)
    print(scores.table(found))
    facts = {"seed": seed, "steps": recipe.steps, "lr": recipe.lr, "cpu_minutes": round(minutes, 1)}
    exam = {"seeds": EXAM_SEEDS, "each": each, "kinds": {s.kind: asdict(s) for s in found}}
    (out / "scores.json").write_text(json.dumps({"name": name, "training": facts, "exam": exam}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of the optimizer, of 2,048 tokens each")
    parser.add_argument("--lr", type=float, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1, help="of weights and batches")
    parser.add_argument("--start", type=Path, help="folder of an earlier run to go on from")
    parser.add_argument("--each", type=int, default=100, help="dialogues for each kind and seed of the exam")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    changes = {name: value for name in ("steps", "lr") if (value := getattr(given, name)) is not None}
    run(given.name, replace(RECIPES[given.name], **changes), given.out, given.seed, given.each, given.start)


if __name__ == "__main__":
    main()
