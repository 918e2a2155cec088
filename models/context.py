"""How many tokens a model reads at most, where its rotary positions are stretched."""

from dataclasses import dataclass

from hybrid_cache.models.config import MOST_OF, Config

POSITIONS = "max_position_embeddings"
TRAINED = "original_max_position_embeddings"
STRETCHES = ("linear", "yarn", "dynamic")


@dataclass(frozen=True, slots=True)
class Context:
    length: int
    stretched: str | None = None  # how, for people


def context_of(config: Config, default: int | None = None) -> Context:
    """`max_position_embeddings`, or what a stretch makes of it where the file leaves it as it was trained.

    linear, yarn   `factor` times the trained length: `original_max_position_embeddings`, or where that is missing the
                   length that the file names
    llama3         files name the stretched length
    dynamic        frequencies change only beyond the length that the file names, which is the bound here: a cached
                   row would have to be rotated again whenever a text grows
    """
    length = config.integer(POSITIONS, default)
    rope = config.rope()
    rope.used = {}  # the positions themselves note what they read
    kind = next((kind for kind in STRETCHES if rope.says("rope_type", kind)), None)
    if kind is None or not rope.has("factor"):
        return Context(length)
    factor = rope.positive("factor")
    if kind == "dynamic":
        return Context(length, f"dynamic: not stretched beyond, factor {factor:g} unused")
    trained = rope.integer(TRAINED) if rope.has(TRAINED) else length
    stretched = min(max(length, round(factor * trained)), MOST_OF[POSITIONS])
    return Context(stretched, f"{kind}: {factor:g} x {trained:,}")
