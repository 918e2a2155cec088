"""Faults of the cache: what may be matched, published, written, shared, held and evicted."""

from functools import partial

from tests.mutants.mutant import Mutant

CACHE = ("tests/cache/test_cache.py",)
MACHINE = (*CACHE, "tests/cache/test_cache_machine.py")
POLICY = ("tests/cache/test_policy.py",)
RANKED = (*POLICY, "tests/cache/test_published_policies.py")
LEARNED = ("tests/cache/test_learned.py", "tests/bench/policy/test_chains.py")
MESSAGES = ("tests/cache/test_messages.py",)
DIGESTS = ("tests/cache/test_digests.py",)
ENGINE = ("tests/engine/test_engine.py",)
BESIDE = "tests/choreography/test_beside_exact.py::"
OWNED = (BESIDE + "test_a_composed_prompt_owns_all_pages_beyond_its_state",)
PRIVATE = (BESIDE + "test_a_lease_that_does_not_publish_shares_no_page_beyond_its_state",)
WRITES = (BESIDE + "test_a_write_to_a_page_of_the_tree_is_an_error",)

default_policy = partial(Mutant, "hybrid_cache/cache/policies/learned.py")
places = partial(Mutant, "hybrid_cache/cache/policies/places.py")
books = partial(Mutant, "hybrid_cache/cache/books.py")
candidates = partial(Mutant, "hybrid_cache/cache/candidates.py")
pool = partial(Mutant, "hybrid_cache/cache/pool.py")
messages = partial(Mutant, "hybrid_cache/cache/messages.py")
allocator = partial(Mutant, "hybrid_cache/cache/allocator.py")
config = partial(Mutant, "hybrid_cache/config.py")
lease = partial(Mutant, "hybrid_cache/cache/lease.py")
keys = partial(Mutant, "hybrid_cache/cache/keys.py")
tree = partial(Mutant, "hybrid_cache/cache/tree.py")
digests = partial(Mutant, "hybrid_cache/device/digests.py")
eviction = partial(Mutant, "hybrid_cache/cache/eviction.py")
arena = partial(Mutant, "hybrid_cache/device/arena.py")

NAMES = ("tests/cache/test_keys.py",)
EVENTS = ("tests/api/server/test_kv_events_machine.py",)
OVERFLOW = ("tests/api/server/test_kv_events.py::test_what_went_while_nobody_listened_is_not_said_any_more",)
resumable = partial(Mutant, "hybrid_cache/cache/resumable.py")
journal = partial(Mutant, "hybrid_cache/cache/journal.py")

ONE_BY_ONE = ("tests/api/server/test_kv_events.py::test_pages_of_a_model_without_states_come_and_go_one_by_one",)

SAYING = [
    pool("nobody is told that a state went", "        self.watcher.went(kept)\n", "", EVENTS),
    pool("nobody is told that a page of a model without states went", "self.watcher.went(node)", "pass", ONE_BY_ONE),
    resumable(
        "pages stay as long as one state below is left",
        "            if self._reasons[node]:\n",
        "            if self._reasons[node] or node.children:\n",
        EVENTS,
    ),
    resumable("pages above a state are not said", "            if count:\n", "            if not count:\n", EVENTS),
    resumable(
        "what was said is said again without being cleared",
        "yield self._forget()\n            elif",
        "pass\n            elif",
        OVERFLOW,
    ),
    journal(
        "what came too fast is dropped",
        "            self._begin_anew()  # the change",
        "            pass  # the change",
        OVERFLOW,
    ),
    journal(
        "the reader is not woken a second time",
        "        self._awake = False  # before",
        "        pass  # before",
        EVENTS,
    ),
]

