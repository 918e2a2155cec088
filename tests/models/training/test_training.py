"""The generator tells the truth, branches do not leak, and the embedded folder is what its card says."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch

from hybrid_cache.models.training import network as net
from hybrid_cache.models.training import rows as rw
from hybrid_cache.models.training.dialogues import (
    KINDS,
    NAMES,
    PLACES,
    STATEFUL,
    THINGS,
    Dialogue,
    dialogues,
    examined,
    practised,
)
from hybrid_cache.models.training.evaluate import has_value
from hybrid_cache.models.training.tokenizer import Codec
from hybrid_cache.models.training.train import WEIGHTS, right

EMBEDDED = Path(net.__file__).parent.parent / "embedded"
TINY = net.Shape(
    hidden_size=32,
    layer_types=("mamba", "attention", "mamba"),
    shared_intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_d_state=8,
)


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(EMBEDDED)


def said_by_user(dialogue: Dialogue, after: int) -> list[str]:
    """Sentences of the user among the first `after` turns."""
    return [s + "." for t in dialogue.turns[:after] if t.role == "user" for s in t.text.rstrip(".").split(". ")]


def recalled(said: list[str], ask: str) -> str:
    (place,) = set(re.findall(r"\w+", ask)) & set(PLACES)
    (code,) = {c for s in said if re.search(rf"\b{place}\b", s) for c in re.findall(r"\d\d", s)}
    return code


def last_set(said: list[str], ask: str) -> str:
    (about,) = set(re.findall(r"\w+", ask)) & {*THINGS, *NAMES}
    told = [s for s in said if re.search(rf"\b{about}\b", s)][-1]
    return re.findall(r"\w+", told.replace(" now.", ""))[-1]


def counted(said: list[str], ask: str) -> str:
    total = 0
    for s in (s for s in said if re.search(r"\d", s)):
        number = int(re.findall(r"\d+", s)[0])
        total += -number if re.search(r"\b(take|takes|remove)\b", s) else number
    return str(total)


def risen(said: list[str], ask: str) -> str:
    floor = 0
    for s in said:
        if place := re.search(r"floor (\d)", s):
            floor = int(place[1])
        elif step := re.search(r"(?:(up|down) )?(\d) floors?(?: (up|down))?", s):
            floor += int(step[2]) * (1 if "up" in step.groups() else -1)
    return str(floor)


SIMULATED = {"recall": recalled, "last": last_set, "count": counted, "order": risen}


def test_the_same_seed_gives_the_same_dialogues() -> None:
    one, two = (list(islice(dialogues(7, WEIGHTS, 8), 50)) for _ in range(2))
    assert one == two
    assert one != list(islice(dialogues(8, WEIGHTS, 8), 50))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_agree_with_a_simulation_of_the_english_text(kind: str) -> None:
    rng = Random(kind)
    for dialogue in [*(examined(kind, rng) for _ in range(300)), *(practised((kind,), rng, 9, 5) for _ in range(100))]:
        for question in dialogue.questions:
            assert SIMULATED[kind](said_by_user(dialogue, question.after), question.ask) == question.value
            assert has_value(question.answer, question.value)


@pytest.mark.parametrize("kind", KINDS)
def test_examined_dialogues_have_three_to_eight_messages_and_no_answer_in_them(kind: str) -> None:
    rng = Random(kind)
    for dialogue in (examined(kind, rng) for _ in range(100)):
        assert 3 <= sum(t.role == "user" for t in dialogue.turns) <= 8
        (question,) = dialogue.questions
        assert question.after == len(dialogue.turns)
        assert all(question.ask not in t.text for t in dialogue.turns)


def test_a_branch_reads_its_dialogue_and_nothing_of_another_branch(codec: Codec) -> None:
    torch.manual_seed(0)
    network, rng = net.Network(TINY), Random(1)
    rows = [rw.row(codec, practised((kind,), rng, 5, 3), rng, {}) for kind in KINDS]
    batch, _ = rw.collate(rows)
    with torch.no_grad():
        logits = network(batch)
        for i, row in enumerate(rows):
            end = len(row.trunk)
            for branch in row.branches:
                alone = network(net.plain(torch.tensor([row.trunk[: branch.attach] + branch.tokens])))
                # Same sums in another order: fp32 noise only.
                torch.testing.assert_close(
                    logits[i, end : end + len(branch.tokens)], alone[0, branch.attach :], atol=1e-4, rtol=1e-4
                )
                end += len(branch.tokens)


def test_transformers_computes_the_same_logits_from_a_saved_folder(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    net.save(net.Network(TINY), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, 4096, (2, 97))
    with torch.no_grad():
        torch.testing.assert_close(net.load(tmp_path)(net.plain(tokens)), theirs(tokens).logits, atol=1e-3, rtol=0)


def test_any_text_survives_the_tokenizer(codec: Codec) -> None:
    text = "Grüße, 日本 🙂\x00\t\n  12 34  {'a': [1]}"
    assert codec.tokenizer.decode(list(codec.encode(text))) == text
    assert len(codec.encode(" 48")) == 2


def test_the_template_renders_what_was_trained_and_each_message_for_itself(codec: Codec) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    dialogue = examined("count", Random(5))
    messages = [{"role": t.role, "content": t.text} for t in dialogue.turns]
    trained = [t for turn in dialogue.turns for t in codec.turn(turn.role, turn.text)]

    def render(upto: int) -> str:
        return str(tokenizer.apply_chat_template(messages[:upto], tokenize=False))

    assert tokenizer(render(len(messages)))["input_ids"] == trained
    assert all(render(n + 1).startswith(render(n)) for n in range(1, len(messages)))


def test_the_embedded_model_has_the_size_its_package_allows() -> None:
    assert sum(p.stat().st_size for p in EMBEDDED.iterdir() if p.is_file()) <= 16 * 2**20
    assert 1_000_000 <= net.num_parameters(net.load(EMBEDDED)) <= 10_000_000


@cache
def accuracy(codec: Codec, kind: str, keep_state: bool) -> float:
    """Share of whole answers that greedy decoding writes word for word, over 40 fresh dialogues."""
    rng = Random(f"test {kind}")
    rows = [rw.row(codec, examined(kind, rng), rng, {}) for _ in range(40)]
    batch, targets = rw.collate(rows, keep_state)
    with torch.no_grad():
        logits = net.load(EMBEDDED)(batch).flatten(0, 1)
    marks = right(logits[targets.position].argmax(-1) == targets.token, targets)
    return sum(good for _, good in marks) / len(marks)


def published() -> dict[str, dict[str, float]]:
    """Scores by kind, as the card gives them."""
    scores: dict[str, dict[str, float]] = json.loads((EMBEDDED / "scores.json").read_text())["kinds"]
    return scores


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedded_model_is_as_good_as_its_card_says(codec: Codec, kind: str) -> None:
    # 40 dialogues: one wrong answer is 2.5 points.
    assert accuracy(codec, kind, keep_state=True) >= published()[kind]["whole"] - 0.08


@pytest.mark.parametrize(
    "kind", [kind if kind == "count" else pytest.param(kind, marks=pytest.mark.slow) for kind in STATEFUL]
)
def test_kinds_that_need_the_recurrent_state_fall_without_it(codec: Codec, kind: str) -> None:
    assert accuracy(codec, kind, keep_state=True) - accuracy(codec, kind, keep_state=False) >= 0.2
