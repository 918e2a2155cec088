"""Faults of the choreography: what is moved where, stored under which name, composed how, and in which order."""

from functools import partial

from tests.mutants.mutant import Mutant, tests_of

COMPOSE = ("tests/choreography/test_compose.py",)
ORDER = ("tests/choreography/test_order.py",)
PLAN = ("tests/choreography/test_plan.py",)
WORKFLOW = "tests/choreography/test_workflow.py::"
LAYERS = "tests/choreography/test_layers.py::"
LLAMA = (LAYERS + "test_one_layer_composes_messages_in_any_order[torch-llama of one layer-(2, 0, 3, 1)]",)

stage_test = partial(tests_of, "tests/choreography/test_stage.py")
stored = partial(tests_of, "tests/choreography/test_stored.py")
variants = partial(tests_of, "tests/choreography/test_variants.py")
compiler = partial(Mutant, "hybrid_cache/choreography/compiler.py")
composition = partial(Mutant, "hybrid_cache/device/composition.py")
program = partial(Mutant, "hybrid_cache/choreography/program.py")
stage = partial(Mutant, "hybrid_cache/choreography/stage.py")
compose = partial(Mutant, "hybrid_cache/device/compose.py")
effects = partial(Mutant, "hybrid_cache/device/effects.py")
order = partial(Mutant, "hybrid_cache/choreography/order.py")
plan = partial(Mutant, "hybrid_cache/choreography/plan.py")
book = partial(Mutant, "hybrid_cache/choreography/book.py")
book_test = partial(tests_of, "tests/choreography/test_book.py")

