"""What training has changed between a sender and a receiver: measured as they are served, on dialogues that are new."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_cache.engine.family import difference_of
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.models.loading import Named
from hybrid_cache.models.tools.pairs import Example, Measured, Pair
from hybrid_cache.models.tools.plans import Progress, latest
from hybrid_cache.models.training import lora
from hybrid_cache.models.training.dialogues import KINDS
from hybrid_cache.models.training.paired import dialogues
from hybrid_cache.profile import Plan, Profile, file_name
from hybrid_cache.transfer import Transfer

OWN, ZEROED = "its own entries", "its own, states zeroed"


@dataclass(frozen=True, slots=True)
class Line:
    """How a model that reads some entries answers, compared with one that computes everything itself."""

    model: str  # before or after training
    reads: str
    alone: str  # before or after, too
    measured: Measured


@dataclass(frozen=True, slots=True)
class Comparison:
    """All lines, and the plan that the trained model comes with."""

    lines: tuple[Line, ...]
    plan: Plan


@dataclass(frozen=True, slots=True)
class Trio:
    """A sender, and a receiver before and after training."""

    sender: Named
    before: Named
    after: Named

    @classmethod
    def load(cls, model: str, out: Path, settings: lora.Settings) -> "Trio":
        """As they are served, adapters beside the model. Raises HybridCacheError."""
        assert settings.reads is not None
        ops, start = dispatch.select("auto"), f"+{settings.start}" if settings.start else ""
        names = (settings.reads, model + start, f"{model}+{out}")
        sender, before, after = (loading.load_named(name, ops=ops) for name in names)
        if difference := difference_of(sender.model, after.model):
            raise ConfigError(f"{settings.reads} is no variant of {model}: {difference}")
        return cls(sender, before, after)

    def compare(
        self, transfer: Transfer, examples: Sequence[Example], progress: Progress = lambda what, done, total: None
    ) -> Comparison:
        """Both models without sharing and with it, the trained one also with itself; as controls, zeroed states."""
        sender, before, after = self.sender.model, self.before.model, self.after.model
        old, new = Pair(sender, before, examples), Pair(sender, after, examples)
        moved = Pair(sender, after, examples, before)
        every, made = range(len(old.examples)), f"{self.sender.title}: {transfer}"
        planned = [
            ("before", OWN, "before", old.measure_own(every)),
            ("after", OWN, "before", moved.measure_own(every)),
            ("before", made, "before", old.measure([transfer], every)),
            ("after", made, "before", moved.measure([transfer], every)),
            ("after", made, "after", new.measure([transfer], every)),
            ("before", ZEROED, "before", old.measure_without_states(every)),
            ("after", ZEROED, "after", new.measure_without_states(every)),
        ]
        lines = tuple(
            Line(model, reads, alone, latest(steps, f"{model} against {alone}: {reads}", every, progress)[0])
            for model, reads, alone, steps in planned
        )
        (shared,) = (line.measured for line in lines if line.reads == made and line.alone == "after")
        return Comparison(lines, new.plan(transfer, shared))

    def save_profile(self, plan: Plan, data: str) -> Path:
        """Writes the trained model's profile beside its adapter, as `variants profile` does -> the file."""
        sender, receiver = self.sender.model, self.after.model
        path = self.after.own_folder / file_name(self.sender.title, sender.fingerprint)
        Profile(sender.fingerprint, receiver.fingerprint, len(receiver.layers), data, (plan,)).save(path)
        return path


def examples_of(seeds: Sequence[int], each: int) -> list[Example]:
    """Dialogues; each: for one kind of question and one seed."""
    folder = loading.embedded_path()
    return [example for seed in seeds for example in dialogues(folder, len(KINDS) * each, seed)]
