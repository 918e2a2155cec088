"""Text to tokens and back, from the files of a model folder. No code of the folder is ever run."""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from tokenizers import Tokenizer as Backend

from hybrid_cache.api.text.defaults import GenerationDefaults, load_defaults
from hybrid_cache.api.text.template import ChatTemplate
from hybrid_cache.api.text.text_work import LONG_TEXT, still_wanted
from hybrid_cache.api.text.tokenizer_file import first_line, has_backend, is_byte_level, is_panic, read_backend
from hybrid_cache.errors import ContextTooLong, ModelError, RequestError
from hybrid_cache.models import deltas
from hybrid_cache.models.files import errors_begin_with, is_there, own_or, read_json_if_there, read_text, shown
from hybrid_cache.models.gguf.text import text_folder

TEMPLATE, OLD_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
MAX_TEMPLATE = 1 << 20  # characters
MAX_TEMPLATES = 64  # of one model
LIKELY_LENGTH = 8  # characters of a token; few are longer
BLOCK = 1 << 16  # characters that are counted at once

_TAG = re.compile(r"<\S+>|\[\S+\]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer of one model. Safe to use from several threads."""

    def __init__(self, backend: Backend, config: Mapping[str, object]) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token_id: token.content for token_id, token in added.items()}
        self.added_ids = frozenset(added)
        self.special_tokens = [token.content for token in added.values() if token.special]
        # Added tokens such as <tool_call> that are text, but structure as well.
        self.tags = [t.content for t in added.values() if not t.special and _TAG.fullmatch(t.content)]
        # Whether one is found in text that does not hold it as it is written.
        self.folds = backend.normalizer is not None and any(t.normalized for t in added.values())
        self._structure_ids = frozenset(i for i, t in added.items() if t.special or _TAG.fullmatch(t.content))
        self._byte_level = is_byte_level(backend)
        vocab = backend.get_vocab(with_added_tokens=True)
        self._longest = max(map(len, vocab), default=1)  # characters of one token
        self.last_token = max(vocab.items(), key=lambda item: item[1], default=("", -1))  # and its id
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        self.named_tokens = {name: token for name in names if (token := _token_content(config.get(name))) is not None}
        self.bos_id = self.id_of(self.named_tokens.get("bos_token"))
        self.eos_id = self.id_of(self.named_tokens.get("eos_token"))
        flag = config.get("add_bos_token")
        self._adds_bos = flag if isinstance(flag, bool) else None

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def as_json(self) -> str:
        """The text of a tokenizer.json."""
        return self._backend.to_str()

    def id_of(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Tokens of a piece of text; special tokens written in it are recognised, none is added.

        Raises RequestError for lone surrogates.
        """
        still_wanted()
        try:
            if len(text) <= LONG_TEXT:
                return self._backend.encode(text, add_special_tokens=False).ids
            # As a batch, because only those let other threads run meanwhile.
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except (UnicodeEncodeError, TypeError) as e:  # TypeError: how the library reports lone surrogates
            raise RequestError("the text holds characters that UTF-8 cannot carry (lone surrogates)") from e
        except BaseException as e:
            if not is_panic(e):
                raise
            raise RequestError(f"this model's tokenizer cannot read the text: {first_line(e)}") from e

    def num_structure_tokens(self, ids: Sequence[int]) -> int:
        """How many are special tokens or tags; what stands for an unknown character is none."""
        unknown = self.id_of(self.named_tokens.get("unk_token"))
        return sum(1 for i in ids if i in self._structure_ids and i != unknown)

    def encode_literal(self, text: str) -> list[int]:
        """Tokens of text in which nothing is a special token or a tag, whatever it looks like.

        It is halved until none comes out. Raises RequestError for a character that is a special token by itself.
        """
        ids = self.encode(text)
        if self._structure_ids.isdisjoint(ids):
            return ids
        if len(text) == 1:
            raise RequestError(f"the character {text!r} is a special token of this model, and cannot be text")
        middle = len(text) // 2
        return self.encode_literal(text[:middle]) + self.encode_literal(text[middle:])

    def check_fits(self, text: str, max_tokens: int, param: str) -> None:
        """Raises ContextTooLong for long text with more than `max_tokens` tokens, when so many have been counted."""
        self.check_characters(len(text), max_tokens, param)
        if len(text) <= max(BLOCK, LIKELY_LENGTH * max_tokens):
            return
        count = 0
        for start in range(0, len(text), BLOCK):
            count += len(self.encode(text[start : start + BLOCK])) - 1
            if count > max_tokens:
                raise ContextTooLong(
                    f"the text has {len(text)} characters, more than the {max_tokens} tokens that the context holds",
                    param=param,
                )

    def check_characters(self, num_characters: int, max_tokens: int, param: str) -> None:
        """Raises ContextTooLong for text that cannot fit by its length, without taking the time to tokenise it."""
        most = max_tokens * self._longest
        if num_characters > max(most, LONG_TEXT):
            raise ContextTooLong(
                f"the text has {num_characters} characters, a context of {max_tokens} tokens holds at most {most}",
                param=param,
            )

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a whole prompt, with the BOS token that this model's prompts begin with, if any."""
        ids = self.encode(text)
        if self._adds_bos is None:
            prefix = self._backend.encode("", add_special_tokens=True).ids
            begins = self.bos_id is not None and self.bos_id in prefix
        else:
            begins = self._adds_bos
        if not begins or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], skip: Container[int] = ()) -> str:
        """Text of some tokens, leaving out those in `skip`. Unfinished characters become U+FFFD."""
        kept = [i for i in ids if i not in skip]
        return self._backend.decode(kept, skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; special tokens stand for their names, unknown ones for nothing."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return b"".join(_BYTE_OF.get(c, c.encode()) for c in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(match[1])
        return token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): bytes([b]) for b in plain} | {chr(256 + i): bytes([b]) for i, b in enumerate(rest)}


