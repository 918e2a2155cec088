"""Faults of tasks: who goes first, how a pause is known again, what is spared for it, and what comes back to it."""

from functools import partial

from tests.mutants.mutant import Mutant, tests_of

LINE = ("tests/engine/test_line.py",)
TASKS = ("tests/engine/test_tasks.py",)
INTERRUPTIONS = ("tests/engine/test_interruptions.py",)
HOST_TIER = ("tests/engine/test_host_tier.py",)
ORDERS = ("tests/scheduling/test_orders.py",)
OUTLOOK = ("tests/scheduling/test_outlook.py",)
PAUSES = ("tests/scheduling/test_pauses.py",)
TOOL_TIMES = ("tests/scheduling/test_tool_times.py",)
CLAIMS = ("tests/cache/test_claims.py",)
HOST = ("tests/cache/test_host.py",)
HOST_MEMORY = ("tests/device/test_host_memory.py",)

task_test = partial(tests_of, "tests/engine/test_tasks.py")
line = partial(Mutant, "hybrid_cache/engine/line.py")
tasks = partial(Mutant, "hybrid_cache/engine/tasks.py")
interruptions = partial(Mutant, "hybrid_cache/engine/interruptions.py")
engine = partial(Mutant, "hybrid_cache/engine/engine.py")
sampling = partial(Mutant, "hybrid_cache/sampling.py")
base = partial(Mutant, "hybrid_cache/scheduling/base.py")
learned = partial(Mutant, "hybrid_cache/scheduling/learned.py")
outlook = partial(Mutant, "hybrid_cache/scheduling/outlook.py")
pauses = partial(Mutant, "hybrid_cache/scheduling/pauses.py")
tool_times = partial(Mutant, "hybrid_cache/scheduling/tool_times.py")
books = partial(Mutant, "hybrid_cache/cache/books.py")
candidates = partial(Mutant, "hybrid_cache/cache/candidates.py")
claims = partial(Mutant, "hybrid_cache/cache/claims.py")
eviction = partial(Mutant, "hybrid_cache/cache/eviction.py")
host = partial(Mutant, "hybrid_cache/cache/host.py")
pool = partial(Mutant, "hybrid_cache/cache/pool.py")
host_memory = partial(Mutant, "hybrid_cache/device/host_memory.py")

WAITING = [
    line(
        "tenants do not take turns",
        "key=lambda each: (under_way[each], self._queues[each][0][0])",
        "key=lambda each: self._queues[each][0][0]",
        LINE,
    ),
    line(
        "who has lost what it returned to still goes first",
        "            if self._place(sequence) <= place:\n",
        "            if place:\n",
        LINE,
    ),
    line(
        "places that are no longer valid are kept",
        "if len(queue) > FEW + 2 * len(self._tickets):",
        "if len(queue) < 0:",
        task_test("those_who_leave_the_line_leave_nothing_in_it"),
    ),
    line(
        "calls of a task that runs are counted with those that begin",
        " and sequence.task is not None and not sequence.task.num_calls:",
        " and sequence.task is not None:",
        LINE,
    ),
    tasks(
        "the time between two tasks only grows",
        "NEWEST * (between_s - self._between_s)",
        "NEWEST * between_s",
        task_test("a_wait_is_as_long_as_it_took_those_before_to_begin"),
    ),
    tasks(
        "the time between two tasks is the time since the first",
        "else between_s\n            self._since_s = self.load.now\n",
        "else between_s\n",
        task_test("a_wait_is_as_long_as_it_took_those_before_to_begin"),
    ),
    tasks(
        "a task that had to give way begins once more",
        " and not sequence.task.num_calls and not sequence.started_s:",
        " and not sequence.task.num_calls:",
        task_test("a_request_that_had_to_give_way_and_calls_of_a_task_are_no_tasks_that_begin"),
    ),
    tasks(
        "those who are late never get their turn",
        "                self._late.add(sequence)\n",
        "",
        task_test("those_who_are_late_go_first_in_the_order_in_which_they_came"),
    ),
    tasks(
        "of those who are late the last goes first",
        "            return Rank.LATE, sequence.submitted_s\n",
        "            return Rank.LATE, -sequence.submitted_s\n",
        task_test("those_who_are_late_go_first_in_the_order_in_which_they_came"),
    ),
    tasks(
        "keys are not placed again when the wait has changed",
        "            self.waiting.place_again(self._jobs)\n",
        "            pass\n",
        task_test("when_the_order_turns_all_who_wait_are_placed_again"),
    ),
    tasks(
        "a task that returns is taken for a new one",
        "        if sequence.claim is None:\n            return Task(",
        "        if self.load:\n            return Task(",
        task_test("a_task_whose_history_was_edited_keeps_its_place_by_its_session_only"),
    ),
    tasks(
        "the whole prompt is taken for what a call has added",
        "new = len(prefill.tokens) - sequence.claim.num_tokens",
        "new = len(prefill.tokens)",
        task_test("what_a_call_has_added_and_how_many_a_task_made_is_learned"),
    ),
    tasks(
        "a task that returns to what the cache has does not go first",
        "            return Rank.HELD, sequence.submitted_s\n",
        "            pass\n",
        task_test("a_task_that_returns_goes_first_while_the_cache_has_what_it_returns_to"),
    ),
    tasks(
        "a task that returns goes first though nothing of it is there",
        "2 * claim.num_resumed >= claim.num_tokens > 0:",
        "claim.num_tokens > 0:",
        task_test("a_task_that_returns_goes_first_while_the_cache_has_what_it_returns_to"),
    ),
    tasks(
        "orders that know of no pauses let those who return go first",
        "claim is not None and self._order.resumes and",
        "claim is not None and",
        task_test("an_order_that_goes_by_requests_lets_nobody_overtake_who_returns"),
    ),
    tasks(
        "a task never makes a call",
        "        task.num_calls += 1\n",
        "",
        task_test("what_a_call_has_added_and_how_many_a_task_made_is_learned"),
    ),
]

