"""Rows of a model and of adapters beside it go through it in one pass, with the bits that each model has by itself."""

import weakref
from dataclasses import replace

import pytest
import torch

from hybrid_cache.config import EngineConfig
from hybrid_cache.device.adapted import AdaptedModel, adapters_of
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors, RowAdapters
from hybrid_cache.models import loading
from hybrid_cache.models.adapters import Adapter, LoraConfig
from hybrid_cache.request import Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from tests.models import checkpoints
from tests.models.driver import Chunk, Driver

FIRST = {case.family: case for case in checkpoints.FIRST_CASES}
FAMILIES = ("GraniteMoeHybrid", "Bamba", "Jamba", "FalconH1", "Qwen3Next", "Zamba2", "Mamba", "RecurrentGemma")
RANKS = (3, 8, 1, 16, 17, 5)
HEAD = "lm_head.weight"
OPS = dispatch.select("torch")


def adapter(shapes, rank, seed, size=0.3):
    """Random factors for matrices [out, in] by name; every third seed leaves every other matrix out."""
    rng = torch.Generator().manual_seed(seed)
    names = [name for i, name in enumerate(sorted(shapes)) if seed % 3 or i % 2]
    factors = {
        name: (
            torch.randn(rank, shapes[name][1], generator=rng) * shapes[name][1] ** -0.5,
            torch.randn(shapes[name][0], rank, generator=rng) * size * rank**-0.5,
        )
        for name in names
    }
    return Adapter(f"adapter-{seed}", LoraConfig(rank, 2.0 * rank, ()), factors, {})


def adapted(trunk, number):
    return loading.beside(trunk, adapter(trunk.bank.shapes, RANKS[number], number))


class MixedDriver(Driver):
    """Each sequence is one model's, of those that have one trunk."""

    def __init__(self, trunk, **sizes):
        super().__init__(trunk, **sizes)
        self.models = {}  # by the slot of a sequence
        self.pause = None

    def of(self, model, tokens):
        sequence = self.sequence(tokens)
        self.models[sequence.slot] = model
        return sequence

    def _batch(self, chunks, decodes):
        batch, spans = super()._batch(chunks, decodes)
        index = torch.full((batch.layout.num_rows,), -1)
        sequences = [*(c.sequence for c in chunks), *decodes]
        rows = adapters_of([self.models[s.slot] for s in sequences])
        firsts = [
            *batch.layout.chunk_row.tolist(),
            *range(batch.layout.decode_row, batch.layout.decode_row + len(decodes)),
        ]
        sizes = [*(c.num_tokens for c in chunks), *[1] * len(decodes)]
        if rows is not None:
            for first, size, number in zip(firsts, sizes, rows.index.tolist(), strict=True):
                index[first : first + size] = number
            batch = replace(batch, adapters=RowAdapters(index, rows.factors))
        return (replace(batch, pause=self.pause) if self.pause else batch), spans


