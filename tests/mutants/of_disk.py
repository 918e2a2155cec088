"""Faults of the disk tier: doubt that is not noticed, room that is not made, entries that are another's."""

from functools import partial

from tests.mutants.mutant import Mutant, tests_of

TIER = "tests/engine/test_disk_tier.py"
DAMAGED = tests_of(TIER, "a_damaged_file_is_a_miss")
BITS = ("tests/storage/test_killed.py",)

folder = partial(Mutant, "hybrid_cache/storage/folder.py")
index = partial(Mutant, "hybrid_cache/cache/disk/index.py")
catalogue = partial(Mutant, "hybrid_cache/cache/disk/catalogue.py")
loading = partial(Mutant, "hybrid_cache/cache/disk/loading.py")
tier = partial(Mutant, "hybrid_cache/cache/disk/tier.py")

MUTANTS = [
    folder("a payload is not compared with its checksum", "if digest_of(payload) != entry.digest:", "if False:", BITS),
    folder(
        "a file is believed to be the one that it is named after",
        "if os.read(file, len(header)) != header:",
        "if os.lseek(file, len(header), 0) < 0:",
        BITS,
    ),
    folder(
        "a link is followed",
        "os.O_RDONLY | os.O_NOFOLLOW",
        "os.O_RDONLY",
        DAMAGED,
    ),
    index(
        "room is not made",
        "self.num_bytes + num_bytes - self._budget_bytes",
        "0",
        tests_of(TIER, "the_budget_is_never_exceeded"),
    ),
    catalogue(
        "what needs a lost entry stays",
        "            numbers += self._below.pop(number, ())\n",
        "",
        tests_of(
            "tests/cache/test_catalogue.py", "the_deepest_state_is_found_with_the_pages_before_it_and_goes_with_them"
        ),
    ),
    catalogue(
        "sizes are believed",
        " or not self._can_be(entry.facts)",
        "",
        tests_of("tests/storage/test_packs.py", "a_pack_that_lies_about_sizes_gives_no_wrong_token"),
    ),
    loading(
        "pages come from the beginning of their run",
        "offset = run.facts.page_names.index(name) * num_bytes",
        "offset = 0",
        tests_of(TIER, "the_next_process_goes_on_with_a_conversation"),
    ),
    loading(
        "a load is waited for however long it takes",
        "if not load.over and self._clock() > load.until_s:",
        "if False:",
        tests_of(TIER, "a_load_that_takes_too_long_is_given_up"),
    ),
    tier(
        "what is dropped while it loads comes back",
        "        self.loading.forget_namespaces(may)\n",
        "",
        tests_of("tests/choreography/test_disk.py", "a_message_that_was_dropped_while_it_loads_does_not_come_back"),
    ),
    tier(
        "what is dropped stays on the disk",
        "        self._storage.drop_namespaces(may)\n",
        "",
        tests_of(TIER, "what_is_dropped_does_not_come_back"),
    ),
]
