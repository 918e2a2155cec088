"""What the routes share: a model that is talked to in text, and facts about it and its server."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial

from pydantic import BaseModel

from hybrid_cache import __version__
from hybrid_cache.api.server.anthropic.diagnostics import Diagnoses
from hybrid_cache.api.server.cache_report import wants_report
from hybrid_cache.api.server.connections import current_connection
from hybrid_cache.api.server.errors import ModelNotFound, current_request_id, quoted
from hybrid_cache.api.server.facts import facts
from hybrid_cache.api.server.gate import MOST_BODIES, Gate, current_visit
from hybrid_cache.api.server.metrics import Metrics, gate_families
from hybrid_cache.api.server.recording.recorder import Recorder
from hybrid_cache.api.server.response_store import ResponseStore
from hybrid_cache.api.server.sessions import session_of, user_of
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.server.sharing import max_loss_of
from hybrid_cache.api.server.tasks import kind_of, template_of, tool_time_of
from hybrid_cache.api.server.tenants import owner_of
from hybrid_cache.api.text.alike import SAME, TextDifference
from hybrid_cache.api.text.answer import Answer
from hybrid_cache.api.text.generation import GenerationSpec
from hybrid_cache.api.text.records import RequestRecord
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.api.text.text_work import TextWork
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.choreography.book import MessageBook
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.errors import ConfigError, RequestError
from hybrid_cache.namespaces import fingerprint_in, namespace_of
from hybrid_cache.tokens import Prompt

Onlooker = Callable[[str, Prompt], None]
current_onlooker: ContextVar[Onlooker | None] = ContextVar("current_onlooker", default=None)
"""Is told the prompts of the request that is being handled, each with its namespace in the cache."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Facts about a model that runs in an engine."""

    names: tuple[str, ...]  # what clients call it, the first is what replies say
    path: str  # of its folder, or its adapter's
    dtype: str
    system_fingerprint: str  # what a seed's promise holds for: server, weights, dtype and kernels
    fingerprint: str  # of its weights, which namespaces of the cache begin with
    parent: str | None = None  # the model that it is a variant of
    adapter: str | None = None  # the name of the one that makes it a variant
    text_difference: TextDifference = SAME  # from the model that it is a variant of
    own_bytes: int = 0  # of a variant's weights, that no other model has
    invocation: tuple[int, ...] = ()  # tokens that switch that on

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True, slots=True)
class Variant:
    """A model of the engine beside its first one, under the name by which the engine knows it."""

    name: str
    path: str
    text: TextModel
    adapter: str | None = None
    text_difference: TextDifference = SAME  # from the first model
    own_bytes: int = 0  # of its weights, that no other model has
    invocation: tuple[int, ...] = ()  # as in `HybridModel`


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
    recorder: Recorder | None = None  # of what is served
    variants: "dict[str, Serving]" = field(default_factory=dict)  # what serves them, by name

    def named(self, asked: str | None) -> "Serving":
        """What serves a model by its name; no name means the first one. Raises ModelNotFound."""
        facts().model = asked or self.model.name
        if not asked or asked in self.model.names:
            return self
        if asked not in self.variants:
            served = ", ".join((*self.model.names, *self.variants))
            raise ModelNotFound(f"the model {quoted(asked)} is not served here, only {served}", param="model")
        return self.variants[asked]

    def whose(self, namespace: str) -> "list[Serving]":
        """What serves the model of a namespace of the cache, under each of its names; the first one comes first."""
        fingerprint = fingerprint_in(namespace)
        return [each for each in (self, *self.variants.values()) if each.model.fingerprint == fingerprint]

    def add(self, variant: Variant) -> None:
        """Serves a variant that the engine has. Raises ConfigError for a name that is taken."""
        if variant.name in (*self.model.names, *self.variants):
            raise ConfigError(f"the name {variant.name!r} is taken")
        text = _text_engine(self.text.engine, variant.text, self.settings, variant, self.text.work)
        facts = _served_model(self.text, self.settings)
        model = replace(
            facts,
            names=(variant.name,),
            path=variant.path,
            parent=facts.name,
            adapter=variant.adapter,
            text_difference=variant.text_difference,
            own_bytes=variant.own_bytes,
            invocation=variant.invocation,
            system_fingerprint=_system_fingerprint(text, self.settings),
            fingerprint=text.fingerprint,
        )
        self.variants[variant.name] = replace(self, text=text, model=model)

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
        session, user, owner = session_of(headers, asked), user_of(asked), owner_of()
        reports = wants_report(headers, asked)
        tool_s = tool_time_of(headers)
        specs = [
            replace(
                spec,
                session=session,
                user=user,
                template=template_of(asked, spec),
                owner=owner,
                reports=reports,
                kind=kind_of(asked, spec.form),
                tool_s=tool_s,
                max_loss=max_loss_of(self.settings, asked),
                first_model=self.model.parent or self.model.name,
                request_id=current_request_id.get() or "",
            )
            for spec in specs
        ]
        known, look = facts(), current_onlooker.get()
        if look is not None:
            for spec in specs:
                look(namespace_of(spec.namespace, self.model.fingerprint), spec.prompt)

        def observe(record: RequestRecord) -> None:
            self.metrics.observe(record)
            known.take(record)

        answer, connection = await Answer.to(self.text, specs, observe), current_connection.get()
        if connection is not None:
            connection.when_closed(partial(self.text.engine.left, answer.engine_ids))
        return answer


