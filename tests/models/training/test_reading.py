"""A model in training reads what another has cached as an engine does, and learns to read it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_cache.api.cli import train_lora
from hybrid_cache.errors import ConfigError, HybridCacheError, ModelError, UnsupportedModel
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models import adapters, loading
from hybrid_cache.models.folders import resolve
from hybrid_cache.models.tools.pairs import Example, Pair
from hybrid_cache.models.training import composed, lora, reading
from hybrid_cache.models.training import network as net
from hybrid_cache.models.training.paired import dialogues
from hybrid_cache.profile import load_profile
from hybrid_cache.transfer import transfer_of, upper
from tests.models.training.test_lora import NOISE, SETTINGS, TINY

EMBEDDED = loading.embedded_path()
TAKEN = upper(3, 3)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [*dialogues(EMBEDDED, 4, 5)]


def network_of(seed: int) -> net.Network:
    torch.manual_seed(seed)
    return net.Network(TINY)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Of a receiver and a sender, tiny ones."""
    for seed, name in enumerate(("receiver", "sender")):
        net.save(network_of(seed), tmp_path / name)
        shutil.copy(EMBEDDED / "tokenizer.json", tmp_path / name)
    return tmp_path / "receiver", tmp_path / "sender"


def reads(sender: Path | str, **changes: object) -> lora.Settings:
    return replace(SETTINGS, reads=str(sender), distill=1.0, dropout=0.0, **changes)  # type: ignore[arg-type]


def logits(reader: reading.Reader, examples: list[Example]) -> Tensor:
    with torch.no_grad():
        return reader.logits(*reading.collate(examples))


def alone(network: net.Network, examples: list[Example]) -> Tensor:
    batch, targets, _ = reading.collate(examples)
    with torch.no_grad():
        return lora.logits_of(network, batch, targets)


# What is read


@pytest.mark.parametrize(
    ("receiver", "text"),
    [
        ("embedded-style", "take 0-5"),  # other decay rates and convolutions, too
        ("embedded+embedded-choreo", "project 0-5"),
        ("embedded+embedded-choreo", "take 0-1, project 2, take 3-5"),
        ("embedded+embedded-choreo", "take 0, recompute 1-3, project 4, take 5"),
        ("embedded+embedded-choreo", "recompute 0-1, take 2, project 3-5"),
    ],
)
def test_training_sees_what_an_engine_computes(receiver: str, text: str, examples: list[Example]) -> None:
    names, transfer = ("embedded", receiver), transfer_of(text, 6)
    pair = Pair(*(loading.load_named(name, dtype="float32", ops=select()).model for name in names), examples)
    *_, (measured,) = pair.measure([transfer], range(len(examples)))
    one, other = map(reading.opened, names)
    ours = logits(reading.Reader(other, one, transfer), examples).log_softmax(-1)
    own = alone(other, examples).log_softmax(-1)
    apart = (own.exp() * (own - ours)).sum(-1).mean().item()
    assert apart == pytest.approx(measured.kl, rel=2e-3, abs=5e-7)
    assert apart > 1e-5


@pytest.mark.parametrize("text", ["take 0-2", "project 0-2", "recompute 0-2", "take 0, recompute 1-2"])
def test_what_a_model_reads_of_itself_is_its_own(text: str, examples: list[Example]) -> None:
    network = network_of(0)
    reader = reading.Reader(network, network, transfer_of(text, 3))
    torch.testing.assert_close(logits(reader, examples), alone(network, examples), **NOISE)


