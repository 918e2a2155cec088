"""Chat with a model in this process, without a server in between."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from hybrid_cache.api.cli.terminal import Asked, Turn, Usage
from hybrid_cache.api.server.budget import plan_memory
from hybrid_cache.api.server.launch import LoadOptions, load
from hybrid_cache.api.text.answer import Answer
from hybrid_cache.api.text.generation import End, GenerationSpec, Text
from hybrid_cache.api.text.messages import Rendering, TemplateMessage, TextPart
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt

# Long enough that the second turn finds a tile of it in the cache.
EMBEDDED_SYSTEM = (
    "You are a small test model. You keep in mind what people tell you in this conversation: codes, colours, where "
    "somebody is, how many things are in a box. When somebody asks, you answer in one short sentence. When you do not "
    "know something, you say so, and ask nothing in return. You never invent a fact."
)


class EnginePartner:
    """A partner that runs the model in this process."""

    def __init__(self, options: LoadOptions, budget_bytes: int | None, asked: Asked) -> None:
        """Loads the model. Raises HybridCacheError.

        budget_bytes: of the cache; None for a share of what is free
        """
        loaded = load(options)
        config = EngineConfig()
        config = replace(config, budget_bytes=plan_memory(loaded, config, budget_bytes).budget_bytes)
        self.name = loaded.name
        text = TextModel.load(loaded.path)
        self._text = TextEngine.of(AsyncEngine(loaded.model, config), text)
        self._asked = asked

    async def open(self) -> None:
        self._text.engine.start()

    async def close(self) -> None:
        await self._text.engine.stop(0)

    async def reply(self, turns: Sequence[Turn]) -> AsyncGenerator[str | Usage, None]:
        messages = [TemplateMessage(turn.role, (TextPart(turn.content),)) for turn in turns]
        conversation = await self._text.conversation(messages, Rendering(), "")
        prompt, stops = conversation.prompt, self._text.defaults.stops
        spec = GenerationSpec(prompt, self._sampling(prompt), stops=stops, talk=conversation.talk)
        async with await Answer.to(self._text, [spec]) as answer:
            async for step in answer:
                for event in step:
                    match event:
                        case Text(text=text) if text:
                            yield text
                        case End(usage=used):
                            yield Usage(used.prompt, used.cached, used.completion)

    def _sampling(self, prompt: Prompt) -> SamplingParams:
        defaults, asked = self._text.defaults, self._asked
        room = self._text.max_length
        longest = self._text.answer_length(prompt, asked.max_tokens, room, "messages")
        return SamplingParams(
            temperature=defaults.temperature if asked.temperature is None else asked.temperature,
            top_p=defaults.top_p,
            top_k=defaults.top_k,
            min_p=defaults.min_p,
            repetition_penalty=defaults.repetition_penalty,
            seed=asked.seed,
            max_tokens=longest,
            min_tokens=min(defaults.min_new_tokens, longest),
            stop_token_ids=self._text.eos_ids,
        )
