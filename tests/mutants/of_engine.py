"""Faults of the engine: whose turn it is, who gives up its room, what is fed, committed, chosen and told."""

from functools import partial

from tests.mutants.mutant import Mutant, tests_of

ENGINE = ("tests/engine/test_engine.py",)
SCHEDULER = ("tests/engine/test_scheduler.py",)
BOTH = SCHEDULER + ENGINE
OUT_OF_MEMORY = ("tests/engine/test_out_of_memory.py",)
SAMPLER = ("tests/engine/test_sampler.py",)
FAILURES = ("tests/engine/test_failures.py",)
SUSPECTS = ("tests/engine/test_suspects.py",)
ORDER = ("tests/choreography/test_order.py",)
BESIDE = "tests/choreography/test_beside_exact.py::"
TURNS = ("tests/choreography/test_layers.py::test_keys_turn_to_wherever_a_message_stands",)
ENDINGS = ("tests/engine/test_endings.py",)
SIGNALS = ("tests/api/server/test_signals.py",)
OWNED = (BESIDE + "test_a_composed_prompt_owns_all_pages_beyond_its_state",)

stage_test = partial(tests_of, "tests/choreography/test_stage.py")
stored = partial(tests_of, "tests/choreography/test_stored.py")
canonical = partial(Mutant, "hybrid_cache/engine/canonical.py")
encodings = partial(Mutant, "hybrid_cache/engine/encodings.py")
intake = partial(Mutant, "hybrid_cache/engine/intake.py")
prefills = partial(Mutant, "hybrid_cache/engine/prefills.py")
sampling = partial(Mutant, "hybrid_cache/sampling.py")
worker = partial(Mutant, "hybrid_cache/device/worker.py")
scheduler = partial(Mutant, "hybrid_cache/engine/scheduler.py")
sharing = partial(Mutant, "hybrid_cache/engine/sharing.py")
engine = partial(Mutant, "hybrid_cache/engine/engine.py")
outcomes = partial(Mutant, "hybrid_cache/engine/outcomes.py")
sequence = partial(Mutant, "hybrid_cache/engine/sequence.py")
namespaces = partial(Mutant, "hybrid_cache/namespaces.py")
sampler = partial(Mutant, "hybrid_cache/device/sampler.py")
tasks = partial(Mutant, "hybrid_cache/engine/tasks.py")
suspects = partial(Mutant, "hybrid_cache/engine/suspects.py")
endings = partial(Mutant, "hybrid_cache/engine/endings.py")

