"""From the JSON of a Messages request to a conversation and what is wanted of it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby

from hybrid_cache.api.server.gate import body_size
from hybrid_cache.api.server.remarks import ignore, remark_reading
from hybrid_cache.api.server.schemas.anthropic import (
    Block,
    CacheControl,
    CountRequest,
    Message,
    MessagesRequest,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
)
from hybrid_cache.api.server.tenants import current_tenant_or, salt_of
from hybrid_cache.api.text.chat import Conversation
from hybrid_cache.api.text.generation import GenerationSpec
from hybrid_cache.api.text.grammars import Source, json_source
from hybrid_cache.api.text.messages import Mark, Rendering, SentBack, TemplateMessage, TextPart, tool_call
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.api.text.tool_grammars import call_source
from hybrid_cache.errors import RequestError
from hybrid_cache.sampling import SamplingParams

BILLING = "x-anthropic-billing-header:"
EFFORT = "reasoning_effort"  # as templates know it
TTL_S = {"5m": 300.0, "1h": 3600.0}


def _source(text: TextEngine, asked: MessagesRequest) -> Source | None:
    """What the answer has to be. Raises RequestError."""
    choice, schema = asked.tool_choice, asked.schema_of_answer
    source = None if schema is None else json_source(schema, "output_config")
    functions = [{"name": t.name, "parameters": t.input_schema, "strict": t.strict} for t in _tools(asked)]
    parallel = choice is None or not choice.disable_parallel_tool_use
    if choice is None or choice.type in ("auto", "none"):
        return text.open_source(functions, source, parallel=parallel)
    parallel = parallel and choice.type == "any"
    only = choice.name if choice.type == "tool" else None
    return call_source(text.tools, functions, text.tokenizer, only=only, parallel=parallel)


async def conversation_of(text: TextEngine, asked: CountRequest, *, keep_billing: bool) -> Conversation:
    """What is asked, as tokens. Raises RequestError, and ContextTooLong when the context does not hold it.

    keep_billing: a billing header with a number of its own in each request stays, and no two prompts begin alike
    """
    tools = _tools(asked)
    if asked.thinking is not None and asked.thinking.type == "enabled" and text.thoughts is None:
        raise RequestError("thinking is enabled, and this model's chat template knows of no thoughts", param="thinking")
    rendering = Rendering(
        kwargs=_thinking(text, asked),
        tools=[_tool(tool) for tool in tools] or None,
        tools_mark=next((mark for tool in reversed([*tools]) if (mark := _mark(tool.cache_control))), None),
    )
    messages = [*_system(asked, keep_billing), *_turns(asked.messages, text.chat.takes_argument_text(rendering))]
    if asked.cache_control is not None:
        messages[-1] = messages[-1].marked_at_end(_mark(asked.cache_control))
    continued: AbstractContextManager[None] = nullcontext()
    if asked.messages[-1].role == "assistant":
        rendering = rendering.continuing()
        continued = _continued(messages[-1], f"messages.{len(asked.messages) - 1}")
    with continued:
        made = await text.conversation(messages, rendering, current_tenant_or(None), body_size())
    remark_reading(made.rearranged, made.unread)
    return made


def _thinking(text: TextEngine, asked: CountRequest) -> dict[str, object]:
    """What the template is told of thoughts, and of effort if it asks for that."""
    variables: dict[str, object] = {}
    if asked.thinking is not None:
        variables["enable_thinking"] = asked.thinking.type != "disabled"
    effort = asked.output_config.effort if asked.output_config is not None else None
    if effort is not None and not text.chat.reads(EFFORT):
        ignore("output_config.effort")
    elif effort is not None:
        variables[EFFORT] = effort
    return variables


@contextmanager
def _continued(last: TemplateMessage, where: str) -> Iterator[None]:
    """Says in this API's words that an answer cannot go on from a last turn. Raises RequestError."""
    if "tool_calls" in last.fields:
        raise RequestError(f"{where}: a tool_use block needs its tool_result in the turn after", param="messages")
    try:
        yield
    except RequestError as error:
        if error.param != "continue_final_message":
            raise
        reason = "the answer continues a last turn with role 'assistant', which has to end in a text that is not empty"
        raise RequestError(f"{where}: {reason}, where the chat template shows it as it is", param="messages") from error


async def spec_of(text: TextEngine, asked: MessagesRequest, conversation: Conversation) -> GenerationSpec:
    """What the request asks for, else what the model's generation_config.json says, else the API's defaults."""
    defaults, prompt = text.defaults, conversation.prompt
    sampling = SamplingParams(
        temperature=defaults.temperature if asked.temperature is None else asked.temperature,
        top_p=defaults.top_p if asked.top_p is None else asked.top_p,
        top_k=max(0, defaults.top_k if asked.top_k is None else asked.top_k),
        min_p=defaults.min_p,
        repetition_penalty=defaults.repetition_penalty,
        max_tokens=text.answer_length(prompt, asked.max_tokens, text.max_length, "messages"),
        stop_token_ids=text.eos_ids,
    )
    source = partial(_source, text, asked) if asked.tools or asked.tool_choice or asked.schema_of_answer else None
    form = text.answer_form(prompt, [_tool(tool) for tool in _tools(asked)])
    return GenerationSpec(
        prompt,
        sampling,
        stops=(*(asked.stop_sequences or ()), *defaults.stops),
        form=form,
        one_call=bool(asked.tool_choice is not None and asked.tool_choice.disable_parallel_tool_use),
        grammar=await text.grammar(source, form, current_tenant_or(None), body_size()),
        namespace=salt_of(None),
        tenant=current_tenant_or(None),
        talk=replace(conversation.talk, sent_back=SentBack(objects=True, blocks=True)),
    )