NAMING = [
    keys(
        "a name does not follow what comes before its page",
        "names.append(_digest(PAGE, names[-1], page))",
        "names.append(_digest(PAGE, names[0], page))",
        NAMES,
    ),
    keys(
        "a prefix has the same name in all namespaces",
        '_digest(ROOT, namespace.encode("utf-8", "surrogatepass"))',
        "_digest(ROOT)",
        NAMES,
    ),
    keys("the end of a prompt has the name of its pages", "_digest(END, self", "_digest(PAGE, self", NAMES),
    keys("names that the tree has are computed again", "if len(names) > len(self._names):", "if False:", NAMES),
    keys(
        "a beginning may be a whole prompt",
        "self.pages[: num_tokens // TILE], NO_TAIL, num_tokens + 1, mark=mark)",
        'self.pages[: num_tokens // TILE], b"", num_tokens + 1, mark=mark)',
        NAMES,
    ),
]

MATCHING = [
    lease(
        "a match leaves no token to compute",
        "if n.checkpoint and n.num_tokens < keys.num_tokens)",
        "if n.checkpoint and n.num_tokens <= keys.num_tokens)",
        CACHE,
    ),
    lease(
        "a match without states leaves no token to compute",
        "min(len(path), max(keys.num_tokens - 1, 0) // step) * step",
        "min(len(path), keys.num_tokens // step) * step",
        MACHINE,
    ),
    lease(
        "the end of a shorter prompt is taken for that of a longer one",
        "if tip is not None and len(path) == len(keys.pages) else None",
        "if tip is not None else None",
        CACHE,
    ),
    books("a match that is out of date is used", "        match = self._renew(match)\n", "", CACHE),
    books(
        "a match is used though its state has gone",
        "(not match.path or match.path[-1].attached) and (source is None or source.attached)",
        "not match.path or match.path[-1].attached",
        CACHE,
    ),
    books(
        "a private lease shares pages beyond its state",
        "            match = match.up_to_its_state(self._page_tokens)\n",
        "            pass\n",
        PRIVATE + OWNED,
    ),
    books(
        "a private lease is a public one once its state had to go",
        "self.acquire(self.match(match.namespace, match.keys), keys, publish=publish)",
        "self.acquire(self.match(match.namespace, match.keys), keys)",
        CACHE,
    ),
    books(
        "pages that stay count as room",
        "num_held = sum(not node.pins for node in match.path)",
        "num_held = 0",
        MACHINE,
    ),
    books(
        "who finds no room keeps pins",
        "        self._unpin(root, match.path)\n        if source is None",
        "        if source is None",
        CACHE,
    ),
    lease(
        "a private lease keeps the whole path of its match",
        "path=self.path[:num_pages],",
        "path=self.path,",
        PRIVATE + OWNED,
    ),
]

PUBLISHING = [
    books(
        "a place is reserved that another request is about to fill",
        "(node and (node.checkpoint or node.awaited))",
        "(node and node.checkpoint)",
        CACHE,
    ),
    books(
        "a place is reserved that the state has passed",
        "self._stateless or position <= lease.length:",
        "self._stateless or position < lease.length:",
        CACHE,
    ),
    books(
        "a private lease reserves places",
        "if not lease.publish or self._stateless or",
        "if self._stateless or",
        CACHE,
    ),
    candidates(
        "a new state takes the room of better ones",
        "num_pages=num_pages, ceiling=score, spare=keeps)",
        "num_pages=num_pages, spare=keeps)",
        CACHE + RANKED,
    ),
    books(
        "a private lease publishes its pages",
        "        if not lease.publish:\n            return\n        for index",
        "        for index",
        CACHE + OWNED,
    ),
    books(
        "a second state at one place replaces the first",
        "                self.pool.give(Kind.SLOT, r.slot)\n                continue\n",
        "                self.pool.give(Kind.SLOT, r.slot)\n",
        CACHE,
    ),
    books(
        "a place is awaited for ever once it was filled",
        "                r.node.awaited = False\n            node = ",
        "                pass\n            node = ",
        CACHE,
    ),
    books(
        "an end is filed before the pages in front of it",
        "if not lease.publish or len(path) < len(keys.pages) or keys.tail",
        "if not lease.publish or keys.tail",
        CACHE,
    ),
    books(
        "a private lease keeps the end of its prompt",
        "if not lease.publish or len(path) < len(keys.pages)",
        "if len(path) < len(keys.pages)",
        CACHE,
    ),
    candidates(
        "what is declined lets nothing grow old",
        "            self._decline(lease, position, kind, score)\n",
        "",
        RANKED,
    ),
    books(
        "the last rows of a prompt's end are not kept",
        "            self.pool.copy(Kind.PAGE, lease.pages[len(path)], end.page)\n",
        "            pass\n",
        CACHE,
    ),
    books(
        "the hidden row of a prompt's end is not kept", "        self.pool.emit(KeepHidden(end.slot, row))\n", "", CACHE
    ),
    books(
        "a page that is taken over may move",
        "            self.pool.allocator.fix(Kind.PAGE, node.page)\n            self.pool.queues.withdraw_dead(node)",
        "            self.pool.queues.withdraw_dead(node)",
        CACHE,
    ),
    books(
        "who is slower keeps the page that nobody reads",
        "            lease.pages[index] = node.page\n",
        "",
        CACHE,
    ),
    books(
        "the page of who is slower is lost",
        "            self.pool.give(Kind.PAGE, lease.pages[index])\n",
        "",
        CACHE,
    ),
]

