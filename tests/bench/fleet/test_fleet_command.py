"""`hybrid-cache bench policy --replicas` on tiny traffic."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from hybrid_cache.bench.policy.command import policy

TINY = ("--workload", "few-shot", "--scale", "0.04", "--model", "embedded", "--capacity", "10%")


def run(*options: str) -> Result:
    app = typer.Typer()
    app.command()(policy)
    return CliRunner().invoke(app, list(options))


def test_rows_say_what_routing_loses_against_one_cache(tmp_path: Path) -> None:
    rows, picture = tmp_path / "rows.json", tmp_path / "fleets.png"
    more = ("--router", "random,usable-prefix", "--failures", "1s", "--shared-disk", "40%", "--policy", "lru")
    result = run(*TINY, "--replicas", "1,4", *more, "--json", str(rows), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    found = {(row["num_replicas"], row["router"]): row for row in json.loads(rows.read_text())}
    names = ("one memory", "one cache")
    assert set(found) == {*((1, name) for name in names), *((4, name) for name in (*names, "random", "usable-prefix"))}
    one, routed = found[4, "one cache"], found[4, "usable-prefix"]
    assert routed["one_token_hit_rate"] == one["token_hit_rate"] >= found[1, "one cache"]["token_hit_rate"]
    assert routed["num_failures"] > 0
    assert routed["whole_flops_saved"] is not None
    assert routed["memory_flops_saved"] == found[4, "one memory"]["flops_saved"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "4 replicas: of the" in result.output


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--router", "random"), "--replicas"),
        (("--replicas", "0"), "'0'"),
        (("--replicas", "4", "--router", "fastest"), "'fastest'"),
        (("--replicas", "4", "--event-delay", "soon"), "'soon'"),
        (("--replicas", "4", "--failures", "1s@4"), "must be below 4"),
        (("--disk", "20%", "--shared-disk", "20%"), "one of them"),
        (("--disk", "1MiB"), "at least"),
        (("--replicas", "2", "--policy", "belady"), "'belady'"),
        (("--replicas", "2", "--disk-rate", "3GB"), "disk-rate"),
    ],
)
def test_what_cannot_be_is_one_line(options: tuple[str, ...], error: str) -> None:
    result = run(*TINY, *options)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert result.output.count("\n") == 1
    assert error in result.output
