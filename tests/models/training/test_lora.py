"""Masks of reuse are what they say, the teacher decodes greedily, and training is the same however it is cut."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from hybrid_cache.api.cli import train_lora
from hybrid_cache.errors import ConfigError, UnsupportedModel
from hybrid_cache.models import adapters
from hybrid_cache.models.training import composed, lora
from hybrid_cache.models.training import network as net
from hybrid_cache.models.training import rows as rw
from hybrid_cache.models.training.composed import Case, Reuse, ReuseRow, Stored
from hybrid_cache.models.training.dialogues import KINDS, Dialogue, Question, Turn, examined
from hybrid_cache.models.training.tokenizer import IM_END, Codec
from tests.models.checkpoints import edit_config

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
# Same sums in another order: fp32 noise only.
NOISE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(EMBEDDED)


@pytest.fixture(scope="module")
def network() -> net.Network:
    torch.manual_seed(0)
    return net.Network(TINY)


@pytest.fixture
def folder(network: net.Network, tmp_path: Path) -> Path:
    """A tiny model folder with the embedded tokenizer."""
    net.save(network, tmp_path / "tiny")
    shutil.copy(EMBEDDED / "tokenizer.json", tmp_path / "tiny")
    return tmp_path / "tiny"


def some_cases(num: int = 3) -> list[Case]:
    rng = Random("cases")
    found = []
    for i in range(num):
        dialogue, others = examined(KINDS[i % 4], rng), examined("recall", rng).turns
        found.append(Case(dialogue, tuple(range(len(dialogue.turns))), others))
    return found


def rows_of(codec: Codec, reuse: Reuse) -> list[ReuseRow]:
    return [composed.row_of(codec, case, reuse, Random(1)) for case in some_cases()]


def at_answers(network: net.Network, rows: list[ReuseRow]) -> Tensor:
    batch, targets = composed.collate(rows)
    with torch.no_grad():
        return network(batch).flatten(0, 1)[targets.position]


def plain(network: net.Network, codec: Codec, keep_state: bool = True) -> Tensor:
    """The same answers, of dialogues that are laid out without any reuse."""
    batch, targets = rw.collate([rw.row(codec, case.read, Random(1), {}) for case in some_cases()], keep_state)
    with torch.no_grad():
        return network(batch).flatten(0, 1)[targets.position]


# What is the same as re-encoding


@pytest.mark.parametrize(
    "reuse",
    [
        Reuse(),
        Reuse("in order"),  # encoded after what is before it anyway
        Reuse("in order", seam=5),
        Reuse("in order", seam=3, tail=4),
        Reuse("alone", seam=99),  # all is recomputed
        Reuse("in context", seam=99),
        Reuse("in context", tail=99),
    ],
    ids=lambda reuse: reuse.name,
)
def test_messages_in_the_place_where_they_were_encoded_are_read_as_if_encoded_again(
    reuse: Reuse, network: net.Network, codec: Codec
) -> None:
    torch.testing.assert_close(at_answers(network, rows_of(codec, reuse)), plain(network, codec), **NOISE)


@pytest.mark.parametrize("state", ["ordered", "last", "mean"])
def test_one_message_alone_is_the_plain_run(state: composed.State, network: net.Network, codec: Codec) -> None:
    said, question = Turn("user", "The code for the gate is 57."), Question("recall", "Which?", "It is 57.", "57", 1)
    case = Case(Dialogue((said,), (question,)), (0,), ())
    row = composed.row_of(codec, case, Reuse("alone", state=state), Random(1))
    whole = composed.row_of(codec, case, Reuse(), Random(1))
    torch.testing.assert_close(at_answers(network, [row]), at_answers(network, [whole]), **NOISE)


def test_the_zero_state_is_the_control_of_the_plain_evaluation(network: net.Network, codec: Codec) -> None:
    zeroed = at_answers(network, rows_of(codec, Reuse(state="zero")))
    torch.testing.assert_close(zeroed, plain(network, codec, keep_state=False), **NOISE)


@pytest.mark.parametrize("encoded", ["alone", "in context"])
@pytest.mark.parametrize(("seam", "tail"), [(0, 0), (4, 0), (0, 4)])
def test_messages_from_elsewhere_are_read_otherwise_than_in_place(
    encoded: composed.Encoded, seam: int, tail: int, network: net.Network, codec: Codec
) -> None:
    away = at_answers(network, rows_of(codec, Reuse(encoded, seam=seam, tail=tail)))
    assert not torch.allclose(away, plain(network, codec), atol=1e-2)


# What is composed, against a loop


def one_layer() -> net.Mamba2:
    torch.manual_seed(1)
    return net.Network(replace(TINY, layer_types=("mamba",))).model.layers[0].mamba  # type: ignore[return-value]


def scanned_by_hand(layer: net.Mamba2, hidden: Tensor, state: Tensor, window: Tensor) -> tuple[Tensor, ...]:
    """Token by token -> outputs, the state and window after them, and the product of all decays."""
    shape, outputs, decay = layer.shape, [], torch.ones(layer.shape.mamba_n_heads)
    taps = layer.conv1d.weight.squeeze(1).T
    for token in hidden:
        projected = layer.in_proj(token)
        gate, new, dt = projected.split([shape.inner, shape.inner + 2 * shape.mamba_d_state, shape.mamba_n_heads])
        line = torch.cat([window, new[None]])
        window = line[1:]
        mixed = torch.nn.functional.silu((line * taps).sum(0) + layer.conv1d.bias)
        x, B, C = mixed.split([shape.inner, shape.mamba_d_state, shape.mamba_d_state])
        dt = torch.nn.functional.softplus(dt + layer.dt_bias)
        kept = (-dt * layer.A_log.exp()).exp()
        x = x.view(shape.mamba_n_heads, shape.mamba_d_head)
        state = kept[:, None, None] * state + (dt[:, None] * x)[..., None] * B
        y = (state @ C + layer.D[:, None] * x).flatten() * torch.nn.functional.silu(gate)
        outputs.append(layer.out_proj(layer.norm(y[None, None])[0, 0]))
        decay = decay * kept
    return torch.stack(outputs), state, window, decay


def test_states_of_messages_alone_compose_to_what_the_masks_of_one_layer_read() -> None:
    layer, shape = one_layer(), TINY
    lengths, asked = (7, 2, 9), 6
    rows = ReuseRow(tuple(Stored(tuple(range(20, 20 + n)), ()) for n in lengths), (branch_of(asked, sum(lengths)),))
    batch, _ = composed.collate([rows])
    hidden = torch.randn(*batch.tokens.shape, shape.hidden_size, generator=torch.Generator().manual_seed(2))
    zero = torch.zeros(shape.mamba_n_heads, shape.mamba_d_head, shape.mamba_d_state)
    empty = torch.zeros(3, shape.inner + 2 * shape.mamba_d_state)
    with torch.no_grad():
        found = layer(hidden, batch)[0]
        h, start, tail = zero, 1, empty
        for n in lengths:
            alone, S, window, P = scanned_by_hand(layer, hidden[0, start : start + n], zero, empty)
            torch.testing.assert_close(found[start : start + n], alone, atol=1e-5, rtol=1e-5)
            h, start, tail = P[:, None, None] * h + S, start + n, torch.cat([tail, window[-min(n, 3) :]])[-3:]
        read, *_ = scanned_by_hand(layer, hidden[0, start : start + asked], h, tail)
        torch.testing.assert_close(found[start : start + asked], read, atol=1e-5, rtol=1e-5)


def test_ordered_composition_in_one_layer_is_the_plain_run_where_windows_are_not_cut() -> None:
    """Layer inputs are the same, so only the first three tokens of a message, whose window is empty, may differ."""
    layer = one_layer()
    with torch.no_grad():
        layer.conv1d.weight[..., :-1] = 0  # now a window holds nothing
        lengths = (5, 8, 3)
        row = ReuseRow(tuple(Stored(tuple(range(20, 20 + n)), ()) for n in lengths), (branch_of(6, sum(lengths)),))
        batch, _ = composed.collate([row])
        hidden = torch.randn(*batch.tokens.shape, TINY.hidden_size, generator=torch.Generator().manual_seed(3))
        used = 1 + sum(lengths)
        whole = layer(hidden[:, 1:], net.plain(batch.tokens[:, 1:]))[0]
        found = layer(hidden, batch)[0, 1:]
    torch.testing.assert_close(found[used - 1 : used + 5], whole[used - 1 : used + 5], atol=1e-5, rtol=1e-5)


def branch_of(length: int, attach: int) -> rw.Branch:
    return rw.Branch(list(range(50, 50 + length)), length - 1, [1.0], attach, "recall")


# Dialogues in another order


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_follows_the_order_in_which_the_messages_are_read(kind: str) -> None:
    cases = composed.cases(kind, 1, 60, anew=True)
    assert all(case.order != tuple(range(len(case.order))) for case in cases)
    changed = [case for case in cases if case.read.questions[0].value != case.dialogue.questions[0].value]
    assert bool(changed) == (kind in ("last", "order"))
    for case in composed.cases(kind, 1, 60, anew=False):
        assert case.read == case.dialogue


@pytest.mark.parametrize("kind", KINDS)
def test_small_talk_makes_messages_longer_and_changes_no_answer(kind: str) -> None:
    for case in composed.cases(kind, 1, 20, anew=False):
        longer = composed.talkative(case, 1, 2, Random(1))
        assert longer.read.questions == case.read.questions
        for turn, told in zip(longer.dialogue.turns, case.dialogue.turns, strict=True):
            extra = 3 if turn.role == "user" else 0
            assert told.text in turn.text
            assert turn.text.count(".") + turn.text.count("!") >= told.text.count(".") + extra


def test_a_lift_is_where_the_new_order_leaves_it() -> None:
    said = ("The lift is on floor 2.", "It moves 1 floor up.", "I send the lift to floor 5.")
    turns = tuple(Turn("user", text) for text in said)
    question = Question("order", "Which floor is the lift on?", "The lift is on floor 5.", "5", 3)
    read = Case(Dialogue(turns, (question,)), (0, 2, 1), ()).read
    assert read.questions[0].answer == "The lift is on floor 6."
    assert composed.truth("order", [turns[1], turns[0]], question.ask, "5") is None


# The teacher


def greedy(network: net.Network, tokens: list[int], most: int) -> list[int]:
    written: list[int] = []
    while len(written) < most and (not written or written[-1] != IM_END):
        with torch.no_grad():
            logits = network(net.plain(torch.tensor([tokens + written])))
        written.append(int(logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("path", [EMBEDDED, None], ids=["embedded", "random"])
def test_transcripts_are_what_greedy_decoding_writes_from_any_draft(
    path: Path | None, network: net.Network, codec: Codec
) -> None:
    teacher = net.load(path) if path else network
    for row in rows_of(codec, Reuse("alone")):
        (branch,) = row.branches
        draft = [*branch.tokens[: branch.prompt], *codec.encode("The lift was"), IM_END]
        wrong = replace(branch, tokens=draft, weights=[1.0] * (len(draft) - branch.prompt))
        (found,) = lora.transcribed(teacher, [replace(row, branches=(wrong,))])
        prompt = [t for m in row.messages for t in m.tokens] + branch.tokens[: branch.prompt]
        expected = greedy(teacher, prompt, lora.MOST_NEW)
        assert found.branches[0].tokens[branch.prompt :] == expected
        assert len(found.branches[0].weights) == len(expected)


# Training


SETTINGS = lora.Settings(rank=2, steps=4, batch_size=2, dropout=0.1, seed=3, bf16=False)


def trained(folder: Path, out: Path, settings: lora.Settings = SETTINGS) -> dict[str, tuple[Tensor, Tensor]]:
    lora.train(folder, out, settings, every=2)
    return dict(adapters.load(out).factors)


def test_a_fresh_adapter_changes_nothing_and_trained_ones_learn(folder: Path, codec: Codec, tmp_path: Path) -> None:
    run = lora.TrainingRun.start(folder, replace(SETTINGS, steps=40, lr=0.02, dropout=0.0))
    rows = lora.transcribed(run.teacher, rows_of(codec, Reuse("alone")))
    with torch.no_grad():
        batch, _ = composed.collate(rows)
        assert torch.equal(run.student(batch), run.teacher(batch))
        before = run.loss(rows)
    frozen = {name: p.clone() for name, p in run.student.named_parameters() if not p.requires_grad}
    for _ in range(20):
        run.take(partial(run.taught, rows))
    with torch.no_grad():
        assert run.loss(rows) < 0.9 * before
    assert all(torch.equal(p, frozen[n]) for n, p in run.student.named_parameters() if n in frozen)


def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_bits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(folder, tmp_path / "whole")

    def stop(step: int, loss: float) -> None:
        if step == 3:  # the last checkpoint is of step 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lora.train(folder, tmp_path / "cut", SETTINGS, every=2, on_step=stop)
    with pytest.raises(ConfigError, match="resume it"):
        lora.train(folder, tmp_path / "cut", SETTINGS)
    with pytest.raises(ConfigError, match="other settings: lr, rank"):
        lora.train(folder, tmp_path / "cut", replace(SETTINGS, lr=1.0, rank=3), resume=True)
    lora.train(folder, tmp_path / "cut", SETTINGS, every=2, resume=True)
    resumed = adapters.load(tmp_path / "cut").factors
    assert set(resumed) == set(whole)
    assert all(torch.equal(x, y) for name in whole for x, y in zip(whole[name], resumed[name], strict=True))
    assert any(B.abs().max() > 0 for _, B in whole.values())


@pytest.mark.parametrize("reuse", sorted(lora.ENCODED))
@pytest.mark.parametrize("seam", [0, 3])
def test_batches_depend_on_the_step_alone_and_hold_the_reuse_that_was_asked_for(
    codec: Codec, reuse: str, seam: int
) -> None:
    settings = replace(SETTINGS, reuse=reuse, seam=seam, in_place=0.2, batch_size=4)
    source = lora.batches(codec, settings, 0)
    first = [next(source) for _ in range(lora.POOL + 2)]
    assert next(lora.batches(codec, settings, lora.POOL + 1)) == first[-1]
    ways = {m.context if m.context is None else bool(m.context) for rows in first for r in rows for m in r.messages}
    assert ways == {None} | {"alone": {False}, "context": {True}, "mixed": {False, True}}[reuse]
    assert all(row.seam == seam and len(rows) == 4 for rows in first for row in rows)


def test_a_run_can_go_on_from_another_adapter(folder: Path, codec: Codec, tmp_path: Path) -> None:
    first = trained(folder, tmp_path / "first")
    run = lora.TrainingRun.start(folder, replace(SETTINGS, seed=9, start=str(tmp_path / "first")))
    assert all(torch.equal(run.trained[f"{n[:-7]}.lora_B.weight"], B.float()) for n, (_, B) in first.items())
    with pytest.raises(ConfigError, match="does not have the rank and the modules"):
        lora.TrainingRun.start(folder, replace(SETTINGS, rank=3, start=str(tmp_path / "first")))
    with pytest.raises(ConfigError, match="counts 16 times, that of this run 4 times"):
        lora.TrainingRun.start(folder, replace(SETTINGS, alpha=8.0, start=str(tmp_path / "first")))


def test_under_stress_more_dialogues_are_about_count_and_order_and_none_is_short() -> None:
    def lessons(stress: bool) -> list[Dialogue]:
        rng = Random(1)
        return [lora.lesson(rng, replace(SETTINGS, stress=stress)) for _ in range(400)]

    def share(found: list[Dialogue]) -> float:
        return sum(d.questions[0].kind in ("count", "order") for d in found) / len(found)

    calm, stressed = lessons(False), lessons(True)
    assert share(stressed) > share(calm) + 0.05
    assert all(len(d.turns) >= lora.FEWEST or d.questions[0].kind == "chat" for d in stressed)
    assert any(len(d.turns) < lora.FEWEST and d.questions[0].kind != "chat" for d in calm)


def test_in_focus_most_dialogues_are_about_one_kind_and_as_long_as_asked() -> None:
    settings, rng = replace(SETTINGS, focus="order", fewest=6), Random(1)
    lessons = [lora.lesson(rng, settings) for _ in range(200)]
    assert sum(d.questions[0].kind == "order" for d in lessons) > 100
    assert all(len(d.turns) >= 6 or d.questions[0].kind == "chat" for d in lessons)


def test_dialogues_read_anew_ask_for_what_is_right_in_the_new_order(codec: Codec) -> None:
    settings, rng = replace(SETTINGS, anew=1.0, focus="order", fewest=4), Random(1)
    cases = [lora.case_of(lora.lesson(rng, settings), settings, rng) for _ in range(100)]
    moved = [case for case in cases if list(case.order) != sorted(case.order)]
    assert len(moved) > 50
    changed = [case for case in moved if case.read.questions[0].value != case.dialogue.questions[0].value]
    assert changed
    for case in changed[:5]:
        row = lora.row_of(codec, case, settings, rng)
        assert [m.tokens for m in row.messages] == [
            tuple(codec.turn(case.dialogue.turns[i].role, case.dialogue.turns[i].text)) for i in case.order
        ]
        assert case.read.questions[0].value in codec.tokenizer.decode(row.branches[0].tokens)


def test_what_the_teacher_gets_wrong_can_be_left_out(codec: Codec) -> None:
    rng = Random(1)
    rows = [lora.row_of(codec, lora.case_of(lora.lesson(rng, SETTINGS), SETTINGS, rng), SETTINGS, rng) for _ in "123"]
    wrong = replace(rows[1], branches=tuple(replace(b, tokens=[*b.tokens[:-1], 7]) for b in rows[1].branches))
    assert lora.confirmed(rows, [rows[0], wrong, rows[2]]) == [rows[0], rows[2]]
    assert lora.confirmed(rows[1:2], [wrong]) == [wrong]


def test_distillation_is_zero_where_student_and_teacher_agree(folder: Path, codec: Codec) -> None:
    run = lora.TrainingRun.start(folder, replace(SETTINGS, distill=1.0))
    with torch.no_grad():
        assert run.loss(rows_of(codec, Reuse())).abs() < 1e-5
        assert run.loss(rows_of(codec, Reuse("alone"))) > 1e-4


def test_modules_can_be_trained_as_a_whole(folder: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, targets=("in_proj",), saved=("conv1d",), steps=2)
    lora.train(folder, tmp_path / "out", settings)
    adapter = adapters.load(tmp_path / "out")
    assert {name.split(".")[-2] for name in adapter.weights} == {"in_proj", "conv1d"}
    merged = dict(composed.adapted(folder, tmp_path / "out").named_parameters())
    name = "model.layers.0.mamba.conv1d.weight"
    assert torch.equal(merged[name], adapter.replaced[name].float())


def test_the_adapted_network_is_the_one_that_was_trained_up_to_rounding(
    folder: Path, codec: Codec, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, lr=0.01, dropout=0.0)
    lora.train(folder, tmp_path / "out", settings)
    run = lora.TrainingRun.start(folder, settings)
    run.resume(tmp_path / "out" / "run")
    rows = rows_of(codec, Reuse("alone"))
    merged, own = (at_answers(n, rows) for n in (composed.adapted(folder, tmp_path / "out"), run.student))
    change = (own - at_answers(net.load(folder), rows)).norm()
    assert (merged - own).norm() < 0.2 * change


@pytest.mark.parametrize(
    "changes", [{"rank": 0}, {"reuse": "sideways"}, {"dropout": 2.0}, {"steps": 0}, {"fewest": 99}, {"focus": "tea"}]
)
def test_settings_out_of_bounds_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        replace(SETTINGS, **changes)  # type: ignore[arg-type]


def test_modules_that_are_not_there_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no modules named up_proj"):
        lora.TrainingRun.start(folder, replace(SETTINGS, targets=("in_proj", "up_proj")))


@pytest.mark.parametrize(
    "changes", [{"model_type": "jamba"}, {"num_local_experts": 4}, {"position_embedding_type": "rope"}]
)
def test_models_that_the_network_does_not_cover_are_refused(folder: Path, changes: dict[str, object]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModel, match=f"{next(iter(changes))} is .*supports GraniteMoeHybrid"):
        lora.load_base(folder)


def test_the_command_writes_adapter_settings_and_scores(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    train_lora.run(str(folder), out, SETTINGS, resume=False, every=9, num_seeds=1, each=1, threads=1)
    assert {"adapter_config.json", "adapter_model.safetensors", "training.json", "run"} <= {
        p.name for p in out.iterdir()
    }
    printed = capsys.readouterr().out
    assert all(reuse.name in printed for reuse in (*lora.SCORED, *lora.SCORED_IN_NEW_ORDER))