SCHEDULING = [
    tasks(
        "who is preempted goes to the end of the queue",
        "            return Rank.GAVE_WAY, 0.0",
        "            return Rank.NEW, self.load.now",
        SCHEDULER,
    ),
    scheduler(
        "the oldest is preempted",
        "self._preempt(max(self._running, key=lambda s: s.rank))",
        "self._preempt(min(self._running, key=lambda s: s.rank))",
        SCHEDULER,
    ),
    scheduler(
        "a small prompt overtakes one that waits for room",
        "match, gap):\n                passed_over.append(sequence)\n                break\n",
        "match, gap):\n                passed_over.append(sequence)\n                continue\n",
        SCHEDULER,
    ),
    sharing(
        "a prompt waits for one of another namespace",
        "not (other.namespace == prefill.namespace or other.namespace in namespaces):",
        "not True:",
        SCHEDULER,
    ),
    sharing(
        "a prompt waits for one that publishes nothing",
        "            if not other.publish or not (",
        "            if not (",
        SCHEDULER,
    ),
    sharing(
        "a prompt waits for a state at its very end",
        "min(_alike(other, prefill), len(prefill.tokens) - 1)",
        "min(_alike(other, prefill), len(prefill.tokens))",
        SCHEDULER,
    ),
    sharing(
        "nobody waits for a prefix that is on its way",
        "                wish_for(owner, shared)\n                return True\n",
        "                pass\n",
        ENGINE,
    ),
    prefills(
        "a state at the end of a chunk is not kept",
        "prefill.wishes[0].position <= end:",
        "prefill.wishes[0].position < end:",
        ENGINE,
    ),
    scheduler(
        "a prompt takes as many tiles beside a decode as alone",
        "self._cut_chunks(self._max_tiles_beside_decode if decodes else self._max_tiles, bool(decodes))",
        "self._cut_chunks(self._max_tiles, bool(decodes))",
        SCHEDULER,
    ),
    scheduler(
        "several prompts have as many tiles each",
        "            tiles -= chunk.most_tiles\n",
        "",
        SCHEDULER,
    ),
    canonical(
        "a finished answer is computed again in one step",
        "return self._prefills.cut(turn, None, 1)",
        "return self._prefills.cut(turn, None, 16)",
        SCHEDULER,
    ),
    canonical(
        "what the cache has of an answer is computed again",
        "if known.length >= len(turn.tokens):",
        "if known.length > len(turn.tokens):",
        SCHEDULER,
    ),
    scheduler(
        "an answer that is computed again keeps its room from a prompt",
        "        if not (self.canonical.give_room() or (gap is None and self.twins.give_room())):",
        "        if not (gap is None and self.twins.give_room()):",
        SCHEDULER,
    ),
    scheduler(
        "an answer that is computed again keeps its room from a decode",
        "if not (self.canonical.give_room() or self.twins.give_room() or self._forgo_answer()):",
        "if not (self.twins.give_room() or self._forgo_answer()):",
        SCHEDULER,
    ),
    scheduler(
        "an answer that is to be kept stands in its own way",
        "if not (self.canonical.give_room() or self.twins.give_room() or self._forgo_answer()):",
        "if not (self.canonical.give_room() or self.twins.give_room()):",
        ("tests/choreography/test_progress.py",),
    ),
    canonical(
        "what a canonical pass held is lost",
        "        self._release(turn)\n        self._queue.remove(turn)",
        "        self._queue.remove(turn)",
        SCHEDULER,
    ),
    scheduler(
        "messages in the making are nobody's work",
        "return not (self._waiting or self._running or self.messages)",
        "return not (self._waiting or self._running)",
        stage_test("an_answer_becomes_a_message"),
    ),
    encodings(
        "all messages of a prompt are begun at once",
        "if len(self._messages) >= self.most:",
        "if len(self._messages) < 0:",
        SCHEDULER,
    ),
    encodings(
        "what could not be stored is tried for ever",
        "            prefill.refused.add(key)  # it is tried once\n",
        "",
        stored("a_message_without_room_is_tried_once_and_computed_in_its_place"),
    ),
    encodings(
        "the lease of a message without room is lost",
        "            if lease is not None:\n                self._cache.release(lease)\n            return False",
        "            return False",
        stored("a_message_without_room_is_tried_once_and_computed_in_its_place"),
    ),
    encodings(
        "a message alone begins with what its slot held before",
        "        self._stage.clear(lease)\n        self._messages.append(message)",
        "        self._messages.append(message)",
        stored("nothing_is_read_that_nobody_wrote"),
    ),
    prefills(
        "a prompt that begins with a message alone begins with what its slot held before",
        "            if prefill.from_zero:\n                self._stage.clear(lease)\n",
        "",
        stored("nothing_is_read_that_nobody_wrote"),
    ),
    encodings(
        "the pages of a message alone enter the tree",
        "lease = self._cache.acquire(nothing, message.keys, publish=False)",
        "lease = self._cache.acquire(nothing, message.keys)",
        stored("arranged_prompts_and_messages_leave_nothing_in_the_prefix_tree"),
    ),
    prefills(
        "a program that is broken off keeps what it holds",
        "            self._stage.end(prefill.program)\n",
        "            pass\n",
        stage_test("an_aborted_request_leaves_nothing_behind"),
    ),
    prefills(
        "a prefix may reach into the header of an answer",
        "end = min(prefill.arrangement.answer_start or len(prefill.tokens), len(prefill.tokens) - 1)",
        "end = len(prefill.tokens) - 1",
        stored("what_an_answer_began_with_is_kept_though_the_cache_has_a_state_behind_it"),
    ),
    prefills(
        "an arranged prompt that must not be cached reads the cache",
        "prefill.keys.beginning(end if prefill.reuse else 0)",
        "prefill.keys.beginning(end)",
        stored("an_arranged_request_that_wants_nothing_cached_starts_from_no_prefix"),
    ),
    sharing(
        "an order is chosen by prompts of another namespace",
        "if prefill.publish and prefill.namespace == namespace:",
        "if prefill.publish:",
        ORDER,
    ),
    sharing(
        "an order is chosen by prompts that publish nothing",
        "if prefill.publish and prefill.namespace == namespace:",
        "if prefill.namespace == namespace:",
        ORDER,
    ),
    scheduler(
        "messages that memory was missing for are tried for ever",
        "        for message in messages:\n            self.messages.end(message)\n",
        "",
        OUT_OF_MEMORY,
    ),
    scheduler(
        "messages beside one that could not be written go on",
        "        for message in list(self.messages):\n            self.messages.end(message)\n",
        "",
        OUT_OF_MEMORY,
    ),
    scheduler(
        "a message without memory ends the engine",
        "if num_tiles <= 1 and num_sequences <= 1 and not messages:",
        "if num_tiles <= 1 and num_sequences <= 1:",
        OUT_OF_MEMORY,
    ),
]