MOVING = [
    compiler(
        "messages of different seams have one name",
        'return f"{namespace}/{name}/{seam}"',
        'return f"{namespace}/{name}/"',
        stored("a_message_is_stored_apart_for_each_seam"),
    ),
    compiler(
        "messages of different models have one name",
        'return f"{namespace}/{name}/{seam}"',
        'return f"{name}/{seam}"',
        variants("what_one_has_stored_is_computed_by_another"),
    ),
    composition(
        "all models have the rotary frequencies and decays of one",
        "self.maps = defaultdict[str, EffectMap](EffectMap)",
        "self.maps = defaultdict[str, EffectMap](lambda one=EffectMap(): one)",
        variants("what_each_stores_and_says_is_what_it_does_alone"),
    ),
    stage(
        "keys turn the wrong way",
        "s.position - s.stored.position)",
        "s.stored.position - s.position)",
        LLAMA,
    ),
    stage(
        "keys are not rotated",
        "s.position - s.stored.position)",
        "0)",
        LLAMA,
    ),
    composition(
        "a message keeps what the context before it did to the states",
        "part.transition.take_away(part.state[command.slot], part.of(numbers), part.state[command.base])",
        "pass",
        stage_test("an_answer_put_back_behind_its_context_gives_what_encoding_it_gives"),
    ),
    stage(
        "a message of one of several in a chunk has the states of the last",
        "self._cache.messages.copy_slot(program.states.get(end, lease.slot), stored.slot)",
        "self._cache.messages.copy_slot(lease.slot, stored.slot)",
        stage_test("messages_of_one_chunk_are_what_they_are_in_several"),
    ),
    composition(
        "the last terms of an effect are not written down",
        "self._making.pop(command.items[0]).flush()",
        "self._making.pop(command.items[0])",
        stored("an_effect_is_the_same_however_its_tokens_were_computed"),
    ),
    stage(
        "what was recorded for a message without room is lost",
        "        if stored is None:\n            self._drop(span.items)\n",
        "        if stored is None:\n",
        stage_test("too_little_room_means_computing"),
    ),
    composition(
        "windows before the last long message are what remains",
        "effects[long[-1] if long else 0 :]",
        "effects[long[-1] + 1 if long else 0 :]",
        stage_test("calls_run_side_by_side_and_do_not_change_each_other"),
    ),
    composition(
        "a window keeps its oldest rows",
        "torch.cat([window[num_tokens:], later[width - num_tokens :]])",
        "torch.cat([window[: width - num_tokens], later[width - num_tokens :]])",
        stored("a_window_is_the_last_rows_of_all_that_came"),
    ),
    composition(
        "a window is that of a short message alone",
        "    elif num_tokens:\n",
        "    elif num_tokens and window.copy_(later) is None:\n",
        stored("a_window_is_the_last_rows_of_all_that_came"),
    ),
    composition(
        "windows go on from what a slot held before",
        "            if command.from_zero:\n                tensors.conv[slot] = 0\n",
        "",
        stored("what_follows_a_short_message_sees_an_empty_window_before_it"),
    ),
    composition(
        "the second messages of many are composed from zero, too",
        "from_zero=command.from_zero and not first)",
        "from_zero=command.from_zero)",
        stored("more_messages_than_are_looked_at_together_are_composed_one_after_the_other"),
    ),
    composition(
        "states go on from what a slot held before",
        "                    tensors.state[command.slot] = 0\n",
        "",
        stored("nothing_is_read_that_nobody_wrote"),
    ),
    program(
        "messages at several places are computed as if at one",
        "(found and not (self.joins and step.shift == found[0].shift))",
        "(found and not self.joins)",
        stored("siblings_at_one_place_are_the_same_in_one_chunk_and_in_several"),
    ),
    program(
        "an answer that is forked has the positions of its places",
        "return Program(self.namespace, deque(), self.plan, shift=self.shift)",
        "return Program(self.namespace, deque(), self.plan)",
        stored("several_answers_to_siblings_at_one_place_have_the_positions_of_one"),
    ),
    stage(
        "an answer whose beginning was not recorded is kept",
        "if index == program.answer_at and program.span is None:",
        "if index >= program.answer_at >= 0 and program.span is None:",
        stored("an_answer_whose_beginning_was_not_recorded_is_not_kept"),
    ),
    compiler(
        "the rest of a message is stored as the message",
        "part is not passing and first == item.start",
        "part is not passing",
        stored("the_rest_of_a_message_that_a_prefix_ends_in_is_not_the_message"),
    ),
    compiler(
        "what is being stored already is computed twice",
        "if key and not self.is_stored(key) and not self.is_making(key):",
        "if key and not self.is_stored(key):",
        stored("a_message_that_comes_twice_is_recorded_once"),
    ),
    compiler(
        "a message that is about to be used may go",
        "        self._messages.hold(message)\n",
        "        message.holders += 1\n",
        stored("what_a_broken_off_request_has_held_may_go"),
    ),
    stage(
        "the message of a prompt that was broken off is never made",
        "                self._making.discard(step.keep)\n",
        "                pass\n",
        stored("what_a_broken_off_request_was_making_is_made_by_the_next"),
    ),
    stage(
        "the message of a prompt that was broken off is held for ever",
        "                self._cache.messages.let_go(step.stored, used=False)\n",
        "                pass\n",
        stored("what_a_broken_off_request_has_held_may_go"),
    ),
    stage(
        "what a prompt that was broken off has recorded is lost",
        "            self._drop(items)\n        program.steps.clear()",
        "            pass\n        program.steps.clear()",
        stage_test("an_aborted_request_leaves_nothing_behind"),
    ),
    stage(
        "what an answer gives up is lost",
        "        self._drop(program.span.items)\n        program.span = None\n        self._give_back",
        "        program.span = None\n        self._give_back",
        stored("what_an_answer_gives_up_is_free"),
    ),
    stage(
        "slots between messages are not given back",
        "            self._cache.messages.return_slot(program.states.pop(index))",
        "            program.states.pop(index)",
        stored("nothing_is_lent_when_all_is_done"),
    ),
    compiler(
        "the last message is stored though nobody waits for it",
        "return part.num_tokens * num_others(part.id) <= STEP_TOKENS",
        "return False",
        (
            WORKFLOW + "test_answers_can_be_attended_to",
            WORKFLOW + "test_a_short_last_message_is_stored_if_others_wait_for_it",
        ),
    ),
    compiler(
        "the last message is not stored though others wait for it",
        "return part.num_tokens * num_others(part.id) <= STEP_TOKENS",
        "return True",
        (WORKFLOW + "test_a_short_last_message_is_stored_if_others_wait_for_it",),
    ),
    compiler(
        "the first message is encoded by itself before its prompt",
        "            if i >= first\n",
        "            if i >= 0\n",
        stage_test("messages_are_stored_once_whoever_asks"),
    ),
    compiler(
        "matrices are averaged over all orders",
        "if arrangement.composition is Composition.PERMUTATIONS and not self.traits.commutes:",
        "if not arrangement:",
        stage_test("what_a_model_cannot_give_is_exact_and_says_so"),
    ),
    compiler(
        "what a model cannot give is done",
        "        if arrangement.fidelity not in self.traits.fidelities:\n",
        "        if not arrangement:\n",
        stage_test("what_a_model_cannot_give_is_exact_and_says_so"),
    ),
]

