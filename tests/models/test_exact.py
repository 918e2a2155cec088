"""A token's bits do not depend on where its prompt was cut, nor on what else is in the batch."""

import pytest
import torch

from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors
from hybrid_cache.models import loading
from tests.models.driver import Chunk, Driver

LENGTH = 3 * TILE + 21
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def model(case, folders, ops, dtype):
    return loading.load(folders(case, DTYPES[dtype]), ops=ops)


def tokens(length, seed=0):
    return torch.randint(199, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def contents(driver, sequence):
    """Everything the cache holds of a sequence, unused rows of its last page left out."""
    for entry in driver.cache:
        if isinstance(entry, KVTensors):
            yield from (pool[sequence.pages].flatten(0, 1)[: sequence.done] for pool in (entry.k, entry.v))
        else:
            yield from (entry.conv[sequence.slot], entry.state[sequence.slot])


def decoded(driver, sequence, extra):
    """Hidden rows of some given tokens, one step each."""
    rows = []
    for token in extra:
        sequence.tokens.append(token)
        rows += driver.step([], [sequence])
    return torch.cat(rows)


def assert_same(driver, one, other):
    for ours, theirs in zip(contents(driver, one), contents(driver, other), strict=True):
        assert not ours.isnan().any()
        assert torch.equal(ours, theirs)


def test_resuming_from_any_captured_tile_is_the_same_as_one_pass(model):
    driver = Driver(model)
    prompt = tokens(LENGTH)
    whole = driver.sequence(prompt)
    captures = {tile: driver.slot() for tile in (1, 2, 3)}
    rows = driver.step([Chunk(whole, LENGTH, captures)])[0]
    resumed = [driver.resume(whole, tile * TILE, slot, prompt) for tile, slot in captures.items()]
    for sequence in resumed:
        start = sequence.done
        tail = driver.step([Chunk(sequence, LENGTH - start)])[0]
        assert torch.equal(tail, rows[start:])
        assert_same(driver, whole, sequence)
    expected = decoded(driver, whole, [3, 1, 4])
    for sequence in resumed:
        assert torch.equal(decoded(driver, sequence, [3, 1, 4]), expected)
        assert_same(driver, whole, sequence)


def test_a_prompt_computed_tile_by_tile_is_the_same_as_one_pass(model):
    driver = Driver(model)
    whole, rows = driver.prefill(tokens(LENGTH))
    cut = driver.sequence(tokens(LENGTH))
    parts = [driver.step([Chunk(cut, n)])[0] for n in (TILE, TILE, TILE, LENGTH - 3 * TILE)]
    assert torch.equal(torch.cat(parts), rows)
    assert_same(driver, whole, cut)


def test_a_prompt_with_cuts_is_the_same_as_its_parts(model):
    if not model.packs:
        pytest.skip("takes no cuts")
    driver = Driver(model)
    cut, parts = driver.sequence(tokens(LENGTH)), driver.sequence(tokens(LENGTH))
    captured = driver.slot()
    rows = driver.step([Chunk(cut, LENGTH, {2: captured}, cuts=(37, 140))])[0]
    expected = [driver.step([Chunk(parts, n)])[0] for n in (37, TILE, 39, LENGTH - 140)]
    assert torch.equal(rows, torch.cat(expected))
    assert_same(driver, cut, parts)
    assert torch.equal(decoded(driver, cut, [3, 1]), decoded(driver, parts, [3, 1]))
    resumed = driver.resume(cut, 37 + TILE, captured, tokens(LENGTH))
    assert torch.equal(driver.step([Chunk(resumed, 39)])[0], expected[2])


def test_which_rows_are_wanted_does_not_change_bits(model):
    driver = Driver(model)
    whole, rows = driver.prefill(tokens(100))
    for wanted in (0, 1, 5):
        sequence = driver.sequence(tokens(100))
        assert torch.equal(driver.step([Chunk(sequence, 100, outputs=wanted)])[0], rows[100 - wanted :])
        assert_same(driver, whole, sequence)


def test_neighbours_in_the_batch_do_not_change_bits(model):
    driver = Driver(model)
    alone, prefill_alone = driver.prefill(tokens(100))
    decode_alone = decoded(driver, alone, [9, 8, 7])

    shared = driver.sequence(tokens(100))
    others = [driver.prefill(tokens(n, seed=n))[0] for n in (5, 70, 64)]
    first, last = (driver.sequence(tokens(n, seed=n)) for n in (33, 129))
    for other in others:
        other.tokens.append(11)
    prefill_shared = driver.step([Chunk(first, 33), Chunk(shared, 100), Chunk(last, 128)], others)[1]
    assert torch.equal(prefill_shared, prefill_alone)
    for i, token in enumerate([9, 8, 7]):
        for sequence in (shared, *others):
            sequence.tokens.append(token)
        chunks = [Chunk(last, 1)] if i == 0 else []
        rows = driver.step(chunks, [others[0], others[1], shared, others[2]])
        assert torch.equal(rows[len(chunks) + 2], decode_alone[i : i + 1])
    assert_same(driver, alone, shared)


def test_logits_of_a_row_do_not_depend_on_the_other_rows(model):
    driver = Driver(model)
    _, hidden = driver.prefill(tokens(70))
    together = driver.logits(hidden)
    for rows in (1, 2, 3, 5, 33):
        assert torch.equal(driver.logits(hidden[:rows]), together[:rows])
