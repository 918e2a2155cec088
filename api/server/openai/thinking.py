"""What a request sets of its template's variables: thoughts, documents, and those that it names itself."""

from hybrid_cache.api.server.remarks import ignore
from hybrid_cache.api.server.schemas.messages import TemplateRequest
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.errors import RequestError

EFFORT, THINKS, DOCUMENTS = "reasoning_effort", "enable_thinking", "documents"


def template_variables(text: TextEngine, asked: TemplateRequest) -> dict[str, object]:
    """chat_template_kwargs, and what other fields say as far as these leave it open. Raises RequestError for thoughts
    and documents that the template does not know.
    """
    own = asked.chat_template_kwargs or {}
    for name in own:
        if not text.chat.reads(name):
            ignore(f"chat_template_kwargs.{name}")
    return {**_thinking(text, asked, own), **_documents(text, asked), **own}


def _documents(text: TextEngine, asked: TemplateRequest) -> dict[str, object]:
    if not asked.documents:
        return {}
    if not text.chat.reads(DOCUMENTS):
        raise RequestError("this model's chat template shows no documents: write them into messages", param=DOCUMENTS)
    return {DOCUMENTS: asked.documents}


def _thinking(text: TextEngine, asked: TemplateRequest, own: dict[str, object]) -> dict[str, object]:
    field, effort = EFFORT, asked.reasoning_effort
    if effort is None and asked.reasoning is not None:
        field, effort = "reasoning", asked.reasoning.effort
    if effort is not None:
        return thinking_at(text, effort, field, own)
    field, thinks = _switch(asked)
    if thinks and not _can_think(text) and THINKS not in own:
        raise RequestError(f"{field} asks for thoughts, and this model's chat template knows of none", param=field)
    return {} if thinks is None else {THINKS: thinks}


def thinking_at(text: TextEngine, effort: str, field: str, own: dict[str, object]) -> dict[str, object]:
    """field: of the request, that has the effort   own: variables that are set in any case   Raises RequestError."""
    if effort == "none":
        return {THINKS: False}
    if not _can_think(text) and not {THINKS, EFFORT} & own.keys():
        name = field if field == EFFORT else f"{field}.effort"
        raise RequestError(f"{name} is {effort!r}, and this model's chat template knows of no thoughts", param=field)
    if not text.chat.reads(EFFORT):  # it can think, and knows no degrees of that
        ignore(field if field == EFFORT else f"{field}.effort")
    return {THINKS: True, EFFORT: effort}


def _switch(asked: TemplateRequest) -> tuple[str, bool | None]:
    """-> the field that says whether a model thinks, and what it says. `adaptive` leaves it to the model."""
    if asked.reasoning is not None and asked.reasoning.enabled is not None:
        return "reasoning", asked.reasoning.enabled
    if asked.thinking is not None:
        return "thinking", {"enabled": True, "disabled": False}.get(asked.thinking.type)
    return THINKS, asked.enable_thinking


def _can_think(text: TextEngine) -> bool:
    return text.thoughts is not None or text.chat.reads(THINKS) or text.chat.reads(EFFORT)
