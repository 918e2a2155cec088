"""Layers that two models have in common are computed once: the other model goes on from what the first of them kept."""

import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from hybrid_cache.cache.inventory import Inventory
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.engine import Engine
from hybrid_cache.engine.outcomes import Outputs
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.models import loading
from hybrid_cache.request import Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Boundary, Prompt, TokenArray
from hybrid_cache.transfer import equal_layers
from tests.models import checkpoints
from tests.models.case import Case

CASES = {case.family: case for case in reversed(checkpoints.FIRST_CASES)}
SOME = ("Bamba", "Jamba", "Mamba2", "Llama", "Qwen3_5", "Zamba2", "NemotronH", "FalconH1", "GraniteMoeHybrid")
BUDGET = 64 << 20


def differs_above(folder: Path, other: Path, first: int) -> Path:
    """A copy of a checkpoint whose weights in layers from `first` on are others."""
    other.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= first and tensor.dim() == 2 and "A_log" not in name:
            tensors[name] = tensor.roll(1, 0).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    return other


def pair(case: Case, folder: Path, first: int, dtype: str = "float32") -> tuple[HybridModel, HybridModel]:
    base = checkpoints.save(checkpoints.reference(case), folder / "base")
    other = differs_above(base, folder / "other", first)
    ops = dispatch.select("auto")
    one, two = (loading.load(path, dtype=dtype, ops=ops) for path in (base, other))
    return one, two


def ask(name: str, tokens: TokenArray, model: str, boundaries: tuple[int, ...] = ()) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=5)
    return Request(name, Prompt(tokens, tuple(map(Boundary, boundaries))), sampling, model=model)


def said(outputs: Outputs, name: str) -> list[TokenOutput]:
    return [o for request_id, o in outputs if request_id == name and isinstance(o, TokenOutput)]


def run(engine: Engine, *requests: Request) -> Outputs:
    for request in requests:
        engine.submit(request)
    outputs = engine.run_until_idle()
    engine.check()
    return outputs


def alone(model: HybridModel, tokens: TokenArray) -> list[TokenOutput]:
    engine = Engine(model, EngineConfig(budget_bytes=BUDGET, prefix_cache=False))
    return said(run(engine, ask("a", tokens, "")), "a")


def tokens_of(model: HybridModel, seed: int, length: int) -> TokenArray:
    return np.random.default_rng(seed).integers(3, model.vocab_size, length).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", SOME)
def test_a_variant_goes_on_from_the_layers_that_it_shares(family: str, dtype: str, tmp_path: Path) -> None:
    base, other = pair(CASES[family], tmp_path, 1, dtype)
    common = equal_layers(base.chain, other.chain)
    if not common:
        pytest.skip("what several layers share lies below all of them")
    engine = Engine(base, EngineConfig(budget_bytes=BUDGET, verify=True), variants={"other": other})
    shared = tokens_of(base, 1, 3 * TILE + 17)
    run(engine, ask("base", np.append(shared, 5).astype(np.int32), "", (len(shared),)))
    prompt = np.concatenate([shared, tokens_of(base, 2, 70)])
    before = engine.stats()
    outputs = run(engine, ask("other", prompt, "other", (len(shared),)))
    assert said(outputs, "other") == alone(other, prompt)
    assert engine.stats().flops_computed - before.flops_computed < base.prefill_cost.flops(0, len(prompt))
    assert engine.stats().received_tokens - before.received_tokens == 3 * TILE
    again = np.concatenate([prompt, tokens_of(base, 3, 40)])
    assert said(run(engine, ask("again", again, "other")), "again") == alone(other, again)
    assert said(run(engine, ask("back", again, "")), "back") == alone(base, again)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", ["Bamba", "Jamba", "Mamba2"])
def test_conversations_that_go_from_model_to_model_have_the_bits_of_each(
    family: str, seed: int, tmp_path: Path
) -> None:
    choose = random.Random(seed)
    base, other = pair(CASES[family], tmp_path, choose.choice([1, 2]))
    models = {"": base, "other": other}
    room = choose.choice(
        [BUDGET, 40 * 64 * max(base.cache_spec.kv_bytes_per_token, 1) + 6 * base.cache_spec.slot_bytes]
    )
    config = EngineConfig(budget_bytes=room, verify=True, max_tiles=choose.choice([1, 2, 8]))
    engine = Engine(base, config, variants={"other": other})
    talks = [tokens_of(base, choose.randrange(100), choose.randrange(1, 300)) for _ in range(3)]
    for number in range(14):
        asked = {}
        for each in range(choose.choice([1, 1, 2])):
            index, name = choose.randrange(3), choose.choice(["", "other"])
            more = tokens_of(base, choose.randrange(100), choose.randrange(1, 130))
            talk = talks[index][: choose.choice([len(talks[index]), choose.randrange(1, len(talks[index]) + 1)])]
            talks[index] = np.concatenate([talk, more])[:900]
            asked[f"{number}-{each}"] = ask(f"{number}-{each}", talks[index], name, (len(talk),))
        outputs = run(engine, *asked.values())
        for name, request in asked.items():
            assert said(outputs, name) == alone(models[request.model], request.prompt.tokens), (number, name)


def test_nothing_is_received_across_salts(tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 1)
    engine = Engine(base, EngineConfig(budget_bytes=BUDGET, verify=True), variants={"other": other})
    shared = tokens_of(base, 1, 3 * TILE + 17)
    run(engine, replace(ask("base", np.append(shared, 5).astype(np.int32), "", (len(shared),)), namespace="one"))
    for salt, tokens in (("two", 0), ("", 0), ("one", 3 * TILE)):
        before = engine.stats().received_tokens
        outputs = run(engine, replace(ask(salt or "none", shared, "other"), namespace=salt))
        assert engine.stats().received_tokens - before == tokens
        assert said(outputs, salt or "none") == alone(other, shared)


def test_states_inside_a_band_are_not_kept_with_what_was_taken_at_its_end(tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 1)
    engine = Engine(base, EngineConfig(budget_bytes=BUDGET, verify=True), variants={"other": other})
    shared = tokens_of(base, 1, 4 * TILE + 17)
    run(engine, ask("base", np.append(shared, 5).astype(np.int32), "", (len(shared),)))
    places = (TILE, 2 * TILE, len(shared))
    assert said(run(engine, ask("all", shared, "other", places)), "all") == alone(other, shared)
    for number, length in enumerate((TILE + 9, 2 * TILE + 9, 3 * TILE + 9)):
        prompt = np.concatenate([shared[:length], tokens_of(base, 7 + number, 20)])
        assert said(run(engine, ask(f"{number}", prompt, "other")), f"{number}") == alone(other, prompt)


def test_what_is_dropped_takes_what_its_layers_were_given_with_it(tmp_path: Path) -> None:
    base, other = pair(CASES["Bamba"], tmp_path, 1)
    engine = Engine(base, EngineConfig(budget_bytes=BUDGET, verify=True), variants={"other": other})
    run(engine, ask("base", tokens_of(base, 1, 4 * TILE + 17), ""))
    assert engine.stats().cache.input_bytes > 0
    inventory = Inventory(engine.cache, lambda namespace: True)
    (conversation,) = inventory.conversations()
    inventory.drop(conversation.end.name.hex())
    engine.check()
    assert engine.stats().cache.input_bytes == 0