def test_only_whole_tiles_of_the_context_are_the_senders(examples: list[Example]) -> None:
    reader, own = reading.Reader(network_of(0), network_of(1), TAKEN), alone(network_of(0), examples)
    _, _, shared = reading.collate(examples)
    assert shared.sum(1).tolist() == [each.num_shared // TILE * TILE for each in examples]
    unshared = [replace(each, num_shared=TILE - 1) for each in examples]
    torch.testing.assert_close(logits(reader, unshared), own, **NOISE)
    assert not torch.allclose(logits(reader, examples), own, atol=1e-2)


# What is learned


def test_gradients_reach_the_adapter_and_not_the_sender(folders: tuple[Path, Path], examples: list[Example]) -> None:
    run = lora.TrainingRun.start(folders[0], reads(folders[1]))
    sender = network_of(1)  # whose parameters could be trained
    reader = reading.Reader(run.student, sender, transfer_of("take 0, project 1, take 2", 3))
    batch, targets, shared = reading.collate(examples)
    torch.nn.functional.cross_entropy(reader.logits(batch, targets, shared), targets.token).backward()
    assert all(p.grad is None for p in sender.parameters())
    reached = {name for name, p in run.trained.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name in run.trained if "lora_B" in name}, "A gets some once B is not zero"


@pytest.mark.parametrize("text", [None, "take 0-1, project 2"])
def test_a_few_steps_bring_the_answers_closer_to_those_without_sharing(
    text: str | None, folders: tuple[Path, Path], examples: list[Example]
) -> None:
    folder, sender = folders
    run = lora.TrainingRun.start(folder, reads(sender, transfer=text, lr=0.01, steps=40, in_place=0.0, batch_size=4))
    lessons = reading.shared_entries(folder, run)
    reader = reading.Reader(run.student, network_of(1), TAKEN if text is None else transfer_of(text, 3))

    def apart() -> float:
        ours, own = logits(reader, examples).log_softmax(-1), alone(run.teacher, examples).log_softmax(-1)
        return float((own.exp() * (own - ours)).sum(-1).mean())

    before = apart()
    for _ in range(20):
        run.take(next(lessons))
    assert apart() < 0.8 * before


def test_without_sharing_there_is_nothing_to_learn_from_itself(folders: tuple[Path, Path]) -> None:
    run = lora.TrainingRun.start(folders[0], reads(folders[1], in_place=1.0))
    with torch.no_grad():
        assert next(reading.shared_entries(folders[0], run))().abs() < 1e-6


def test_an_adapter_that_is_repaired_is_compared_with_itself(folders: tuple[Path, Path], tmp_path: Path) -> None:
    first = replace(SETTINGS, lr=0.05)
    lora.train(folders[0], tmp_path / "first", first)
    run = lora.TrainingRun.start(folders[0], reads(folders[1], in_place=1.0, start=str(tmp_path / "first")))
    with torch.no_grad():
        assert next(reading.shared_entries(folders[0], run))().abs() < 1e-6
        batch, targets, _ = reading.collate([*dialogues(EMBEDDED, 2, 1)])
        assert not torch.allclose(
            lora.logits_of(run.teacher, batch, targets), lora.logits_of(run.student, batch, targets)
        )


def test_a_run_that_was_stopped_goes_on_with_the_same_dialogues(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder, sender = folders
    train = partial(lora.train, folder, lessons=partial(reading.shared_entries, folder), every=2)

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    train(tmp_path / "whole", reads(sender))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", reads(sender), on_step=stop)
    train(tmp_path / "cut", reads(sender), resume=True)
    whole, cut = (adapters.load(tmp_path / name).tensors for name in ("whole", "cut"))
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())


# What is refused


def of_another_shape(folder: Path) -> Path:
    net.save(net.Network(replace(TINY, mamba_d_state=16)), folder)
    shutil.copy(EMBEDDED / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (lambda path: {"reads": str(of_another_shape(path / "other"))}, ConfigError, "its mamba_d_state is 16, not 8"),
        (lambda path: {"transfer": "take 0-5"}, ConfigError, "'take 0-5' names 6 layers, the model has 3"),
        (lambda path: {"transfer": "take 1-2"}, ConfigError, "layer 0 should come before 'take 1-2'"),
        (lambda path: {"transfer": "grab 0-2"}, ConfigError, "transfer 'grab 0-2' cannot be read"),
        (lambda path: {"reads": "nobody"}, ModelError, "nobody is not a local folder"),
        (lambda path: {"reads": "embedded+nobody"}, ModelError, "adapter nobody: neither a folder nor"),
        (lambda path: {"reads": "embedded+embedded-polite"}, UnsupportedModel, "activated by a prompt"),
        (lambda path: {"start": "embedded-choreo"}, ConfigError, "does not have the rank and the modules"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    changes: Callable[[Path], dict[str, str]],
    error: type[HybridCacheError],
    says: str,
    folders: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    settings = replace(reads(folders[1]), **changes(tmp_path))  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        lora.train(folders[0], tmp_path / "out", settings, lessons=partial(reading.shared_entries, folders[0]))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"transfer": "take 0-5"}, "transfer is 'take 0-5', which needs a model"),
        ({"reads": "embedded", "seam": 8}, "seam is 8, which says nothing about reading embedded"),
        ({"reads": "embedded", "stress": True}, "stress is True"),
    ],
)
def test_settings_of_other_lessons_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        replace(SETTINGS, **changes)  # type: ignore[arg-type]


# The command


def test_the_command_compares_and_leaves_a_profile_that_the_adapter_is_served_with(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sender = folders
    settings = reads(sender, transfer="take 0-1, project 2")
    train_lora.run(str(folder), tmp_path / "out", settings, resume=False, every=9, num_seeds=1, each=1, threads=1)
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("its own, states zeroed", "sender: take 0-1, project 2", "count right"))
    (path,) = (tmp_path / "out").glob("sharing-sender-*.json")
    profile, ops = load_profile(path), select("auto")
    assert profile.sender == loading.load(sender, ops=ops).fingerprint
    assert profile.receiver == loading.load(folder, adapter=tmp_path / "out", merges=False, ops=ops).fingerprint
    assert [str(plan.transfer) for plan in profile.plans] == [settings.transfer]


def test_a_delta_is_trained_as_the_model_that_it_stands_for() -> None:
    network, codec = lora.load_base(resolve("embedded-half"))
    base, _ = lora.load_base(EMBEDDED)
    assert codec.opening("assistant")
    ours, theirs = dict(network.named_parameters()), dict(base.named_parameters())
    assert torch.equal(ours["model.layers.0.mamba.in_proj.weight"], theirs["model.layers.0.mamba.in_proj.weight"])
    assert not torch.equal(ours["model.layers.5.mamba.in_proj.weight"], theirs["model.layers.5.mamba.in_proj.weight"])
    assert composed.adapted(EMBEDDED, "embedded-choreo", torch.float32).shape == base.shape
