"""Chat with a model in this process, without a server in between."""

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from hybrid_cache.api.cli.terminal import Asked, Turn, Usage
from hybrid_cache.api.server.generation import Limit, known_tokens
from hybrid_cache.api.server.launch import LoadOptions, load
from hybrid_cache.api.text.chat import ChatEncoder
from hybrid_cache.api.text.messages import Message, Part, Rendering
from hybrid_cache.api.text.stream import ChoiceText, Detokenizer
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.request import PromptOutput, Request, SamplingParams
from hybrid_cache.tokens import Prompt


class EnginePartner:
    """An engine of our own."""

    def __init__(self, options: LoadOptions, config: EngineConfig, asked: Asked) -> None:
        """Loads the model. Raises HybridCacheError."""
        loaded = load(options)
        self.name = loaded.name
        self._text = TextModel.load(loaded.path)
        self._encoder = ChatEncoder(self._text.tokenizer, self._text.chat_templates)
        self._max_length, self._vocab_size = loaded.model.max_length, loaded.model.vocab_size
        self._engine = AsyncEngine(loaded.model, config)
        self._asked = asked

    async def open(self) -> None:
        self._engine.start()

    async def close(self) -> None:
        await self._engine.stop(0)

    async def reply(self, turns: Sequence[Turn]) -> AsyncGenerator[str | Usage, None]:
        messages = [Message(turn.role, (Part(turn.content),)) for turn in turns]
        prompt = self._encoder.encode(messages, Rendering(), self._max_length - 1)
        sampling = self._sampling(len(prompt.tokens))
        text = self._new_text(prompt, sampling)
        cached, completion = 0, 0
        async with aclosing(self._engine.submit(Request(uuid.uuid4().hex, prompt, sampling))) as stream:
            async for output in stream:
                if isinstance(output, PromptOutput):
                    cached = output.cached_tokens
                    continue
                completion += output.token is not None
                if piece := text.push(output).text:
                    yield piece
        yield Usage(len(prompt.tokens), cached, completion)

    def _sampling(self, num_prompt_tokens: int) -> SamplingParams:
        defaults, asked = self._text.defaults, self._asked
        longest = asked.max_tokens or defaults.max_new_tokens
        limit = Limit.of(self._max_length, self._engine.longest_sequence, is_open=asked.max_tokens is None)
        return SamplingParams(
            temperature=defaults.temperature if asked.temperature is None else asked.temperature,
            top_p=defaults.top_p,
            top_k=defaults.top_k,
            repetition_penalty=defaults.repetition_penalty,
            seed=asked.seed,
            max_tokens=limit.answer(num_prompt_tokens, longest or self._max_length, "messages"),
            stop_token_ids=known_tokens(defaults.eos_ids, self._vocab_size),
        )

    def _new_text(self, prompt: Prompt, sampling: SamplingParams) -> ChoiceText:
        tokenizer = self._text.tokenizer
        detokenizer = Detokenizer(tokenizer, prompt.tokens.tolist(), tokenizer.special_ids)
        return ChoiceText(detokenizer, (), sampling.stop_token_ids, (), include_stop=False)
