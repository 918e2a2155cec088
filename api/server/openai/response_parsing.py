"""From the items of a Responses request to a conversation, and from its other fields to those of chat."""

import base64
import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from hybrid_cache.api.server.gate import body_size
from hybrid_cache.api.server.openai.messages import rendering_of, text_part
from hybrid_cache.api.server.openai.response_turns import Turn
from hybrid_cache.api.server.remarks import remark_reading
from hybrid_cache.api.server.schemas.chat import ChatRequest, NamedFunction, NamedTool
from hybrid_cache.api.server.schemas.common import JsonSchema, ResponseFormat, remark_unused
from hybrid_cache.api.server.schemas.messages import FunctionDefinition, ReasoningOptions, Tool
from hybrid_cache.api.server.schemas.responses import (
    FunctionCallItem,
    FunctionChoice,
    FunctionOutputItem,
    FunctionTool,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
    Said,
    TextContent,
)
from hybrid_cache.api.server.tenants import current_tenant_or
from hybrid_cache.api.text.chat import Conversation
from hybrid_cache.api.text.messages import TemplateMessage, TextPart, arguments_object, tool_call
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.errors import ContextTooLong, RequestError

ANSWER_ROOM = 1024  # tokens that truncation leaves for an answer of any length; at most a quarter of the context
ENCODED = "text."  # begins an encrypted_content of ours: no secret, `content` says the same
RENAMED = {"messages": "input", "response_format": "text.format"}
Unit = list[Said]  # what truncation drops or keeps as a whole: a message, or an answer with the results of its calls


class _Place(NamedTuple):
    """Where a truncated conversation may begin."""

    unit: int
    characters: int  # from there on
    rank: int  # how many times its number among the places can be halved, as a power of two


@contextmanager
def in_words_of_responses() -> Iterator[None]:
    """Errors name the fields of this API, not those of chat."""
    try:
        yield
    except RequestError as error:
        error.param = RENAMED.get(error.param or "", error.param)
        raise


def as_chat(asked: ResponsesRequest) -> ChatRequest:
    """All but the messages, in the fields of chat."""
    effort = asked.reasoning.effort if asked.reasoning is not None else None
    choice: object = asked.tool_choice
    if isinstance(choice, FunctionChoice):
        choice = NamedTool(type="function", function=NamedFunction(name=choice.name))
    return ChatRequest.model_construct(
        messages=[],
        max_completion_tokens=asked.max_output_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        logprobs=asked.shows_logprobs,
        top_logprobs=asked.top_logprobs,
        tools=[_tool(tool) for tool in asked.tools or ()] or None,
        tool_choice=choice,
        parallel_tool_calls=asked.parallel_tool_calls,
        response_format=_format(asked),
        reasoning=None if effort is None else ReasoningOptions(effort=effort),
        cache_salt=asked.cache_salt,
        prompt_cache_options=asked.prompt_cache_options,
    )


