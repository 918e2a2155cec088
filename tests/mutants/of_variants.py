"""Faults of several models in one engine: whose rows a model computes, what it shares, and what goes with it."""

from functools import partial

from tests.mutants.mutant import Mutant

VARIANTS = ("tests/engine/test_variants.py",)
DEPTH = ("tests/models/test_depth.py",)
ADAPTERS = ("tests/models/test_adapters.py",)
BANK = ("tests/models/test_bank.py",)

adapted = partial(Mutant, "hybrid_cache/device/adapted.py")
bank = partial(Mutant, "models/bank.py")
depth = partial(Mutant, "models/depth.py")
engine = partial(Mutant, "hybrid_cache/engine/engine.py")
family = partial(Mutant, "hybrid_cache/engine/family.py")
intake = partial(Mutant, "hybrid_cache/engine/intake.py")
inventory = partial(Mutant, "hybrid_cache/cache/inventory.py")
native_bank = partial(Mutant, "kernels/native_low_rank.py")
shelf = partial(Mutant, "models/shelf.py")
stack = partial(Mutant, "models/blocks/stack.py")
torch_bank = partial(Mutant, "kernels/low_rank.py")
worker = partial(Mutant, "hybrid_cache/device/worker.py")
senders = partial(Mutant, "hybrid_cache/engine/senders.py")
prefills = partial(Mutant, "hybrid_cache/engine/prefills.py")
books = partial(Mutant, "hybrid_cache/cache/books.py")
inputs = partial(Mutant, "hybrid_cache/device/inputs.py")
twins = partial(Mutant, "hybrid_cache/engine/twins.py")
sequence = partial(Mutant, "hybrid_cache/engine/sequence.py")
scheduler = partial(Mutant, "hybrid_cache/engine/scheduler.py")
BANDS, PROFILED = ("tests/engine/test_bands.py",), ("tests/engine/test_profiled.py",)
TWINS = ("tests/engine/test_twins.py",)

