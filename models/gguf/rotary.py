"""Settings of rotary positions, as a config.json has them."""

from collections.abc import Mapping
from math import pi

import torch
from torch import Tensor

from hybrid_cache.errors import UnsupportedModel
from hybrid_cache.models.gguf.metadata import Metadata

FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_of(meta: Metadata) -> dict[str, object]:
    """Raises UnsupportedModel for scalings that cannot be told from the file."""
    for name in ("scale_linear", "scaling.attn_factor", "scaling.yarn_ext_factor", "scaling.yarn_attn_factor"):
        meta.refuse(f"rope.{name}", 1.0)
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


def with_frequencies(rope: Mapping[str, object], theta: float, divisors: Tensor) -> dict[str, object]:
    """The settings of Llama 3.1 that gave a file's divisors [size / 2] of the frequencies.

    The file has these only; all published models differ in the largest alone. Raises UnsupportedModel for others.
    """
    low, high, trained = LLAMA3.values()
    factor = float(f"{float(divisors.max()):.7g}")
    turns = trained / (2 * pi) * theta ** -(torch.arange(divisors.numel()) / divisors.numel())  # in the trained length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(1 / ((1 - kept) / factor + kept), divisors.float(), rtol=1e-3, atol=0):
        raise UnsupportedModel(f"{FREQUENCIES} stretches positions in another way than Llama 3.1 does")
    return {**rope, **LLAMA3, "rope_type": "llama3", "factor": factor}