def _tools(asked: CountRequest) -> Sequence[Tool]:
    """Those that the model may call."""
    return () if asked.tool_choice is not None and asked.tool_choice.type == "none" else asked.tools or ()


def _system(asked: CountRequest, keep_billing: bool) -> Iterator[TemplateMessage]:
    if asked.system is None:
        return
    blocks = [TextBlock(type="text", text=asked.system)] if isinstance(asked.system, str) else list(asked.system)
    if blocks and not keep_billing and blocks[0].text.startswith(BILLING):
        rest = blocks[0].text.partition("\n")[2].lstrip("\n")
        blocks[:1] = [blocks[0].model_copy(update={"text": rest})] if rest else []
    if blocks:
        yield TemplateMessage("system", tuple(map(_part, blocks)))


def _turns(messages: Sequence[Message], as_text: bool) -> Iterator[TemplateMessage]:
    """Turns of one role in a row are one. Results of tools are messages of their own, where they stand.

    Raises RequestError for a result without its call, or a call without its result.
    """
    open_calls: dict[str, str] = {}  # of the turn before: id and name
    for role, turns in groupby(messages, key=lambda message: message.role):
        blocks = [block for turn in turns for block in _blocks(turn)]
        if role == "system":
            yield TemplateMessage("system", tuple(_part(block) for block in blocks if isinstance(block, TextBlock)))
            continue
        if role == "assistant":
            yield _assistant(blocks, as_text)
            calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
            open_calls = {call.id: call.name for call in calls}
            if len(open_calls) < len(calls):
                raise RequestError("two tool_use blocks of one turn have the same id", param="messages")
            continue
        for is_text, group in groupby(blocks, key=lambda block: isinstance(block, TextBlock)):
            if is_text:
                yield TemplateMessage("user", tuple(_part(block) for block in group if isinstance(block, TextBlock)))
            else:
                yield from _results(group, open_calls)
        if open_calls:
            missing = next(iter(open_calls))
            raise RequestError(f"the tool_use block {missing!r} has no tool_result in the turn after", param="messages")


def _blocks(turn: Message) -> Sequence[Block]:
    if isinstance(turn.content, str):
        return [TextBlock(type="text", text=turn.content)]
    return turn.content


def _results(blocks: Iterable[Block], open_calls: dict[str, str]) -> Iterator[TemplateMessage]:
    for block in blocks:
        assert isinstance(block, ToolResultBlock)
        name = open_calls.pop(block.tool_use_id, None)
        if name is None:
            raise RequestError(
                f"the tool_result for {block.tool_use_id!r} answers no tool_use block of the turn before",
                param="messages",
            )
        if block.is_error:  # no template has a place for that, results are to say it themselves
            ignore("content.is_error")
        content = block.content or ""
        parts = [TextPart(content)] if isinstance(content, str) else [_part(each) for each in content]
        message = TemplateMessage("tool", tuple(parts), {"tool_call_id": block.tool_use_id, "name": name})
        yield message.marked_at_end(_mark(block.cache_control))


def _assistant(blocks: Sequence[Block], as_text: bool) -> TemplateMessage:
    texts = [_part(block) for block in blocks if isinstance(block, TextBlock)]
    calls = [_call(block, as_text) for block in blocks if isinstance(block, ToolUseBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    if not (texts or calls or thoughts):
        raise RequestError(
            "a message with role 'assistant' needs a text, a thinking or a tool_use block", param="messages"
        )
    fields: dict[str, object] = {}
    if any(isinstance(block, RedactedThinkingBlock) for block in blocks):  # nobody here can read it
        ignore("content.redacted_thinking")
    if calls:
        fields["tool_calls"] = calls
    if thoughts:
        fields["reasoning_content"] = "\n".join(thoughts)
    parts = tuple(texts) or (None if calls else (TextPart(""),))  # an answer that was cut off inside its thoughts
    message = TemplateMessage("assistant", parts, fields)
    marks = (_mark(block.cache_control) for block in blocks if isinstance(block, ToolUseBlock))
    return message.marked_at_end(next((mark for mark in marks if mark), None))


def _call(block: ToolUseBlock, as_text: bool) -> dict[str, object]:
    arguments = json.dumps(block.input, ensure_ascii=False) if as_text else block.input
    return tool_call(block.id, block.name, arguments)


def _tool(tool: Tool) -> dict[str, object]:
    function: dict[str, object] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _part(block: TextBlock) -> TextPart:
    mark = _mark(block.cache_control)
    return TextPart(block.text, mark is not None, mark.ttl_s if mark else None)


def _mark(control: CacheControl | None) -> Mark | None:
    return None if control is None else Mark(TTL_S[control.ttl or "5m"])
