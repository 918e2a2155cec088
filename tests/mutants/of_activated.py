"""Faults of activated adapters: who computes what of a prompt, and who finds it."""

from functools import partial

from tests.mutants.mutant import Mutant, tests_of

ENGINE = ("tests/engine/test_activated.py",)
MARKS = ("tests/cache/test_marks.py",)

activated = partial(tests_of, ENGINE[0])
books = partial(Mutant, "hybrid_cache/cache/books.py")
canonical = partial(Mutant, "hybrid_cache/engine/canonical.py")
family = partial(Mutant, "hybrid_cache/engine/family.py")
intake = partial(Mutant, "hybrid_cache/engine/intake.py")
keys = partial(Mutant, "hybrid_cache/cache/keys.py")
lease = partial(Mutant, "hybrid_cache/cache/lease.py")
outcomes = partial(Mutant, "hybrid_cache/engine/outcomes.py")
prefills = partial(Mutant, "hybrid_cache/engine/prefills.py")
sequence = partial(Mutant, "hybrid_cache/engine/sequence.py")
sharing = partial(Mutant, "hybrid_cache/engine/sharing.py")
tasks = partial(Mutant, "hybrid_cache/engine/tasks.py")
tokens = partial(Mutant, "hybrid_cache/tokens.py")

MUTANTS = [
    tokens(
        "the first occurrence of an invocation counts",
        "return int(starts[-1])",
        "return int(starts[0])",
        activated("the_last_whole_occurrence_counts"),
    ),
    family(
        "an activated adapter reads what comes before it by itself",
        'self["" if self[name].invocation else name].fingerprint',
        "self[name].fingerprint",
        activated("only_the_invocation_and_what_follows_is_computed_behind_a_base_prompt"),
    ),
    sequence(
        "rows before an invocation are the adapter's",
        "return fingerprint_in(self.namespace) if self.before_mark else self.model",
        "return self.model",
        activated("the_next_call_reads_the_first_answer_as_base_text"),
    ),
    outcomes(
        "the state at an invocation is not kept",
        "        if prefill.leaves_stem(chunk.end):\n            self._cache.publish_stem(prefill.lease, last_row)\n",
        "",
        activated("a_base_prompt_that_ends_at_the_invocation_decodes_from_what_an_adapter_left"),
    ),
    outcomes(
        "all of a prompt is scored by the adapter",
        "self._worker.score(chunk.rows.model, rows[new]",
        "self._worker.score(prefill.model, rows[new]",
        activated("tokens_before_the_invocation_are_scored_by_the_base"),
    ),
    prefills(
        "the last row before an invocation is not read",
        "len(sequence.prefill.tokens) or sequence.prefill.leaves_stem(end))",
        "len(sequence.prefill.tokens))",
        activated("a_base_prompt_that_ends_at_the_invocation_decodes_from_what_an_adapter_left"),
    ),
    prefills(
        "behind an invocation tiles stay off the grid",
        "return (start, end, (back,)) if",
        "return (start, end, ()) if",
        activated("only_the_invocation_and_what_follows_is_computed_behind_a_base_prompt"),
    ),
    keys(
        "pages of an adapter are those of any",
        "            pages[index] += said\n",
        "            pass\n",
        MARKS,
    ),
    keys(
        "a mark does not say who takes over",
        "_digest(MARK, root_name(mark.namespace))",
        '_digest(MARK, root_name(""))',
        MARKS,
    ),
    lease(
        "nobody goes on from the end of a prompt at a mark",
        "stem is not None and stem.num_tokens > length",
        "False and stem is not None and stem.num_tokens > length",
        activated("only_the_invocation_and_what_follows_is_computed_behind_a_base_prompt"),
    ),
    books(
        "pages of an adapter stay in the namespace of the base",
        "lease.pages[index], self._clock(), namespace)",
        "lease.pages[index], self._clock())",
        activated("an_adapter_that_goes_takes_what_it_left_and_nothing_else"),
    ),
    sharing(
        "prompts of two adapters are alike behind their invocations",
        "    marks = () if a.mark == b.mark else ",
        "    marks = () if a.mark or b.mark else ",
        activated("prompts_of_the_same_words_do_not_wait_for_what_another_model_computes"),
    ),
    sharing(
        "nobody waits for the state at an invocation",
        "            if alike >= stem and other.leaves_stem(stem):\n                shared = max(stem, shared)\n",
        "",
        activated("two_who_go_on_from_one_place_wait_for_it_once"),
    ),
    intake(
        "after a pause an invocation is looked for again",
        " if before is None else before.mark",
        "",
        activated("an_invocation_that_is_said_or_follows_a_pause_switches_nothing"),
    ),
    canonical(
        "what an adapter has read is not read by the base",
        "num_read = len(prefill.tokens) if prefill.mark is None else prefill.mark.position",
        "num_read = len(prefill.tokens)",
        activated("what_an_adapter_has_read_is_read_by_the_base_in_the_end"),
    ),
    tasks(
        "a turn is known by who has said it",
        "self.pauses.ended(request.id, task, request.session, prefill.text, said",
        "self.pauses.ended(request.id, task, request.session, prefill.keys, said",
        activated("a_turn_is_known_by_its_text_whoever_has_said_it"),
    ),
]
