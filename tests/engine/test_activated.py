"""Activated adapters: a variant computes a prompt from the last occurrence of its invocation on, the base before it."""

import random
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from hybrid_cache.cache.inventory import Inventory
from hybrid_cache.choreography.arrangement import Arrangement, Encoding, Fidelity, Part
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import ConfigError, RequestError
from hybrid_cache.request import CacheMode, Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.scheduling.registry import ORDERS
from hybrid_cache.tokens import Boundary, BoundaryKind, Prompt, TokenArray, last_occurrence
from tests.engine.test_engine import answers, make_request, prompt_output, run
from tests.engine.test_host_tier import room_for
from tests.engine.test_variants import Times, shift_of
from tests.fakes import SumModel, tokens_of

INVOKED = {"": (), "judge": (7, 8, 7), "guard": (9,), "plain": ()}
FACTORS = {"": 1, "judge": 2, "guard": 3, "plain": 5}


class Activated(Times):
    """Adds up multiples of the tokens from its invocation on."""

    def __init__(self, name: str, *, packs: bool = True) -> None:
        super().__init__(FACTORS[name])
        self.name, self.invocation, self.packs = name, INVOKED[name], packs


def new_engine(
    budget_bytes: int = 1 << 20, *, packs: bool = True, **config: object
) -> tuple[Engine, dict[str, Activated]]:
    models = {name: Activated(name, packs=packs) for name in FACTORS}
    variants = {name: model for name, model in models.items() if name}
    settings = EngineConfig(budget_bytes=budget_bytes, **config)  # type: ignore[arg-type]
    return Engine(models[""], settings, variants=variants), models


def invocation(tokens: TokenArray, name: str) -> int | None:
    """Where an adapter is switched on, found in the plainest way."""
    part, text = [*INVOKED[name]], tokens.tolist()
    found = [i for i in range(len(text)) if text[i : i + len(part)] == part]
    return found[-1] if part and found else None


def answer_of(name: str, prompt: TokenArray, num_tokens: int, at: int | None = None) -> list[int]:
    """What a model says after a prompt, worked out by hand. at: where it is switched on, if the prompt does not say"""
    tokens = prompt.tolist()
    at = invocation(prompt, name) if at is None else at
    if INVOKED[name] and at is None:
        name = ""
    factor, before = FACTORS[name], tokens[:at] if at is not None else []
    for _ in range(num_tokens):
        total = sum(before) + factor * sum(tokens[len(before) :])
        tokens.append((total + len(tokens) + shift_of(factor)) % Times.vocab_size)
    return tokens[len(prompt) :]


def text_of(seed: int, length: int) -> TokenArray:
    """Random tokens that invoke nothing."""
    return tokens_of(seed, length) % 900 + 20


def invoked(before: TokenArray, name: str, num_more: int, seed: int = 99) -> TokenArray:
    return np.concatenate([before, np.array(INVOKED[name], np.int32), text_of(seed, num_more)]).astype(np.int32)


def rows_of(models: dict[str, Activated]) -> dict[str, int]:
    return {name: model.rows_computed for name, model in models.items() if model.rows_computed}


@pytest.mark.parametrize(
    ("tokens", "part", "place"),
    [
        ([1, 2, 3, 1, 2, 4], (1, 2), 3),
        ([1, 1, 1, 1], (1, 1), 2),
        ([1, 2], (1, 2), 0),
        ([1, 2], (1, 2, 3), None),
        ([2, 1, 2, 3], (2, 3), 2),
        ([1, 2, 1], (1, 2), 0),
        ([5], (5,), 0),
        ([4, 5], (6,), None),
    ],
)
def test_the_last_whole_occurrence_counts(tokens: list[int], part: tuple[int, ...], place: int | None) -> None:
    assert last_occurrence(np.array(tokens, np.int32), part) == place


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 100, 127, 128, 130, 200])
@pytest.mark.parametrize("more", [0, 10, 70])
def test_only_the_invocation_and_what_follows_is_computed_behind_a_base_prompt(at: int, more: int) -> None:
    before = text_of(1, at)
    for warm_up in ("none", "prompt"):
        engine, models = new_engine()
        if warm_up == "prompt" and at:
            outputs = run(engine, make_request("base", before, 3, commits=False))
            assert answers(outputs, "base") == answer_of("", before, 3)
        for round_, name in enumerate(["judge", "guard", "judge"]):
            num_rows = rows_of(models)
            tokens = invoked(before, name, more)
            outputs = run(engine, replace(make_request(str(round_), tokens, 1), model=name, commits=False))
            assert answers(outputs, str(round_)) == answer_of(name, tokens, 1)
            cached = prompt_output(outputs, str(round_)).cached_tokens
            computed = rows_of(models).get(name, 0) - num_rows.get(name, 0)
            if round_ == 2:
                assert (cached, computed) == (len(tokens), 0)
            elif round_ or warm_up == "prompt":
                assert (cached, computed) == (at, len(tokens) - at)
        assert rows_of(models).get("", 0) == at + (2 if warm_up == "prompt" and at else 0)


