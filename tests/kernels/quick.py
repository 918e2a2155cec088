"""Which combinations of the kernel tests' parameters the quick run meets; all others are slow.

An operation's first shape meets everything. What another shape may spoil shows with each backend and dtype, in a few
batches, and with any value of another parameter: one shape meets one, the next shape the next. Numbers of threads take
turns in the same way where there are no shapes.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product

import pytest
import torch

from hybrid_cache.kernels.parity import SHAPES

FIRST_SHAPES = {name for name in SHAPES if not any(name.startswith(f"{other} ") for other in SHAPES)}
EACH = ("ops", "dtype", "shape")
# A token alone, captures, a prompt that is resumed, decode rows in company.
FEW_BATCHES = ("one token", "130 tokens, two captures", "prefill and decode")


def spared(items: Iterable[pytest.Function]) -> Iterator[pytest.Function]:
    """Of tests that run over shapes or numbers of threads, those that the quick run leaves out."""
    tests = defaultdict(list)
    for item in items:
        if {"shape", "threads"} & {*item.fixturenames}:
            tests[item.function].append(item)
    for combinations in tests.values():
        values = _values(combinations)
        swept = "threads" if "shape" not in values else next((n for n in values if n not in EACH), None)
        for item in combinations:
            params = item.callspec.params
            place = sum(values[name].index(value) for name, value in params.items())
            if swept and params.get("shape") not in FIRST_SHAPES and place % len(values[swept]):
                yield item


def in_both_dtypes(shapes: Iterable[str]) -> list[object]:
    """(shape, dtype) to run over: the quick run has the first shape in both, each other one in one of them, in turn."""
    pairs = enumerate(product(shapes, (torch.float32, torch.bfloat16)))
    return [pytest.param(*pair, marks=pytest.mark.slow if i > 1 and i % 4 in (1, 2) else []) for i, pair in pairs]


def _values(items: Iterable[pytest.Function]) -> dict[str, list[object]]:
    """Of each parameter, in their order."""
    values: dict[str, list[object]] = defaultdict(list)
    for item in items:
        for name, value in item.callspec.params.items():
            if value not in values[name]:
                values[name].append(value)
    return values