FAIR = ("tests/engine/test_fairness.py",)
BETWEEN = ("tests/engine/test_between_layers.py",)
shares = partial(Mutant, "hybrid_cache/engine/shares.py")
pace = partial(Mutant, "hybrid_cache/engine/pace.py")
turns = partial(Mutant, "hybrid_cache/engine/turns.py")

SHARING = [
    shares(
        "a tenant who comes back has all to come that it did not ask for",
        "max(self._served.get(tenant, 0.0), self._lowest())",
        "self._served.get(tenant, 0.0)",
        FAIR,
    ),
    shares("nobody is forgotten", "if len(self._served) > MOST_REMEMBERED:", "if not self._served:", FAIR),
    scheduler(
        "what is computed counts for nobody",
        "            self._shares.charge(sequence.request.tenant, chunk.end - chunk.start)\n",
        "            pass\n",
        FAIR,
    ),
    turns(
        "short prompts wait for long ones",
        "sequence.arrival if aged else prefill.tiles_left",
        "sequence.arrival",
        FAIR,
    ),
    turns(
        "a long prompt is starved by short ones",
        "aged = aged_first and prefill.passed_over >= MOST_PASSED_OVER",
        "aged = prefill.passed_over < 0",
        FAIR,
    ),
    scheduler(
        "a long prompt is starved by short ones that all wait long",
        "self._aged_last = aged_first and prefill.passed_over",
        "self._aged_last = prefill.passed_over",
        FAIR,
    ),
    shares(
        "whoever was just served goes before who comes",
        "= 2 * self._num_turns - 1\n",
        "= 2 * self._num_turns + 1\n",
        BETWEEN,
    ),
    turns(
        "a tenant goes on between layers however much it got",
        " and shares.served(sequence.request.tenant) <= most",
        "",
        BETWEEN,
    ),
    scheduler(
        "prompts without end go between the layers of one pass",
        "                gap.take(*_left(self._cost, sequence.prefill, match))\n",
        "                pass\n",
        BETWEEN,
    ),
    scheduler(
        "a sequence under way gives its place to one between layers",
        "        under_way = gap.under_way if gap else ()\n",
        "        under_way = ()\n",
        BETWEEN,
    ),
    scheduler(
        "canonical passes have steps between their layers",
        "if self._suspects or not step.chunks or any(chunk.sequence is None for chunk in step.chunks):",
        "if self._suspects or not step.chunks or not list(step.sequences) and not self.idle:",
        BETWEEN,
    ),
    engine(
        "the end of a prompt between layers is kept with a row of the pass",
        "        self._work(Step())  # what is kept of its hidden rows: the pass overwrites them\n",
        "",
        BETWEEN,
    ),
    engine(
        "a step between layers that fails takes back nothing",
        "            self._scheduler.take_back(step, gap)\n",
        "",
        BETWEEN,
    ),
    scheduler(
        "a long prompt shares the step that a short one ends in",
        "if most <= 0 or (ends and prefill.tiles_left > most):",
        "if most <= 0:",
        FAIR,
    ),
    scheduler(
        "one tenant may hold all places",
        "if held[sequence.request.tenant] >= share or count <= share:",
        "if held:",
        FAIR,
    ),
    suspects(
        "a request is given up with others beside it",
        "        if len(arrivals) > 1:\n",
        "        if len(arrivals) > 2:\n",
        SUSPECTS,
    ),
    suspects(
        "those who came first are tried first",
        "tuple(arrivals[middle:]), tuple(arrivals[:middle])",
        "tuple(arrivals[:middle]), tuple(arrivals[middle:])",
        SUSPECTS,
    ),
    suspects(
        "one step that passes clears a suspect",
        "if num_tokens >= self._goals.get(rank, num_tokens + 1):",
        "if rank in self._goals:",
        SUSPECTS,
    ),
    suspects("requests that only fail together run one by one", "return most // 2", "return 1", SUSPECTS),
    suspects("old failures count for ever", "        if self._quiet == QUIET:\n", "        if False:\n", SUSPECTS),
    scheduler(
        "requests are suspected for a message's fault",
        "arrival = None if others or doubled else self._suspects.failed(goals)",
        "arrival = self._suspects.failed(goals)",
        SUSPECTS,
    ),
    engine(
        "an engine that fails goes on for ever",
        "        if self._failures >= MOST_FAILURES:\n",
        "        if self._failures < 0:\n",
        FAILURES,
    ),
    engine(
        "a few bad requests end the engine",
        "        if request_id == OWN:\n",
        "        if self._failures > MOST_FAILURES:\n",
        FAILURES,
    ),
    sampling(
        "a choice that failed takes a number", "        if self._point is None:\n", "        if True:\n", FAILURES
    ),
    pace(
        "decode takes no time of a step",
        "seconds = max(self._max_step_s - self._decode_s * decodes, 0.0)",
        "seconds = self._max_step_s",
        FAIR,
    ),
    pace("a step may hold nothing", "low, high = int(self._empty), most", "low, high = 0, most", FAIR),
]