MUTANTS = [
    worker(
        "all rows of a step are the first one's model's",
        "        if not sent and len(plain) == 1:\n            (first,) = plain.values()\n",
        "        if plain:\n            first = next(iter(plain.values()))\n",
        VARIANTS,
    ),
    worker(
        "logits of all rows are the first one's model's",
        "if all(trunk is trunks[0] for trunk in trunks):",
        "if trunks:",
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
    worker(
        "rows of adapters are replayed without them",
        "and not work.chunks and batch.adapters is None:",
        "and not work.chunks:",
        ("tests/engine/test_cuda_graphs.py",),
    ),
    intake(
        "what comes next is computed by the first model",
        "        namespace = self._family.namespace(model, namespace)\n",
        '        self._family.namespace(model, "")\n        namespace = self._family.namespace("", namespace)\n',
        VARIANTS,
    ),
    intake(
        "a model that is not there is the first one",
        "        self._family.fingerprint(request.model)\n        n, limit",
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
        "*self._scheduler.sequences(), *self._interruptions.sequences()",
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
    torch_bank("what is beside a projection is left out", "for group in self._bank.groups:", "for group in ():", BANK),
    torch_bank("factors stand beside the first part", "sum(sizes[:i]) for i", "0 for i", BANK),
    torch_bank(
        "the pass between layers leaves its rows to the other",
        "            self._show(before)\n",
        "            pass\n",
        BANK,
    ),
    torch_bank(
        "the rows that are wanted are taken for all",
        "self._show(self._adapters.of(rows))",
        "self._show(self._adapters)",
        BANK,
    ),
    stack("the bank is not told which rows go on", "    batch.narrowed()\n", "", BANK),
    adapted("all rows have the first adapter", "numbers.get(model.fingerprint, -1) for", "0 for", BANK),
    adapted(
        "a head that an adapter changes is the trunk's",
        "each if not isinstance(each, AdaptedModel) or each.adapts_head else",
        "each if not isinstance(each, AdaptedModel) else",
        BANK,
    ),
    bank("an adapter beside a model has no scale", "(adapter.config.scale * B.float())", "(1.0 * B.float())", BANK),
    bank(
        "what cannot stand beside the model is left out",
        "        if others := adapter.factors.keys() - self._targets.keys():\n",
        "        if others := set[str]():\n",
        BANK,
    ),
    bank("an adapter has the name of its model", "            digests |= {", "            digests | {", BANK),
    native_bank(
        "who shares a matrix does not find it",
        "        self._base = base  # whoever",
        "        # whoever",
        ("tests/api/server/test_variants.py",),
    ),
    shelf(
        "nothing is stored once",
        "        found: T | None = self._packed.get(key)\n",
        "        found: T | None = None\n",
        ADAPTERS,
    ),
    senders(
        "one more layer is taken for equal",
        "equal_layers(sender.chain, receiver.chain) or 0",
        "(equal_layers(sender.chain, receiver.chain) or 0) + 1",
        BANDS,
    ),
    senders(
        "any loss is allowed", "each.lane and each.loss <= max_loss and cheaper", "each.lane and cheaper", PROFILED
    ),
    prefills(
        "a state in the middle of a band is kept",
        "if wish.position <= start or (prefill.source and wish.position < prefill.source.end):",
        "if wish.position <= start:",
        BANDS,
    ),
    prefills(
        "a kept state lacks what was taken",
        "        if prefill.source:  # the pass adds what it computes\n",
        "        if False:\n",
        BANDS,
    ),
    prefills(
        "what is not exact is looked for among the model's own",
        "            prefill.enter_lane(self._best_lane(prefill, prefill.max_loss or 0.0))\n",
        "            prefill.lane = self._best_lane(prefill, prefill.max_loss or 0.0)\n",
        PROFILED,
    ),
    prefills(
        "a lane hands on what it was given",
        "        if lane_in(prefill.namespace) or (prefill.mark",
        "        if (prefill.mark",
        PROFILED,
    ),
    books(
        "the pages of another prefix are taken",
        "lease.pages[sent.end - len(path) : sent.end]",
        "lease.pages[: len(path)]",
        BANDS,
    ),
    inputs(
        "rows are read from the start of an item",
        "slice(first, first + num)",
        "slice(0, num)",
        ("tests/device/test_inputs.py",),
    ),
    twins(
        "a prompt is written for whoever has ever read",
        "        return computed > 0 and self._read[lane] >= EXPECTED * computed",
        "        return computed > 0",
        TWINS,
    ),
    twins(
        "what is taken is not copied into a twin",
        "        self._cache.copy_beside(prefill.lease, lease, made.start, made.end, copies, twin.offer.entries)\n",
        "",
        TWINS,
    ),
    twins(
        "taken states are copied from where the prompt is now",
        "copies = [(slots[position], slot) for position, slot in made.captures]",
        "copies = [(prefill.lease.slot, slot) for position, slot in made.captures]",
        TWINS,
    ),
    twins(
        "a twin goes on behind a gap",
        "            if twin.prefill.computed != start or end <= start or lease is None:",
        "            if end <= start or lease is None:",
        ("tests/engine/test_variants_mixed.py", "tests/engine/test_twins.py"),
    ),
    twins(
        "twins outlive their prompt",
        "                self._cache.release(twin.prefill.lease)\n",
        "",
        TWINS,
    ),
    twins(
        "pages that were written for a reader count for nothing when it reads them",
        "                self.read(lane, TILE)\n",
        "                pass\n",
        TWINS,
    ),
    prefills(
        "what twins have written is kept for their readers, too",
        "        written = frozenset(twin.offer.lane for twin in prefill.twins)\n",
        "        written = frozenset[str]()\n",
        TWINS,
    ),
    prefills(
        "nobody waits for a model that computes what it can go on from",
        "        return self._receives(prefill) and any(",
        "        return False and any(",
        TWINS,
    ),
    prefills(
        "nobody waits for what is being written in a lane",
        "namespaces = [namespace_beside(prefill.namespace, prefill.model, lane.lane) for lane in lanes if lane]",
        "namespaces = list[str]()",
        TWINS,
    ),
    scheduler(
        "a request is at fault where a twin may be",
        "arrival = None if others or doubled else",
        "arrival = None if others else",
        TWINS,
    ),
    scheduler(
        "twins are kept while others begin again",
        "self.canonical.give_room() or self.twins.give_room() or self._forgo_answer()",
        "self.canonical.give_room() or self._forgo_answer()",
        TWINS,
    ),
    worker(
        "a twin is given the rows of another chunk",
        "                part.held[place].rows = slice(first, first + len(rows.tokens))\n",
        "                part.held[place].rows = slice(0, len(rows.tokens))\n",
        ("tests/engine/test_twins.py", "tests/engine/test_variants_mixed.py"),
    ),
    prefills(
        "a prompt waits for a sender that leaves nothing",
        "not (other.publish and plain)",
        "not plain",
        TWINS,
    ),
    prefills(
        "a prompt waits for what another sender has already",
        "        if now is not None and shared <= now[1].end * TILE:\n            return False\n",
        "",
        TWINS,
    ),
    sequence(
        "a further choice chooses a lane for itself",
        "        self.enter_lane(first.lane)\n",
        "",
        TWINS,
    ),
    twins(
        "a twin of a prompt that keeps only marked states is waited for elsewhere",
        "Prefill(namespace, tokens, True, True, marks, prefill.only_marked)",
        "Prefill(namespace, tokens, True, True)",
        TWINS,
    ),
    senders(
        "a profile whose sender has gone is offered",
        " and sender in self._models:",
        ":",
        PROFILED,
    ),
    twins(
        "the policy never hears of what is written beside",
        "        self._cache.propose(lease, ",
        "        dict(lease=lease, of=",
        TWINS,
    ),
]
