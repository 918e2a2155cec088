"""What a parity test is told of an architecture; `cases/` has one file for each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch

BASE = {
    "vocab_size": 199,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}


@dataclass(frozen=True)
class Case:
    """One small checkpoint. `family` begins the names of transformers' classes; `config`, `model` name others."""

    name: str
    family: str
    settings: dict = field(hash=False)
    config: str = ""
    model: str = ""
    prepare: Callable[[torch.nn.Module], None] | None = None  # after the usual random weights

    def __str__(self) -> str:
        return self.name

    @property
    def config_class(self) -> str:
        return self.config or f"{self.family}Config"

    @property
    def model_class(self) -> str:
        return self.model or f"{self.family}ForCausalLM"


def all_cases() -> list[Case]:
    names = sorted(path.stem for path in (Path(__file__).parent / "cases").glob("*.py"))
    return [case for name in names for case in import_module(f"tests.models.cases.{name}").CASES]
