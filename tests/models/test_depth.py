"""Up to which layer two models are the same."""

import pytest

from hybrid_cache.models.depth import chain_of
from hybrid_cache.transfer import equal_layers

WEIGHTS = {
    "model.embed_tokens.weight": b"e",
    "model.shared.block.weight": b"s",
    **{f"model.layers.{i}.{part}.weight": f"{i} {part}".encode() for i in range(12) for part in ("norm", "in_proj")},
    "model.norm.weight": b"n",
    "lm_head.weight": b"h",
}
BASE = chain_of("facts", WEIGHTS)


@pytest.mark.parametrize(
    ("name", "equal"),
    [
        ("model.layers.0.in_proj.weight", 0),
        ("model.layers.7.norm.weight", 7),
        ("model.layers.11.in_proj.weight", 11),
        ("model.norm.weight", 12),
        ("lm_head.weight", 12),
        ("model.embed_tokens.weight", None),
        ("model.shared.block.weight", None),
    ],
)
def test_a_weight_that_differs_ends_what_is_equal_where_it_is_used(name: str, equal: int | None) -> None:
    other = chain_of("facts", {**WEIGHTS, name: b"other"})
    assert equal_layers(BASE, other) == equal_layers(other, BASE) == equal
    assert all(a != b for a, b in zip(BASE, other, strict=True)) is (equal is None)
    assert not {*BASE[0 if equal is None else equal + 1 :]} & {*other}


def test_more_than_weights_has_to_be_equal() -> None:
    assert len(BASE) == 13
    assert equal_layers(BASE, BASE) == 12
    assert equal_layers(BASE, chain_of("others", WEIGHTS)) is None
    assert equal_layers((), ()) is None
    added = {**WEIGHTS, "model.layers.5.in_proj.weight adapter 2.0 [3, 4]": b"A"}
    assert equal_layers(BASE, chain_of("facts", added)) == 5
    assert equal_layers(BASE, chain_of("facts", dict(reversed(WEIGHTS.items())))) == 12, "in whatever order"
