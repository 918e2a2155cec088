"""Entries that one model makes from another's where a profile allows it: in lanes of their own, and labelled."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.namespaces import lane_in
from hybrid_cache.profile import Plan, Profile, frontier, load_profile
from hybrid_cache.request import PromptOutput, Received
from hybrid_cache.transfer import Transfer, Way, projected, transfer_of, upper
from tests.engine.test_bands import BUDGET, CASES, alone, ask, pair, run, said, tokens_of

FAMILIES = ("Bamba", "Jamba", "Mamba2", "Llama", "Qwen3_5", "Zamba2", "NemotronH", "FalconH1")


def profile_of(sender: HybridModel, receiver: HybridModel, *plans: tuple[Transfer, float]) -> Profile:
    made = tuple(Plan(transfer, loss, 1.0, 0.5, 0) for transfer, loss in plans)
    return Profile(sender.fingerprint, receiver.fingerprint, len(receiver.layers), "by hand", made)


def received(outputs: Outputs, name: str) -> Received | None:
    (output,) = [o for request_id, o in outputs if request_id == name and isinstance(o, PromptOutput)]
    return output.received


def twins(family: str, folder: Path) -> tuple[HybridModel, HybridModel]:
    """Two models with the same layers, of which nobody knows that: what one makes from the other's is its own."""
    base, other = pair(CASES[family], folder, 100)
    other.fingerprint, other.chain = "twin", ()  # type: ignore[misc]
    return base, other


def every_transfer(num_layers: int, seed: int) -> list[Transfer]:
    choose = random.Random(seed)
    mixed = [Transfer(tuple(choose.choices(list(Way), k=num_layers))) for _ in range(4)]
    return [upper(num_layers, num_layers), projected(num_layers, range(num_layers)), upper(num_layers, 0), *mixed]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_way_to_make_an_entry_is_exact_between_equal_models(family: str, tmp_path: Path) -> None:
    base, other = twins(family, tmp_path)
    shared = tokens_of(base, 1, 3 * TILE + 9)
    prompt = np.concatenate([shared, tokens_of(base, 2, 80)])
    expected = alone(other, prompt)
    for transfer in every_transfer(len(base.layers), 3):
        engine = Engine(base, EngineConfig(budget_bytes=BUDGET, verify=True), variants={"other": other})
        engine.add_profile(profile_of(base, other, (transfer, 0.01)))
        run(engine, replace(ask("first", shared[:10], "other"), max_loss=1.0))  # such entries are asked for
        run(engine, ask("base", np.append(shared, 5).astype(np.int32), "", (len(shared),)))
        outputs = run(engine, replace(ask("other", prompt, "other", (len(shared),)), max_loss=0.01))
        assert said(outputs, "other") == expected, str(transfer)
        if transfer.ways.count(Way.RECOMPUTE) < len(transfer.ways):
            done = str(transfer.for_layers(other.layers))
            assert received(outputs, "other") == Received("", 0, 3 * TILE, done, 0.01)
        again = replace(ask("again", prompt, "other"), max_loss=0.01)
        assert said(run(engine, again), "again") == expected


