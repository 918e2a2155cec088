"""Double writing: the pass that computes a prompt makes entries for a model that is expected to read it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel, go_on
from hybrid_cache.device.worker import Hidden, Worker
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.models import loading
from hybrid_cache.namespaces import lane_in, namespace_of
from hybrid_cache.request import CacheMode, PromptOutput, Received, Request
from hybrid_cache.tokens import Boundary, BoundaryKind, Prompt, TokenArray
from hybrid_cache.transfer import Transfer, projected, upper
from hybrid_cache.work import Work
from tests.engine.test_bands import BUDGET, CASES, alone, ask, pair, run, said, tokens_of
from tests.engine.test_profiled import FAMILIES, every_transfer, profile_of, received, twins

LENGTH = 3 * TILE + 9


def new_engine(base: HybridModel, other: HybridModel, transfer: Transfer, **settings: object) -> Engine:
    config = EngineConfig(budget_bytes=BUDGET, verify=True, **settings)  # type: ignore[arg-type]
    engine = Engine(base, config, variants={"other": other})
    engine.add_profile(profile_of(base, other, (transfer, 0.01)))
    return engine


def reads(name: str, tokens: TokenArray, boundary: int = LENGTH) -> Request:
    return replace(ask(name, tokens, "other", (boundary,)), max_loss=0.01)


def expect(engine: Engine, base: HybridModel) -> None:
    """Two texts that the base computes and the other model reads: from now on it is expected."""
    for seed in (81, 82):
        text = tokens_of(base, seed, LENGTH)
        run(engine, ask(f"base {seed}", np.append(text, 5).astype(np.int32), "", (LENGTH,)))
        run(engine, reads(f"other {seed}", np.append(text, 6).astype(np.int32)))


def found(outputs: Outputs, name: str) -> PromptOutput:
    (output,) = [o for request_id, o in outputs if request_id == name and isinstance(o, PromptOutput)]
    return output


def lane_entries(engine: Engine) -> dict[tuple[bytes, str], list[torch.Tensor]]:
    """What is cached in lanes: by prefix, copies of its tensors."""
    engine.settle()
    tensors, entries = engine.worker.memory.tensors, {}
    for node in engine.cache.tree.nodes():
        if node.parent is None or not lane_in(node.namespace):
            continue
        pages = [each for each in tensors if isinstance(each, KVTensors)]
        entries[node.name, "page"] = [half[node.page].clone() for kv in pages for half in (kv.k, kv.v)]
        if node.checkpoint is not None:
            states = [each for each in tensors if not isinstance(each, KVTensors)]
            slot = node.checkpoint.slot
            entries[node.name, "state"] = [part[slot].clone() for each in states for part in (each.conv, each.state)]
    return entries


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_finds_what_was_written_for_it_and_computes_nothing_of_it(family: str, tmp_path: Path) -> None:
    base, other = twins(family, tmp_path)
    shared = tokens_of(base, 1, LENGTH)
    prompt = np.concatenate([shared, tokens_of(base, 2, 80)])
    for transfer in every_transfer(len(base.layers), 3)[:5]:
        engine = new_engine(base, other, transfer)
        cheap = _cost(engine, base, other) <= base.prefill_cost.per_token / 3
        expect(engine, base)
        written, kept = engine.stats().twin_tokens, engine.cache.inputs.stored.copy()
        run(engine, ask("base", np.append(shared, 5).astype(np.int32), "", (LENGTH,)))
        assert engine.stats().twin_tokens - written == (3 * TILE if cheap else 0), str(transfer)
        outputs = run(engine, reads("other", prompt))
        assert said(outputs, "other") == alone(other, prompt), str(transfer)
        if cheap:
            assert engine.cache.inputs.stored == kept  # nothing was kept that is not needed
            assert found(outputs, "other").cached_tokens == 3 * TILE
            done = str(transfer.for_layers(other.layers))
            assert received(outputs, "other") == Received("", 0, 0, done, 0.01)


def _cost(engine: Engine, base: HybridModel, other: HybridModel) -> float:
    engine._scheduler.senders.profiled(other.fingerprint, 1.0)
    (offer,) = engine._scheduler.senders.read_from(base.fingerprint)
    return offer.cost.per_token


@pytest.mark.parametrize("family", ["Bamba", "Jamba", "Zamba2", "NemotronH", "Qwen3_5"])
def test_what_is_written_beside_has_the_bytes_of_what_is_made_later(family: str, tmp_path: Path) -> None:
    base, other = pair(CASES[family], tmp_path, 0)
    num, shared = len(base.layers), tokens_of(base, 1, LENGTH)
    checked = 0
    for transfer in (upper(num, num), projected(num, range(num)), *every_transfer(num, 5)[3:5]):
        both = []
        for beside in (True, False):
            engine = new_engine(base, other, transfer, double_writing=beside)
            expect(engine, base)
            run(engine, ask("base", np.append(shared, 5).astype(np.int32), "", (LENGTH,)))
            run(engine, reads("other", np.append(shared, 7).astype(np.int32)))
            both.append(lane_entries(engine))
        assert both[0].keys() >= both[1].keys()  # a twin keeps states where the prompt does
        for name, tensors in both[1].items():
            assert all(map(torch.equal, tensors, both[0][name])), (str(transfer), name)
            checked += name[1] == "state" or not base.cache_spec.slot_bytes
    assert checked >= 5


def test_who_does_not_read_any_more_is_not_written_for(tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    engine = new_engine(base, other, projected(len(base.layers), range(len(base.layers))))
    expect(engine, base)
    written = []
    for seed in range(40):
        run(engine, ask(f"{seed}", tokens_of(base, seed, 2 * TILE + 1), ""))
        written.append(engine.stats().twin_tokens)
    assert written[0] == 2 * TILE
    assert written[-1] == written[-10] < 30 * 2 * TILE
    assert engine.cache.inputs.stored  # what it may ask for is kept again


def test_a_reader_that_comes_too_early_waits_for_what_is_being_written(tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    num, shared = len(base.layers), tokens_of(base, 1, 8 * TILE)
    for beside in (True, False):
        engine = new_engine(base, other, projected(num, range(num)), max_tiles=1, double_writing=beside)
        expect(engine, base)
        engine.submit(ask("base", np.append(shared, 5).astype(np.int32), "", (len(shared),)))
        engine.step()
        before = engine.stats()
        outputs = run(engine, reads("other", np.append(shared, 7).astype(np.int32), len(shared)))
        prompt = found(outputs, "other")
        assert (prompt.cached_tokens == 8 * TILE) is beside
        assert prompt.received is not None
        assert (prompt.received.end == 8 * TILE) is not beside
        whole = base.prefill_cost.flops(0, 8 * TILE)
        assert engine.stats().flops_computed - before.flops_computed < 1.6 * whole


def test_without_room_twins_are_given_up_before_anyone_begins_again(tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    num, shared = len(base.layers), tokens_of(base, 1, 8 * TILE)
    spec = base.cache_spec
    room = 2 * (10 * TILE * spec.kv_bytes_per_token + 4 * spec.slot_bytes)
    engine = Engine(base, EngineConfig(budget_bytes=room, verify=True, max_tiles=1), variants={"other": other})
    engine.add_profile(profile_of(base, other, (projected(num, range(num)), 0.01)))
    expect(engine, base)
    before = engine.stats().twin_tokens
    engine.submit(ask("base", np.append(shared, 5).astype(np.int32), ""))
    engine.step()
    assert engine.stats().twin_tokens > before
    others = [tokens_of(base, 40 + i, 7 * TILE) for i in range(2)]
    outputs = run(engine, *(ask(f"{i}", tokens, "") for i, tokens in enumerate(others)))
    assert engine.stats().num_preemptions == 0
    for i, tokens in enumerate(others):
        assert said(outputs, f"{i}") == alone(base, tokens)
    assert not engine._scheduler.twins._owners


@pytest.mark.parametrize("how", ["abort", "pass fails", "variant goes"])
def test_twins_end_with_their_prompt_and_with_their_reader(how: str, tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    num, shared = len(base.layers), tokens_of(base, 1, 8 * TILE)
    engine = new_engine(base, other, projected(num, range(num)), max_tiles=2)
    expect(engine, base)
    engine.submit(ask("base", shared, ""))
    engine.step()
    assert engine._scheduler.twins._owners
    if how == "abort":
        engine.abort("base")
    elif how == "variant goes":
        engine.remove_variant("other")
        assert not [root for root in engine.cache.tree.roots if "~" in root]
    else:
        forward, calls = other.forward, []

        def failing(*args: object) -> torch.Tensor:
            calls.append(args)
            if len(calls) == 1:
                raise ValueError("a transfer that fails")
            return forward(*args)  # type: ignore[arg-type]

        other.forward = failing  # type: ignore[method-assign, assignment]
        engine.step()
        assert calls
    assert not engine._scheduler.twins._owners
    outputs = engine.run_until_idle()
    engine.check()
    if how != "abort":
        assert said(outputs, "base") == alone(base, shared)
    assert engine.stats().cache.working_bytes == 0


def test_a_twin_that_is_ahead_of_its_prompt_waits_for_it(tmp_path: Path) -> None:
    base, other = twins("Bamba", tmp_path)
    engine = new_engine(base, other, projected(len(base.layers), range(len(base.layers))), max_tiles=8)
    expect(engine, base)
    shared = tokens_of(base, 1, LENGTH)
    longer = np.concatenate([shared, tokens_of(base, 2, 4 * TILE)])
    run(engine, ask("base", np.append(shared, 5).astype(np.int32), "", (LENGTH,)))
    run(engine, reads("first", np.append(shared, 6).astype(np.int32)))
    engine.cache.drop(namespace_of("", base.fingerprint))
    before = engine.stats().twin_tokens
    outputs = run(engine, ask("longer", longer, "", (len(longer) - 1,)))
    assert said(outputs, "longer") == alone(base, longer)
    assert engine.stats().twin_tokens - before == len(longer) // TILE * TILE - 3 * TILE
    prompt = np.append(longer, 9).astype(np.int32)
    outputs = run(engine, reads("other", prompt, len(longer)))
    assert found(outputs, "other").cached_tokens >= 6 * TILE
    assert said(outputs, "other") == alone(other, prompt)


@pytest.mark.parametrize("mode", list(CacheMode))
def test_nobody_waits_for_a_sender_that_leaves_nothing(mode: CacheMode, tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    num, shared = len(base.layers), tokens_of(base, 1, 6 * TILE)
    engine = new_engine(base, other, upper(num, num), max_tiles=1, order="fcfs")
    run(engine, reads("lane", shared[:10], 10))  # from now on it is asked for
    long = np.concatenate([shared, tokens_of(base, 2, 4 * TILE)])
    engine.submit(replace(ask("base", long, ""), cache_mode=mode))
    engine.step()
    engine.submit(reads("other", np.append(shared, 7).astype(np.int32), len(shared)))
    before = engine.stats().received_tokens
    outputs = engine.run_until_idle()
    engine.check()
    assert [name for name, output in outputs if isinstance(output, PromptOutput)] == ["other", "base"]
    waits = mode is CacheMode.IMPLICIT
    assert engine.stats().received_tokens - before == (6 * TILE if waits else 0)


@pytest.mark.parametrize("num_read", [2, 5])
def test_nobody_waits_for_states_that_twins_of_a_marked_prompt_do_not_keep(num_read: int, tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    num, long = len(base.layers), tokens_of(base, 1, 14 * TILE)
    engine = new_engine(base, other, projected(num, range(num)), max_tiles=1, order="fcfs")
    expect(engine, base)
    marks = tuple(Boundary(tiles * TILE, BoundaryKind.EXPLICIT) for tiles in ((2,) if num_read == 2 else (2, 12)))
    engine.submit(replace(ask("base", long, ""), prompt=Prompt(long, marks), cache_mode=CacheMode.EXPLICIT))
    engine.step()
    assert [len(twin.prefill.tokens) for twin in engine._scheduler.twins._owners[0].twins] == [marks[-1].position]
    engine.submit(reads("other", long[: num_read * TILE], TILE))
    for _ in range(2):
        engine.step()
    assert engine.stats().running == 2  # it has waited for the first mark at most
    engine.run_until_idle()
    engine.check()


def test_a_choice_that_waits_for_room_stays_in_the_lane_of_the_first_or_out_of_it(tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    num, shared = len(base.layers), tokens_of(base, 1, 4 * TILE + 9)
    engine = new_engine(base, other, upper(num, num), max_running=2)
    marked = Prompt(shared, (Boundary(TILE, BoundaryKind.EXPLICIT),))
    request = replace(reads("other", shared), prompt=marked, cache_mode=CacheMode.EXPLICIT, n=2)
    outputs = run(engine, request, ask("base", np.append(shared, 5).astype(np.int32), "", (4 * TILE,)))
    assert received(outputs, "other") is None
    expected = alone(other, shared)
    for index in range(2):
        assert [replace(o, index=0) for o in said(outputs, "other") if o.index == index] == expected


def test_a_step_is_bounded_in_time_with_what_is_made_beside_it(tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    now, took = [0.0], list[float]()
    s_per_flop = 1e-3 / base.prefill_cost.flops(0, TILE)

    class Timed(Worker):
        def run(self, work: Work, pause: Callable[[], None] = go_on) -> Hidden:
            hidden = super().run(work, pause)
            if work.chunks:
                now[0] += took[-1]
            return hidden

    config = EngineConfig(budget_bytes=BUDGET, verify=True, max_step_ms=4.0)
    engine = Engine(base, config, worker=Timed, clock=lambda: now[0], variants={"other": other})
    engine.watch = lambda step: took.append(sum(chunk.flops for chunk in step.chunks) * s_per_flop)
    engine.add_profile(profile_of(base, other, (projected(len(base.layers), range(len(base.layers))), 0.01)))
    expect(engine, base)
    written = engine.stats().twin_tokens
    took.clear()
    run(engine, ask("base", tokens_of(base, 1, 14 * TILE + 1), ""))
    assert engine.stats().twin_tokens - written == 14 * TILE
    assert 2e-3 < max(took) < 4.001e-3


def test_nobody_waits_for_a_sender_while_another_has_as_much(tmp_path: Path) -> None:
    base, other = twins("Bamba", tmp_path)
    third = loading.load(tmp_path / "other", dtype="float32", ops=base.ops)
    third.fingerprint, third.chain = "third", ()  # type: ignore[misc]
    config = EngineConfig(budget_bytes=BUDGET, verify=True, max_tiles=1, order="fcfs")
    engine = Engine(base, config, variants={"other": other, "third": third})
    for sender in (base, third):
        engine.add_profile(profile_of(sender, other, (projected(len(base.layers), range(len(base.layers))), 0.01)))
    shared = tokens_of(base, 1, 8 * TILE)
    run(engine, reads("lane", shared[:10], 10))  # from now on it is asked for
    run(engine, ask("base", np.append(shared, 5).astype(np.int32), "", (len(shared),)))
    engine.submit(ask("third", np.append(shared, 6).astype(np.int32), "third", (len(shared),)))
    engine.step()
    engine.submit(reads("other", np.append(shared, 7).astype(np.int32), len(shared)))
    engine.step()
    assert engine.stats().running == 2
    outputs = engine.run_until_idle()
    engine.check()
    prompt = found(outputs, "other")
    assert prompt.received is not None
    assert prompt.received.end == 8 * TILE


def test_the_policy_learns_of_what_is_written_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    engine = new_engine(base, other, projected(len(base.layers), range(len(base.layers))))
    expect(engine, base)
    policy, seen = engine.cache.pool.policy, list[str]()
    propose = policy.propose
    monkeypatch.setattr(policy, "propose", lambda outline: seen.append(outline.keys.namespace) or propose(outline))
    run(engine, ask("base", tokens_of(base, 1, LENGTH), ""))
    assert any(lane_in(namespace) for namespace in seen)  # else it takes a state there for worthless


def test_of_two_models_that_read_in_the_same_way_only_the_one_that_does_is_written_for(tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    (tmp_path / "third").mkdir()
    _, third = pair(CASES["Bamba"], tmp_path / "third", 0)
    third.fingerprint = "third"  # type: ignore[misc]
    transfer = projected(len(base.layers), range(len(base.layers)))
    engine = new_engine(base, other, transfer)
    engine.add_variant("third", third)
    engine.add_profile(profile_of(base, third, (transfer, 0.01)))
    run(engine, replace(ask("once", tokens_of(base, 7, 70), "third"), max_loss=0.01))  # and never again
    expect(engine, base)
    before = engine.stats().twin_tokens
    text = tokens_of(base, 1, LENGTH)
    run(engine, ask("base", np.append(text, 5).astype(np.int32), "", (LENGTH,)))
    assert engine.stats().twin_tokens - before == 3 * TILE
    run(engine, reads("other", np.append(text, 6).astype(np.int32)))
    engine.remove_variant("third")
    outputs = run(engine, reads("again", np.append(text, 7).astype(np.int32)))
    assert found(outputs, "again").cached_tokens == 3 * TILE, "what is another reader's stays"