def tokens_of(seed, length):
    return torch.randint(3, 190, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def kept(driver, sequence):
    """Bits of all that a sequence has in pages and states."""
    found = []
    for entry in driver.cache:
        if isinstance(entry, KVTensors):
            rows = [(sequence.pages[i // TILE], i % TILE) for i in range(sequence.done)]
            pages, places = (torch.tensor(column) for column in zip(*rows, strict=True))
            found += [entry.k[pages, places], entry.v[pages, places]]
        else:
            found += [entry.conv[sequence.slot], entry.state[sequence.slot]]
    return found


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def alone(model, tokens, length, outputs):
    """-> hidden rows of a sequence by itself, in chunks and then token by token, and what it leaves."""
    driver = Driver(model)
    sequence = driver.sequence(tokens)
    rows = driver.step([Chunk(sequence, TILE, outputs=outputs)])
    rows += driver.step([Chunk(sequence, length - TILE, outputs=outputs)])
    rows += [driver.step([], [sequence])[0] for _ in range(len(tokens) - length)]
    return rows, kept(driver, sequence)


LENGTHS = (TILE + 5, 2 * TILE + 1, TILE + 40, TILE + 9, 2 * TILE, TILE + 1, TILE + 17)
EXTRA = 3  # tokens that are decoded


def together(trunk, models, outputs, pause=None):
    """-> the same of sequences of all models. Some start while others decode already."""
    driver = MixedDriver(trunk, num_slots=2 * len(models) + 8)
    driver.pause = pause
    sequences = [driver.of(model, tokens_of(i, LENGTHS[i] + EXTRA)) for i, model in enumerate(models)]
    early, late = sequences[::2], sequences[1::2]
    rows = {id(s): [] for s in sequences}

    def step(chunks, decodes):
        found = driver.step([Chunk(s, n, outputs=outputs) for s, n in chunks], decodes)
        for sequence, hidden in zip([*(s for s, _ in chunks), *decodes], found, strict=True):
            rows[id(sequence)].append(hidden)

    lengths = {id(s): LENGTHS[i] for i, s in enumerate(sequences)}
    step([(s, TILE) for s in early], [])
    step([(s, lengths[id(s)] - TILE) for s in early], [])
    step([(s, TILE) for s in late], early)
    step([(s, lengths[id(s)] - TILE) for s in late], early[:1])
    for turn in range(EXTRA):
        step([], [*(s for i, s in enumerate(early) if turn + 1 + (i == 0) < EXTRA), *late][::-1])
    return [(rows[id(s)], kept(driver, s)) for s in sequences]


@pytest.mark.parametrize("outputs", [None, 1], ids=["all rows wanted", "last rows wanted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_mixed_pass_has_the_bits_of_its_model_alone(family, dtype, outputs, folders):
    folder, ops = folders(FIRST[family]), dispatch.select()
    base = loading.load(folder, dtype=dtype, ops=ops)
    trunk = loading.load_trunk(folder, dtype=dtype, ops=ops)
    assert trunk.fingerprint == base.fingerprint
    models = [trunk, *(adapted(trunk, number) for number in range(6))]
    mixed = together(trunk, models, outputs)
    prints = set()
    for i, (rows, left) in enumerate(mixed):
        model = base if i == 0 else models[i]  # the base without any bank
        expected, expected_left = alone(model, tokens_of(i, LENGTHS[i] + EXTRA), LENGTHS[i], outputs)
        assert same(rows, expected), f"hidden rows of model {i}"
        assert same(left, expected_left), f"pages or states of model {i}"
        prints.add(model.fingerprint)
    assert len(prints) == 7
    others = [mixed[i][0][1] for i in range(7)]
    assert not any(torch.equal(others[0][-1], rows[-1]) for rows in others[1:])


@pytest.mark.parametrize("backend", dispatch.exact_backends())
@pytest.mark.parametrize("num_adapters", [1, 2, 4])
def test_backends_mix_rows_alike(backend, num_adapters, folders):
    trunk = loading.load_trunk(folders(FIRST["GraniteMoeHybrid"]), dtype="bfloat16", ops=dispatch.select(backend))
    models = [adapted(trunk, number) for number in range(num_adapters)] + [trunk]
    for i, (rows, left) in enumerate(together(trunk, models, 1)):
        expected, expected_left = alone(models[i], tokens_of(i, LENGTHS[i] + EXTRA), LENGTHS[i], 1)
        assert same(rows, expected)
        assert same(left, expected_left)


def test_another_pass_between_layers_has_its_own_rows(folders):
    """The one that was broken off goes on with those that it had."""
    trunk = loading.load_trunk(folders(FIRST["GraniteMoeHybrid"]), dtype="bfloat16", ops=dispatch.select())
    one, two = adapted(trunk, 1), adapted(trunk, 3)
    inner = []

    def pause():
        other = MixedDriver(trunk, num_slots=8)
        sequences = [other.of(model, tokens_of(9, 20)) for model in (two, trunk, one)]
        inner.append(other.step([Chunk(s, 20) for s in sequences]))

    broken, whole = (together(trunk, [one, trunk, two], 1, pause=each) for each in (pause, None))
    assert all(same(a[0], b[0]) and same(a[1], b[1]) for a, b in zip(broken, whole, strict=True))
    expected = [Driver(model).prefill(tokens_of(9, 20))[1] for model in (two, trunk, one)]
    assert len(inner) > 10
    assert all(same(rows, expected) for rows in inner)


@pytest.mark.parametrize("family", ["GraniteMoeHybrid", "FalconH1", "Qwen3", "Mamba2"])
def test_an_adapter_beside_a_model_is_that_of_plain_torch(family, folders, references):
    """As PEFT computes it: the output of each linear layer, and scale * B(A(x)) added to it, in float32."""
    case = FIRST[family]
    trunk = loading.load_trunk(folders(case), ops=dispatch.select())
    found = adapter(trunk.bank.shapes, 4, 1)
    tokens = tokens_of(3, 100)
    driver = Driver(loading.beside(trunk, found))
    ours = driver.logits(driver.prefill(tokens)[1])
    net, hooks = references(case), []
    for name, (A, B) in found.factors.items():

        def add(module, inputs, output, A=A, B=B):
            return output + found.config.scale * (inputs[0] @ A.T) @ B.T

        hooks.append(net.get_submodule(name.removesuffix(".weight")).register_forward_hook(add))
    with torch.no_grad():
        theirs = net(torch.tensor([tokens])).logits[0]
        for hook in hooks:
            hook.remove()
        plain = net(torch.tensor([tokens])).logits[0]
    # Float32 in another order of sums, through all layers: as the parity tests allow.
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)
    assert (theirs - plain).abs().max() > 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", dispatch.exact_backends())
def test_products_of_low_rank_are_those_of_plain_torch(backend, dtype):
    """Parts of one projection, rows of two adapters and of none, ranks even and odd."""
    ops, rng = dispatch.select(backend), torch.Generator().manual_seed(0)
    bank, sizes, size_in = ops.bank(), (70, 33, 128), 48

    def random(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    weight, x = random(sum(sizes), size_in), random(23, size_in)
    projection, places = bank.linear(ops.linear(weight), sizes)
    assert list(places) == [0, 1, 2]
    pairs = [
        {place: (random(rank, size_in), random(sizes[place], rank)) for place in some}
        for some, rank in (((0, 1, 2), 16), ((1,), 5))
    ]
    index = torch.tensor([-1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, -1, 0, 1, 0, 0, 0, -1, -1, 0, 0, 1, 1])
    alone = projection(x)
    with bank.during(RowAdapters(index, tuple(bank.factors(each) for each in pairs))):
        mixed = projection(x)
    assert torch.equal(projection(x), alone)
    assert torch.equal(mixed[index < 0], alone[index < 0])
    expected = x.double() @ weight.double().T
    for number, each in enumerate(pairs):
        for place, (A, B) in each.items():
            first = sum(sizes[:place])
            rows = index == number
            u = (x[rows].double() @ A.double().T).to(dtype).double()
            expected[rows, first : first + sizes[place]] += u @ B.double().T
    # Sums of size 30: one rounding of the base, one of the sum, in bfloat16 2^-9 each; float32 has 16 bits more.
    torch.testing.assert_close(
        mixed.double(),
        expected,
        **({"rtol": 0.02, "atol": 0.25} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}),
    )


# Through the engine


def generated(outputs):
    return {
        name: [(o.token, o.logprob.logprob) for n, o in outputs if n == name and isinstance(o, TokenOutput)]
        for name in {name for name, _ in outputs}
    }


def request(name, model, seed, max_tokens=6):
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=2)
    prompt = Prompt(torch.tensor(tokens_of(seed, 80 + 7 * seed), dtype=torch.int32).numpy())
    return Request(name, prompt, sampling, model=model)


def passes(engine):
    """Counts forward passes from here on."""
    count, forward = [], engine.worker.forward
    engine.worker.forward = lambda part, batch: (count.append(len(batch.token_ids)), forward(part, batch))[1]
    return count


def with_head(trunk, number):
    """An adapter that changes the head too."""
    return loading.beside(trunk, adapter(trunk.bank.shapes, 4, number))


def without_head(trunk, number):
    shapes = {name: shape for name, shape in trunk.bank.shapes.items() if name != HEAD}
    return loading.beside(trunk, adapter(shapes, 4, number))


@pytest.mark.parametrize("family", ["GraniteMoeHybrid", "Jamba"])
def test_adapters_come_and_go_between_steps(family, folders):
    folder, ops = folders(FIRST[family]), dispatch.select()
    trunk = loading.load_trunk(folder, dtype="bfloat16", ops=ops)
    models = {"a": with_head(trunk, 1), "b": without_head(trunk, 2), "c": with_head(trunk, 4)}
    plain = {"": loading.load(folder, dtype="bfloat16", ops=ops), **models}

    def expected(name, model, seed):
        engine = Engine(plain[model], EngineConfig(budget_bytes=8 << 20, prefix_cache=False))
        engine.submit(request(name, "", seed))
        return generated(engine.run_until_idle())[name]

    engine = Engine(trunk, EngineConfig(budget_bytes=8 << 20), variants={"a": models["a"]})
    count, outputs = passes(engine), []
    engine.submit(request("0", "", 0))
    engine.submit(request("1", "a", 1))
    for _ in range(3):
        outputs += engine.step()
    engine.add_variant("b", models["b"])
    engine.add_variant("c", models["c"])
    asked = {"0": ("", 0), "1": ("a", 1), "2": ("b", 2), "3": ("c", 3), "4": ("b", 4)}
    for name in ("2", "3", "4"):
        engine.submit(request(name, *asked[name]))
    steps = 3
    while not engine.idle:
        outputs += engine.step()
        steps += 1
    assert len(count) <= steps, "one pass a step, whatever the models"
    assert generated(outputs) == {name: expected(name, *which) for name, which in asked.items()}

    gone = weakref.ref(models.pop("b"))
    factors = weakref.ref(gone().factors)
    plain.pop("b")
    engine.remove_variant("b")
    assert gone() is None
    assert factors() is None, "its memory went with it"
    engine.submit(request("5", "c", 3))
    engine.submit(request("6", "", 6))
    assert generated(engine.run_until_idle()) == {"5": expected("5", "c", 3), "6": expected("6", "", 6)}


def test_prompts_are_scored_by_the_head_of_their_adapter(folders):
    trunk = loading.load_trunk(folders(FIRST["Jamba"]), dtype="bfloat16", ops=dispatch.select())
    assert HEAD in trunk.bank.shapes
    model = with_head(trunk, 1)
    assert model.adapts_head
    engine = Engine(trunk, EngineConfig(budget_bytes=8 << 20), variants={"a": model})
    hidden = torch.randn(5, trunk.cache_spec.hidden_size).bfloat16()
    scores = [engine.worker.score(each.fingerprint, hidden, [1, 2, 3, 4, 5], 0) for each in (trunk, model)]
    assert scores[0] != scores[1]
    mixed = engine.worker.all_logits(list(hidden), [trunk.fingerprint, model.fingerprint] * 2 + [trunk.fingerprint])
    with torch.inference_mode():
        by_trunk, by_model = trunk.logits(hidden), model.logits(hidden)
    assert torch.equal(mixed[::2], by_trunk[::2])
    assert torch.equal(mixed[1::2], by_model[1::2])
    assert not torch.equal(mixed[1], by_trunk[1])


# What may stand beside a model


def test_what_is_no_product_is_refused_with_the_option_that_merges_it(folders):
    trunk = loading.load_trunk(folders(FIRST["Jamba"]), ops=OPS)
    experts = Adapter(
        "x",
        LoraConfig(2, 2.0, ()),
        {"model.layers.1.feed_forward.experts.0.up_proj.weight": (torch.ones(2, 3),) * 2},
        {},
    )
    with pytest.raises(UnsupportedModel, match=r"no product that it can stand beside: merge it \(--merge-adapters\)"):
        loading.beside(trunk, experts)


def test_a_rank_that_is_too_large_is_refused_with_the_bound(folders):
    trunk = loading.load_trunk(folders(FIRST["GraniteMoeHybrid"]), ops=OPS)
    with pytest.raises(UnsupportedModel, match=r"r is 1025, beside a model at most 1024: merge it"):
        loading.beside(trunk, adapter(trunk.bank.shapes, 1025, 1))


def test_factors_that_overflow_in_the_type_of_the_rows_are_refused(folders):
    trunk = loading.load_trunk(folders(FIRST["GraniteMoeHybrid"]), ops=OPS)
    with pytest.raises(loading.ModelError, match=r"not finite in torch\.float32"):
        loading.beside(trunk, adapter(trunk.bank.shapes, 2, 1, size=3e38))


@pytest.mark.parametrize("backend", dispatch.exact_backends())
def test_an_adapter_takes_the_bytes_of_its_factors(backend, folders):
    """In bfloat16, at a rank that fills what is packed; outputs are filled up to panels of 64."""
    trunk = loading.load_trunk(folders(FIRST["GraniteMoeHybrid"]), dtype="bfloat16", ops=dispatch.select(backend))
    found = adapter(trunk.bank.shapes, 16, 1)
    rows = [(A.shape[1] * 16, -(-len(B) // 64) * 64 * 16) for A, B in found.factors.values()]
    model = loading.beside(trunk, found)
    assert isinstance(model, AdaptedModel)
    assert model.factors.num_bytes <= 2 * sum(map(sum, rows))


def test_a_model_beside_which_nothing_may_stand_has_no_bank(folders):
    base = loading.load(folders(FIRST["GraniteMoeHybrid"]), ops=dispatch.select())
    assert base.bank is None