SPARING = [
    tasks(
        "a newcomer evicts what is spared",
        "return self.pauses.keeps if busy else None",
        "return None",
        task_test("a_newcomer_waits_rather_than_evict_what_a_paused_task_will_return_to"),
    ),
    tasks(
        "a newcomer waits for what is spared though nobody runs",
        "return self.pauses.keeps if busy else None",
        "return self.pauses.keeps",
        TASKS,
    ),
    tasks(
        "what a task returned to is spared once it runs",
        "        self._drop_claim(sequence)\n        overdue =",
        "        overdue =",
        TASKS,
    ),
    tasks(
        "what a turn starts from goes where it adds no tile",
        "            self.began(sequence)  # its task",
        "            pass  # its task",
        TASKS,
    ),
    tasks(
        "what a request counted on is spared after its end",
        "            self._no_longer_new(sequence)\n        self._drop_claim(sequence)\n",
        "            self._no_longer_new(sequence)\n",
        task_test("nothing_is_spared_for_a_request_that_returned_and_was_aborted"),
    ),
    tasks(
        "what a preempted request has computed goes for others",
        "Pause(task=sequence.task, returned=True)",
        "Pause(task=sequence.task)",
        task_test("what_a_preempted_request_has_computed_is_spared_until_it_runs_again"),
    ),
    tasks(
        "a request that keeps its marks only keeps what its task returns to",
        " or not resumable(sequence) or sequence.prefill.only_marked:",
        " or not resumable(sequence):",
        task_test("a_request_that_keeps_its_marks_only_reserves_nothing"),
    ),
    pauses(
        "what a task counts on goes to others while it waits for its turn",
        "return claim.returned or (",
        "return (",
        PAUSES,
    ),
    pauses(
        "what ended in no call is spared",
        "(claim.tool is not None and self._order.keeps(claim, self._load))",
        "self._order.keeps(claim, self._load)",
        PAUSES,
    ),
    pauses(
        "a state that might be of use one day takes the place of what is spared",
        "        claims.keeps = self.keeps\n",
        "",
        PAUSES,
    ),
    pauses(
        "what a turn started from stays while it runs though a second tier has it",
        "return not self._load.host_bytes_per_s  #",
        "return True  #",
        PAUSES,
    ),
    candidates(
        "room for a state is taken from what is spared",
        "ceiling=score, spare=keeps)",
        "ceiling=score, spare=None)",
        TASKS,
    ),
    claims("a claim survives its drop", "        self._move(claim, None)\n", "        pass\n", CLAIMS),
    claims(
        "a claim ends with the state that it lies on",
        "self._move(claim, self._resumed_from(item.node if isinstance(item, Checkpoint) else item.parent))",
        "self._move(claim, None)",
        CLAIMS,
    ),
    claims(
        "a claim lies on a state that has left",
        "self._claims.pop(item, ())",
        "self._claims.get(item, ())",
        CLAIMS,
    ),
    claims(
        "nothing is there where the last page has no state",
        "        while node is not None and node.checkpoint is None:\n            node = node.parent\n",
        "",
        CLAIMS,
    ),
    pool(
        "a page that is counted on goes",
        "            if not self._spares(node, spare):\n",
        "            if node:\n",
        CLAIMS,
    ),
    pool(
        "a state that is counted on goes",
        "            if not self._spares(kept, spare):\n",
        "            if kept:\n",
        CLAIMS,
    ),
    pool(
        "a state that is guaranteed goes though it is counted on",
        "if guaranteed is None or self._spares(guaranteed, spare):",
        "if guaranteed is None:",
        CLAIMS,
    ),
    pool(
        "all that is counted on is asked about for each page",
        "return self._num_asked < MOST_ASKED",
        "return True",
        CLAIMS,
    ),
    pool(
        "what was spared stays even for those who run",
        "self.queues.spared(due=spare is not None)",
        "self.queues.spared(due=True)",
        TASKS,
    ),
    eviction(
        "what is spared is asked about as often however long it stays",
        "min(2 * self._patience.get(item, FIRST_SPARED_S / 2), MOST_SPARED_S)",
        "FIRST_SPARED_S",
        CLAIMS,
    ),
    eviction(
        "a page that went is still among those that are spared",
        "        self._dead.discard(node)\n        self._forget_spared(node)\n",
        "        self._dead.discard(node)\n",
        CLAIMS,
    ),
    books(
        "what a prompt starts from goes for a newcomer that needs all the room",
        "source is not None and spare is None and not keeps_end and",
        "source is not None and not keeps_end and",
        CLAIMS,
    ),
    books(
        "a task takes away the state that it will return to", "        if stays:\n", "        if not stays:\n", CLAIMS
    ),
    books(
        "what is spared goes where there is no room for a copy of a state",
        "rest = self.pool.take(num_slots=num_slots - 1, num_pages=num_others, num_held=num_held, spare=spare)",
        "rest = self.pool.take(num_slots=num_slots - 1, num_pages=num_others, num_held=num_held)",
        CLAIMS,
    ),
    books(
        "room is taken for the end of a prompt though its state is there",
        "        return None if node and (node.checkpoint or node.awaited) else position\n",
        "        return position\n",
        CLAIMS,
    ),
]