STEPPING = [
    scheduler(
        "what could not be moved for lack of memory is moved again",
        "            sequence.prefill.in_place = True\n",
        "            pass\n",
        ("tests/choreography/test_device_memory.py",),
    ),
    scheduler(
        "a message that could not be written is there",
        "            self._cache.messages.forget(command.written())\n",
        "            pass\n",
        OUT_OF_MEMORY,
    ),
    worker(
        "a command without memory keeps those behind it from being carried out",
        "                lost.append(command)\n",
        "                raise OutOfDeviceMemory(str(error), (command,))\n",
        ("tests/choreography/test_device_memory.py",),
    ),
    engine(
        "what was decided is carried out again with each step",
        "        self._commands.clear()\n",
        "",
        ENGINE,
    ),
    outcomes(
        "the end of a prompt is kept with the row of another",
        "            num_rows += chunk.rows.num_wanted\n",
        "            num_rows = chunk.rows.num_wanted\n",
        BOTH,
    ),
    worker(
        "rows of messages in a chunk are noted from its first on",
        "yield slice(first + noted.start - rows.start, first + noted.end - rows.start), noted",
        "yield slice(first, first + noted.end - rows.start), noted",
        stage_test("messages_of_one_chunk_are_what_they_are_in_several"),
    ),
    canonical(
        "the answer to a request that publishes nothing is published",
        "if not (prefill.publish and sequence.request.commits) or prefill.only_marked:",
        "if not sequence.request.commits or prefill.only_marked:",
        SCHEDULER,
    ),
    canonical(
        "the last token of an answer is not fed, but committed",
        "Prefill(namespace, tokens[:end], True, True, within, generated=True, origin=origin, of=of)",
        "Prefill(namespace, tokens, True, True, within, generated=True, origin=origin, of=of)",
        SCHEDULER,
    ),
    outcomes(
        "choices are forked again after a preemption",
        "if sequence.index == 0 and not sequence.forked:",
        "if sequence.index == 0:",
        BOTH,
    ),
    outcomes(
        "choices run though there are as many as may",
        "room = self._scheduler.has_room\n",
        "room = True\n",
        SCHEDULER,
    ),
    outcomes(
        "choices of an arranged prompt lose its positions",
        "                sequence.prefill.program = first.prefill.program.fork()\n",
        "                pass\n",
        stored("several_answers_to_siblings_at_one_place_have_the_positions_of_one"),
    ),
    outcomes(
        "a preempted sequence chooses again what it has chosen",
        "            if replayed:\n",
        "            if sequence.fed < 0:\n",
        SCHEDULER,
    ),
    intake(
        "each choice has its own order of messages",
        "if index == 0 and asked is not None and asked.order is Order.ANY",
        "if asked is not None and asked.order is Order.ANY",
        ORDER,
    ),
    intake(
        "a prompt that is scored is put together",
        "        if request.sampling.prompt_logprobs is not None:\n            return",
        "        if not request:\n            return",
        stored("a_prompt_that_is_scored_is_computed_exactly"),
    ),
    intake(
        "a request that wants no caching is put together",
        "if not self._config.prefix_cache or request.cache_mode is CacheMode.OFF:",
        "if not self._config.prefix_cache:",
        stage_test("requests_may_leave_the_cache_alone"),
    ),
    outcomes(
        "a preempted prompt is told of twice",
        "if sequence.announced or sequence.index > 0:",
        "if sequence.index > 0:",
        SCHEDULER,
    ),
    sequence(
        "a preempted prompt is scored twice",
        "new = slice(len(self.prompt_logprobs) - 1 - start, len(tokens))",
        "new = slice(0, len(tokens))",
        SCHEDULER,
    ),
    outcomes(
        "no answer becomes a message",
        "            self._scheduler.messages.keep_answer(sequence)\n",
        "            pass\n",
        stage_test("an_answer_becomes_a_message"),
    ),
    encodings(
        "a message takes over a lease that is given back",
        "            prefill.lease = None\n            self._messages.append(message)",
        "            self._messages.append(message)",
        stage_test("an_answer_becomes_a_message"),
    ),
    encodings(
        "an answer begins with its first token, not with its header",
        "tokens[arrangement.answer_start :], arrangement.context)",
        "tokens[arrangement.answer_start + 1 :], arrangement.context)",
        stage_test("an_answer_put_back_behind_its_context_gives_what_encoding_it_gives"),
    ),
    engine(
        "a step may write to states that were published",
        "        self.cache.pool.check_unpublished(Kind.SLOT, work.written_slots())\n",
        "",
        ("tests/choreography/test_beside_exact.py",),
    ),
    worker(
        "moved tokens have the positions of their places",
        "np.arange(chunk.start, chunk.end) - chunk.shift",
        "np.arange(chunk.start, chunk.end)",
        stored("what_follows_siblings_at_one_place_stands_behind_the_longest"),
    ),
    worker(
        "answers to moved messages have the positions of their places",
        "decode.start - decode.shift",
        "decode.start",
        stored("what_follows_siblings_at_one_place_stands_behind_the_longest"),
    ),
]

