"""Faults in how requests find replicas: those that have nothing, that are overrun, or that are asked no more."""

from functools import partial

from tests.mutants.mutant import Mutant, tests_of

FLEET = "tests/api/ray/test_fleet.py"
INGRESS = "tests/api/ray/test_ingress.py"
REPLICAS = "tests/api/ray/test_replicas.py"

fleet = partial(Mutant, "hybrid_cache/api/ray/fleet.py")
holdings = partial(Mutant, "hybrid_cache/api/ray/holdings.py")
ingress = partial(Mutant, "hybrid_cache/api/ray/ingress.py")
chain = partial(Mutant, "hybrid_cache/api/ray/chain.py")

MUTANTS = [
    fleet(
        "who waits for long keeps its conversations",
        "deepest.owed - quickest.owed <= STAY * saved",
        "True",
        tests_of(FLEET, "who_would_wait_longer_than_it_saves_goes_elsewhere"),
    ),
    fleet(
        "equal instructions lead everybody to one replica",
        "first.replica.placed <= bound and",
        "",
        tests_of(FLEET, "equal_instructions_do_not_lead_all_conversations_to_one_replica"),
    ),
    fleet(
        "what was sent is not expected to be held",
        "if until > now else 0",
        "if until < now else 0",
        tests_of(FLEET, "until_a_replica_must_have_spoken_it_is_expected_to_hold_what_it_was_sent"),
    ),
    holdings(
        "what is gone is still said",
        "            for key in self._keys.get(name, (0, ()))[1]:\n                self._drop(key, name)\n",
        "",
        tests_of(REPLICAS, "what_is_dropped_is_not_said_any_more"),
    ),
    holdings(
        "an answer belongs to no prompt",
        "if key.startswith(tail):",
        "if not tail:",
        tests_of(REPLICAS, "short_messages_are_known_by_the_answer_behind_them"),
    ),
    ingress(
        "a full replica is asked again",
        'call.tried.add(answer.headers.get(REPLICA, ""))',
        "pass",
        tests_of(INGRESS, "a_full_replica_loses_a_request_to_another"),
    ),
    ingress(
        "a stream ends as if it were whole",
        '"body": broken(call.scope["path"])',
        '"body": b""',
        tests_of(INGRESS, "a_stream_that_breaks_ends_with_an_error_of_its_dialect"),
    ),
    chain(
        "tenants have equal keys",
        'root = _digest(secret, whose.encode("utf-8", "surrogatepass"), ',
        "root = _digest(secret, ",
        tests_of("tests/api/ray/test_chain.py", "what_prompts_depend_on_beside_messages_changes_all_keys"),
    ),
]
