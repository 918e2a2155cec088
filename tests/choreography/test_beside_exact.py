"""What is approximate never touches what exact requests read: pages of the tree, states, ends of prompts."""

import random
from itertools import product

import numpy as np
import pytest
import torch

from hybrid_cache.choreography.arrangement import SEAMS, Composition, Encoding, Fidelity, Order, Positions
from hybrid_cache.choreography.compiler import key_of
from hybrid_cache.errors import OwnershipError
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from tests.choreography.conductor import Conductor, message
from tests.models.checkpoints import CASES

BAMBA = next(case for case in CASES if case.name.startswith("bamba"))
JAMBA = next(case for case in CASES if case.name.startswith("jamba") and "experts" in case.name)
DELTA = next(case for case in CASES if case.name.startswith("qwen3 next") or "qwen3-next" in case.name)
LLAMA = next(case for case in CASES if case.name == "llama of one layer")

A, B, C, D = (message(length, seed) for seed, length in enumerate((130, 200, 90, 70)))


@pytest.fixture
def bamba(folder):
    return loading.load(folder(BAMBA), ops=dispatch.select())


def pages_of(conductor):
    """Copies of all pages and states of the tree."""
    found = {}
    for node in conductor.engine.cache.tree.nodes():
        for layer in conductor.engine.worker.memory.tensors:
            rows = getattr(layer, "k", None)
            if rows is not None and node.parent is not None:
                found[node, "k"] = rows[node.page].clone()
                found[node, "v"] = layer.v[node.page].clone()
    return found


def test_a_composed_prompt_owns_all_pages_beyond_its_state(bamba):
    """The tree has pages of [A, B, ...], but no state between A and the end: [A, B] composed goes on from zero."""
    conductor = Conductor(bamba)
    longer = np.concatenate([B, C])
    expected = conductor.run([A, longer])[0]
    conductor.run([D, B], conductor.arrangement([D, B]))
    before = pages_of(conductor)
    told = conductor.run([A, B], conductor.arrangement([A, B]))[1]
    assert told.plan.fidelity is Fidelity.COMPOSED
    assert told.cached_tokens > 0
    after = pages_of(conductor)
    assert before
    assert all(torch.equal(after[key], rows) for key, rows in before.items())
    assert torch.equal(conductor.run([A, longer])[0], expected)