async def conversation_of(text: TextEngine, asked: ResponsesRequest, chat: ChatRequest, turn: Turn) -> Conversation:
    """The items of a turn as tokens; with truncation the latest of them.

    chat: of `as_chat`
    Raises RequestError, and ContextTooLong when the context does not hold them.
    """
    rendering = rendering_of(text, chat)
    as_text = text.chat.takes_argument_text(rendering)
    tenant, size = current_tenant_or(asked.cache_salt), body_size() + turn.stored_bytes
    system, units = _parted(asked.instructions, turn.items)

    async def beginning_at(first: int) -> Conversation:
        messages = [*system, *_messages([item for unit in units[first:] for item in unit], as_text)]
        if not messages:
            raise RequestError("the input has no items, and there are no instructions", param="input")
        made = await text.conversation(messages, rendering, tenant, size)
        remark_reading(made.rearranged, made.unread)
        return made

    if asked.truncation != "auto" or len(units) < 2:
        return await beginning_at(0)
    room = min(text.max_length, text.engine.longest_sequence)
    room -= min(asked.max_output_tokens or ANSWER_ROOM, text.max_length // 4)
    return await _latest(beginning_at, _places(units), room)


async def _latest(
    beginning_at: Callable[[int], Awaitable[Conversation]], places: Sequence[_Place], room: int
) -> Conversation:
    """A conversation of at most `room` tokens, the whole if that fits; the shortest one whatever its length.

    Of all places that leave about half the room or more, it begins at the one of the highest rank. That one stays for
    about half as many turns as there are such places, however long their messages are, and turns begin alike.
    """

    async def within_room(place: _Place) -> Conversation | None:
        try:
            found = await beginning_at(place.unit)
        except ContextTooLong:
            return None
        return found if len(found.prompt.tokens) <= room else None

    best = await within_room(places[0])
    if best is not None:
        return best
    low, high = 1, len(places) - 1
    while low < high:
        middle = (low + high) // 2
        found = await within_room(places[middle])
        low, high, best = (middle + 1, high, best) if found is None else (low, middle, found)
    if best is None:
        return await beginning_at(places[-1].unit)
    half = places[low].characters * room / (2 * len(best.prompt.tokens))
    chosen = max((p for p in places[low:] if p.characters >= half), key=lambda p: p.rank, default=places[low])
    return best if chosen.rank <= places[low].rank else await beginning_at(chosen.unit)


def _tool(tool: FunctionTool) -> Tool:
    """In the form that templates know."""
    definition = tool.model_dump(exclude_none=True, exclude={"type"})
    return Tool(type="function", function=FunctionDefinition(**definition))


def _format(asked: ResponsesRequest) -> ResponseFormat | None:
    form = asked.text.format if asked.text is not None else None
    if form is None:
        return None
    schema = None if form.schema_ is None else JsonSchema.model_construct(name=form.name, schema_=form.schema_)
    return ResponseFormat.model_construct(type=form.type, json_schema=schema)


def _parted(instructions: str | None, items: Sequence[Said]) -> tuple[list[TemplateMessage], list[Unit]]:
    """What is said to the system before anything else, as one message, and all that may be dropped."""
    system = list(itertools.takewhile(lambda item: isinstance(item, MessageItem) and item.by_system, items))
    parts = [] if instructions is None else [TextPart(instructions)]
    parts += [part for item in system if isinstance(item, MessageItem) for part in _parts(item.parts)]
    head = [TemplateMessage("system", tuple(parts))] if parts else []
    return head, _units(items[len(system) :])


def _units(items: Sequence[Said]) -> list[Unit]:
    units, open_calls = list[Unit](), set[str]()
    for item in items:
        goes_on = bool(open_calls) or (bool(units) and _of_model(units[-1][-1]) and _of_model(item))
        if goes_on:
            units[-1].append(item)
        else:
            units.append([item])
        if isinstance(item, FunctionCallItem):
            open_calls.add(item.call_id)
        elif isinstance(item, FunctionOutputItem):
            open_calls.discard(item.call_id)
    return units


def _places(units: Sequence[Unit]) -> list[_Place]:
    """Where a truncated conversation may begin: the first unit, each message of a user, and all after the last one."""
    of_user = [place for place, unit in enumerate(units) if not _of_model(unit[0])]
    first_after = of_user[-1] + 1 if of_user else 0
    numbers = {place: number for number, place in enumerate(of_user)}
    numbers |= {place: place - first_after + 1 for place in range(first_after, len(units))}
    sizes = [sum(map(_num_characters, unit)) for unit in units]
    left = list(itertools.accumulate(reversed(sizes)))[::-1]
    return [_Place(place, left[place], number & -number) for place, number in sorted(({0: 0} | numbers).items())]


def _num_characters(item: Said) -> int:
    match item:
        case MessageItem():
            return sum(len(part.content) for part in item.parts)
        case FunctionOutputItem():
            return sum(len(part.content) for part in item.parts)
        case FunctionCallItem():
            return len(item.name) + len(item.arguments)
    return len(_thought(item))


def _of_model(item: Said) -> bool:
    return not isinstance(item, FunctionOutputItem) and (not isinstance(item, MessageItem) or item.role == "assistant")


def _messages(items: Sequence[Said], as_text: bool) -> Iterator[TemplateMessage]:
    """What the model has said in one answer is one message."""
    names: dict[str, str] = {}
    for of_model, group in itertools.groupby(items, key=_of_model):
        said = list(group)
        names |= {item.call_id: item.name for item in said if isinstance(item, FunctionCallItem)}
        if of_model:
            yield from (_answer(answer, as_text) for answer in _answers(said))
            continue
        for item in said:
            if isinstance(item, FunctionOutputItem):
                fields = {"tool_call_id": item.call_id, "name": names[item.call_id]}
                yield TemplateMessage("tool", _parts(item.parts), fields)
            elif isinstance(item, MessageItem):
                yield TemplateMessage(item.role, _parts(item.parts))


def _answers(items: Iterable[Said]) -> Iterator[list[Said]]:
    """No answer has two messages in a row."""
    answer: list[Said] = []
    for item in items:
        if answer and isinstance(answer[-1], MessageItem) and isinstance(item, MessageItem):
            yield answer
            answer = []
        answer.append(item)
    yield answer


def _answer(items: Sequence[Said], as_text: bool) -> TemplateMessage:
    said = [item for item in items if isinstance(item, MessageItem)]
    calls = [item for item in items if isinstance(item, FunctionCallItem)]
    thought = "".join(_thought(item) for item in items if isinstance(item, ReasoningItem))
    fields: dict[str, object] = {}
    if thought:
        fields["reasoning_content"] = thought
    if calls:
        fields["tool_calls"] = [
            tool_call(c.call_id, c.name, c.arguments if as_text else arguments_object(c.arguments)) for c in calls
        ]
    if len(said) == 1:
        return TemplateMessage("assistant", _parts(said[0].parts), fields)
    text = "".join(part.content for item in said for part in item.parts)
    return TemplateMessage("assistant", (TextPart(text),) if text or not calls else None, fields)


def _parts(parts: Sequence[TextContent]) -> tuple[TextPart, ...]:
    return tuple(text_part(part.content, part.prompt_cache_breakpoint) for part in parts) or (TextPart(""),)


def _thought(item: ReasoningItem) -> str:
    """In the clear, or in an encrypted_content of ours; what others have encrypted nobody here can read."""
    if item.content:
        return "".join(part.text for part in item.content)
    text = item.encrypted_content or ""
    with suppress(ValueError):
        if text.startswith(ENCODED):
            return base64.b64decode(text.removeprefix(ENCODED), validate=True).decode()
    remark_unused(item, ["encrypted_content", "summary"])
    return ""


def encoded(thought: str) -> str:
    """For clients that hand nothing back but `encrypted_content`."""
    return ENCODED + base64.b64encode(thought.encode()).decode()