RETURNING = [
    pauses(
        "a call that is told of twice is paused twice",
        "        self._num_paused += turn.pause.tool is None\n",
        "        self._num_paused += 1\n",
        PAUSES,
    ),
    pauses(
        "orders that decide at a call are not told of it",
        "        self._order.paused(turn.pause, self._load)\n",
        "",
        PAUSES,
    ),
    pauses(
        "of several that said the same the first gets what was computed",
        "        if len(found) == 1:  #",
        "        if found:  #",
        PAUSES,
    ),
    pauses(
        "what was computed of an answer is not counted on",
        "            self._claims.place(found[0].pause, tip, max(",
        "            str.format(found[0].pause, tip, max(",
        PAUSES,
    ),
    pauses(
        "the same prompt once more is what comes after it",
        "if t.num_prompt < keys.num_tokens)",
        "if t.num_prompt <= keys.num_tokens)",
        PAUSES,
    ),
    pauses(
        "a tenant goes on with the task of another",
        "(t for t in longer if t.pause.task.tenant == tenant)",
        "longer",
        task_test("sessions_of_two_tenants_are_two"),
    ),
    pauses(
        "of two calls of a session the first is taken for the one that was edited",
        "if len(turns) != 1 or",
        "if not turns or",
        PAUSES,
    ),
    pauses(
        "a request without the tools of a session's task takes its place",
        "if len(turns) != 1 or turns[0].pause.task.kind != kind:",
        "if len(turns) != 1:",
        PAUSES,
    ),
    pauses(
        "a session's request that answers nothing takes the place of its task",
        "if answers is None else answers):",
        "if answers is None else True):",
        PAUSES,
    ),
    pauses(
        "where nobody knows, any request of a session takes the place of its task",
        "if not (turns[0].first == _first_of(keys) if",
        "if not (True if",
        PAUSES,
    ),
    pauses(
        "what is said of an id is of an earlier request",
        "        self._by_request.pop(request_id, None)\n\n    def over",
        "        pass\n\n    def over",
        PAUSES,
    ),
    tasks(
        "those who are kept out make others wait longer",
        "            if overdue:  # or",
        "            if False:  # or",
        task_test("nor_does_it_make_those_who_come_later_wait_longer"),
    ),
    tasks(
        "an answered call counts as a result",
        'since = len(roles) - roles[::-1].index("assistant") if "assistant" in roles else 0',
        "since = 0",
        TASKS,
    ),
    engine(
        "an idle engine forgets no call",
        "        if self.forgets_in_s <= 0:\n            self._scheduler.tasks.look()\n",
        "",
        task_test("a_call_that_is_never_answered_is_forgotten_without_anybody_coming"),
    ),
    interruptions(
        "a pause loses tokens that a grammar has passed",
        "        sequence.chooser.owe(before.forced, self._intake.vocab_size)\n",
        "",
        ("tests/engine/test_constraints.py",),
    ),
    sampling(
        "tokens that are owed draw random numbers",
        "0.0 if self.params.greedy or self._owes else",
        "0.0 if self.params.greedy else",
        ("tests/engine/test_constraints.py",),
    ),
    pauses(
        "what was edited away counts as there",
        "        self._claims.drop(turns[0].pause)\n        return turns[0]\n",
        "        return turns[0]\n",
        PAUSES,
    ),
    pauses(
        "who called nothing goes on with the same task",
        "        if pause.tool is None:\n",
        "        if pause is None:\n",
        PAUSES,
    ),
    pauses(
        "how long a call took is learned of the next one",
        "task.num_calls - 1, seconds)",
        "task.num_calls, seconds)",
        PAUSES,
    ),
    pauses(
        "a pause is never forgotten",
        " and age < FORGOTTEN_AFTER_S:",
        " and age >= 0:",
        PAUSES,
    ),
    pauses(
        "there is no bound to pauses",
        "if len(self._turns) <= MOST_PAUSES and age",
        "if age",
        PAUSES,
    ),
    pauses(
        "another session goes on from what has the same beginning",
        "known = named or [t for t in known if not t.session]",
        "known = named or known",
        PAUSES,
    ),
    pauses(
        "a later request of the same name is forgotten with an earlier one",
        "        if self._by_request.get(turn.request_id) is turn:\n",
        "        if turn.request_id in self._by_request:\n",
        PAUSES,
    ),
    pauses(
        "what a task counted on is spared after its end",
        "task.spent_s)\n        self._claims.drop(turn.pause)\n",
        "task.spent_s)\n",
        PAUSES,
    ),
    interruptions(
        "a request that is continued begins a task of its own",
        "        sequence.continues = request_id\n",
        "",
        task_test("a_request_that_is_paused_while_it_waits_keeps_its_place"),
    ),
    interruptions(
        "what was said before a pause is not computed for the cache",
        "        self._scheduler.canonical.add_turn(sequence)\n",
        "",
        INTERRUPTIONS,
    ),
    interruptions(
        "each part of an answer may be as long as the whole",
        "request.sampling.max_tokens - done, max(",
        "request.sampling.max_tokens, max(",
        INTERRUPTIONS,
    ),
    interruptions(
        "what is added does not count for the repetition penalty",
        "        sequence.chooser.go_on(prompt.tokens)\n",
        "",
        INTERRUPTIONS,
    ),
    interruptions(
        "there is no bound to requests that are paused",
        "if len(self._open) >= MOST_INTERRUPTED:",
        "if len(self._open) < 0:",
        INTERRUPTIONS,
    ),
]

