"""hybrid-cache: serve attention + state-space models behind one exact prefix cache.

    from hybrid_cache import LLM, Engine, EngineConfig, Prompt, Request, SamplingParams, Workflow, errors

Names are imported when they are first asked for: `import hybrid_cache.cache` loads no torch.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid_cache import errors as errors
    from hybrid_cache.api.llm import LLM as LLM
    from hybrid_cache.config import EngineConfig as EngineConfig
    from hybrid_cache.engine.engine import Engine as Engine
    from hybrid_cache.request import Request as Request
    from hybrid_cache.sampling import SamplingParams as SamplingParams
    from hybrid_cache.tokens import Prompt as Prompt
    from hybrid_cache.workflow import Workflow as Workflow

# Idle OpenMP threads that spin make a shared machine about five times slower. This must be set before
# torch loads its OpenMP runtime, and a user's own choice wins.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

__version__ = "0.18.0"

_HOMES = {
    "LLM": "api.llm",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "Prompt": "tokens",
    "Request": "request",
    "SamplingParams": "sampling",
    "Workflow": "workflow",
}
__all__ = ["LLM", "Engine", "EngineConfig", "Prompt", "Request", "SamplingParams", "Workflow", "__version__", "errors"]


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module("hybrid_cache.errors")
    if name not in _HOMES:
        raise AttributeError(f"module 'hybrid_cache' has no attribute {name!r}")
    return getattr(import_module(f"hybrid_cache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