def test_a_base_prompt_that_ends_at_the_invocation_decodes_from_what_an_adapter_left() -> None:
    engine, models = new_engine()
    before = text_of(1, 150)
    run(engine, replace(make_request("a", invoked(before, "guard", 5), 1), model="guard"))
    assert rows_of(models) == {"": 150, "guard": 6}
    outputs = run(engine, make_request("b", before, 4))
    assert prompt_output(outputs, "b").cached_tokens == 150
    assert answers(outputs, "b") == answer_of("", before, 4)
    assert rows_of(models) == {"": 153, "guard": 6}


def test_the_next_call_reads_the_first_answer_as_base_text() -> None:
    engine, models = new_engine()
    tokens = invoked(text_of(1, 150), "judge", 20)
    outputs = run(engine, replace(make_request("a", tokens, 60), model="judge"))
    said = answers(outputs, "a")
    assert said == answer_of("judge", tokens, 60)
    assert models[""].rows_computed == 150 + 192 - 128  # the canonical pass reads prompt and answer
    whole = np.concatenate([tokens, np.array(said, np.int32)])
    for name in ("judge", "guard", ""):
        again = invoked(whole, name, 7) if name else np.concatenate([whole, text_of(4, 9)])
        outputs = run(engine, replace(make_request(f"b{name}", again, 3), model=name))
        assert answers(outputs, f"b{name}") == answer_of(name, again, 3)
        assert prompt_output(outputs, f"b{name}").cached_tokens >= 192
    outputs = run(engine, replace(make_request("again", tokens, 60), model="judge"))
    assert answers(outputs, "again") == said
    assert prompt_output(outputs, "again").cached_tokens == len(tokens)


def test_a_prompt_without_the_invocation_is_the_bases(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "hybrid_cache")
    engine, models = new_engine()
    tokens = np.concatenate([text_of(1, 140), np.array([7, 8], np.int32)])
    outputs = run(engine, replace(make_request("a", tokens, 5), model="judge"))
    assert answers(outputs, "a") == answer_of("", tokens, 5)
    assert "request a does not invoke judge" in caplog.text
    assert prompt_output(run(engine, make_request("b", tokens)), "b").cached_tokens == len(tokens)
    assert set(rows_of(models)) == {""}


@pytest.mark.parametrize("invokes", [True, False])
def test_an_invocation_that_is_said_or_follows_a_pause_switches_nothing(invokes: bool) -> None:
    engine, _ = new_engine()
    tokens = invoked(text_of(1, 100), "guard", 4) if invokes else text_of(1, 100)
    engine.submit(replace(make_request("a", tokens, 20), model="guard"))
    outputs = [*engine.step(), *engine.step(), *engine.step()]
    engine.pause("a", "look")
    said = answers(outputs, "a")
    engine.resume("a", [30, *INVOKED["guard"], 31])
    outputs += engine.run_until_idle()
    after = np.array([*tokens, *said, 30, *INVOKED["guard"], 31], np.int32)
    name = "guard" if invokes else ""
    at = invocation(tokens, "guard")
    assert answers(outputs, "a")[len(said) :] == answer_of(name, after, 20 - len(said), at)
    engine.check()


def test_tokens_before_the_invocation_are_scored_by_the_base() -> None:
    engine, _ = new_engine()
    tokens = invoked(text_of(1, 100), "guard", 50)
    sampling = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    outputs = run(engine, Request("a", Prompt(tokens), sampling, model="guard"))
    scores = prompt_output(outputs, "a").logprobs
    assert scores is not None
    likely = [score.top[0][0] for score in scores if score is not None]
    before, after = np.cumsum(tokens[:100]), np.cumsum(tokens[100:])
    sums = np.concatenate([before, before[-1] + 3 * after])
    shifts = np.array([0] * 100 + [shift_of(3)] * len(after))
    assert likely == ((sums + np.arange(1, len(tokens) + 1) + shifts) % Times.vocab_size)[:-1].tolist()
    assert answers(outputs, "a") == answer_of("guard", tokens, 2)