def test_a_lease_that_does_not_publish_shares_no_page_beyond_its_state(bamba):
    conductor = Conductor(bamba)
    cache, tokens = conductor.engine.cache, np.concatenate([A, B[:100], C])
    conductor.run([A, B, C])
    match = cache.match(conductor.namespace, tokens)
    assert match.shared > match.length
    private = cache.acquire(match, tokens, publish=False)
    assert private.shared == private.length
    assert not {n.page for n in match.path[private.length // 64 :]} & set(private.pages)
    shared = cache.acquire(match, tokens)
    assert shared.shared == match.shared
    for lease in (private, shared):
        cache.release(lease)
    cache.check()


def test_a_write_to_a_page_of_the_tree_is_an_error(bamba):
    conductor = Conductor(bamba)
    cache, tokens = conductor.engine.cache, np.concatenate([A, B[:100], C])
    conductor.run([A, B, C])
    lease = cache.acquire(cache.match(conductor.namespace, tokens), tokens)
    assert lease.shared > lease.length
    assert (lease.rows_to_fill(lease.shared - 5, lease.shared + 5)[:5] == -1).all()
    assert (lease.rows_to_fill(lease.shared - 5, lease.shared + 5)[5:] >= 0).all()
    for write in (lambda: lease.own_rows(lease.shared - 1, lease.shared + 1), lambda: lease.own_row(lease.shared - 1)):
        with pytest.raises(OwnershipError, match=f"the tree owns those below {lease.shared}"):
            write()
    lease.publish = False
    with pytest.raises(OwnershipError):
        lease.rows_to_fill(lease.shared - 1, lease.shared + 1)
    node = next(n for n in cache.tree.nodes() if n.checkpoint)
    with pytest.raises(OwnershipError, match="after it was published"):
        cache.messages.copy_slot(lease.slot, node.checkpoint.slot)
    cache.release(lease)
    with pytest.raises(OwnershipError, match="given back"):
        lease.rows(0, 1)


def test_a_step_that_would_write_to_a_state_of_the_tree_is_an_error(bamba):
    conductor = Conductor(bamba)
    conductor.run([A, B, C])
    node = next(n for n in conductor.engine.cache.tree.nodes() if n.checkpoint)
    conductor.engine.submit(conductor.request([A], max_tokens=5))
    conductor.engine.step()
    [running] = conductor.engine._scheduler.sequences()
    running.prefill.lease.slot = node.checkpoint.slot
    with pytest.raises(OwnershipError, match="after it was published"):
        conductor.engine.step()


def test_a_stored_message_is_not_written_to(bamba):
    conductor = Conductor(bamba)
    arrangement = conductor.arrangement([A, B])
    conductor.run([A, B], arrangement)
    cache = conductor.engine.cache
    stored = cache.messages.get(key_of(conductor.namespace, arrangement.parts[1].id, 0))
    with pytest.raises(OwnershipError):
        stored.own_rows()
    with pytest.raises(OwnershipError):
        cache.messages.copy_slot(stored.slot, stored.slot)


def random_style(rng, model):
    compositions = list(Composition) if model.commutes else [Composition.ORDERED]
    return {
        "encoding": rng.choice(list(Encoding)),
        "fidelity": rng.choice([*Fidelity, Fidelity.COMPOSED]),
        "seam": rng.choice((0, 0, *SEAMS)),
        "positions": rng.choice(list(Positions)),
        "composition": rng.choice(compositions),
        "order": rng.choice(list(Order)),
    }


def break_off(conductor, messages, arrangement, num_steps):
    request = conductor.request(messages, arrangement, 3)
    conductor.engine.submit(request)
    for _ in range(num_steps):
        conductor.engine.step()
    conductor.engine.abort(request.id)
    conductor.engine.run_until_idle()


@pytest.mark.parametrize(
    ("sequences", "case"),
    [
        pytest.param(room, case, marks=[] if room == 2 or (room, case) == (200, BAMBA) else pytest.mark.slow)
        for room, case in product([2, 8, 200], [BAMBA, JAMBA, DELTA, LLAMA])
    ],
    ids=str,
)
def test_styles_side_by_side_leave_exact_answers_as_they_are(folder, case, sequences):
    """Random prompts of the same messages, which share pages beyond states; some broken off, some with little room."""
    model, rng = loading.load(folder(case), ops=dispatch.select()), random.Random(f"{case.name} {sequences}")
    room = sequences * (16 * model.cache_spec.page_bytes + 2 * model.cache_spec.slot_bytes + 4096)
    plain, cached = Conductor(model, prefix_cache=False), Conductor(model, room, max_tiles=3)
    texts = [message(length, 50 + seed) for seed, length in enumerate((128, 200, 70, 300, 40, 64, 65, 90))]
    texts += [np.concatenate([texts[i], texts[j]]) for i, j in ((0, 1), (1, 4), (3, 2))]  # `B` and `B and more`
    by_id = {cached.part(tokens, Encoding.ALONE).id: tokens for tokens in texts}
    orders = [rng.sample(range(len(texts)), rng.randint(1, 3)) for _ in range(6)]
    compared, kinds = 0, set()
    for _ in range(60):
        messages = [texts[i] for i in rng.choice(orders)]
        arranged = rng.random() < 0.5
        arrangement = cached.arrangement(messages, **random_style(rng, model)) if arranged else None
        if rng.random() < 0.2:
            break_off(cached, messages, arrangement, rng.randint(1, 4))
            continue
        found, told, answer = cached.run(messages, arrangement, max_tokens := rng.choice((1, 3)))
        kinds.add(told.plan.fidelity if told.plan else "plain")
        if told.plan is None or told.plan.fidelity is Fidelity.EXACT:
            order = [by_id[item.id] for item in told.plan.items if item.id] if told.plan else messages
            expected = plain.run(order, None, max_tokens)
            assert torch.equal(found, expected[0])
            assert answer == expected[2]
            compared += 1
    assert compared >= 10
    assert kinds == {"plain", *Fidelity} - (
        {Fidelity.RELOCATED} if Fidelity.RELOCATED not in model.fidelities else set()
    )
