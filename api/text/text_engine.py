"""A model that is talked to in text: an engine, what turns text into tokens, and the room for both sides."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from hybrid_cache.api.text.answer_parser import AnswerForm
from hybrid_cache.api.text.boundaries import prompt_of_tokens
from hybrid_cache.api.text.chat import ChatEncoder, Conversation
from hybrid_cache.api.text.defaults import GenerationDefaults
from hybrid_cache.api.text.generation import GenerationSpec
from hybrid_cache.api.text.grammars import Grammar, Grammars, Source
from hybrid_cache.api.text.messages import Rendering, Talk, TemplateMessage
from hybrid_cache.api.text.next_turn import Said, beginnings
from hybrid_cache.api.text.text_work import LONG_TEXT, TextWork
from hybrid_cache.api.text.tokenizer import TextModel, Tokenizer
from hybrid_cache.api.text.tool_formats import ThoughtFormat, ToolFormat, format_of, thoughts_of
from hybrid_cache.api.text.tool_grammars import open_source
from hybrid_cache.api.text.tool_schemas import properties_of
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.errors import ContextTooLong, RequestError
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.tokens import Prompt, TokenArray, last_occurrence

THOUGHT_TOKENS = 16  # at the end of a prompt: the mark that opens a thought is among them


@dataclass(frozen=True, slots=True)
class TextEngine:
    """Made once for a model; all requests share it."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    chat: ChatEncoder
    defaults: GenerationDefaults
    work: TextWork
    tools: ToolFormat  # in which the model writes calls
    thoughts: ThoughtFormat | None  # and thoughts, if it has any
    grammars: Grammars
    model: str = ""  # the engine's name for it: empty, or a variant's
    invocation: tuple[int, ...] = ()  # of an activated adapter: tokens that switch it on
    expecting: set[asyncio.Task[None]] = field(default_factory=set)  # work on turns that are still to come

    @classmethod
    def of(
        cls,
        engine: AsyncEngine,
        text: TextModel,
        *,
        special_tokens_in_content: bool = False,
        tool_parser: str | None = None,
        model: str = "",
        work: TextWork | None = None,
        invocation: tuple[int, ...] = (),
    ) -> "TextEngine":
        """special_tokens_in_content: as in `ChatEncoder`
        tool_parser: the name of a `ToolFormat`; None to find it from the chat template
        model: a variant of the engine   work: that of others, to share its threads with them
        invocation: as the field

        Raises ConfigError for an unknown one.
        """
        chat = ChatEncoder(text.tokenizer, text.chat_templates, special_tokens_in_content=special_tokens_in_content)
        sources = [template.source for template in text.chat_templates.values()]
        tools = format_of(sources, tool_parser)
        eos_ids = [token for token in text.defaults.eos_ids if token < engine.model.vocab_size]
        grammars = Grammars(text.tokenizer, engine.model.vocab_size, eos_ids)
        return cls(
            engine=engine,
            tokenizer=text.tokenizer,
            chat=chat,
            defaults=text.defaults,
            work=work or TextWork(),
            tools=tools,
            thoughts=thoughts_of(sources),
            grammars=grammars,
            model=model,
            invocation=invocation,
        )

    @property
    def fingerprint(self) -> str:
        """Of its model, which namespaces begin with."""
        return self.engine.fingerprint(self.model)

    def active_from(self, prompt: Prompt) -> int | None:
        """Where in a prompt an activated adapter is switched on; None if nothing does that."""
        return last_occurrence(prompt.tokens, self.invocation) if self.invocation else None

    def answer_form(self, prompt: Prompt, tools: Sequence[Mapping[str, object]] | None) -> AnswerForm:
        """How an answer to a conversation is read. tools: definitions of functions; None where calls are text"""
        end = self.tokenizer.decode(prompt.tokens[-THOUGHT_TOKENS:].tolist()).rstrip() if self.thoughts else ""
        thinking = self.thoughts is not None and end.endswith(self.thoughts.begin)
        if not tools:
            return AnswerForm(thoughts=self.thoughts, thinking=thinking)
        return AnswerForm(self.tools, _types(tools), self.thoughts, thinking)

    @property
    def vocab_size(self) -> int:
        return self.engine.model.vocab_size

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and its answer, by the model's context."""
        return self.engine.model.max_length

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer and that the model can choose: a generation_config.json may name others."""
        return tuple(token for token in self.defaults.eos_ids if token < self.vocab_size)

    def answer_length(self, prompt: Prompt, max_tokens: int | None, otherwise: int, param: str) -> int:
        """Tokens that an answer may have: at most `max_tokens`, or where that was left open what the model's own
        defaults say, or `otherwise`.

        It ends where the context does, or the cache.
        Raises ContextTooLong about `param` if there is room for none.
        """
        room, bound = self.max_length, "this model's context"
        if self.engine.longest_sequence < room:
            room, bound = self.engine.longest_sequence, "the cache budget"
        num_tokens = len(prompt.tokens)
        longest = self.defaults.answer_length(num_tokens, otherwise) if max_tokens is None else max_tokens
        # A prompt that fills the context may still be scored: that takes no answer.
        if num_tokens + min(longest, 1) > room:
            raise ContextTooLong(
                f"the prompt has {num_tokens} tokens and {bound} {room}, which must hold the prompt and its answer",
                param=param,
            )
        return min(longest, room - num_tokens)

    def open_source(
        self, functions: Sequence[Mapping[str, object]], answer: Source | None, *, parallel: bool
    ) -> Source | None:
        """What an answer has to be that may call tools, and else be `answer`: with `strict` tools, calls as these say.

        None where anything goes. Raises RequestError.
        """
        if not functions or not (answer or any(each.get("strict") for each in functions)):
            return answer
        if answer is not None and (answer.own or not self.tools.begin):
            return answer  # a grammar says what calls look like, and Llama-3's begin like any other object
        return open_source(self.tools, functions, self.tokenizer, self.thoughts, parallel=parallel, answer=answer)

    async def grammar(
        self, source: Callable[[], Source | None] | None, form: AnswerForm, tenant: str, size: int
    ) -> Grammar | None:
        """Compiles what an answer of a form has to be, if anything is asked. Raises RequestError.

        source: makes it, beside the event loop; None where nothing is asked
        size: characters of what asks for it
        """
        if source is None:
            return None
        size = max(size, LONG_TEXT + 1)  # however short, it may take long
        return await self.work.run(tenant, size, lambda: self._compiled(source(), form))

    def _compiled(self, source: Source | None, form: AnswerForm) -> Grammar | None:
        if source is None:
            return None
        if form.thinking and form.thoughts is not None:
            source = source.after_thought(form.thoughts.end, self.tokenizer.id_of(form.thoughts.end))
        return self.grammars.compile(source)

    async def conversation(
        self,
        messages: Sequence[TemplateMessage],
        rendering: Rendering,
        tenant: str,
        size: int = 0,
        *,
        in_order: bool = False,
    ) -> Conversation:
        """Renders and tokenises. Raises RequestError, and ContextTooLong when the context does not hold them.

        size: characters of everything, if there is more than the text of the messages
        in_order: the messages stay as they are, whatever the template says of their order
        """
        size = max(size, Talk(messages, rendering).size)
        make = self.chat.conversation if in_order else self.chat.rearranged
        return await self.work.run(tenant, size, lambda: make(messages, rendering, self.max_length))

    def expect(self, spec: GenerationSpec, said: Said) -> None:
        """Has the cache hold what the next request will begin with, now that an answer to a conversation is there."""
        task = asyncio.ensure_future(self._commit(spec, said))
        self.expecting.add(task)
        task.add_done_callback(self.expecting.discard)

    async def _commit(self, spec: GenerationSpec, said: Said) -> None:
        talk = spec.talk
        assert talk is not None
        longest = self.engine.longest_sequence
        with suppress(RequestError):  # which a later request would get, too
            found = await self.work.run_later(talk.size + said.size, lambda: beginnings(self.chat, talk, said, longest))
            read = spec.prompt.tokens[: self.active_from(spec.prompt)]  # by the model that reads what comes next
            for prompt in found or ():
                if adds_pages(prompt.tokens, read):
                    self.engine.commit(spec.namespace, prompt, spec.session, self.model)

    async def prompt(self, prompt: str | list[int], tenant: str, *, add_special_tokens: bool) -> Prompt:
        """A text, or tokens as they are. Raises RequestError, and ContextTooLong for text that cannot fit."""

        def tokens() -> Sequence[int]:
            if not isinstance(prompt, str):
                return prompt
            self.tokenizer.check_fits(prompt, self.max_length, "prompt")
            return self.tokenizer.encode_prompt(prompt) if add_special_tokens else self.tokenizer.encode(prompt)

        return await self.work.run(tenant, len(prompt), lambda: prompt_of_tokens(tokens(), self.tokenizer))


def adds_pages(beginning: TokenArray, prompt: TokenArray) -> bool:
    """Whether the full pages of what the next prompt begins with are not all those of a prompt that was computed."""
    end = len(beginning) // TILE * TILE
    return end > len(prompt) or not np.array_equal(beginning[:end], prompt[:end])


def _types(tools: Sequence[Mapping[str, object]]) -> dict[str, Mapping[str, object]]:
    """Tool -> parameter -> its schema, as far as the definitions say."""
    types: dict[str, Mapping[str, object]] = {}
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, dict):
            types[str(function.get("name"))] = properties_of(function.get("parameters"))
    return types