SHARING = [
    books(
        "a fork lacks the rows of its last page",
        "max(-(-num_tokens // self._page_tokens) - len(lease.nodes), 0)",
        "max(num_tokens // self._page_tokens - len(lease.nodes), 0)",
        CACHE + ENGINE,
    ),
    books("a fork does not pin what it shares", "        self._pin(lease.root, lease.nodes)\n", "", CACHE),
    books("a fork has no state", "        self.pool.copy(Kind.SLOT, lease.slot, slots[0])\n", "", CACHE),
    books(
        "what is released twice is given back twice",
        "        if lease.released:\n            return None\n",
        "",
        CACHE,
    ),
    books(
        "slots that were reserved are lost with an abort",
        "for slot in [lease.slot, *(r.slot for r in lease.reserved)]:",
        "for slot in [lease.slot]:",
        CACHE,
    ),
    books(
        "a place is awaited for ever after an abort",
        "for r in lease.reserved:\n            if r.node is not None:\n                r.node.awaited = False\n",
        "for r in ():\n            pass\n",
        CACHE,
    ),
    books(
        "the state that a prompt starts from may go meanwhile",
        "        self.pool.guard(source)\n        taken = ",
        "        taken = ",
        CACHE + MACHINE,
    ),
    books(
        "the last rows of a prompt's end are not handed on",
        "                self.pool.copy(Kind.PAGE, tail, taken[1][place])\n",
        "                pass\n",
        CACHE,
    ),
    books(
        "a use of a state does not count",
        "            self.pool.stamp(source, match.path)\n",
        "",
        CACHE + POLICY,
    ),
    pool(
        "what is guarded may move",
        "            self.allocator.fix(kind, item)\n\n    def unguard",
        "            pass\n\n    def unguard",
        MESSAGES,
    ),
    books(
        "a page may move as soon as one of two has let go",
        "            if not node.pins:\n                self.pool.allocator.unfix(Kind.PAGE, node.page)",
        "            self.pool.allocator.unfix(Kind.PAGE, node.page)",
        CACHE + ENGINE,
    ),
    books(
        "a page that is in use again may go",
        "            node.pins += 1\n            self.pool.queues.withdraw_dead(node)\n",
        "            node.pins += 1\n",
        CACHE,
    ),
    pool(
        "what was published may be written to",
        "            if item in published or (",
        "            if item in () or (",
        WRITES,
    ),
    pool(
        "what a published message does to states may be written to, where slots hold it",
        "        self.extra_slots.update(self._others(kept, Kind.SLOT))\n",
        "",
        MESSAGES,
    ),
    lease(
        "rows of the tree may be written to",
        "if start < min(self.shared, end):",
        "if end < min(self.shared, end):",
        WRITES,
    ),
    lease(
        "a row of the tree may be written to",
        "if index < self.shared or self.released:",
        "if self.released:",
        WRITES,
    ),
    lease(
        "rows of a lease that was given back are read",
        '        if self.released:\n            raise OwnershipError(f"rows [{start}, {end}) of a lease',
        '        if not self:\n            raise OwnershipError(f"rows [{start}, {end}) of a lease',
        WRITES,
    ),
    lease(
        "tokens that are computed again overwrite a row of somebody",
        "np.full(shared - start, -1, np.int64)",
        "np.full(shared - start, 0, np.int64)",
        WRITES + ENGINE,
    ),
    lease(
        "a private lease leaves rows to the tree, which may be other ones",
        "min(max(self.shared, start), end) if self.publish else start",
        "min(max(self.shared, start), end)",
        WRITES,
    ),
]

