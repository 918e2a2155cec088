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
        """Each without sharing, with it, and with zeroed states; the trained one also against what it was."""
        sender, before, after = self.sender.model, self.before.model, self.after.model
        pairs = {
            ("before", "before"): Pair(sender, before, examples),
            ("after", "before"): Pair(sender, after, examples, before),
            ("after", "after"): Pair(sender, after, examples),
        }
        what = (OWN, f"{self.sender.title}: {transfer}", ZEROED)
        lines = list[Line]()
        for (model, alone), pair in pairs.items():
            every = range(len(pair.examples))
            steps = pair.measure_beside_controls(transfer, every)
            found = latest(steps, f"{model}, against {alone} alone", every, progress)
            lines += [Line(model, reads, alone, each) for reads, each in zip(what, found, strict=True)]
        return Comparison(tuple(lines), pair.plan(transfer, lines[-2].measured))

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
