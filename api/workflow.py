"""Workflows in this process: a model folder, its chat template, and an engine.

from hybrid_cache.api.workflow import open_workflow
"""

from hybrid_cache.api.server.launch import LoadOptions, load
from hybrid_cache.api.text.renderer import ChatRenderer
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.choreography.arrangement import Fidelity, Style
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.sizes import parse_bytes
from hybrid_cache.workflow import Workflow


def open_workflow(
    model: str | None = None,
    *,
    budget: str = "256MiB",
    fidelity: str = "exact",
    style: Style | None = None,
    options: LoadOptions | None = None,
    **config: object,
) -> Workflow:
    """A workflow on a model folder; the embedded model without one.

    fidelity  exact, relocated or composed, of calls that do not say it themselves; `style` says more
    options   how the model is loaded; config: other fields of `EngineConfig`
    """
    loaded = load(options or LoadOptions(model))
    engine = Engine(loaded.model, EngineConfig(budget_bytes=parse_bytes(budget), **config))  # type: ignore[arg-type]
    return Workflow(engine, ChatRenderer(TextModel.load(loaded.path)), style=style or Style(Fidelity(fidelity)))
