"""Faults of the command line: what comes first, what is downloaded, how long a context is."""

from functools import partial

from tests.mutants.mutant import Mutant, tests_of

CONFIGURED = "tests/api/cli/test_configured.py"
HELP = "tests/api/cli/test_help_page.py"
HUB = "tests/models/test_hub.py"

configured = partial(Mutant, "hybrid_cache/api/cli/configured.py")
searched = partial(Mutant, "hybrid_cache/api/cli/help_page.py")
foreign = partial(Mutant, "hybrid_cache/api/cli/foreign_options.py")
folders = partial(Mutant, "hybrid_cache/models/folders.py")
loading = partial(Mutant, "hybrid_cache/models/loading.py")

MUTANTS = [
    configured(
        "a file comes before the environment",
        "{**values, **of_environment}",
        "{**of_environment, **values}",
        tests_of(CONFIGURED, "the_command_line_comes_before_the_environment_and_that_before_the_file"),
    ),
    configured(
        "API keys are shown",
        'SECRET = ("api_key",)',
        "SECRET = ()",
        tests_of(CONFIGURED, "what_holds_is_shown_with_its_origin_and_without_secrets"),
    ),
    searched(
        "help breaks an option into lines where a program reads it",
        "not sys.stdout.isatty() if wide is None",
        "sys.stdout.isatty() if wide is None",
        tests_of(HELP, "a_program_reads_each_option_in_one_line"),
    ),
    foreign(
        "help names what is refused as if it did the same",
        "if entry.settings and _target(entry) == option",
        "if option in entry.here",
        tests_of(HELP, "names_of_other_servers_stand_with_what_does_the_same"),
    ),
    Mutant(
        "hybrid_cache/api/cli/translation.py",
        "the first option that cannot be had hides the others",
        "            self.refusals.setdefault(",
        "            self.refusals or self.refusals.setdefault(",
        tests_of("tests/api/cli/test_foreign_options.py", "all_that_a_command_line_cannot_have_is_said_at_once"),
    ),
    folders(
        "weights of other formats are downloaded too",
        '"[!a]*/*", ',
        "",
        tests_of(HUB, "what_is_needed_is_downloaded_and_nothing_else"),
    ),
    folders(
        "the weights are downloaded before anybody looks at the config",
        "        _check_snapshot(Path(small), name)  # before the weights, which may be many\n",
        "",
        tests_of(HUB, "an_architecture_that_is_not_supported_is_told_before_its_weights_are_here"),
    ),
    loading(
        "a shorter context is forgotten",
        "min(max_length, model.max_length)",
        "model.max_length",
        tests_of("tests/api/server/test_launch.py", "a_context_below_the_models_own_holds_for_it_and_its_variants"),
    ),
]