ASKING = [
    sequence(
        "choices of one request make room for each other forever",
        "return self.arrival, self.index",
        "return self.arrival, 0",
        ("tests/engine/test_progress.py",),
    ),
    namespaces(
        "tenants share what is cached",
        'else f"{fingerprint}/{salt}"',
        'else f"{fingerprint}/"',
        BOTH,
    ),
    namespaces(
        "models share what is cached",
        'else f"{fingerprint}/{salt}"',
        'else f"/{salt}"',
        SCHEDULER,
    ),
    sequence(
        "a prompt that waits is cut into pages again in each step",
        "    @cached_property\n    def keys(",
        "    @property\n    def keys(",
        SCHEDULER,
    ),
    sequence(
        "arranged prompts are published",
        "return Prefill(namespace, request.prompt.tokens, False, not off, arrangement=request.arrangement)",
        "return Prefill(namespace, request.prompt.tokens, True, not off, arrangement=request.arrangement)",
        OWNED,
    ),
    sequence("explicit requests without marks are cached", "scored or unmarked or", "scored or", ENGINE),
    sequence(
        "scored prompts are read from the cache",
        "off = not enabled or scored or unmarked",
        "off = not enabled or unmarked",
        ENGINE,
    ),
    sequence(
        "requests that want no caching are cached",
        " or unmarked or request.cache_mode is CacheMode.OFF",
        " or unmarked",
        ENGINE,
    ),
    sequence("the cache cannot be switched off", "off = not enabled or scored", "off = scored", ENGINE),
    sequence(
        "explicit requests leave states where nobody marked them",
        "    only_marked = request.cache_mode is CacheMode.EXPLICIT\n",
        "    only_marked = False\n",
        SCHEDULER,
    ),
    sequence(
        "a stop may come one token too late",
        "and len(self.generated) >= sampling.min_tokens:",
        "and len(self.generated) > sampling.min_tokens:",
        SCHEDULER,
    ),
    sequence(
        "a stop may come before min_tokens",
        "and len(self.generated) >= sampling.min_tokens:",
        "and self.generated:",
        SCHEDULER,
    ),
    sequence(
        "stop tokens stop nothing",
        "if (stopped or token in sampling.stop_token_ids) and",
        "if stopped and",
        SCHEDULER,
    ),
    sequence(
        "an answer runs over the end of the context",
        "self.num_tokens >= max_length:",
        "self.num_tokens > max_length:",
        SCHEDULER,
    ),
]

