"""How families of models write tool calls and thoughts: a record for each, found from the chat template.

The forms are those that the families' published templates and model cards show.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from hybrid_cache.api.text.call_readers import ReadCall, Tags, json_call, kimi_call, python_call
from hybrid_cache.errors import ConfigError

_LIST = " \t\r\n,;[]"  # between calls of JSON or Python, in a list or one after the other
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A section of calls: `begin`, calls with characters of `between` around them, `end`."""

    name: str
    begin: str  # empty: the answer itself, where it begins with a brace
    end: str  # empty: the end of the answer
    read: ReadCall
    between: str = _LIST
    inner: tuple[str, ...] = ()  # other marks that may be tokens without text

    @property
    def marks(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.begin, self.end, *self.inner)))


QWEN = Tags("<function=", "</function>", "<parameter=", "</parameter>", ">", "\n")
MINIMAX = Tags('<invoke name="', "</invoke>", '<parameter name="', "</parameter>", '">')
_KIMI = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
PYTHON_TAG = "<|python_tag|>"

FORMATS = {
    each.name: each
    for each in (
        ToolFormat("hermes", "<tool_call>", "</tool_call>", json_call),  # Qwen, Granite-4, Falcon-H1
        ToolFormat("qwen3_coder", "<tool_call>", "</tool_call>", QWEN.read, _SPACE),  # and Nemotron-3
        ToolFormat("jamba", "<tool_calls>", "</tool_calls>", json_call),  # and MiniMax-M1
        ToolFormat("nemotron", "<TOOLCALL>", "</TOOLCALL>", json_call),
        ToolFormat("lfm2", "<|tool_call_start|>", "<|tool_call_end|>", python_call),
        ToolFormat("minimax_m2", "<minimax:tool_call>", "</minimax:tool_call>", MINIMAX.read, _SPACE),
        ToolFormat(
            "kimi", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", kimi_call(*_KIMI), _SPACE, _KIMI
        ),
        ToolFormat("llama3", "", "", json_call, inner=(PYTHON_TAG,)),
    )
}
DEFAULT = FORMATS["hermes"]
_SHOWN_BY = (  # what a template has in it, the most telling first
    ("<|tool_calls_section_begin|>", "kimi"),
    ("<minimax:tool_call>", "minimax_m2"),
    ("<|tool_call_start|>", "lfm2"),
    ("<|tool_list_start|>", "lfm2"),
    ("<TOOLCALL>", "nemotron"),
    ("<tool_calls>", "jamba"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3"),
    ("<|start_header_id|>", "llama3"),
)


def format_of(sources: Iterable[str], forced: str | None = None) -> ToolFormat:
    """What a model writes calls in, by its chat templates. Raises ConfigError for a forced one that is unknown."""
    if forced is not None:
        if forced not in FORMATS:
            raise ConfigError(f"tool_parser is {forced!r}, must be one of {', '.join(FORMATS)}")
        return FORMATS[forced]
    text = "\n".join(sources)
    return next((FORMATS[name] for mark, name in _SHOWN_BY if mark in text), DEFAULT)


@dataclass(frozen=True, slots=True)
class ThoughtFormat:
    """What stands around the thoughts of an answer."""

    begin: str = "<think>"
    end: str = "</think>"


def thoughts_of(sources: Iterable[str]) -> ThoughtFormat | None:
    """None for a model whose template knows of no thoughts."""
    known = ThoughtFormat()
    return known if any(known.end in source or known.begin in source for source in sources) else None