def test_two_who_go_on_from_one_place_wait_for_it_once() -> None:
    engine, models = new_engine(max_tiles=1)
    before = text_of(1, 200)
    for name in ("judge", "guard", "judge", ""):
        tokens = invoked(before, name, 30) if name else before
        engine.submit(replace(make_request(name + str(len(engine._outcomes.open)), tokens, 2), model=name))
    outputs = engine.run_until_idle()
    for i, name in enumerate(["judge", "guard", "judge", ""]):
        tokens = invoked(before, name, 30) if name else before
        assert answers(outputs, f"{name}{i}") == answer_of(name, tokens, 2)
    assert rows_of(models) == {"": 200 + 1, "judge": 33 + 2, "guard": 31 + 1}


def test_what_an_adapter_has_read_is_read_by_the_base_in_the_end() -> None:
    engine, models = new_engine()
    run(engine, replace(make_request("a", invoked(text_of(1, 150), "judge", 90), 1), model="judge"))
    assert models[""].rows_computed == 150 + 192 - 128


def test_prompts_of_the_same_words_do_not_wait_for_what_another_model_computes() -> None:
    engine, _ = new_engine(max_tiles=8)
    tokens = invoked(text_of(1, 0), "judge", 200)
    for name in ("judge", "guard", ""):
        engine.submit(replace(make_request(name, tokens, 2), model=name))
    outputs = engine.step()
    assert engine.stats().running == 2, "the guard is not invoked, so that its prompt is the base's"
    outputs += engine.run_until_idle()
    assert [answers(outputs, name) for name in ("judge", "guard", "")] == [
        answer_of(name, tokens, 2) for name in ("judge", "guard", "")
    ]


def test_one_that_comes_between_the_layers_of_a_pass_goes_on_behind_it() -> None:
    engine, _ = new_engine(max_tiles=8)
    late, outputs = ["judge", "guard"], Outputs()

    def come() -> None:
        if late:
            name = late.pop()
            engine.submit(replace(make_request(name, invoked(text_of(5, 70), name, 80), 4), model=name))
            outputs.extend(engine.step_between())

    engine.between_layers = come
    outputs += run(engine, make_request("long", text_of(6, 500), 3))
    assert answers(outputs, "long") == answer_of("", text_of(6, 500), 3)
    for name in ("judge", "guard"):
        assert answers(outputs, name) == answer_of(name, invoked(text_of(5, 70), name, 80), 4)
    assert late == []


def test_a_turn_is_known_by_its_text_whoever_has_said_it() -> None:
    """The next request of a task may ask the base, or invoke another adapter behind the tool's result."""
    for follower in ("", "judge", "guard"):
        engine, _ = new_engine()
        tokens = invoked(text_of(1, 100), "judge", 50)
        said = answers(run(engine, replace(make_request("a", tokens, 70), model="judge", commits=False)), "a")
        engine.pause("a", "look")
        longer = np.concatenate([tokens, np.array(said, np.int32), text_of(2, 30)])
        after = invoked(longer, follower, 3) if follower else longer
        outputs = run(engine, replace(make_request("b", after, 2), model=follower))
        assert answers(outputs, "b") == answer_of(follower, after, 2)
        assert engine.stats().pauses.num_resumed == 1


def test_messages_are_computed_exactly_by_an_adapter_and_it_says_so() -> None:
    engine, _ = new_engine()
    tokens = invoked(text_of(1, 100), "judge", 8)
    parts = (Part(30, "m0", Encoding.ALONE), Part(70, "m1", Encoding.ALONE), Part(len(tokens) - 100))
    request = make_request("a", tokens, 3, arrangement=Arrangement(parts, Fidelity.COMPOSED), model="judge")
    assert engine.plan(request).fidelity is Fidelity.EXACT
    assert answers(run(engine, request), "a") == answer_of("judge", tokens, 3)