EVICTING = [
    books(
        "all is dropped, messages that somebody holds too",
        "            if not (isinstance(kept, StoredMessage) and kept.holders):\n",
        "            if True:\n",
        MESSAGES,
    ),
    books(
        "dropping one namespace drops the states of all",
        "[k for k in self.pool.slot_owner.values() if namespace in (None, k.namespace)]",
        "list(self.pool.slot_owner.values())",
        CACHE,
    ),
    pool(
        "of two states that are worth the same the older stays",
        "if ceiling is not None and score > ceiling:",
        "if ceiling is not None and score >= ceiling:",
        POLICY,
    ),
    pool(
        "a new state takes the room of a guaranteed one",
        "self.queues.next_guaranteed() if ceiling is None else None",
        "self.queues.next_guaranteed()",
        CACHE,
    ),
    pool(
        "who asks for more than there is empties the cache first",
        "        if not self.fits(num_pages, num_slots, num_held):\n            return None\n        self._num_asked",
        "        self._num_asked",
        CACHE,
    ),
    pool("what was taken in vain is lost", "                self._give_all(taken)\n", "", MESSAGES + MACHINE),
    pool(
        "a page that nobody needs any more stays for ever",
        "        self.settle(node.parent)\n",
        "",
        CACHE,
    ),
    pool(
        "states below one that goes are not said to be worth more",
        "        if self.policy.wants_rises:\n            self.rescore_below(kept.node)\n",
        "",
        RANKED,
    ),
    books(
        "states below a new one are not said to be worth less",
        "            self.pool.publish(node.checkpoint, lease.nodes)\n            self.pool.rescore_below(node)",
        "            self.pool.publish(node.checkpoint, lease.nodes)",
        POLICY,
    ),
    pool(
        "a state is not said to take more pages along than before",
        "            self._rescore(node.checkpoint or next(iter(node.ends.values())))",
        "            pass",
        CACHE + RANKED,
    ),
    pool("nobody is told that two requests part at a state", "        self._report_rise(node.parent, 2)\n", "", POLICY),
    pool(
        "nobody is told that requests no longer part at a state",
        "        self._report_rise(node.parent, 1)\n",
        "",
        POLICY,
    ),
    candidates(
        "a candidate's worth overlooks the places reserved above it",
        "max((r.position for r in lease.reserved if r.position < position), default=0)",
        "0",
        POLICY,
    ),
    books("the last use of a page is not noted", "            node.last_used = now\n", "", CACHE),
    pool(
        "a minimum life does not begin anew",
        "kept.keep_until = self.clock() + kept.ttl_s",
        "kept.keep_until = kept.keep_until or self.clock() + kept.ttl_s",
        CACHE,
    ),
    tree(
        "a node with the end of a prompt is dead",
        "return not (self.children or self.checkpoint or self.ends or self.pins)",
        "return not (self.children or self.checkpoint or self.pins)",
        CACHE,
    ),
    tree(
        "a state is its own replacement",
        "        node = self.parent\n        while node is not None and node.checkpoint is None:",
        "        node = self\n        while node is not None and node.checkpoint is None:",
        CACHE + POLICY,
    ),
    tree(
        "pages under the end of a prompt count as another state's",
        "if len(node.children) > 1 or node.checkpoint or node.ends:",
        "if len(node.children) > 1 or node.checkpoint:",
        CACHE,
    ),
    tree(
        "pages that others go through count as a state's",
        "        if node.children:\n            return 0\n",
        "",
        CACHE + RANKED,
    ),
    tree(
        "a state takes along the pages of an end beside it",
        "return 0 if self.node.ends else self.node.pages_alone()",
        "return self.node.pages_alone()",
        CACHE,
    ),
    tree(
        "an end takes along the pages of an end beside it",
        "own if self.node.checkpoint or len(self.node.ends) > 1 else",
        "own if self.node.checkpoint else",
        CACHE,
    ),
    tree(
        "an end on the grid is replaced by the state beside it",
        "return self.node.resume_point() if self.tail else self.node.checkpoint_above()",
        "return self.node.resume_point()",
        CACHE,
    ),
    eviction(
        "a score that has risen is not noticed",
        "            if not fresh > score:  # also of what is no number\n",
        "            if fresh is not None:\n",
        POLICY + RANKED,
    ),
    eviction(
        "a guarantee has no end",
        "first.keep_until <= self._clock():",
        "first.keep_until < 0:",
        CACHE,
    ),
    eviction(
        "what is guaranteed may go by its score",
        "            self._guaranteed.push(kept, kept.keep_until)\n            self._scored.remove(kept)\n",
        "            self._guaranteed.push(kept, kept.keep_until)\n",
        CACHE,
    ),
    allocator(
        "slabs in use count as room for a large item",
        "return num_large <= self.num_loose_slabs and units",
        "return units",
        CACHE,
    ),
    allocator(
        "a slab is emptied into itself",
        "elsewhere = self.free_units - self.span * len(self._empty) - free",
        "elsewhere = self.free_units - self.span * len(self._empty)",
        MACHINE,
    ),
    allocator(
        "what is given back stays fixed", "        self.unfix(kind, index)\n        units", "        units", CACHE
    ),
    pool(
        "nobody is told where an item was moved to",
        "            self._rename(kind, source, target)\n",
        "            pass\n",
        CACHE,
    ),
    pool(
        "a message is not told where its own numbers were moved to",
        "pages = owner.pages if source in owner.pages else owner.extra",
        "pages = owner.pages",
        MESSAGES,
    ),
]

