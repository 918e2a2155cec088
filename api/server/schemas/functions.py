"""Functions in OpenAI's form of 2023, read as the tools that took their place."""

from collections.abc import Mapping

from hybrid_cache.errors import RequestError


def functions_as_tools(value: object) -> object:
    """The body of a request: its functions are tools, of which an answer calls one at most. Raises RequestError."""
    if not isinstance(value, dict):
        return value
    functions, choice = value.get("functions"), value.get("function_call")
    if not isinstance(functions, list):
        return value
    if value.get("tools"):
        raise RequestError("tools and functions cannot both be there", param="functions")
    if choice is not None and value.get("tool_choice") is not None:
        raise RequestError("tool_choice and function_call cannot both be there", param="tool_choice")
    if value.get("parallel_tool_calls"):
        raise RequestError("functions are called one at a time, tools in parallel", param="parallel_tool_calls")
    if choice is None:
        choice = value.get("tool_choice")
    elif isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    tools = [{"type": "function", "function": function} for function in functions]
    return {**value, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}


def calls_as_tool_calls(messages: list[object]) -> list[object]:
    """Messages in which a `function_call` is a tool call, and the message of a function its result."""
    read, open_call = list[object](), ""
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            read.append(message)
        elif _calls_a_function(message):
            open_call = f"call_{place}"
            call = {"id": open_call, "type": "function", "function": message["function_call"]}
            read.append({**_without_call(message), "tool_calls": [call]})
        elif message.get("role") == "function":
            read.append({**message, "role": "tool", "tool_call_id": open_call or None})
            open_call = ""
        else:
            read.append(message)
    return read


def _calls_a_function(message: Mapping[object, object]) -> bool:
    by_model = message.get("role") == "assistant" and not message.get("tool_calls")
    return by_model and isinstance(message.get("function_call"), Mapping)


def _without_call(message: Mapping[object, object]) -> dict[object, object]:
    return {name: value for name, value in message.items() if name != "function_call"}
