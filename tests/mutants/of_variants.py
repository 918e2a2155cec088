"""Faults of several models in one engine: whose rows a model computes, what it shares, and what goes with it."""

from functools import partial

from tests.mutants.mutant import Mutant

VARIANTS = ("tests/engine/test_variants.py",)
DEPTH = ("tests/models/test_depth.py",)
ADAPTERS = ("tests/models/test_adapters.py",)

adapted = partial(Mutant, "models/blocks/common.py")
depth = partial(Mutant, "models/depth.py")
engine = partial(Mutant, "hybrid_cache/engine/engine.py")
family = partial(Mutant, "hybrid_cache/engine/family.py")
intake = partial(Mutant, "hybrid_cache/engine/intake.py")
inventory = partial(Mutant, "hybrid_cache/cache/inventory.py")
shelf = partial(Mutant, "models/shelf.py")
weights = partial(Mutant, "models/weights.py")
worker = partial(Mutant, "hybrid_cache/device/worker.py")

MUTANTS = [
    worker(
        "all rows of a step are the first one's model's",
        "if all(each.model == rows[0].model for each in rows):",
        "if rows:",
        VARIANTS,
    ),
    worker(
        "logits of all rows are the first one's model's",
        "if all(model == models[0] for model in models):",
        "if models:",
        VARIANTS,
    ),
    worker(
        "rows of several models come back in the order of the models",
        "            for place, row in zip(part.decodes, singles, strict=True):\n                decodes[place] = row",
        "            for place, row in enumerate(singles, sum(d is not None for d in decodes)):\n"
        "                decodes[place] = row",
        VARIANTS,
    ),
    worker(
        "prompts are scored by the first model",
        "logits = self.logits(self.models[model], rows[start",
        "logits = self.logits(self.model, rows[start",
        VARIANTS,
    ),
    intake(
        "what comes next is computed by the first model",
        "        fingerprint = self._fingerprint_of(model)\n",
        '        self._fingerprint_of(model)\n        fingerprint = self._fingerprint_of("")\n',
        VARIANTS,
    ),
    intake(
        "a model that is not there is the first one",
        "        self._fingerprint_of(request.model)\n        n, limit",
        "        n, limit",
        VARIANTS,
    ),
    engine(
        "a variant in use goes",
        "        if num_open:\n            raise",
        "        if False:\n            raise",
        VARIANTS,
    ),
    engine(
        "who is paused does not use its variant",
        "(*self._scheduler.sequences(), *self._interruptions.sequences())",
        "self._scheduler.sequences()",
        VARIANTS,
    ),
    engine(
        "turns of a variant that is gone are computed",
        "        self.forget_turns(is_its)\n",
        "",
        VARIANTS,
    ),
    engine(
        "what is cached of a variant stays when it goes",
        "        Inventory(self.cache, is_its).drop_all()\n",
        "",
        VARIANTS,
    ),
    inventory(
        "what is in the second tier only stays",
        "            known |= self._pool.host.namespaces\n",
        "            pass\n",
        VARIANTS,
    ),
    family(
        "a name that is taken is given to another model",
        "if name in self._models:\n            raise",
        "if False:\n            raise",
        VARIANTS,
    ),
    family("any model of the same kind fits", "        if ours != theirs:\n", "        if False:\n", VARIANTS),
    family(
        "the last name of a model does not take it along",
        "return all(model.fingerprint != fingerprint for model in self._models.values())",
        "return False",
        VARIANTS,
    ),
    family(
        "the first name of a model takes it along",
        "return all(model.fingerprint != fingerprint for model in self._models.values())",
        "return True",
        VARIANTS,
    ),
    depth("what several layers share is above them", "elif not _ABOVE.match(name):", "elif False:", DEPTH),
    depth("a head that differs is below all layers", "elif not _ABOVE.match(name):", "else:", DEPTH),
    depth("a layer's name does not say what is below it", "_link(chain[-1], layers", "_link(chain[0], layers", DEPTH),
    adapted("what is beside a projection is left out", "        y += self._up(self._down(x))\n", "", ADAPTERS),
    adapted("factors of several parts lie over each other", "                place += len(A)\n", "", ADAPTERS),
    adapted("factors stand beside the first part", "            row += size\n", "            row += 0\n", ADAPTERS),
    weights(
        "an adapter beside a model has no scale",
        "return LowRank(A.float(), self._adapter.config.scale * B.float())",
        "return LowRank(A.float(), B.float())",
        ADAPTERS,
    ),
    weights(
        "what cannot stand beside the model is left out",
        "        if self._adapter and not self._merges and self._to_change:\n",
        "        if False:\n",
        ADAPTERS,
    ),
    shelf(
        "nothing is stored once",
        "        found: T | None = self._packed.get(key)\n",
        "        found: T | None = None\n",
        ADAPTERS,
    ),
]