KEEPING_MESSAGES = [
    messages(
        "a message in the making takes the room of what is better",
        "self._pool.take(num_slots=slots, num_pages=pages, ceiling=score)",
        "self._pool.take(num_slots=slots, num_pages=pages)",
        MESSAGES,
    ),
    messages(
        "a message takes the room of what is better",
        'num_pages=num_pages, ceiling=score)\n        if taken is None:\n            self._pool.declines["message"]',
        'num_pages=num_pages)\n        if taken is None:\n            self._pool.declines["message"]',
        MESSAGES,
    ),
    messages(
        "what is lent is not counted",
        "        self.loans.update((kind, item) for item in items)\n",
        "",
        MESSAGES,
    ),
    messages(
        "what a message has taken in is still lent",
        "        self.loans.difference_update((self._pool.extra_kind, item) for item in extra)\n",
        "",
        MESSAGES,
    ),
    messages(
        "what was lent is not given back",
        "        self.loans.remove((kind, item))\n        self._pool.give(kind, item)",
        "        self.loans.remove((kind, item))",
        MESSAGES,
    ),
    messages(
        "a key is stored twice",
        "        if key in self.stored:\n            return None\n",
        "",
        MESSAGES,
    ),
    messages(
        "a message that was published cannot be found",
        "        self.stored[message.key] = message\n",
        "",
        MESSAGES,
    ),
    tree(
        "nobody looks whether the rows of a message may be written to",
        "        if self.attached:\n            raise OwnershipError(f",
        "        if not self:\n            raise OwnershipError(f",
        MESSAGES,
    ),
    pool(
        "the pages of a message belong to nobody",
        "            self.page_owner.update((item, kept) for item in self._others(kept, Kind.PAGE))\n",
        "            pass\n",
        MESSAGES,
    ),
    messages(
        "a message that is held may go",
        "        if not stored.holders:\n            self._pool.guard(stored)\n",
        "",
        MESSAGES,
    ),
    messages(
        "the first to let go of a message lets it go for all",
        "        if not stored.holders:\n            self._pool.unguard(stored)",
        "        self._pool.unguard(stored)",
        MESSAGES,
    ),
    messages(
        "the use of a message does not count",
        "            self._pool.stamp(stored, [])\n        if not",
        "        if not",
        MESSAGES,
    ),
    messages(
        "the last rows of a message have no page",
        "return -(-(end - start) // self._pool.tree.page_tokens) if",
        "return (end - start) // self._pool.tree.page_tokens if",
        MESSAGES,
    ),
    messages(
        "what a message does to states has too little room",
        "-(-effect_bytes // pool.item_bytes",
        "(effect_bytes // pool.item_bytes",
        MESSAGES,
    ),
]

