"""Which combinations of the kernel tests' parameters the quick run meets; all others are slow.

An operation's first shape meets everything. What another shape may spoil shows with each backend and dtype, in a few
batches, and with any value of another parameter: one shape meets one, the next shape the next.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import pytest

from hybrid_cache.kernels.parity import SHAPES

FIRST_SHAPES = {name for name in SHAPES if not any(name.startswith(f"{other} ") for other in SHAPES)}
# A token alone, captures, a prompt that is resumed, decode rows in company.
FEW_BATCHES = ("one token", "130 tokens, two captures", "prefill and decode")


def spared(items: Iterable[pytest.Function]) -> Iterator[pytest.Function]:
    """Of tests that run over shapes, those that the quick run leaves out."""
    tests = defaultdict(list)
    for item in items:
        if "shape" in item.fixturenames:
            tests[item.function].append(item)
    for combinations in tests.values():
        values = _values(combinations)
        rest = [len(found) for name, found in values.items() if name not in ("ops", "dtype", "shape")]
        for item in combinations:
            params = item.callspec.params
            place = sum(values[name].index(value) for name, value in params.items())
            if rest and params["shape"] not in FIRST_SHAPES and place % max(rest):
                yield item


def _values(items: Iterable[pytest.Function]) -> dict[str, list[object]]:
    """Of each parameter, in their order."""
    values: dict[str, list[object]] = defaultdict(list)
    for item in items:
        for name, value in item.callspec.params.items():
            if value not in values[name]:
                values[name].append(value)
    return values
