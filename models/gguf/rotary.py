"""Settings of rotary positions, as a config.json has them."""

from collections.abc import Mapping

from hybrid_cache.errors import UnsupportedModel
from hybrid_cache.models.gguf.metadata import Metadata

FREQUENCIES = "rope_freqs.weight"


def rope_of(meta: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
    """Raises UnsupportedModel for scalings that cannot be told from the file."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": meta.number("rope.freq_base", 10000.0)}
    kind = meta.text("rope.scaling.type", "none")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": meta.number("rope.scaling.factor")}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": meta.number("rope.scaling.factor")}
        rope["original_max_position_embeddings"] = meta.integer("rope.scaling.original_context_length")
        for name, field in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if meta.has(f"rope.scaling.{name}"):
                rope[field] = meta.number(f"rope.scaling.{name}")
    elif kind != "none":
        raise UnsupportedModel(f"{meta.arch}.rope.scaling.type is {kind!r}, supported: none, linear, yarn")
    return rope
