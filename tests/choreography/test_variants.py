"""Several models in one engine, each with stored messages, rotary frequencies and decays of its own."""

import shutil
from itertools import permutations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrid_cache.choreography.arrangement import Arrangement, Encoding, Fidelity, Part
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.request import PromptOutput, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from tests.choreography.conductor import HEADER, VOCAB, Conductor
from tests.choreography.test_stage import ATTENTION, DELTA, HYBRID, MAMBA, MESSAGES
from tests.models.checkpoints import edit_config

NAMES = ("base", "other")
ORDERS = list(permutations(range(3)))
WHOLE_ROW = SamplingParams(temperature=0, max_tokens=5, logprobs=VOCAB)


def moved(folder, into):
    """A model of the same shape, with other decays, another rotary base and other weights."""
    shutil.copytree(folder, into)
    edit_config(into, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    weights = load_file(into / "model.safetensors")
    rng = torch.Generator().manual_seed(3)
    for name, weight in weights.items():
        change = 0.3 if "A_log" in name or "dt_bias" in name else 0.05
        weights[name] = weight * (1 + change * torch.randn(weight.shape, generator=rng))
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    return into


@pytest.fixture(scope="module")
def pair(folder, tmp_path_factory):
    """Both models of a case by name, each loaded once."""
    made = {}

    def get(case):
        if case not in made:
            folders = folder(case), moved(folder(case), tmp_path_factory.mktemp("moved") / "other")
            loaded = (loading.load(path, ops=dispatch.select()) for path in folders)
            made[case] = dict(zip(NAMES, loaded, strict=True))
        return made[case]

    return get


class Players:
    """One engine for some models, whose requests name messages by the same ids."""

    def __init__(self, models, names):
        """names: of the models that it runs, its own first"""
        self.called = {name: name if number else "" for number, name in enumerate(names)}
        variants = {name: models[name] for name in names[1:]}
        self.engine = Engine(models[names[0]], EngineConfig(budget_bytes=64 << 20), variants=variants)

    def request(self, name, order, encoding, **style):
        tokens = np.concatenate([*(MESSAGES[i] for i in order), HEADER])
        parts = (*(Part(len(MESSAGES[i]), f"m{i}", encoding) for i in order), Part(len(HEADER)))
        return Request(
            name, Prompt(tokens), WHOLE_ROW, arrangement=Arrangement(parts, **style), model=self.called[name]
        )

    def play(self, order, encoding, **style):
        """One request to each model -> by name: what was done of it, and all log-probabilities of its answer."""
        for name in self.called:
            self.engine.submit(self.request(name, order, encoding, **style))
        outputs = self.engine.run_until_idle()
        self.engine.check()
        plans = {name: output.plan for name, output in outputs if isinstance(output, PromptOutput)}
        said = {name: [o for i, o in outputs if i == name and isinstance(o, TokenOutput)] for name in self.called}
        return {name: (plans[name], said[name]) for name in self.called}

    def effects(self, name, seam):
        found = [self.engine.effects(f"m{i}", seam, model=self.called[name]) for i in range(len(MESSAGES))]
        return [tensor for pairs in found if pairs is not None for pair in pairs for tensor in pair]


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1]], ids=lambda names: f"{names[0]} first")
@pytest.mark.parametrize(("encoding", "seam"), [(Encoding.ALONE, 0), (Encoding.IN_PLACE, 8)])
@pytest.mark.parametrize("case", [HYBRID, DELTA, ATTENTION, MAMBA], ids=str)
def test_what_each_stores_and_says_is_what_it_does_alone(pair, case, encoding, seam, names):
    models = pair(case)
    for fidelity in map(Fidelity, models["base"].fidelities):
        mixed, alone = Players(models, names), {name: Players(models, [name]) for name in NAMES}
        style = {"encoding": encoding, "fidelity": fidelity, "seam": seam}
        for order in ORDERS:
            together, apart = mixed.play(order, **style), {name: alone[name].play(order, **style) for name in NAMES}
            for name in NAMES:
                assert together[name] == apart[name][name]
                plan, said = together[name]
                assert plan.fidelity is fidelity
                assert len(said) == WHOLE_ROW.max_tokens
            assert together["base"][1] != together["other"][1]
        assert plan.computed < plan.num_tokens
        for name in NAMES:
            found, expected = mixed.effects(name, seam), alone[name].effects(name, seam)
            assert len(found) == len(expected)
            assert all(map(torch.equal, found, expected))


def test_what_one_has_stored_is_computed_by_another(pair):
    """Under the same ids, and in the same words."""
    models = pair(HYBRID)
    players = Players(models, NAMES)
    first = players.request("base", (0, 1, 2), Encoding.ALONE, fidelity=Fidelity.COMPOSED)
    players.engine.submit(first)
    players.engine.run_until_idle()
    stored = [
        [players.engine.is_stored(f"m{i}", model=players.called[name]) for i in range(3)] for name in players.called
    ]
    assert stored == [[True] * 3, [False] * 3]
    plans = [
        players.engine.plan(players.request(name, (2, 0, 1), Encoding.ALONE, fidelity=Fidelity.COMPOSED))
        for name in NAMES
    ]
    assert plans[0].computed == len(HEADER)
    assert plans[1].computed == plans[1].num_tokens


def test_a_model_that_goes_takes_its_messages_and_its_map_along(pair):
    models = pair(HYBRID)
    players, style = Players(models, NAMES), {"encoding": Encoding.ALONE, "fidelity": Fidelity.COMPOSED}
    before = [players.play(order, **style) for order in ORDERS[:2]]
    players.engine.remove_variant("other")
    assert [*players.engine.worker.composer.maps] == [models["base"].fingerprint]
    assert players.engine.stats().cache.messages == len(MESSAGES)
    players.engine.add_variant("other", models["other"])
    assert players.effects("other", 0) == []
    again = [players.play(order, **style) for order in ORDERS[:2]]
    assert [said["other"] for said in again] == [said["other"] for said in before]


def test_messages_of_tenants_are_told_apart_as_well(pair):
    conductor = Conductor(pair(HYBRID)["base"])
    conductor.run(MESSAGES, conductor.arrangement(MESSAGES))
    names = [part.id for part in conductor.arrangement(MESSAGES).parts[:-1]]
    assert all(conductor.engine.is_stored(name) for name in names)
    assert not any(conductor.engine.is_stored(name, namespace="another") for name in names)
