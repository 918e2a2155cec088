"""Train an adapter with which a model reads messages that were encoded separately: in isolation, or in another context.

    hybrid-cache train-lora [MODEL] --out DIR

The teacher is the model itself, re-encoding everything: its greedy answers are the targets, and with `distill` its
logits too. The student reads the same dialogues from stored messages, through the masks of `composed`, so gradients
go through what each message leaves behind and through the composed state. A share of rows stays in place, so that
re-encoding keeps working. With `--reads` it learns to read another model's entries instead: see `reading`. DIR gets a
PEFT adapter, `training.json` with every setting and the scores before and after, and `run/` with a checkpoint to resume
from. Batches depend on the seed and the step only.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybrid_cache.errors import ConfigError, ModelError, UnsupportedModel
from hybrid_cache.models import adapters, deltas
from hybrid_cache.models.adapters import LoraConfig
from hybrid_cache.models.loading import load_config
from hybrid_cache.models.training import composed
from hybrid_cache.models.training import network as net
from hybrid_cache.models.training import rows as rw
from hybrid_cache.models.training.composed import TRUTH, Case, Reuse, ReuseRow, Score
from hybrid_cache.models.training.dialogues import KINDS, Dialogue, Question, Turn, examined, mixture
from hybrid_cache.models.training.tokenizer import IM_END, SPECIALS, Codec
from hybrid_cache.models.training.train import WEIGHTS

LINEAR = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "input_linear", "output_linear")
ENCODED: Mapping[str, tuple[composed.Encoded, ...]] = {
    "alone": ("alone",),
    "context": ("in context",),
    "mixed": ("alone", "in context"),
}
SCORED = (Reuse(), Reuse(state="zero"), Reuse("alone"), Reuse("alone", state="zero"), Reuse("in context"))
SCORED_IN_NEW_ORDER = (Reuse(), Reuse("alone"), Reuse("in order"), Reuse("in order", state="zero"))
# What share of the training dialogues is about what, with stress on what the state has to carry.
STRESS = {"recall": 0.20, "likes": 0.04, "last": 0.08, "count": 0.32, "order": 0.31, "chat": 0.05}
POOL = 16  # batches whose rows are sorted by length together
MESSAGES = 9  # most of a training dialogue
FEWEST = 3  # of one under stress
FOCUS = 0.6  # share of the dialogues that are about the kind in focus
QUESTIONS = 4
MOST_CONTEXT = 4
MOST_NEW = 24  # tokens of an answer
WARM = 0.03
OF_MESSAGES = ("reuse", "seam", "stress", "focus", "fewest", "anew", "checked")  # settings that need `reads` unset
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run depends on; the same settings give the same adapter."""

    rank: int = 32
    alpha: float = 32.0
    lr: float = 2e-3
    steps: int = 900
    batch_size: int = 8  # dialogues
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEAR
    saved: tuple[str, ...] = ()  # modules trained as a whole
    seed: int = 1
    reuse: str = "mixed"  # a key of ENCODED
    in_place: float = 0.15  # share of rows that stay as they are
    seam: int = 0
    distill: float = 0.0  # share of the loss that compares logits with the teacher's
    bf16: bool = True  # activations
    stress: bool = False  # longer dialogues, more of those that the state has to carry
    start: str | None = None  # an adapter of the same shape to go on from
    focus: str = ""  # a kind of question that most dialogues are about
    fewest: int = 1  # messages of a dialogue
    anew: float = 0.0  # share of the dialogues that are read in a new order
    checked: bool = False  # leaves out what the teacher itself gets wrong
    reads: str | None = None  # a model whose entries are read, as in `variants profile`
    transfer: str | None = None  # how they are made from that one's, as `transfer_of` reads it; None: all are taken

    def __post_init__(self) -> None:
        bounds = {"rank": 1, "alpha": 0, "lr": 0, "steps": 1, "batch_size": 1, "seam": 0, "fewest": 1}
        for name, least in bounds.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least {least}")
        for name in ("dropout", "in_place", "distill", "anew"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must lie between 0 and 1")
        if self.fewest > MESSAGES:
            raise ConfigError(f"fewest is {self.fewest}, must be at most {MESSAGES}")
        if self.focus and self.focus not in KINDS:
            raise ConfigError(f"focus is {self.focus!r}, must be one of {', '.join(KINDS)}")
        if self.reuse not in ENCODED:
            raise ConfigError(f"reuse is {self.reuse!r}, must be one of {', '.join(ENCODED)}")
        self._check_that_one_thing_is_taught()

    def _check_that_one_thing_is_taught(self) -> None:
        if self.reads is None and self.transfer is not None:
            raise ConfigError(f"transfer is {self.transfer!r}, which needs a model whose entries are read")
        defaults = {f.name: f.default for f in fields(self)}
        for name in OF_MESSAGES if self.reads is not None else ():
            if (value := getattr(self, name)) != defaults[name]:
                raise ConfigError(f"{name} is {value!r}, which says nothing about reading {self.reads}")

    def lora(self, base: str) -> LoraConfig:
        return LoraConfig(self.rank, self.alpha, self.targets, base, self.saved, self.dropout)

    def to_json(self) -> dict[str, object]:
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


class LoraLinear(nn.Module):
    """A frozen linear layer with low-rank factors added; starts as the layer itself."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return self.base(x) + self.change(x)  # type: ignore[no-any-return]

    def change(self, x: Tensor) -> Tensor:
        """What the factors add; x [..., in] -> [..., out]."""
        return self.scale * self.lora_B(self.lora_A(F.dropout(x, self.dropout, self.training)))  # type: ignore[no-any-return]


def attach(
    network: net.Network,
    config: LoraConfig,
    adapted: Callable[[nn.Linear, int, float, float], LoraLinear] = LoraLinear,
) -> dict[str, nn.Parameter]:
    """Freezes the network and adds factors to its target layers -> what trains, by module and parameter.

    Raises ConfigError for modules that are not there or not linear.
    """
    network.requires_grad_(False)
    trained: dict[str, nn.Parameter] = {}
    found: set[str] = set()
    for path, module in list(network.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in config.targets:
            if not isinstance(module, nn.Linear):
                raise ConfigError(f"{path} is not a linear layer, it can only be trained as a whole")
            lora = adapted(module, config.rank, config.scale, config.dropout)
            setattr(network.get_submodule(parent), name, lora)
            trained |= {f"{path}.{part}.weight": getattr(lora, part).weight for part in ("lora_A", "lora_B")}
            found.add(name)
        elif name in config.saved:
            trained |= {f"{path}.{part}": p.requires_grad_() for part, p in module.named_parameters(recurse=False)}
            found.add(name)
    if missing := {*config.targets, *config.saved} - found:
        raise ConfigError(f"the model has no modules named {', '.join(sorted(missing))}")
    return trained


def load_base(folder: Path) -> tuple[net.Network, Codec]:
    """Raises UnsupportedModel for what the differentiable network does not cover."""
    config, texts = load_config(folder), deltas.base_of(folder)
    wanted = net.Shape().to_config()
    fixed = {
        "model_type",
        "num_local_experts",
        "mamba_n_groups",
        "mamba_conv_bias",
        "mamba_proj_bias",
        "mamba_d_conv",
        "position_embedding_type",
        "attention_bias",
        "tie_word_embeddings",
    }
    for name in sorted(fixed):
        if config.get(name) != wanted[name]:
            raise UnsupportedModel(
                f"{folder}: {name} is {config.get(name)!r}, training supports GraniteMoeHybrid with {wanted[name]!r}"
            )
    if not (texts / "tokenizer.json").is_file():
        raise ModelError(f"{texts}: tokenizer.json is not there")
    try:
        network = net.load(folder)
    except (KeyError, RuntimeError, OSError, SafetensorError) as e:
        raise ModelError(f"{folder} is not what the training network expects: {e}") from e
    codec = Codec.load(texts)
    if [codec.tokenizer.token_to_id(token) for token in SPECIALS[:5]] != list(range(5)):
        raise UnsupportedModel(f"{folder}: training supports the embedded model's tokenizer, with {SPECIALS[4]!r} as 4")
    return network, codec


def lesson(rng: Random, settings: Settings) -> Dialogue:
    """Messages and questions about them; of a chat, its last exchange."""
    weights, fewest = (STRESS, max(FEWEST, settings.fewest)) if settings.stress else (WEIGHTS, settings.fewest)
    if settings.focus:
        weights = {kind: share * (1 - FOCUS) + FOCUS * (kind == settings.focus) for kind, share in weights.items()}
    dialogue = mixture(rng, weights, MESSAGES, QUESTIONS)
    while not dialogue.trained and (len(dialogue.turns) < fewest or not dialogue.questions):
        dialogue = mixture(rng, weights, MESSAGES, QUESTIONS)
    if dialogue.questions:
        return dialogue
    *turns, asked, reply = dialogue.turns
    question = Question("chat", asked.text, reply.text, reply.text, len(turns))
    return Dialogue(tuple(turns), (question,))


def case_of(dialogue: Dialogue, settings: Settings, rng: Random) -> Case:
    """The dialogue as it is read; if drawn and possible, in a new order and with only its last question."""
    original, others = tuple(range(len(dialogue.turns))), examined(rng.choice(KINDS), rng).turns
    last = dialogue.questions[-1]
    if settings.anew and last.kind in TRUTH and last.after == len(original) and rng.random() < settings.anew:
        asked = replace(dialogue, questions=(last,))
        order = composed.reordered(asked, rng)
        if order is not None:
            return Case(asked, tuple(order), others)
    return Case(dialogue, original, others)


def row_of(codec: Codec, case: Case, settings: Settings, rng: Random) -> ReuseRow:
    """The dialogue as it is reused, by `settings`."""
    turns, is_reordered = case.dialogue.turns, list(case.order) != sorted(case.order)
    encoded = "in place" if rng.random() < settings.in_place else rng.choice(ENCODED[settings.reuse])
    in_order = is_reordered and encoded == "in context" and rng.random() < 0.5
    messages, ends = [], [0]
    for i in case.order:
        context: Sequence[Turn] | None = None
        if encoded == "alone":
            context = ()
        elif in_order:
            context = turns[:i]
        elif encoded == "in context":
            pool = [*turns[:i], *turns[i + 1 :], *case.others]
            context = composed.context_of(rng, pool, MOST_CONTEXT)
        messages.append(composed.stored(codec, context, turns[i]))
        ends.append(ends[-1] + len(messages[-1].tokens))
    questions = case.read.questions if is_reordered else case.dialogue.questions
    branches = tuple(rw.branch(codec, q, ends[q.after], blind=False) for q in questions)
    return ReuseRow(tuple(messages), branches, settings.seam)


def batches(codec: Codec, settings: Settings, step: int) -> Iterator[list[ReuseRow]]:
    """Batches from this step on, the same whenever they are asked for."""

    def drawn(rng: Random) -> ReuseRow:
        return row_of(codec, case_of(lesson(rng, settings), settings, rng), settings, rng)

    return pooled(drawn, len, settings, step)


def pooled(
    drawn: Callable[[Random], Row], length: Callable[[Row], int], settings: Settings, step: int
) -> Iterator[list[Row]]:
    """Batches of rows of similar length from this step on; they depend on the seed and the step only."""
    while True:
        pool, first = divmod(step, POOL)
        rng = Random(f"{settings.seed} {pool}")
        rows = sorted((drawn(rng) for _ in range(POOL * settings.batch_size)), key=length)
        slices = [rows[i : i + settings.batch_size] for i in range(0, len(rows), settings.batch_size)]
        rng.shuffle(slices)
        yield from slices[first:]
        step += POOL - first


def in_place(row: ReuseRow) -> ReuseRow:
    return replace(row, messages=tuple(replace(m, context=None) for m in row.messages), seam=0)


@torch.no_grad()
def transcribed(teacher: net.Network, rows: Sequence[ReuseRow]) -> list[ReuseRow]:
    """The rows with the teacher's greedy answers, which it gives while it re-encodes all messages.

    The answers of the rows are drafts: a pass confirms them up to the first token that the teacher would not write,
    which it replaces, until nothing changes. So most rows take one pass, and all end in what greedy decoding writes.
    """
    found = list(rows)
    pending = list(range(len(rows)))
    while pending:
        batch, targets = composed.collate([in_place(found[i]) for i in pending])
        written = _choices(teacher, batch, targets)
        branch, again = 0, []
        for i in pending:
            fixed = []
            for b in found[i].branches:
                fixed.append(_continued(b, written[branch]))
                branch += 1
            if tuple(fixed) != found[i].branches:
                found[i] = replace(found[i], branches=tuple(fixed))
                again.append(i)
        pending = again
    return found


def confirmed(rows: Sequence[ReuseRow], found: Sequence[ReuseRow]) -> list[ReuseRow]:
    """What was found without answers that are not those of the rows; all of it if nothing would be left."""
    kept = [
        replace(theirs, branches=tuple(b for a, b in zip(ours.branches, theirs.branches, strict=True) if a == b))
        for ours, theirs in zip(rows, found, strict=True)
    ]
    return [row for row in kept if row.branches] or list(found)


def _choices(teacher: net.Network, batch: net.Batch, targets: rw.Targets) -> list[list[int]]:
    """By branch, the token that the teacher writes at each place of the draft."""
    hidden = teacher.hidden(batch).flatten(0, 1).index_select(0, targets.position)
    written: list[list[int]] = [[] for _ in targets.kinds]
    for branch, token in zip(targets.branch.tolist(), teacher.logits(hidden).argmax(-1).tolist(), strict=True):
        written[branch].append(token)
    return written


def _continued(branch: rw.Branch, written: Sequence[int], most: int = MOST_NEW) -> rw.Branch:
    """The draft with its first token that is not the teacher's replaced; ends with the teacher, or is cut."""
    draft = branch.tokens[branch.prompt :]
    wrong = next((i for i, (ours, theirs) in enumerate(zip(draft, written, strict=True)) if ours != theirs), None)
    if wrong is None:
        if draft[-1] == IM_END or len(draft) >= most:
            return branch
        draft, weights = [*draft, IM_END], [*branch.weights, 1.0]  # a draft of one more token
    elif written[wrong] == IM_END:
        draft, weights = [*draft[:wrong], IM_END], [*branch.weights[:wrong], 1.0]
    else:
        rest = draft[wrong + 1 :] or [IM_END]
        draft = [*draft[:wrong], written[wrong], *rest][:most]
        weights = [*branch.weights, 1.0][: len(draft)]
    return replace(branch, tokens=[*branch.tokens[: branch.prompt], *draft], weights=weights)


def learning_rate(settings: Settings, step: int) -> float:
    """Rises over the first steps, then falls along a cosine to a fiftieth."""
    progress = step / settings.steps
    if progress < WARM:
        return settings.lr * (step + 1) / (WARM * settings.steps + 1)
    return settings.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - WARM) / (1 - WARM))))