def test_salts_keep_what_comes_before_apart() -> None:
    engine, models = new_engine()
    tokens = invoked(text_of(1, 130), "guard", 3)
    for salt in ("a", "b"):
        outputs = run(engine, replace(make_request(salt, tokens, 2), model="guard", namespace=salt))
        assert prompt_output(outputs, salt).cached_tokens == 0
    assert models[""].rows_computed == 260


def test_an_adapter_that_goes_takes_what_it_left_and_nothing_else() -> None:
    engine, models = new_engine(room_for(SumModel(), 12, 60), host_bytes=1 << 20)
    before = text_of(1, 150)
    for name in ("judge", "guard"):
        run(engine, replace(make_request(name, invoked(before, name, 200), 70), model=name))
    left = {node.namespace for node in engine.cache.tree.nodes()}
    assert left == {"times-1/", "times-2/", "times-3/"}
    engine.remove_variant("judge")
    engine.check()
    assert {node.namespace for node in engine.cache.tree.nodes()} == {"times-1/", "times-3/"}
    rows = rows_of(models)
    outputs = run(engine, replace(make_request("again", invoked(before, "guard", 200), 70), model="guard"))
    assert prompt_output(outputs, "again").cached_tokens == 351
    assert models[""].rows_computed == rows[""]


def test_what_has_no_base_or_unknown_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs the model that reads what comes before it"):
        Engine(Activated("judge"), EngineConfig(budget_bytes=1 << 20))
    engine, _ = new_engine()
    other = Activated("guard")
    other.invocation = (3, 997)
    with pytest.raises(ConfigError, match=r"'new' is invoked by \(3, 997\), tokens are below 997"):
        engine.add_variant("new", other)


def test_people_are_shown_whole_conversations_by_the_model_that_ends_them() -> None:
    engine, _ = new_engine()
    before = text_of(1, 150)
    asked = {"judge": invoked(before, "judge", 100), "guard": invoked(before, "guard", 20), "": text_of(3, 90)}
    for name, tokens in asked.items():
        run(engine, replace(make_request(name, tokens, 1), model=name, commits=False))
    inventory = Inventory(engine.cache, lambda _: True)
    found = {each.namespace: inventory.find(each.end.name.hex()) for each in inventory.conversations()}
    assert {*found} == {"times-1/", "times-2/", "times-3/"}
    for name, tokens in asked.items():
        whole = found[f"times-{FACTORS[name]}/"]
        assert whole is not None
        assert whole.tokens.tolist() == tokens.tolist()
        if name:
            assert 150 in [state.num_tokens for state in whole.states], "the state where it goes on from the base"
    drop = found["times-2/"]
    assert drop is not None
    assert inventory.drop(drop.conversation.end.name.hex())
    engine.check()
    left = {name: replace(make_request(name, asked[name], 1), model=name) for name in ("judge", "guard")}
    assert [engine.cached_tokens(request) for request in left.values()] == [150, len(asked["guard"])]


def test_a_report_says_from_where_on_another_model_has_the_same_words() -> None:
    engine, _ = new_engine()
    before = text_of(1, 150)
    tokens = invoked(before, "guard", 70)
    run(engine, make_request("base", tokens, 1, boundaries=(150,)))
    found = prompt_output(run(engine, replace(make_request("a", tokens, 1), model="guard", owner="x")), "a").found
    assert found is not None
    assert (found.matched, found.kind, found.kv_only) == (128, "message_end", 0)
    assert found.nearest is not None
    assert (found.nearest.position, found.nearest.tokens[0]) == (150, INVOKED["guard"][0])
    again = replace(make_request("b", invoked(before, "guard", 71, 5), 1), model="guard")
    found = prompt_output(run(engine, again), "b").found
    assert found is not None
    assert (found.matched, found.kind, found.kv_only) == (150, "prompt_end", 0)