COMPOSING = [
    compose(
        "each message has the effect of the one before it",
        "ps, sums = ps[1:], sums[1:]",
        "ps, sums = ps[:-1], sums[1:]",
        COMPOSE,
    ),
    compose("rotations mix up effects", "ps.roll(-i, 0)", "ps.roll(i, 0)", COMPOSE),
    compose(
        "the last message has the effect of the first",
        "transition.follow(h, ps[-1:], sums[-1:])",
        "transition.follow(h, ps[:1], sums[-1:])",
        COMPOSE,
    ),
    compose("means of products are wrong", "(n + 1 - m) * longer[m]", "(n + 2 - m) * longer[m]", COMPOSE),
    compose(
        "the state before is not changed by permuted messages",
        "    h.mul_(torch.stack(factors).prod(0))\n",
        "",
        COMPOSE,
    ),
    compose("from zero goes on from what is there", "        h.zero_()\n", "        pass\n", COMPOSE),
    effects(
        "decays of the messages before are taken, not of those after",
        "return ps.flip(0).cumsum(0).flip(0) if len(ps) > 1 else ps",
        "return ps.cumsum(0) if len(ps) > 1 else ps",
        COMPOSE,
    ),
    effects(
        "what was before a message is added once more",
        "h.addcmul_(before, _spread(p.exp(), h), value=-1)",
        "h.addcmul_(before, _spread(p.exp(), h), value=1)",
        COMPOSE,
    ),
    effects(
        "what was before a message of Mamba-1 is added once more",
        "h.addcmul_(before, (p[:, None] * self.A).exp_(), value=-1)",
        "h.addcmul_(before, (p[:, None] * self.A).exp_(), value=1)",
        COMPOSE,
    ),
    effects(
        "what was before a message of a delta net is added once more",
        "h.baddbmm_(before, p, alpha=-1)",
        "h.baddbmm_(before, p, alpha=1)",
        COMPOSE,
    ),
    effects(
        "matrices are applied from the wrong side",
        "torch.baddbmm(s, h.clone(), p, out=h)",
        "torch.baddbmm(s, h.clone(), p.transpose(1, 2), out=h)",
        COMPOSE,
    ),
    effects(
        "sums forget what was written down before",
        "torch.cat([self.numbers.read(0, self.num_sums)[None], *self._terms])",
        "torch.cat(self._terms)",
        stored("an_effect_is_the_same_however_its_tokens_were_computed"),
    ),
    effects(
        "sums begin with what was there before",
        "            numbers.write(0, torch.zeros(num_sums))\n",
        "            pass\n",
        stored("nothing_is_read_that_nobody_wrote"),
    ),
    effects(
        "matrices begin anew with each chunk",
        "        if self.started:\n",
        "        if not self.numbers:\n",
        stored("an_effect_is_the_same_however_its_tokens_were_computed"),
    ),
    effects(
        "all matrices lie in one place",
        "        self._matrix_start += heads * size * size\n",
        "",
        stored("nothing_is_read_that_nobody_wrote"),
    ),
    effects(
        "an effect in several items is read from the first",
        "yield self.rows[self.items[index], first:last]",
        "yield self.rows[self.items[0], first:last]",
        stored("numbers_go_on_from_one_item_to_the_next"),
    ),
    effects(
        "of a layer's terms only the last row counts",
        "runs = (self._latest[rows].sum(0) for rows, _ in self._runs)",
        "runs = (self._latest[rows][-1] for rows, _ in self._runs)",
        stored("an_effect_is_the_same_however_its_tokens_were_computed"),
    ),
]