_BYTE_OF = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class TextModel:
    """What a model folder says about text: its tokenizer, its chat templates, its way of choosing tokens."""

    tokenizer: Tokenizer
    defaults: GenerationDefaults
    chat_templates: Mapping[str, ChatTemplate]  # by name: "default", at times "tool_use"; empty for a base model

    @staticmethod
    def load(path: Path, base: Path | None = None, stand_ins: Mapping[str, str] = MappingProxyType({})) -> "TextModel":
        """Reads the text files of a model folder, or of a delta's base.

        base: a folder whose files stand in for those that are not there
        stand_ins: chat templates for a folder without any
        Raises ModelError with one line that names the file.
        """
        path, base = text_folder(Path(path)), None if base is None else text_folder(base)
        folder = path if base is not None else text_folder(deltas.base_of(path))
        if not folder.is_dir():
            raise ModelError(f"{folder} is not a folder")
        tokenizer = load_tokenizer(folder, base)
        with errors_begin_with(folder):
            _check_vocabulary(folder, tokenizer)
            sources = load_chat_templates(folder) or stand_ins
            templates = {name: ChatTemplate(source, tokenizer.named_tokens) for name, source in sources.items()}
            return TextModel(tokenizer, load_defaults(folder, tokenizer.eos_id, base), templates)

    @staticmethod
    def load_variant(path: Path, base_path: Path, base: "TextModel") -> "TextModel":
        """Reads what the folder of a variant has of text files; the rest are those of the model that it varies.

        A tokenizer that is another one stands alone: the other files of the base would name tokens that it lacks.
        Raises as `load`.
        """
        path, base_path = text_folder(path), text_folder(base_path)
        if has_backend(path) and load_tokenizer(path, base_path).as_json() != base.tokenizer.as_json():
            return TextModel.load(path)
        return TextModel.load(path, base_path, {name: each.source for name, each in base.chat_templates.items()})

    def with_template(self, path: Path) -> "TextModel":
        """The same with a file's chat template in place of all that the folder has. Raises ModelError."""
        with errors_begin_with(f"chat template {path}"):
            template = ChatTemplate(read_text(path, MAX_TEMPLATE), self.tokenizer.named_tokens)
        return replace(self, chat_templates={"default": template})

    def with_template_of(self, folder: Path) -> "TextModel":
        """The same with the chat template in a folder's chat_template.jinja, if it has one. Raises ModelError."""
        if not is_there(path := folder / TEMPLATE):
            return self
        with errors_begin_with(folder):
            template = ChatTemplate(read_text(path, MAX_TEMPLATE), self.tokenizer.named_tokens)
        return replace(self, chat_templates={**self.chat_templates, "default": template})


def load_tokenizer(folder: Path, base: Path | None = None) -> Tokenizer:
    """Reads tokenizer.json, or has transformers convert an older format. Raises ModelError.

    base: a folder whose files stand in for those that are not there
    """
    with errors_begin_with(folder):
        config = read_json_if_there(own_or(base, folder / "tokenizer_config.json"))
        special = read_json_if_there(own_or(base, folder / "special_tokens_map.json"))
        backend = read_backend(folder if base is None or has_backend(folder) else base)
        tokenizer = Tokenizer(backend, {**special, **config})
        for name, token in tokenizer.named_tokens.items():
            if tokenizer.id_of(token) is None:
                file = "tokenizer_config.json" if config.get(name) is not None else "special_tokens_map.json"
                raise ModelError(f"{file}: {name} is {shown(token)}, which the tokenizer's vocabulary lacks")
    return tokenizer


def load_chat_templates(folder: Path) -> dict[str, str]:
    """Named chat templates of a folder, "default" among them if there is one. Raises ModelError.

    As transformers reads them: in tokenizer_config.json one or a list of named ones, over these the older
    chat_template.json, over this chat_template.jinja and a file for each other name in additional_chat_templates.
    """
    templates: dict[str, str] = {}
    for name in ("tokenizer_config.json", OLD_TEMPLATE):
        templates |= _named_templates(read_json_if_there(folder / name).get("chat_template"))
    files = {"default": folder / TEMPLATE} | {
        path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    }
    templates |= {name: read_text(path, MAX_TEMPLATE) for name, path in files.items() if is_there(path)}
    if len(templates) > MAX_TEMPLATES:
        raise ModelError(f"there are {len(templates)} chat templates, at most {MAX_TEMPLATES} are read")
    for name, source in templates.items():
        if len(source) > MAX_TEMPLATE:
            raise ModelError(f"chat template {shown(name)} has {len(source)} characters, at most {MAX_TEMPLATE}")
    return templates


def _named_templates(field: object) -> dict[str, str]:
    if isinstance(field, str):
        return {"default": field}
    if isinstance(field, dict):
        return {str(name): source for name, source in field.items() if isinstance(source, str)}
    named = field if isinstance(field, list) else []
    return {str(t["name"]): str(t["template"]) for t in named if isinstance(t, dict) and {"name", "template"} <= {*t}}


def _check_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """Every token has a row in the model's embedding. Rows without a token are fine: many models have some."""
    config = read_json_if_there(folder / "config.json")
    nested = config.get("text_config")
    size = (nested if isinstance(nested, dict) else config).get("vocab_size")
    token, last = tokenizer.last_token
    if isinstance(size, int) and last >= size:
        raise ModelError(f"the tokenizer's token {shown(token)} has id {last}, config.json: vocab_size is {size}")


def _token_content(value: object) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
