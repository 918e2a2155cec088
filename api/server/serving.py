"""What the routes share: an engine, the text side of its model, and facts about both."""

from dataclasses import dataclass

from hybrid_cache import __version__
from hybrid_cache.api.server.errors import ModelNotFound, quoted
from hybrid_cache.api.server.metrics import Metrics
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.chat import ChatEncoder
from hybrid_cache.api.text.tokenizer import GenerationDefaults, TextModel, Tokenizer
from hybrid_cache.choreography.book import MessageBook
from hybrid_cache.engine.async_engine import AsyncEngine


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Facts about the model that runs in an engine."""

    names: tuple[str, ...]  # what clients call it, the first is what replies say
    max_length: int  # tokens of a prompt and its answer, by the model's context
    budget_length: int  # the same, by what an empty cache has room for; at most `max_length`
    vocab_size: int
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

    engine: AsyncEngine
    settings: ServerSettings
    model: ServedModel
    tokenizer: Tokenizer
    chat: ChatEncoder
    defaults: GenerationDefaults
    metrics: Metrics
    book: MessageBook  # messages that requests may refer to


def new_serving(engine: AsyncEngine, text: TextModel, settings: ServerSettings) -> Serving:
    return Serving(
        engine=engine,
        settings=settings,
        model=_served_model(engine, settings),
        tokenizer=text.tokenizer,
        chat=ChatEncoder(text.tokenizer, text.chat_templates),
        defaults=text.defaults,
        metrics=Metrics(engine, settings),
        book=MessageBook(),
    )


def _served_model(engine: AsyncEngine, settings: ServerSettings) -> ServedModel:
    model = engine.model
    dtype = str(model.cache_spec.hidden_dtype).removeprefix("torch.")
    return ServedModel(
        names=settings.served_names,
        max_length=model.max_length,
        budget_length=engine.longest_sequence,
        vocab_size=model.vocab_size,
        dtype=dtype,
        system_fingerprint=f"hybrid-cache-{__version__}-{model.fingerprint[:12]}-{dtype}-{settings.backend}",
    )
