"""`bench choreography`: scripts, fairness between contenders, what is compared with what, and the command."""

import json
import time
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from typer.testing import CliRunner

from hybrid_cache.api.cli.main import app
from hybrid_cache.api.server.launch import LoadOptions
from hybrid_cache.bench.choreography import command
from hybrid_cache.bench.choreography.models import attention_only, open_subject
from hybrid_cache.bench.choreography.players import (
    ANY_ORDER,
    EXACT,
    NO_CACHE,
    PREFIX_CACHE,
    EnginePair,
    Performance,
    Reply,
    moved,
    tokenized,
)
from hybrid_cache.bench.choreography.quality import Examiner, Reading
from hybrid_cache.bench.choreography.report import Check, aims, percentile, rows_of
from hybrid_cache.bench.choreography.texts import GENERATED, Writer, drawn, generated, texts_from
from hybrid_cache.bench.choreography.workflows import WORKFLOWS, Size, make_script
from hybrid_cache.choreography.arrangement import Composition, Fidelity
from hybrid_cache.choreography.plan import Action

SIZE = Size(branches=3, voters=3, agents=2, rounds=2, requests=3, message_tokens=20, answer_tokens=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def subject():
    return open_subject(LoadOptions())


@pytest.fixture(scope="module")
def engines(subject):
    return EnginePair(subject, 64 << 20, time.process_time)


def words(text: str) -> int:
    return len(text.split())


def script_of(name, seed=0, writer=None):
    return make_script(name, writer or Writer(generated(0), words), SIZE, seed)


# Texts and scripts


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_seed_always_gives_the_same_script_and_another_seed_another(name):
    assert script_of(name) == script_of(name)
    other = make_script(name, Writer(generated(1), words), SIZE, 1)
    assert other != script_of(name)
    assert other.num_calls == script_of(name).num_calls


@pytest.mark.parametrize("name", WORKFLOWS)
def test_what_is_read_has_been_said_in_an_earlier_round(name):
    script, said = script_of(name), set[int]()
    answers = {ask.answer for asks in script.rounds for ask in asks}
    for asks in script.rounds:
        assert all(i in said or i not in answers for ask in asks for i in ask.reads)
        said |= {ask.answer for ask in asks}
    assert said == answers


def test_voters_read_all_proposals_in_different_orders():
    proposals, votes, _ = make_script("tree of thought", Writer(generated(0), words), Size(voters=8), 0).rounds
    names = {ask.answer for ask in proposals}
    orders = {tuple(i for i in ask.reads if i in names) for ask in votes}
    assert all(set(order) == names for order in orders)
    assert len(orders) > 1


def test_debaters_read_their_own_answer_first_and_then_all_others():
    first, second = script_of("parallel debate").rounds
    for before, ask in zip(first, second, strict=True):
        answers = [i for i in ask.reads if i in {a.answer for a in first}]
        assert answers[0] == before.answer
        assert set(answers) == {a.answer for a in first}


def test_a_text_has_whole_words_and_at_most_the_tokens_asked_for():
    writer = Writer(generated(0), words)
    text = writer.question(0, 24)
    assert words(text) == 24
    assert writer.question(0, 10) == " ".join(text.split()[:10])
    assert writer.question(1, 24) != text


def test_passages_of_a_made_up_retrieval_come_back_with_the_same_length():
    found = drawn(20, 100, Random(0))
    lengths = {}
    for names in found:
        assert len({name for name, _ in names}) == len(names)
        for name, length in names:
            assert lengths.setdefault(name, length) == length
    assert sum(map(len, found)) > 2 * len(lengths)


def write_lines(path: Path, *records: object) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_real_texts_are_taken_from_the_files_that_are_there(tmp_path):
    solvers = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    solved = {name: {"solution": f"It is <<1+1=2>>2, says {name}."} for name in solvers}
    write_lines(
        tmp_path / "example_model_solutions.jsonl", {"question": "One and one?", "ground_truth": "Two.", **solved}
    )
    history = [{"content": f"Turn {i}.", "role": "user"} for i in range(8)]
    write_lines(tmp_path / "who_and_when.jsonl", {"history": history})
    lengths = [{"passage_id": i, "token_length": 10 * (i + 1)} for i in range(3)]
    write_lines(tmp_path / "2_passages.jsonl", *lengths)
    asked = [(2, [2, 0]), (1, [0, 1]), (3, [1])]
    write_lines(
        tmp_path / "0_trace.jsonl",
        *({"timestamp": str(at), "hash_ids": {"passages_ids": names}} for at, names in asked),
    )
    texts = texts_from(tmp_path, 0)
    assert all(source in texts.note for source in ("GSM8K", "Who&When", "RAGPulse"))
    assert next(texts.question(0)) == "One and one?"
    assert next(texts.answer(0, 3)) == "It is 2, says 175b_verification."
    assert next(texts.turn(9)) == "Turn 1."
    found = texts.retrievals(3, 30)
    assert sorted(tuple(name for name, _ in names) for names in found) == [(0, 1), (1,), (2, 0)]
    assert dict(found[0])[found[0][0][0]] == round(30 * 10 * (found[0][0][0] + 1) / 18)
    assert texts_from(tmp_path / "nowhere", 0).note == GENERATED


# Playing


CONTENDERS = [NO_CACHE, PREFIX_CACHE, ANY_ORDER, *moved(Fidelity.COMPOSED, (0, 16), [])]


@pytest.mark.parametrize(
    "name",
    [pytest.param("tree of thought", marks=pytest.mark.slow), "parallel debate", "two questions", "retrieval"],
)
def test_all_contenders_read_and_write_the_same_tokens(name, subject, engines):
    script = script_of(name, writer=Writer(generated(0), subject.num_tokens))
    tokens = tokenized(script, subject)
    plays = {c.name: engines.perform(script, tokens, c, 0) for c in CONTENDERS}
    expected = [
        sum(len(tokens.pieces[i]) for i in ask.reads) + len(tokens.opening) for asks in script.rounds for ask in asks
    ]
    written = [token for asks in script.rounds for ask in asks for token in tokens.lines[ask.answer]]
    for contender, play in plays.items():
        assert [sum(reply.tokens.values()) for reply in play.replies] == expected, contender
        assert [score.token for reply in play.replies for score in reply.scores] == written, contender
    assert plays["no cache"].tokens[Action.COMPUTED] == sum(expected)
    assert plays["composed"].tokens[Action.COMPOSED] > 0
    assert plays["composed seam 16"].flops > plays["composed"].flops


def test_exact_has_the_bits_of_re_encoding_and_composed_has_not(subject, engines):
    script = script_of("tree of thought", writer=Writer(generated(0), subject.num_tokens))
    tokens = tokenized(script, subject)
    against = engines.perform(script, tokens, NO_CACHE, 5)
    assert command.check("", "", "", engines.perform(script, tokens, EXACT, 5), against).differing == 0
    assert command.check("", "", "", engines.perform(script, tokens, PREFIX_CACHE, 5), against).differing == 0
    (composed, *_) = moved(Fidelity.COMPOSED, (0,), [])
    assert command.check("", "", "", engines.perform(script, tokens, composed, 5), against).differing > 0


def test_the_control_has_attention_alone_and_about_the_same_cost(subject):
    control = attention_only(subject)
    assert "relocated" in control.model.fidelities
    assert control.model.prefill_cost.per_token == pytest.approx(subject.model.prefill_cost.per_token, rel=0.1)
    assert control.model.vocab_size == subject.model.vocab_size


# Answers


def test_zeroed_states_and_the_last_message_alone_lose_answers_that_states_carry(subject):
    plans = [
        Reading(""),
        Reading("alone"),
        Reading("alone", composition=Composition.LAST),
        Reading("alone", zeroed=True),
    ]
    scores = list(Examiner(subject, 64 << 20).scores("count", 601, 6, plans, anew=False, on_score=lambda: None))
    again, alone, last, zeroed = scores
    assert again.right == again.same == 1.0
    assert (again.kl_first, again.kl, again.computed) == (0.0, 0.0, 1.0)
    assert alone.computed < 0.5
    assert 0 < alone.kl < zeroed.kl
    assert max(last.right, zeroed.right) < again.right


def test_messages_put_back_where_they_were_told_give_the_same_answers(subject):
    """Composition in the order in which they were encoded is exact but for rounding."""
    scores = list(
        Examiner(subject, 64 << 20).scores(
            "order", 602, 4, [Reading(""), Reading("as told"), Reading("in context")], anew=False, on_score=lambda: None
        )
    )
    assert scores[1].same == 1.0
    assert scores[1].kl < 1e-2
    assert scores[1].computed < 0.5
    assert scores[1].kl < scores[2].kl


# Reporting


def performance(seconds: float, *firsts: float) -> Performance:
    return Performance([Reply(first, {Action.COMPUTED: 10}, ()) for first in firsts], seconds=seconds, flops=seconds)


def test_ratios_are_the_median_over_repetitions_each_against_its_own():
    slow = [performance(8, 1, 2, 3), performance(16, 2, 4, 6), performance(8, 1, 2, 3)]
    fast = [performance(4, 1, 1, 1), performance(4, 1, 1, 1), performance(2, 1, 1, 1)]
    rows = {row.contender: row for row in rows_of("w", "m", {"no cache": slow, "composed": fast})}
    assert rows["composed"].ttft_ratio == {"no cache": 2.0}
    assert rows["composed"].total_ratio == {"no cache": 4.0}
    assert rows["no cache"].ttft_s == 2.0
    assert rows["no cache"].ttft_p90_s == 3.0
    assert rows["no cache"].calls == 3


def test_percentiles_are_values_that_were_seen():
    assert percentile([4, 1, 3, 2], 0.5) == 2
    assert percentile([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.9) == 9
    assert percentile([7], 0.9) == 7


def test_aims_are_held_against_what_was_measured():
    played = {
        "no cache": [performance(9.0, 7.0)],
        "prefix cache": [performance(5.0, 2.0)],
        "exact": [performance(5.05, 2.0)],
        "composed": [performance(3.0, 1.0)],
    }
    (*rows,) = rows_of("parallel debate", "m", played)
    found = aims(rows, [Check("parallel debate", "m", "exact", 100, 0)], branches=4, voters=16, agents=3)
    assert [aim.reached for aim in found] == [True] * 5
    slower = [replace(row, ttft_ratio={"no cache": 5.0, "prefix cache": 1.4}) for row in rows]
    found = aims(slower, [Check("parallel debate", "m", "exact", 100, 1)], branches=4, voters=16, agents=3)
    assert [aim.reached for aim in found] == [False, True, True, False, False]


# The command


def run(*options):
    small = ("--branches", "2", "--voters", "2", "--agents", "2", "--rounds", "1", "--message-tokens", "12")
    return CliRunner().invoke(app, ["bench", "choreography", *small, "--answer-tokens", "2", "--repeat", "1", *options])


def test_the_command_times_examines_and_writes_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "EXAM_SEEDS", 1)
    monkeypatch.setattr(command, "KINDS", ("count",))
    out = tmp_path / "found.json"
    result = run("--workflows", "two questions", "--seams", "0", "--questions", "1", "--json", str(out))
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    names = {(row["model"], row["contender"]) for row in report["rows"]}
    assert {("embedded", "composed"), ("embedded", "exact any order")} < names
    assert ("attention only, random weights", "relocated alone leftmost") in names
    assert all(row["ttft_s"] > 0 and row["total_s"] >= row["ttft_s"] for row in report["rows"])
    assert [check["differing"] for check in report["checks"]] == [0] * 4
    assert {score["reading"] for score in report["scores"]} >= {"encoded again", "alone", "alone, states zeroed"}
    assert report["aims"]
    assert "two questions" in result.output
    assert "encoded again" in result.output


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "found.png"
    options = ("--workflows", "two questions", "--contenders", "no cache,composed", "--questions", "0", "--no-control")
    result = run(*options, "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--workflows", "chess"], "'chess' is not one of tree of thought"),
        (["--contenders", "oracle"], "'oracle' is not one of no cache"),
        (["--seams", "7"], "'7' is not one of 0, 8, 16, 32, 64"),
        (["--compositions", "soup"], "'soup' is not one of ordered"),
        (["--clock", "sun"], "'sun' is not one of cpu, wall"),
        (["--plot", "found.jpg"], "a plot is a PNG file"),
        (["--data", "nowhere"], "there is no file"),
        (["--model", "nowhere"], "nowhere is not a local folder"),
    ],
)
def test_a_wrong_option_is_named(options, wanted):
    result = run(*options)
    assert result.exit_code != 0
    assert wanted in " ".join(f"{result.output} {result.exception}".replace("│", " ").split())