CHOOSING = [
    sampling(
        "all choices draw the same numbers",
        "[params.seed & (2**64 - 1), index]",
        "[params.seed & (2**64 - 1)]",
        SAMPLER,
    ),
    sampling("a seed says nothing", "np.random.default_rng(entropy)", "np.random.default_rng(None)", SAMPLER),
    sampling(
        "stop tokens are held back one token too long",
        "self.counts.total() < self.params.min_tokens",
        "self.counts.total() <= self.params.min_tokens",
        SAMPLER,
    ),
    sampler(
        "the repetition penalty rewards",
        "torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)",
        "torch.where(values > 0, values * p.repetition_penalty, values / p.repetition_penalty)",
        SAMPLER,
    ),
    sampling(
        "the repetition penalty overlooks the prompt",
        "np.union1d(self._prompt, list(self.counts))",
        "np.union1d([], list(self.counts))",
        SAMPLER,
    ),
    sampling(
        "the repetition penalty overlooks new tokens",
        "            self._seen = np.append(self._seen, token)",
        "            pass",
        SAMPLER,
    ),
    sampler(
        "presence counts each time",
        "p.presence_penalty + p.frequency_penalty * counts",
        "(p.presence_penalty + p.frequency_penalty) * counts",
        SAMPLER,
    ),
    sampler("penalties change the model's logits", "        logits = logits.clone()\n", "", SAMPLER),
    sampling(
        "frequency alone is no penalty",
        "p.presence_penalty != 0 or p.frequency_penalty != 0 or",
        "p.presence_penalty != 0 or",
        SAMPLER,
    ),
    sampler(
        "a log-probability is that of the most likely token",
        "own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0] - sums",
        "own = logits.amax(1) - sums",
        SAMPLER,
    ),
]

TELLING = [
    outcomes(
        "a request that failed has lost its client",
        "self.abort(request_id, Finish.FAILED)",
        "self.abort(request_id)",
        ENDINGS,
    ),
    engine(
        "the policy does not hear that an answer was a call",
        "        self._scheduler.endings.called(request_id)\n",
        "",
        SIGNALS,
    ),
    endings(
        "an id that is used again is told of its earlier request",
        "        self._latest.pop(request_id, None)\n",
        "        return\n",
        ENDINGS,
    ),
    endings(
        "endings are remembered for ever",
        "            if len(self._latest) > MOST_ENDINGS:\n                self._latest.popitem(last=False)\n",
        "",
        ENDINGS,
    ),
    Mutant(
        "api/server/protocol.py",
        "nobody hears that a connection was closed",
        "        self._connection.close()\n",
        "",
        SIGNALS,
    ),
]

MUTANTS = [*SCHEDULING, *SHARING, *STEPPING, *ASKING, *CHOOSING, *TELLING]
