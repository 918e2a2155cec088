"""What layers tell of themselves is enough to move what they keep, for every architecture."""

from dataclasses import replace

import pytest
import torch

from hybrid_cache.choreography.arrangement import Encoding, Fidelity, Positions
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.models.blocks.stack import HybridStack
from hybrid_cache.spec import AttentionSpec
from tests.choreography.conductor import Conductor, exact_logits, message
from tests.models.checkpoints import CASES, FIRST_CASES, ONE_OF_A_KIND

LENGTHS = (37, 21, 70, 40)
MESSAGES = [message(length, seed) for seed, length in enumerate(LENGTHS)]
USUAL = dispatch.select().name
OTHERS = [name for name in dispatch.exact_backends() if name != USUAL]
ONE_LAYER = [case for case in CASES if "of one layer" in case.name]


def fidelity_of(model):
    return Fidelity.RELOCATED if "relocated" in model.fidelities else Fidelity.COMPOSED


@pytest.fixture
def model(case, folder, ops):
    return loading.load(folder(case), ops=ops)


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_messages_put_back_where_they_were_encoded_give_what_encoding_gave(model):
    """Effects are taken apart and put together again at every depth: nothing is approximate but float32."""
    if not model.fidelities:
        pytest.skip("the model has layers that cannot be put together")
    conductor = Conductor(model)
    arrangement = conductor.arrangement(MESSAGES, Encoding.IN_PLACE, fidelity_of(model))
    expected = exact_logits(model, MESSAGES)
    first, told, _ = conductor.run(MESSAGES, arrangement)
    assert told.cached_tokens == 0
    again, told, _ = conductor.run(MESSAGES, arrangement)
    assert told.cached_tokens == sum(LENGTHS)
    torch.testing.assert_close(first, expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(again, expected, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("order", [(2, 0, 3, 1), (1, 0), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("case", ONE_LAYER, ids=str)
def test_one_layer_composes_messages_in_any_order(model, order):
    """Layer inputs of one layer are embeddings, which no context changes; the seam computes convolutions again."""
    conductor = Conductor(model)
    chosen = [MESSAGES[i] for i in order]
    arrangement = conductor.arrangement(chosen, Encoding.ALONE, fidelity_of(model), seam=16)
    found, told, _ = conductor.run(chosen, arrangement)
    assert told.cached_tokens == sum(len(m) - 16 for m in chosen[1:])  # the first is computed in its place
    torch.testing.assert_close(found, exact_logits(model, chosen), atol=2e-5, rtol=2e-5)


def single_layers(model):
    """The model with one of its layers alone, for each kind that it has."""
    layers, spec, seen = model._stack.layers, model.cache_spec, set()
    if len(layers) != len(spec.layers):
        return
    for layer, kept in zip(layers, spec.layers, strict=True):
        kind = type(kept), type(getattr(layer, "mixer", layer))
        if kind not in seen:
            seen.add(kind)
            model._stack = HybridStack([layer])
            model.cache_spec = replace(spec, layers=(kept,))
            model.fidelities = ("relocated", "composed") if isinstance(kept, AttentionSpec) else ("composed",)
            yield kind


@pytest.mark.parametrize("ops", [USUAL, *(pytest.param(ops, marks=pytest.mark.slow) for ops in OTHERS)], indirect=True)
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in ONE_OF_A_KIND else pytest.mark.slow) for c in FIRST_CASES], ids=str
)
def test_every_kind_of_layer_composes_messages_in_any_order(model):
    """As above, with each kind of layer taken out of its model."""
    for kind in single_layers(model):
        for order in ((2, 0, 3, 1), (3, 1)):
            chosen = [MESSAGES[i] for i in order]
            conductor = Conductor(model)
            arrangement = conductor.arrangement(chosen, Encoding.ALONE, fidelity_of(model), seam=16)
            found, told, _ = conductor.run(chosen, arrangement)
            assert told.cached_tokens == sum(len(m) - 16 for m in chosen[1:])  # the first is computed in its place
            expected = exact_logits(model, chosen)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5, msg=f"{kind}")


@pytest.mark.parametrize("case", [c for c in ONE_LAYER if "llama" in c.name or "qwen" in c.name], ids=str)
def test_keys_turn_to_wherever_a_message_stands(model):
    """Siblings at one place: the answer is the same in any order, and not that of consecutive messages."""
    conductor = Conductor(model)
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        chosen = [MESSAGES[i] for i in order]
        arrangement = conductor.arrangement(chosen, fidelity=Fidelity.RELOCATED, positions=Positions.LEFTMOST)
        found.append(conductor.run(chosen, arrangement)[0])
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=2e-5)
    assert not torch.allclose(found[0], exact_logits(model, MESSAGES[:3]), atol=1e-3)