class Conversation:
    """A text that grows by what is asked and answered, with invocations at random places."""

    def __init__(self, rng: random.Random, seed: int) -> None:
        self._rng = rng
        self.tokens = text_of(seed, rng.choice((1, 40, 64, 100, 128, 190)))

    def ask(self, number: int) -> tuple[str, TokenArray]:
        rng, name = self._rng, self._rng.choice(["", "", "judge", "judge", "guard", "plain"])
        cut = rng.choice((0, 0, 0, 5, 64))
        before = self.tokens[: max(1, len(self.tokens) - cut)]
        if rng.random() < 0.3:
            before = before[: max(1, len(before) // 64 * 64 + rng.choice((-1, 0, 1)))]
        if rng.random() < 0.05:
            before = before[:0]
        more = rng.choice((0, 1, 10, 60, 64, 100))
        if not INVOKED[name] or rng.random() < 0.1:
            return name, np.concatenate([before, text_of(number, more + 1)])
        return name, invoked(before, name, more, number)

    def heard(self, prompt: TokenArray, answer: list[int]) -> None:
        if len(prompt) + len(answer) < 700:
            self.tokens = np.concatenate([prompt, np.array(answer, np.int32)])


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_mixed_answers_are_those_worked_out_by_hand(seed: int) -> None:
    """Few bytes, tenants, choices, cache modes, aborts, commits, a second tier; conversations of all of them."""
    rng = random.Random(seed)
    sizes = {"max_running": (2, 6), "max_tiles": (1, 2, 5), "host_bytes": (0, 1 << 19)}
    config = {name: rng.choice(values) for name, values in sizes.items()}
    room = room_for(SumModel(), rng.choice((3, 6, 20)), rng.choice((16, 30, 60)))
    policy, order = rng.choice(("learned", "flops-per-byte", "lru", "vllm-block")), rng.choice([*ORDERS])
    engine, models = new_engine(room, packs=seed % 3 > 0, policy=policy, order=order, verify=True, **config)
    talks = [Conversation(rng, seed * 10 + i) for i in range(3)]
    asked, outputs = dict[str, Request](), Outputs()
    for number in range(70):
        talk = rng.choice(talks)
        name, tokens = talk.ask(number)
        mode = rng.choice([*CacheMode, CacheMode.IMPLICIT, CacheMode.IMPLICIT])
        request = make_request(
            str(number), tokens, rng.choice((1, 5, 70)), n=rng.choice((1, 1, 2)), model=name, cache_mode=mode
        )
        marks = (Boundary(rng.randrange(1, len(tokens) + 1), rng.choice(list(BoundaryKind))),)
        request = replace(
            request,
            prompt=Prompt(tokens, marks),
            tenant=rng.choice("ab"),
            namespace=rng.choice(("", "", "s")),
            session=rng.choice(("", "x")),
            commits=rng.random() < 0.7,
        )
        asked[request.id] = request
        engine.submit(request)
        for _ in range(rng.choice((0, 1, 3, 30))):
            outputs += engine.step()
        if rng.random() < 0.1:
            engine.abort(victim := rng.choice([*asked]))
            del asked[victim]
        if rng.random() < 0.1:
            engine.commit(request.namespace, request.prompt, request.session, name)
        if rng.random() < 0.3:
            outputs += engine.run_until_idle()
            engine.check()
            if request.id in asked:
                talk.heard(tokens, answers(outputs, request.id))
                with suppress(RequestError):  # one that nobody could go on from
                    engine.pause(request.id, "tool", rng.choice((None, 0.5, 60.0)))
    outputs += engine.run_until_idle()
    engine.check()
    for name, request in asked.items():
        found = prompt_output(outputs, name).found
        assert found is not None
        ends = [found.matched, *(part.end for part in found.parts)]
        assert [part.start for part in found.parts] == ends[:-1]
        assert ends[-1] == len(request.prompt.tokens)
        for index in range(request.n):
            expected = answer_of(request.model, request.prompt.tokens, request.sampling.max_tokens)
            assert answers(outputs, name, index) == expected
    stats = engine.stats()
    assert min(stats.cached_tokens, stats.cache.num_evictions) > 0
    assert min(models[name].rows_computed for name in models) > 0


@pytest.mark.parametrize("how", ["runs", "is paused"])
def test_an_adapter_stays_while_a_request_names_it_that_does_not_invoke_it(how: str) -> None:
    engine, _ = new_engine()
    tokens = text_of(1, 100)
    engine.submit(replace(make_request("a", tokens, 3, n=1 if how == "is paused" else 2), model="judge"))
    if how == "is paused":
        engine.pause("a")
    with pytest.raises(RequestError, match="'judge' is in use by 1 requests"):
        engine.remove_variant("judge")
    if how == "is paused":
        engine.resume("a", [5])
        tokens = np.append(tokens, 5).astype(np.int32)
    assert answers(engine.run_until_idle(), "a") == answer_of("", tokens, 3)
    engine.remove_variant("judge")
    engine.check()