LEARNING = [
    base(
        "a hint is believed for ever",
        "if pause.hint_s is not None and elapsed < pause.hint_s:",
        "if pause.hint_s is not None:",
        ORDERS,
    ),
    base(
        "what a second tier has counts as to be computed",
        "if self.host_bytes_per_s else seconds",
        "if self.host_bytes_per_s < 0 else seconds",
        ORDERS,
    ),
    learned(
        "a huge task is put back without bound",
        "self._wait_s * min(self._eagerness * size, self._most_later)",
        "self._wait_s * self._eagerness * size",
        ORDERS,
    ),
    learned(
        "what has gone is kept like what is there",
        "        num_tokens = pause.num_resumed\n",
        "        num_tokens = pause.num_tokens\n",
        ORDERS,
    ),
    learned(
        "room is reserved for contexts that a second tier takes",
        "    if not load.host_bytes_per_s:\n",
        "    if load:\n",
        ORDERS,
    ),
    tool_times(
        "the newest time is forgotten",
        "self.rising.remove(self._latest.popleft())",
        "self.rising.remove(self._latest.pop())",
        TOOL_TIMES,
    ),
    tool_times(
        "a tool of which nothing is known is always about to be done",
        "        return max(UNKNOWN_S, elapsed)\n",
        "        return UNKNOWN_S\n",
        TOOL_TIMES,
    ),
    tool_times(
        "a tool is forgotten though it is used",
        "            self._tools.move_to_end(key)\n",
        "",
        TOOL_TIMES,
    ),
    outlook(
        "the more is known the less a mean moves",
        "self.count = min(self.count + 1, MEMORY)",
        "self.count += 1",
        OUTLOOK,
    ),
    outlook("the last turn of a task ends in a call", ".add(left > 0)", ".add(left >= 0)", OUTLOOK),
    outlook(
        "a kind of task is forgotten though it is heard of",
        "self._habits.pop(key, None) or Habits()",
        "self._habits.get(key) or Habits()",
        OUTLOOK,
    ),
]