def test_what_is_not_exact_stays_in_its_lane(tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    num = len(base.layers)
    engine = Engine(base, EngineConfig(budget_bytes=BUDGET, verify=True), variants={"other": other})
    engine.add_profile(profile_of(base, other, (upper(num, num), 0.5), (projected(num, range(num)), 0.02)))
    engine.add_profile(profile_of(other, base, (projected(num, range(num)), 0.02)))
    run(engine, replace(ask("zeroth", tokens_of(base, 9, 10), ""), max_loss=0.1))  # now `other` is a sender, too
    shared = tokens_of(base, 1, 4 * TILE)
    prompt = np.concatenate([shared, tokens_of(base, 2, 100)])
    run(engine, replace(ask("first", shared[:10], "other"), max_loss=0.1))
    run(engine, ask("base", np.append(shared, 5).astype(np.int32), "", (len(shared),)))
    loose = run(engine, replace(ask("loose", prompt, "other"), max_loss=0.1))
    looser = run(engine, replace(ask("looser", prompt, "other"), max_loss=0.6))
    for outputs, name, loss in ((loose, "loose", 0.02), (looser, "looser", 0.5)):
        found = received(outputs, name)
        assert found is not None
        assert (found.start, found.end, found.loss) == (0, 4 * TILE, loss)
        assert [o.logprob for o in said(outputs, name)] != [o.logprob for o in alone(other, prompt)]
    assert not any(lane_in(run.namespace) for run in engine.cache.inputs.runs)
    for name, model, max_loss in (("exact", "other", None), ("tight", "other", 0.001), ("own", "", 1.0)):
        outputs = run(engine, replace(ask(name, prompt, model), max_loss=max_loss))
        assert said(outputs, name) == alone(other if model else base, prompt)
        assert received(outputs, name) is None


def test_a_profile_of_other_weights_is_refused_and_one_waits_for_its_models(tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 0)
    num = len(base.layers)
    engine = Engine(base, EngineConfig(budget_bytes=BUDGET, verify=True), variants={"other": other})
    profile = profile_of(base, other, (upper(num, num), 0.5))
    with pytest.raises(ConfigError, match="a profile of other weights: elsewhere"):
        engine.add_profile(replace(profile, sender="elsewhere"))
    engine.add_profile(profile)
    shared = tokens_of(base, 1, 4 * TILE)
    more = np.append(shared, 7).astype(np.int32)
    run(engine, ask("base", np.append(shared, 5).astype(np.int32), ""))
    assert received(run(engine, replace(ask("one", more, "other"), max_loss=1.0)), "one") is not None
    engine.remove_variant("other")
    engine.check()
    assert not [root for root in engine.cache.tree.roots if "~" in root]
    engine.add_variant("other", other)
    assert received(run(engine, replace(ask("two", more, "other"), max_loss=1.0)), "two") is not None


def test_a_sender_is_called_by_a_name_that_it_still_has(tmp_path: Path) -> None:
    base, other = twins("Bamba", tmp_path)
    variants = {"one": other, "two": other}
    engine = Engine(base, EngineConfig(budget_bytes=BUDGET), variants=variants)
    engine.add_profile(profile_of(other, base, (upper(len(base.layers), len(base.layers)), 0.01)))
    engine.remove_variant("one")
    prompt = tokens_of(base, 1, 3 * TILE)
    run(engine, ask("other", prompt, "two"))
    made = received(run(engine, replace(ask("base", np.append(prompt, 7).astype(np.int32), ""), max_loss=1.0)), "base")
    assert made is not None
    assert made.sender == "two"


def test_profiles_are_written_and_read(tmp_path: Path) -> None:
    plans = [Plan(upper(6, n), loss, 0.9, n / 6, n) for n, loss in ((0, 0.0), (2, 0.2), (3, 0.3), (5, 0.1))]
    profile = Profile("a", "b", 6, "somewhere", frontier(plans))
    assert [plan.loss for plan in profile.plans] == [0.0]
    profile = replace(profile, plans=tuple(plans))
    profile.save(tmp_path / "profile.json")
    assert load_profile(tmp_path / "profile.json") == profile
    huge = json.dumps({**json.loads((tmp_path / "profile.json").read_text()), "num_layers": math.inf})
    alike = (tmp_path / "profile.json").read_text().replace('"receiver": "b"', '"receiver": "a"')
    for text in ("{}", "[]", "{", '{"format": 2}', "[" * 100_000, huge, alike):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match="profile"):
            load_profile(tmp_path / "bad.json")
    for transfer in every_transfer(6, 1):
        assert transfer_of(str(transfer), 6) == transfer
    for text in ("take 0-4", "take 1-6", "take 0-6", "steal 0-5", "take 0-2, take 2-5", "take 0-99999999999", ""):
        with pytest.raises(ValueError, match=r".+"):
            transfer_of(text, 6)