CHECKING = [
    digests(
        "no change is ever found",
        "        if self._digest(*item) != digest:",
        "        if not digest:",
        DIGESTS,
    ),
    digests(
        "a change is not found when the item goes",
        "            self._compare(item)\n            self._remove(item)",
        "            self._remove(item)",
        DIGESTS,
    ),
    digests(
        "a change is not found when the item moves",
        "            self._compare((kind, target))\n",
        "",
        DIGESTS,
    ),
    digests(
        "nobody looks around",
        "            self._compare(self._random.choice(self._order))",
        "            self._random.choice(self._order)",
        DIGESTS,
    ),
    config(
        "HYBRID_CACHE_VERIFY=0 asks for the checking mode",
        'not in ("", "0")',
        'not in ("",)',
        DIGESTS,
    ),
    arena(
        "half of an item is not looked at",
        "self._rows[kind][item].cpu()",
        "self._rows[kind][item][::2].cpu()",
        DIGESTS,
    ),
    books(
        "the state that a prompt starts from is not compared",
        "        self.pool.verify(self.pool.items(source))\n",
        "",
        DIGESTS,
    ),
    books(
        "the pages that a prompt starts from are not compared",
        "        self.pool.verify((Kind.PAGE, node.page) for node in match.path)\n",
        "",
        DIGESTS,
    ),
    books(
        "a page that is taken over is not compared",
        "            self.pool.verify(((Kind.PAGE, node.page),))\n",
        "",
        DIGESTS,
    ),
    messages(
        "a message is not compared when it is held",
        "        self._pool.verify(self._pool.items(stored))\n        if not stored.holders:",
        "        if not stored.holders:",
        DIGESTS,
    ),
    messages(
        "a message is not compared after it was read",
        "            self._pool.verify(self._pool.items(stored))\n            self._pool.stamp",
        "            self._pool.stamp",
        DIGESTS,
    ),
]

PLANNING = [
    default_policy(
        "a conversation's new end does not take the place of its last",
        "return lowest[0] if lowest is not None and lowest[1] is kept else score",
        "return score",
        LEARNED,
    ),
    default_policy(
        "a state where many branch off is given up for the end of one",
        "kept = source.kept if source is not None and not source.branched else None",
        "kept = source.kept if source is not None else None",
        LEARNED,
    ),
    default_policy(
        "the share of returns that branch off is overlooked",
        "if worth.flops * (1.0 - branching) <= self._worth_of(kept).flops * branching:",
        "if False:",
        LEARNED,
    ),
    default_policy(
        "nothing stands by for the end of a conversation",
        "return min(likely, MOST_STANDS_BY) if likely >= LEAST_STANDS_BY else 0.0",
        "return 0.0",
        LEARNED,
    ),
    places(
        "a chain leads on to where it was before",
        "                place.onward = last\n",
        "                pass\n",
        LEARNED,
    ),
    places(
        "going on from a prompt instead of its answer counts as branching",
        "place.passed |= not outline.generated",
        "place.passed = True",
        LEARNED,
    ),
]

MUTANTS = [*PLANNING, *NAMING, *SAYING, *MATCHING, *PUBLISHING, *SHARING, *EVICTING, *KEEPING_MESSAGES, *CHECKING]
