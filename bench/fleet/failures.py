"""When which replica fails: at random, or by a list."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_cache.errors import ConfigError

UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
WANTED = "wanted a mean time between two failures of a replica such as 10m, or 10m:30s with the time that it is away, "
LIST = "or a list such as 120s@3,10m@0:30s"
MOST = 100_000  # failures of a replay


@dataclass(frozen=True, slots=True)
class Failure:
    """A replica loses its memory, and takes no requests for a while."""

    at_s: float
    replica: int
    away_s: float


def seconds(what: str, text: str) -> float:
    """A time such as 100ms. Raises ConfigError."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(ms|s|m|h|d)", text.strip(), re.ASCII)
    if match is None:
        raise ConfigError(f"{what} {text!r} is not a time, wanted one such as 100ms, 5s or 10m")
    return float(match[1]) * UNITS_S[match[2]]


def failures_of(text: str, num_replicas: int, start_s: float, end_s: float, seed: int) -> list[Failure]:
    """Of a replay from `start_s` to `end_s`, in order; the times of a list count from its start. Raises ConfigError."""
    if not text:
        return []
    if "@" in text:
        found = [_listed(each, start_s) for each in text.split(",")]
        return sorted((each for each in found if each.replica < num_replicas), key=lambda each: each.at_s)
    mean, _, away = text.partition(":")
    mean_s, away_s = seconds("failures", mean), seconds("failures", away) if away else 0.0
    expected = num_replicas * (end_s - start_s) / mean_s if mean_s else math.inf
    if expected > MOST:
        raise ConfigError(f"failures {text!r}: {expected:.3g} would be expected in this replay, at most {MOST:,}")
    drawn, found = random.Random(f"failures {seed}"), list[Failure]()
    for replica in range(num_replicas):
        at_s = start_s + drawn.expovariate(1 / mean_s)
        while at_s < end_s:
            found.append(Failure(at_s, replica, away_s))
            at_s += away_s + drawn.expovariate(1 / mean_s)
    return sorted(found, key=lambda each: each.at_s)


def _listed(text: str, start_s: float) -> Failure:
    match = re.fullmatch(r"\s*([^@:]+)@([0-9]{1,4})(?::([^@:]+))?\s*", text, re.ASCII)
    if match is None:
        raise ConfigError(f"failures {text!r}: {WANTED}{LIST}")
    away_s = seconds("failures", match[3]) if match[3] else 0.0
    return Failure(start_s + seconds("failures", match[1]), int(match[2]), away_s)


def check(text: str, numbers: Sequence[int]) -> None:
    """Raises ConfigError for what is neither, or for a replica that no fleet has."""
    if not text:
        return
    if "@" not in text:
        failures_of(text, 1, 0.0, 0.0, 0)
        return
    for each in text.split(","):
        if (failure := _listed(each, 0.0)).replica >= max(numbers):
            raise ConfigError(f"failures {text!r}: replica {failure.replica}, must be below {max(numbers)}")
