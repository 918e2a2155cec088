"""The embedded model's tokenizer: byte-level BPE with chat specials, and how a dialogue becomes tokens.

Digits are single tokens, so that codes and counts are spelled alike wherever they stand. All 256 bytes are in the
alphabet: any text survives the round trip.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

TOOL_MARKS = ("<tool_call>", "</tool_call>")
SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", *TOOL_MARKS)
RESERVED = tuple(f"<|reserved_{i}|>" for i in range(9))
PAD, BOS, EOS, IM_START, IM_END = range(5)
VOCABULARY = 4096

# As GPT-2 splits text, except that digits stand alone.
WORDS = r"""'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}
{{- messages[0].content + '\\n\\n' }}
{%- endif %}
{{- 'You may call these tools:\\n<tools>' }}
{%- for tool in tools %}
{{- '\\n' }}
{{- tool | tojson }}
{%- endfor %}
{{- '\\n</tools>\\nTo call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}
{{- message.content }}
{%- elif message.content %}
{%- for part in message.content %}
{%- if part.type == 'text' %}
{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}
{%- set call = call.function if call.function else call %}
{{- '<tool_call>{"name": "' + call.name + '", "arguments": ' }}
{{- call.arguments if call.arguments is string else call.arguments | tojson }}
{{- '}</tool_call>' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE of `VOCABULARY` tokens; fewer when the texts hold fewer different words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIALS, *RESERVED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_visible_tool_marks(tokenizer)


def _with_visible_tool_marks(tokenizer: Tokenizer) -> Tokenizer:
    """Tool marks are one token each, but text: whoever leaves out special tokens must still see a call."""
    settings = json.loads(tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["content"] not in TOOL_MARKS
    return Tokenizer.from_str(json.dumps(settings))


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `AutoTokenizer` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|eos|>", "<|im_start|>", "<|im_end|>"],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


class Codec:
    """Token ids of turns, as the chat template renders them; remembers what it has encoded."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.encode = cache(self._encode)

    @classmethod
    def load(cls, folder: Path) -> Codec:
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def turn(self, role: str, text: str) -> list[int]:
        return [*self.opening(role), *self.encode(text), IM_END, *self.encode("\n")]

    def opening(self, role: str) -> tuple[int, ...]:
        return self.encode(f"<|im_start|>{role}\n")


def passages(folder: Path) -> Iterator[str]:
    """Paragraphs of the books in a text folder: every `*.jsonl.xz` below it whose lines have `text`."""
    import lzma

    for path in sorted(folder.rglob("books*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield from (p for p in json.loads(line)["text"].split("\n\n") if 80 < len(p) < 1200)
