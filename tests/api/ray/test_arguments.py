"""Arguments of `serve run hybrid_cache.api.ray:build`."""

import subprocess
import sys

import pytest

from hybrid_cache.api.ray import MISSING, build
from hybrid_cache.api.ray.arguments import BUDGET, options_of, parse
from hybrid_cache.errors import ConfigError, HybridCacheError
from hybrid_cache.sizes import parse_bytes


def test_options_of_a_server_go_to_each_replica() -> None:
    found = parse(
        {"replicas": "3", "cpus": "2", "budget": "2GiB", "shared_cache": "true", "served-model-name": ["a", "b"]}
    )
    assert (found.placement.replicas, found.placement.cpus) == (3, 2.0)
    options = options_of(found.serve)
    assert options.budget_bytes == 2 << 30
    assert options.shared_cache
    assert options.served_names == ("a", "b")
    assert options.load.threads == 2


def test_without_arguments_a_replica_is_small() -> None:
    options = options_of(parse({}).serve)
    assert options.budget_bytes == parse_bytes(BUDGET)
    assert options.load.threads == 1
    assert options.load.model is None


def test_with_a_gpu_each_takes_what_is_free() -> None:
    assert options_of(parse({"gpus": 1}).serve).budget_bytes is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"replicas": "0"}, "replicas is 0"),
        ({"replicas": "two"}, "replicas is 'two'"),
        ({"replicas": 4, "max_replicas": 2}, "max_replicas is 2"),
        ({"cpus": "0"}, "cpus is 0"),
        ({"routing": "best"}, "routing is 'best'"),
        ({"bugdet": "1GiB"}, "bugdet is neither"),
        ({"port": "80"}, "port belongs to Ray's HTTP proxy"),
        ({"response_store": "f"}, "response_store is for one server"),
        ({"shared_cache": "maybe"}, "shared_cache is 'maybe'"),
    ],
)
def test_wrong_arguments_are_named(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(given)


@pytest.mark.parametrize("given", [{"budget": "much"}, {"max_running": "many"}, {"model": "/not/there"}])
def test_wrong_values_of_options_are_found_at_once(given: dict[str, object]) -> None:
    with pytest.raises(HybridCacheError, match=r"much|max-running|not/there"):
        options_of(parse(given).serve)


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"hybrid-cache\[ray\]"):
        build({})


@pytest.mark.parametrize("word", ["replicas=0", "replicas", "port=none"])
def test_the_command_says_it_in_one_line(word: str) -> None:
    done = subprocess.run([sys.executable, "-m", "hybrid_cache.api.ray", word], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert word in done.stderr or MISSING in done.stderr or "replicas is 0" in done.stderr
