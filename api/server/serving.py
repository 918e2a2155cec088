"""What the routes share: a model that is talked to in text, and facts about it and its server."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel

from hybrid_cache import __version__
from hybrid_cache.api.server.anthropic.diagnostics import Diagnoses
from hybrid_cache.api.server.cache_report import wants_report
from hybrid_cache.api.server.errors import ModelNotFound, quoted
from hybrid_cache.api.server.gate import MOST_BODIES, Gate, current_visit
from hybrid_cache.api.server.metrics import Metrics, gate_families
from hybrid_cache.api.server.response_store import ResponseStore
from hybrid_cache.api.server.sessions import session_of
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.server.tasks import kind_of, tool_time_of
from hybrid_cache.api.server.tenants import owner_of
from hybrid_cache.api.text.answer import Answer
from hybrid_cache.api.text.generation import GenerationSpec
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.choreography.book import MessageBook
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.errors import RequestError


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Facts about the model that runs in an engine."""

    names: tuple[str, ...]  # what clients call it, the first is what replies say
    dtype: str
    system_fingerprint: str  # what a seed's promise holds for: server, weights, dtype and kernels

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, asked: str | None) -> None:
        """Raises ModelNotFound for a model that is not this one; no name means this one."""
        if asked and asked not in self.names:
            served = ", ".join(self.names)
            raise ModelNotFound(f"the model {quoted(asked)} is not served here, only {served}", param="model")


@dataclass(frozen=True, slots=True)
class Serving:
    """Everything that a request needs, made once."""

    text: TextEngine
    settings: ServerSettings
    model: ServedModel
    metrics: Metrics
    book: MessageBook  # messages that requests may refer to
    gate: Gate
    diagnoses: Diagnoses
    responses: ResponseStore  # that clients may ask for again, or continue

    async def answer(self, specs: Sequence[GenerationSpec], headers: Mapping[str, str], asked: BaseModel) -> Answer:
        """Queues all of them or none. Raises RequestError, Overloaded or EngineStopped.

        headers, asked: of the request, for what it says of itself
        """
        limit = self.text.engine.max_waiting
        if len(specs) > limit:
            raise RequestError(f"{len(specs)} prompts in one request, at most {limit} can wait here", param="prompt")
        visit = current_visit.get()
        if visit is not None:
            visit.add_requests(len(specs) - visit.num_requests)
        session, owner, reports = session_of(headers, asked), owner_of(), wants_report(headers, asked)
        tool_s = tool_time_of(headers)
        specs = [
            replace(
                spec,
                session=session,
                owner=owner,
                reports=reports,
                kind=kind_of(asked, spec.form),
                tool_s=tool_s,
            )
            for spec in specs
        ]
        return await Answer.to(self.text, specs, self.metrics.observe)


def new_serving(engine: AsyncEngine, text: TextModel, settings: ServerSettings) -> Serving:
    gate = Gate(engine.max_requests, MOST_BODIES * settings.max_body_bytes, by_tenant=len(settings.api_keys) > 1)
    text_engine = TextEngine.of(
        engine,
        text,
        special_tokens_in_content=settings.special_tokens_in_content,
        tool_parser=settings.tool_parser,
    )
    book = MessageBook(settings.message_book_bytes)
    metrics = Metrics(engine, settings, book)
    metrics.also(lambda: gate_families(gate, text_engine.work))
    responses = ResponseStore(settings.response_store, settings.response_store_bytes, settings.response_life_s)
    metrics.also(responses.families)
    return Serving(
        text=text_engine,
        settings=settings,
        model=_served_model(engine, settings),
        metrics=metrics,
        book=book,
        gate=gate,
        diagnoses=Diagnoses(),
        responses=responses,
    )


def _served_model(engine: AsyncEngine, settings: ServerSettings) -> ServedModel:
    model = engine.model
    dtype = str(model.cache_spec.hidden_dtype).removeprefix("torch.")
    return ServedModel(
        names=settings.served_names,
        dtype=dtype,
        system_fingerprint=f"hybrid-cache-{__version__}-{model.fingerprint[:12]}-{dtype}-{settings.backend}",
    )
