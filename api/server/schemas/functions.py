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
    if isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    tools = [{"type": "function", "function": function} for function in functions]
    return {**value, "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}


def calls_as_tool_calls(messages: list[object]) -> list[object]:
    """Messages in which a `function_call` is a tool call, and the message of a function its result."""
    read, open_call = list[object](), ""
    for place, message in enumerate(messages):
        if not isinstance(message, dict):
            read.append(message)
        elif isinstance(message.get("function_call"), Mapping) and not message.get("tool_calls"):
            open_call = f"call_{place}"
            call = {"id": open_call, "type": "function", "function": message["function_call"]}
            read.append({**_without_call(message), "tool_calls": [call]})
        elif message.get("role") == "function":
            read.append({**message, "role": "tool", "tool_call_id": open_call or None})
            open_call = ""
        else:
            read.append(message)
    return read


def _without_call(message: Mapping[object, object]) -> dict[object, object]:
    return {name: value for name, value in message.items() if name != "function_call"}
