"""How far up two models are the same: what a layer is given depends on the weights below it, and on nothing else."""

import re
from collections.abc import Iterable, Mapping
from hashlib import blake2b

import torch
from torch import Tensor

_LAYER = re.compile(r"\blayers\.(\d+)\.")
_ABOVE = re.compile(r"^(?:[\w.]*\.)?(?:norm|norm_f|final_layernorm|embedding_norm|lm_head)\.")  # and in no layer


def digest_of(tensor: Tensor) -> bytes:
    """Of a tensor on the CPU: shape, type and contents."""
    digest = blake2b(f"{list(tensor.shape)} {tensor.dtype}\n".encode(), digest_size=16)
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def fingerprint_of(facts: str, digests: Mapping[str, bytes]) -> str:
    """Of a whole model, from what `chain_of` takes."""
    named = "".join(f"\n{name} {digest.hex()}" for name, digest in digests.items())
    return blake2b((facts + named).encode(), digest_size=16).hexdigest()


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


def _link(before: bytes, weights: Iterable[tuple[str, bytes]]) -> bytes:
    digest = blake2b(before, digest_size=16)
    for name, contents in sorted(weights):
        digest.update(f"\n{name} ".encode() + contents)
    return digest.digest()