def new_serving(
    engine: AsyncEngine,
    text: TextModel,
    settings: ServerSettings,
    variants: Iterable[Variant] = (),
    recorder: Recorder | None = None,
) -> Serving:
    """variants: those of the engine   recorder: that listens to it"""
    gate = Gate(engine.max_requests, MOST_BODIES * settings.max_body_bytes, by_tenant=len(settings.api_keys) > 1)
    text_engine = _text_engine(engine, text, settings)
    book = MessageBook(settings.message_book_bytes)
    metrics = Metrics(engine, settings, book)
    metrics.also(lambda: gate_families(gate, text_engine.work))
    responses = ResponseStore(settings.response_store, settings.response_store_bytes, settings.response_life_s)
    metrics.also(responses.families)
    if recorder is not None:
        metrics.also(recorder.families)
    serving = Serving(
        text=text_engine,
        settings=settings,
        model=_served_model(text_engine, settings),
        metrics=metrics,
        book=book,
        gate=gate,
        diagnoses=Diagnoses(),
        responses=responses,
        recorder=recorder,
    )
    for variant in variants:
        serving.add(variant)
    return serving


def _text_engine(
    engine: AsyncEngine,
    text: TextModel,
    settings: ServerSettings,
    variant: Variant | None = None,
    work: TextWork | None = None,
) -> TextEngine:
    return TextEngine.of(
        engine,
        text,
        special_tokens_in_content=settings.special_tokens_in_content,
        tool_parser=settings.tool_parser,
        model=variant.name if variant else "",
        work=work,
        invocation=variant.invocation if variant else (),
    )


def _served_model(text: TextEngine, settings: ServerSettings) -> ServedModel:
    return ServedModel(
        names=settings.served_names,
        path=settings.model_path,
        dtype=_dtype(text),
        system_fingerprint=_system_fingerprint(text, settings),
        fingerprint=text.fingerprint,
        adapter=settings.adapter,
    )


def _dtype(text: TextEngine) -> str:
    return str(text.engine.model.cache_spec.hidden_dtype).removeprefix("torch.")


def _system_fingerprint(text: TextEngine, settings: ServerSettings) -> str:
    return f"hybrid-cache-{__version__}-{text.fingerprint[:12]}-{_dtype(text)}-{settings.backend}"