@dataclass(slots=True)
class TrainingRun:
    """An adapter that is being trained; `step` counts those taken."""

    settings: Settings
    teacher: net.Network
    student: net.Network
    codec: Codec
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    step: int = 0

    @classmethod
    def start(cls, folder: Path, settings: Settings) -> TrainingRun:
        (teacher, codec), (student, _) = load_base(folder), load_base(folder)
        torch.manual_seed(settings.seed)
        trained = attach(student, settings.lora(folder.name))
        if settings.start is not None:
            _copy_adapter(settings.start, settings, trained)
        optimizer = torch.optim.AdamW(trained.values(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
        return cls(settings, teacher.requires_grad_(False), student, codec, trained, optimizer)

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.settings.bf16 else nullcontext()

    def take(self, loss_of: Callable[[], Tensor]) -> float:
        """One step of the optimizer -> the loss; loss_of: the student's, a scalar []."""
        torch.manual_seed(hash((self.settings.seed, self.step)))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        self.student.train()
        with self.precision():
            loss = loss_of()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def taught(self, rows: Sequence[ReuseRow]) -> Tensor:
        """The loss on what the teacher answers, a scalar []."""
        found = transcribed(self.teacher, rows)
        return self.loss(confirmed(rows, found) if self.settings.checked else found)

    def loss(self, rows: Sequence[ReuseRow]) -> Tensor:
        """Mean loss over the weighted targets of the rows, a scalar []."""
        batch, targets = composed.collate(rows)

        def theirs() -> Tensor:
            return logits_of(self.teacher, *composed.collate([in_place(row) for row in rows]))

        return blended(logits_of(self.student, batch, targets), targets, theirs, self.settings.distill)

    def save(self, folder: Path) -> None:
        """A checkpoint to resume from; replaces the old one only when it is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": p.detach().contiguous() for name, p in self.trained.items()}
        names = list(self.trained)
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{key}.{names[i]}": value for key, value in moments.items()}
        facts = {"settings": json.dumps(self.settings.to_json()), "step": str(self.step)}
        save_file(tensors, folder / "next.safetensors", metadata=facts)
        (folder / "next.safetensors").replace(folder / "checkpoint.safetensors")

    @torch.no_grad()
    def resume(self, folder: Path) -> None:
        """Goes on from a checkpoint of the same settings. Raises ConfigError."""
        path = folder / "checkpoint.safetensors"
        if not path.is_file():
            raise ConfigError(f"{folder} holds no checkpoint to resume from")
        with safe_open(path, "pt") as file:
            facts = file.metadata()
        theirs, ours = json.loads(facts["settings"]), self.settings.to_json()
        if changed := sorted(f.name for f in fields(Settings) if theirs.get(f.name) != ours[f.name]):
            raise ConfigError(f"{folder} was started with other settings: {', '.join(changed)}")
        tensors = load_file(path)
        for name, p in self.trained.items():
            p.copy_(tensors[f"model.{name}"])
        keys = sorted({key.split(".", 1)[0] for key in tensors} - {"model"})
        state = {i: {k: tensors[f"{k}.{name}"] for k in keys} for i, name in enumerate(self.trained)}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state if keys else {}})
        self.step = int(facts["step"])


@torch.no_grad()
def _copy_adapter(path: str, settings: Settings, trained: Mapping[str, nn.Parameter]) -> None:
    """Raises ConfigError if it changes other weights, or has another rank or scale."""
    adapter = adapters.load(path)
    tensors, scale = adapter.tensors, settings.lora("").scale
    if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in trained.items()}:
        raise ConfigError(f"adapter {path} does not have the rank and the modules of this run")
    if adapter.config.scale != scale:
        raise ConfigError(f"adapter {path} counts {adapter.config.scale:g} times, that of this run {scale:g} times")
    for name, p in trained.items():
        p.copy_(tensors[name])


def logits_of(network: net.Network, batch: net.Batch, targets: rw.Targets) -> Tensor:
    """At the n targets, in fp32; [n, V]."""
    return network.logits(network.hidden(batch).flatten(0, 1).index_select(0, targets.position)).float()


def blended(logits: Tensor, targets: rw.Targets, theirs: Callable[[], Tensor], distill: float) -> Tensor:
    """Mean over the weighted targets -> a scalar []: cross-entropy, and a share of divergence from a teacher's logits.

    logits, theirs() [n, V]
    """
    losses = F.cross_entropy(logits, targets.token, reduction="none")
    if distill:
        with torch.no_grad():
            wanted = theirs().log_softmax(-1)
        apart = F.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
        losses = torch.lerp(losses, apart, distill)
    return (losses * targets.weight).sum() / targets.weight.sum()


# What a run learns from: losses of its student, from the step that it has come to.
Lessons = Callable[[TrainingRun], Iterator[Callable[[], Tensor]]]


def stored_messages(run: TrainingRun) -> Iterator[Callable[[], Tensor]]:
    """Dialogues whose messages were encoded separately."""
    return (partial(run.taught, rows) for rows in batches(run.codec, run.settings, run.step))


def train(
    folder: Path,
    out: Path,
    settings: Settings,
    *,
    lessons: Lessons = stored_messages,
    resume: bool = False,
    every: int = 250,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Writes the adapter to `out`, and a checkpoint every `every` steps; `on_step` gets each step and its loss.

    Raises ConfigError if `out` holds a run and `resume` is not set.
    """
    run = TrainingRun.start(folder, settings)
    if resume:
        run.resume(out / "run")
    elif (out / "run").exists():
        raise ConfigError(f"{out} holds a run already: resume it, or choose another folder")
    source = lessons(run)
    while run.step < settings.steps:
        loss = run.take(next(source))
        on_step(run.step, loss)
        if run.step % every == 0:
            run.save(out / "run")
    run.save(out / "run")
    adapters.save(out, settings.lora(folder.name), {name: p.bfloat16() for name, p in run.trained.items()})


def evaluate(
    folder: Path, out: Path, settings: Settings, seeds: Sequence[int], each: int
) -> tuple[list[Score], list[Score]]:
    """Scores of the base and of the adapted model, with the seam that was trained."""
    original_order, new_order = (
        [r if r.encoded == "in place" else replace(r, seam=settings.seam) for r in reuses]
        for reuses in (SCORED, SCORED_IN_NEW_ORDER)
    )
    base, codec = load_base(folder)
    before = composed.evaluate(base, codec, seeds, each, original_order, new_order)
    return before, composed.evaluate(composed.adapted(folder, out), codec, seeds, each, original_order, new_order)


def report(out: Path, settings: Settings, scores: Mapping[str, Sequence[Mapping[str, object]]]) -> None:
    """Writes settings and scores into the adapter's folder."""
    values = {"settings": settings.to_json(), "scores": scores}
    (out / "training.json").write_text(json.dumps(values, indent=1) + "\n")