SECOND_TIER = [
    host(
        "what is counted on is lost where the second tier is full",
        "if not (claimed or self._stateless or self._has_room):",
        "if not (self._stateless or self._has_room):",
        HOST,
    ),
    host(
        "what nobody counts on makes others go from the second tier",
        "self._allocator.free_bytes * ROOMY > self.budget_bytes",
        "self._allocator.free_bytes >= 0",
        HOST,
    ),
    host(
        "pages before a state are not copied",
        "            node.wanted = True\n",
        "            pass\n",
        HOST,
    ),
    host(
        "pages are copied though no state needs them",
        "        if node.wanted or self._stateless:\n",
        "        if node:\n",
        HOST,
    ),
    host(
        "what is about to come back is dropped",
        "(entry for entry in self._items if entry not in self._held)",
        "iter(self._items)",
        HOST,
    ),
    host(
        "what has moved is looked for where it was",
        "            self._items[entry] = target\n",
        "            pass\n",
        HOST_TIER,
    ),
    host(
        "all namespaces are dropped with one",
        "if namespace in (None, owner)]",
        "if owner is not None]",
        HOST,
    ),
    host(
        "a prompt comes back from its first state",
        "range(deepest, least, -1) if",
        "range(least + 1, deepest + 1) if",
        HOST,
    ),
    host(
        "the last page of what comes back may go",
        "for n in range(first + 1, end + 1)}",
        "for n in range(first + 1, end)}",
        HOST,
    ),
    host(
        "of one prefix the first pages go first",
        "for n in range(end, 0, -1):",
        "for n in range(1, end + 1):",
        HOST,
    ),
    host(
        "what came back once never goes",
        "        self.let_go()\n",
        "        pass\n",
        HOST,
    ),
    pool(
        "nobody counts on what goes to the second tier",
        "claimed=bool(self.claims.on(kept))",
        "claimed=False",
        HOST,
    ),
    host_memory(
        "a state is loaded from the wrong place",
        "self._arena.row(command.kind, command.host)",
        "self._arena.row(command.kind, command.item)",
        HOST_MEMORY,
    ),
    host_memory(
        "what moves in the second tier leaves its bytes behind",
        "            self._arena.move(command.kind, command.moves)",
        "            pass",
        HOST_MEMORY,
    ),
]

MUTANTS = [*WAITING, *SPARING, *RETURNING, *LEARNING, *SECOND_TIER]