ORDERING = [
    order(
        "an order is settled a page too early",
        "return max(self.known) // TILE < self.num_tokens // TILE",
        "return max(self.known) // TILE <= self.num_tokens // TILE",
        ORDER,
    ),
    order(
        "an order is settled by its states, whatever has rows",
        "return max(self.known) // TILE < self.num_tokens // TILE",
        "return self.known[0] // TILE < self.num_tokens // TILE",
        ORDER,
    ),
    order(
        "of equal orders the last is taken",
        "if beginning.known > best.known:",
        "if beginning.known >= best.known:",
        ORDER,
    ),
    order(
        "the search ends as soon as there are rows of all",
        "if min(best.known) // TILE >= num_pages:",
        "if max(best.known) // TILE >= num_pages:",
        ORDER,
    ),
    order(
        "the search has no end",
        "if in_vain == most_in_vain or len(self._asked) >= MOST_ASKED:",
        "if in_vain == most_in_vain:",
        ORDER,
    ),
    order(
        "beginnings that end in one page are all asked about",
        "beginning.known if same else self._ask(order)",
        "self._ask(order)",
        ORDER,
    ),
    order(
        "the last message may change places",
        "(bool(parts[i].id) and i != last, parts[i].role)",
        "(bool(parts[i].id), parts[i].role)",
        (*ORDER, *stage_test("unordered_messages_stand_where_the_cache_has_them")),
    ),
    order(
        "messages of different roles change places",
        "(bool(parts[i].id) and i != last, parts[i].role)",
        "(bool(parts[i].id) and i != last, 0)",
        stage_test("messages_of_different_roles_keep_their_order"),
    ),
    order(
        "marks stay where they were",
        "[replace(b, position=b.position - start + position) for b in inside]",
        "[replace(b, position=b.position) for b in inside]",
        ORDER,
    ),
    order(
        "the mark at the end of a message goes with the next",
        "if start < b.position <= end]",
        "if start <= b.position < end]",
        ORDER,
    ),
    order(
        "where siblings are many the worst one comes next",
        "beginning = max((self._longer(beginning, i) for i in left)",
        "beginning = min((self._longer(beginning, i) for i in left)",
        ORDER,
    ),
]

PLANNING = [
    plan(
        "the dearest plan is taken",
        "return min(plans, key=lambda plan: plan.flops)",
        "return max(plans, key=lambda plan: plan.flops)",
        PLAN,
    ),
    plan(
        "the message before the answer is moved",
        "elif start >= prefix and name and start + seam < end < num_tokens and is_stored(name):",
        "elif start >= prefix and name and start + seam < end and is_stored(name):",
        PLAN,
    ),
    plan(
        "a message that a prefix ends in is moved",
        "elif start >= prefix and name and",
        "elif name and",
        PLAN,
    ),
    plan(
        "a message that is all seam is moved",
        "start + seam < end < num_tokens",
        "start + seam <= end < num_tokens",
        PLAN,
    ),
    plan(
        "the seam costs nothing",
        "items.append(Item(name, moved, start, end, seam, cost.flops(start, start + seam), why))",
        "items.append(Item(name, moved, start, end, 0, 0.0, why))",
        PLAN,
    ),
    plan(
        "siblings at one place go on from a prefix",
        "        prefix = 0  # in the cache a message stands after the one before it\n",
        "        pass\n",
        PLAN,
    ),
    plan(
        "an exact plan computes what the prefix holds",
        "first = min(max(start, prefix), end)",
        "first = start",
        PLAN,
    ),
    plan(
        "a model of attention alone composes states",
        "moved = Action.COMPOSED if states else Action.RELOCATED",
        "moved = Action.COMPOSED",
        PLAN,
    ),
]

REMEMBERING = [
    book(
        "what was sent takes nothing",
        "getsizeof(text) + sent_bytes",
        "getsizeof(text)",
        book_test("bytes_are_those_of_tokens_text_and_what_was_sent"),
    ),
    book(
        "a large message drops all others",
        "if num_bytes > self.most_bytes // SHARE:",
        "if False:",
        book_test("a_message_that_is_too_large_is_gone_at_once_and_costs_no_other"),
    ),
    book(
        "a message is found from any namespace",
        "key=blake2b(namespace.encode()).digest(), ",
        "",
        book_test("what_was_dropped_is_gone_and_not_unknown"),
    ),
    Mutant(
        "hybrid_cache/choreography/arrangement.py",
        "a namespace and its context run into each other",
        'digest.update(len(part).to_bytes(8, "little") + part)',
        "digest.update(part)",
        book_test("no_two_namespaces_and_contexts_have_one_id"),
    ),
]

MUTANTS = [*MOVING, *COMPOSING, *ORDERING, *PLANNING, *REMEMBERING]
