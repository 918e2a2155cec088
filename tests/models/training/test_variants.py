"""Lessons of the variants tell the truth, and the shipped folders are what their scores say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import adapters, deltas, folders, loading
from hybrid_cache.models.adapters import LoraConfig
from hybrid_cache.models.training import activated, lessons, lookup, scores, variants
from hybrid_cache.models.training import network as net
from hybrid_cache.models.training import rows as rw
from hybrid_cache.models.training.dialogues import KINDS, Dialogue, Turn, examined
from hybrid_cache.models.training.evaluate import has_value
from hybrid_cache.models.training.tokenizer import IM_END, Codec
from hybrid_cache.request import Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from hybrid_cache.transfer import equal_layers

OPS = dispatch.select("torch")
BASES = {name: variants.MODELS / folder for name, folder in folders.SHIPPED.items() if name in ("embedded", "recall")}
FOLDERS = {
    "style": "embedded_style",
    "half": "embedded_half",
    "polite": "embedded_polite",
    "recall": "recall",
    "recall-style": "recall_style",
}
CASES = [(name, kind) for name in FOLDERS for kind in variants.RECIPES[name].kinds]
EACH = 24


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(BASES["embedded"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_frame_changes_an_answer_and_not_its_value(kind: str) -> None:
    for seed in range(50):
        (plain,) = examined(kind, Random(seed)).questions
        (framed,) = lessons.framed_exam(kind, Random(seed)).questions
        assert framed.value == plain.value
        assert framed.answer.removeprefix(lessons.FRAME).lower() == plain.answer.lower()
        assert has_value(framed.answer, framed.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_polite_answer_asks_back(kind: str) -> None:
    for seed in range(50):
        (plain,) = examined(kind, Random(seed)).questions
        (polite,) = lessons.polite_exam(kind, Random(seed)).questions
        assert (polite.ask, polite.value) == (plain.ask, plain.value)
        assert polite.answer == f"{plain.answer} What else would you like to know?"


def test_many_codes_are_each_stated_once_and_asked_for_as_they_were() -> None:
    rng = Random(1)
    exams, practice = [lessons.codes_exam(rng) for _ in range(50)], [lessons.codes_lesson(rng, 16) for _ in range(50)]
    for dialogue in (*exams, *practice):
        for question in dialogue.questions:
            said = " ".join(turn.text for turn in dialogue.turns[: question.after])
            (place,) = (place for place in lessons.DOORS if re.search(rf"\b{place}\b", question.ask))
            assert re.findall(rf"\b{place}\b\D*(\d\d)\b", said) == [question.value]


def test_an_exam_holds_as_many_codes_as_it_says() -> None:
    rng = Random(2)
    counts = {
        sum(map(len, re.findall(r"\d\d", " ".join(t.text for t in lessons.codes_exam(rng).turns)))) // 2
        for _ in range(99)
    }
    least, most = lessons.EXAMINED_CODES
    assert counts == set(range(least, most + 1))


def test_a_branch_that_forgets_is_a_branch_without_state(codec: Codec) -> None:
    rows = [rw.row(codec, examined("count", Random(4)), Random(4), {})]
    forgetful, _ = rw.collate([scores.under(rows[0], forgets=True)])
    stateless, _ = rw.collate(rows, keep_state=False)
    kept, _ = rw.collate(rows)
    assert torch.equal(forgetful.scanned, stateless.scanned)
    assert torch.equal(forgetful.torn_past, stateless.torn_past)
    assert not torch.equal(forgetful.scanned, kept.scanned)


def test_an_adapter_counts_from_the_last_invocation_to_the_end_of_the_branch(codec: Codec) -> None:
    rng = Random(5)
    rows = [rw.row(codec, lessons.polite_lesson(rng, 0.0), rng, {}) for _ in range(4)]
    answered = Dialogue((Turn("user", "Hi."), Turn("assistant", "Noted.")), examined("last", rng).questions[:1])
    rows.append(rw.row(codec, replace(answered, questions=(replace(answered.questions[0], after=2),)), rng, {}))
    batch, _ = rw.collate(rows)
    switch = activated.Switch(variants.invocation(codec))
    switch.set(batch)
    expected = torch.zeros_like(switch.on)
    for row, one in enumerate(rows):
        end = len(one.trunk)
        for branch in one.branches:
            start, end = end, end + len(branch.tokens)
            expected[row, start + branch.prompt - len(switch.invocation) : end] = True
    assert torch.equal(switch.on, expected)


def test_rows_before_an_invocation_are_those_of_the_base_in_all_bits(codec: Codec) -> None:
    torch.manual_seed(0)
    rng = Random(6)
    row = rw.row(codec, lessons.polite_exam("order", rng), rng, {})  # one branch: several share their sums
    batch, _ = rw.collate([row])
    base = net.load(BASES["embedded"])
    config = LoraConfig(rank=4, alpha=4.0, targets=("in_proj", "q_proj", "output_linear"))
    pupil = variants.with_adapter(net.load(BASES["embedded"]), config, codec)
    with torch.no_grad():
        for p in pupil.factors.values():
            p.normal_(0.0, 0.05)
        pupil.before(batch)
        differ = (base(batch) != pupil.network(batch)).any(-1)
    on = activated.Switch(variants.invocation(codec))
    on.set(batch)
    assert torch.equal(differ[0, : len(row)], on.on[0, : len(row)])  # what follows is padding


def test_a_network_that_looks_things_up_finds_what_followed_the_same_word(codec: Codec) -> None:
    torch.manual_seed(0)
    base = net.load(BASES["embedded"])
    network = lookup.network_of(base, ("mamba", "attention"), 8)
    told = [f"The code for the {place} is {code}." for place, code in (("garage", 42), ("shed", 17), ("hall", 93))]
    tokens = [t for text in told for t in codec.turn("user", text)]
    tokens += codec.encode("The code for the shed is 1")
    batch = net.plain(torch.tensor([tokens]))
    with torch.no_grad():
        hidden = network.model.embed_tokens(batch.tokens) * network.shape.embedding_multiplier
        first, second = network.model.layers
        hidden = second.get_submodule("input_layernorm")(first(hidden, batch))
        attention = second.get_submodule("self_attn")
        q, k = (getattr(attention, name)(hidden)[0].view(len(tokens), 6, -1) for name in ("q_proj", "k_proj"))
        scores_ = torch.einsum("ihd,jhd->hij", q, k)
    word, one, seven = (codec.encode(" shed")[0], codec.encode(" 1")[0], codec.encode("7")[0])
    stated = tokens.index(word)
    assert tokens[stated + 2 : stated + 4] == [one, seven]
    digits = [i for i in range(len(tokens) - 2) if codec.tokenizer.decode([tokens[i]]).strip().isdigit()]
    for heads, query, key in ((slice(0, 3), -2, stated + 2), (slice(3, 6), -1, stated + 3)):
        found = scores_[heads, query].mean(0)
        assert max(digits, key=lambda i: float(found[i])) == key


def published(name: str) -> dict[str, dict[str, float]]:
    kinds: dict[str, dict[str, float]] = json.loads((variants.MODELS / FOLDERS[name] / "scores.json").read_text())[
        "exam"
    ]["kinds"]
    return kinds


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_shipped_variant_scores_what_it_says(codec: Codec, name: str, kind: str) -> None:
    recipe = variants.RECIPES[name]
    pupil = variants.opened(recipe, variants.MODELS / FOLDERS[name], codec)
    found = scores.score(pupil.network, codec, recipe.exam, kind, 9, EACH, pupil.before)
    said = published(name)[kind]
    # Three standard errors of a share over 24 dialogues, taken as one dialogue at the least.
    for measure in ("whole", "value", "zeroed", "blind"):
        share = said[measure]
        assert abs(getattr(found, measure) - share) <= 3 * max(0.04, (share * (1 - share) / EACH) ** 0.5), measure


def written(engine: Engine, prompt: list[int]) -> list[int]:
    """Greedily, up to the end of the turn."""
    sampling = SamplingParams(temperature=0, max_tokens=24)
    engine.submit(Request("a", Prompt(np.asarray(prompt, np.int32)), sampling))
    outputs = [output for _, output in engine.run_until_idle()]
    tokens = [o.token for o in outputs if isinstance(o, TokenOutput) and o.token is not None]
    return tokens[: tokens.index(IM_END)] if IM_END in tokens else tokens


@pytest.mark.parametrize(
    ("name", "folder"),
    [("style", "embedded-style"), ("half", "embedded-half"), ("recall", "recall"), ("recall-style", "recall-style")],
)
def test_the_engine_writes_what_a_variant_was_taught(codec: Codec, name: str, folder: str) -> None:
    model, rng = loading.load(folders.resolve(folder), ops=OPS), Random(10)
    engine, right = Engine(model, EngineConfig(budget_bytes=32 << 20)), 0
    for _ in range(6):
        dialogue = variants.RECIPES[name].exam("recall", rng)
        (branch,) = rw.row(codec, dialogue, rng, {}).branches
        told = [t for turn in dialogue.turns for t in codec.turn(turn.role, turn.text)]
        right += written(engine, [*told, *branch.tokens[: branch.prompt]]) == branch.tokens[branch.prompt : -1]
    assert right >= 5


@pytest.mark.parametrize("name", ["embedded-style", "embedded-half", "recall-style"])
def test_a_shipped_delta_is_a_variant_of_its_base(name: str) -> None:
    folder = folders.resolve(name)
    base = deltas.base_of(folder)
    ours, theirs = loading.load(folder, ops=OPS), loading.load(base, ops=OPS)
    assert equal_layers(theirs.chain, ours.chain) == (3 if name == "embedded-half" else 0)
    assert ours.fingerprint != theirs.fingerprint


def test_what_half_leaves_as_it_is_is_bit_equal() -> None:
    delta = deltas.find(folders.resolve("embedded-half"))
    assert delta is not None
    changed = set(load_file(delta.weights))
    assert {name.split(".")[2] for name in changed if ".layers." in name} == {"3", "4", "5"}
    assert changed - {name for name in changed if ".layers." in name} == {"model.norm.weight"}


def test_the_adapter_names_its_invocation_as_the_template_renders_it(codec: Codec) -> None:
    values = json.loads((variants.MODELS / FOLDERS["polite"] / adapters.CONFIG).read_text())
    tokens = codec.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False).ids
    assert values["alora_invocation_tokens"] == tokens
    assert values["base_model_name_or_path"] == "embedded"


def test_what_ships_is_small() -> None:
    sizes = [p.stat().st_size for folder in FOLDERS.values() for p in (variants.MODELS / folder).iterdir()]
    assert sum(sizes) < 20e6


@pytest.mark.parametrize("name", ["half", "polite"])
def test_the_same_seed_trains_the_same_weights(name: str, tmp_path: Path) -> None:
    recipe = replace(variants.RECIPES[name], steps=2)
    for run in ("one", "two"):
        variants.run(name, recipe, tmp_path / run, seed=3, each=1)
    (ours,), (theirs,) = (sorted((tmp_path / run).glob("*.safetensors")) for run in ("one", "two"))
    assert ours.read_bytes() == theirs.read_bytes()
