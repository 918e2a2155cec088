"""How far up two models are the same: what a layer is given depends on the weights below it, and on nothing else."""

import re
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from itertools import takewhile

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_ABOVE = re.compile(r"^(?:[\w.]*\.)?(?:norm|norm_f|final_layernorm|embedding_norm|lm_head)\.")  # and in no layer


def chain_of(facts: str, digests: Mapping[str, bytes]) -> tuple[str, ...]:
    """Names of what a model computes up to each of its layers. Entry l is that of the rows which layer l is given, the
    last one that of the last layer's.

    facts: all but the weights: architecture, settings, type of numbers   digests: of weights, by name
    """
    layers: dict[int, list[tuple[str, bytes]]] = {}
    below = list[tuple[str, bytes]]()
    for name, digest in digests.items():
        place = _LAYER.search(name)
        if place is not None:
            layers.setdefault(int(place[1]), []).append((name, digest))
        elif not _ABOVE.match(name):  # the embedding, and what several layers share
            below.append((name, digest))
    chain = [_link(facts.encode(), below)]
    for index in range(max(layers, default=-1) + 1):
        chain.append(_link(chain[-1], layers.get(index, ())))
    return tuple(link.hex() for link in chain)


def equal_layers(one: Iterable[str], other: Iterable[str]) -> int | None:
    """How many layers, from the first one, two models have in common; None if they differ below the first."""
    pairs = zip(one, other, strict=False)
    count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return count - 1 if count else None


def _link(before: bytes, weights: Iterable[tuple[str, bytes]]) -> bytes:
    digest = blake2b(before, digest_size=16)
    for name, contents in sorted(weights):
        digest.update(f"\n{name} ".encode() + contents)
    return digest.digest()
