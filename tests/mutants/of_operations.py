"""Faults of what a server tells those who run it: its log, its spans, and who is in it."""

from functools import partial

from tests.mutants.mutant import Mutant, tests_of

LOG = partial(tests_of, "tests/api/server/test_request_log.py")
PROPS = partial(tests_of, "tests/api/server/test_props.py")

logs = partial(Mutant, "hybrid_cache/api/server/logs.py")
lines = partial(Mutant, "hybrid_cache/api/server/request_log.py")
words = partial(Mutant, "hybrid_cache/api/server/discretion.py")
props = partial(Mutant, "hybrid_cache/api/server/routes/props.py")
outlet = partial(Mutant, "hybrid_cache/api/cli/outlet.py")

MUTANTS = [
    logs("a client may end a line", "    if text.isprintable():", "    if text:", LOG("no_client_forges_a_line")),
    words(
        "an error tells what it quotes",
        "    return _QUOTED.sub(HIDDEN, message)[:MOST_CHARACTERS]",
        "    return message",
        LOG("a_refused_request_says_why"),
    ),
    words(
        "the words of others are told",
        "        message = message.replace(foreign, HIDDEN) if foreign else message",
        "        message = message",
        LOG("nothing_of_the_content_is_logged[/v1/chat/completions]"),
    ),
    lines(
        "who leaves has had an answer",
        'message["type"] == "http.disconnect" and not self._complete',
        "False",
        LOG("a_client_that_leaves_is_499"),
    ),
    lines(
        "probes fill the log",
        "            return logging.DEBUG\n",
        "            return logging.INFO\n",
        LOG("probes_are_for_debugging"),
    ),
    props(
        "each key sees all requests",
        "return sees_all or other == tenant",
        "return True",
        PROPS("each_key_sees_its_own_requests_and_an_operator_all"),
    ),
    outlet(
        "what is dropped is not counted",
        "        else:\n            self.num_dropped += 1",
        "        else:\n            self.num_dropped += 0",
        LOG("more_than_an_outlet_holds_is_dropped_and_counted"),
    ),
]
