"""Answers in a form that is asked for: JSON schemas, regular expressions, choices and grammars, by llguidance.

https://github.com/guidance-ai/llguidance (MIT). A grammar becomes a mask over the vocabulary for each token.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Literal

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.errors import RequestError

MAX_SOURCE = 1 << 18  # characters of a schema or a grammar
MOST_KEPT = 64  # compiled grammars
# Space between the parts of a JSON value: an answer that goes on with nothing else would never end.
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,16}"
LIMITS = LLParserLimits(max_grammar_size=200_000, max_lexer_states=100_000)


@dataclass(frozen=True, slots=True)
class Source:
    """What is asked for: a JSON schema, a regular expression, or a grammar in llguidance's Lark.

    param: of the request, to name in errors
    own: it is a grammar that the client wrote
    """

    kind: Literal["json", "regex", "lark"]
    text: str
    param: str
    own: bool = False

    def after_thought(self, end: str) -> "Source":
        """The same behind a thought that is under way. Raises RequestError for a grammar of the client's own."""
        if self.own:
            raise RequestError("a grammar cannot follow a thought; switch thinking off", param=self.param)
        bodies = {"json": f"body: %json {self.text}", "regex": f"body: /{self.text.replace('/', chr(92) + '/')}/"}
        body = bodies.get(self.kind) or self.text.replace("start:", "body:", 1)
        head = f"start: thought SPACE body\nthought[suffix={json.dumps(end)}]: /(.|\\n)*/\nSPACE: /[ \\n]{{0,4}}/"
        return Source("lark", f"{head}\n{body}", self.param)


def json_source(schema: object, param: str) -> Source:
    """A schema as JSON has it, or its text. Raises RequestError."""
    if isinstance(schema, str):
        return Source("json", schema, param)
    try:
        return Source("json", json.dumps(schema), param)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the schema is nested too deeply or holds itself: {error}", param=param) from None


def choice_source(choices: Sequence[str], param: str) -> Source:
    """One of these texts."""
    return Source("lark", "start: " + " | ".join(json.dumps(choice) for choice in choices), param)


class Walk:
    """One answer's way through a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def mask(self) -> npt.NDArray[np.uint8]:
        """See `sampling.Constraint`. Raises ValueError where the grammar takes more than its limits."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())
        return bits

    def note(self, token: int) -> None:
        if not self._matcher.consume_token(token) or self._matcher.is_error():
            raise ValueError(self._matcher.get_error() or f"token {token} may not come here")

    @property
    def done(self) -> bool:
        return bool(self._matcher.is_stopped())


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that is compiled. Safe to use from several threads."""

    matcher: LLMatcher

    def start(self) -> Walk:
        return Walk(self.matcher.deep_copy())


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the latest. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """vocab_size: of the logits   eos_ids: tokens that may end an answer"""
        self._text = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._lock = Lock()

    def compile(self, source: Source) -> Grammar:
        """Takes milliseconds, at times a second. Raises RequestError for what is no grammar, or too large a one."""
        key = (source.kind, source.text)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        if len(source.text) > MAX_SOURCE:
            raise RequestError(
                f"{len(source.text)} characters of a schema or a grammar, at most {MAX_SOURCE}", param=source.param
            )
        grammar = Grammar(self._matcher(source))
        with self._lock:
            self._kept[key] = grammar
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        return grammar

    def _matcher(self, source: Source) -> LLMatcher:
        try:
            matcher = LLMatcher(self._tokenizer, _compiled(source), log_level=0, limits=LIMITS)
        except (ValueError, RecursionError) as error:
            raise RequestError(str(error).splitlines()[0], param=source.param) from None
        if matcher.is_error():
            raise RequestError(_first_lines(matcher.get_error()), param=source.param)
        warnings = matcher.get_grammar_warnings()
        if warnings:
            raise RequestError(_first_lines(warnings[0]), param=source.param)
        probe = matcher.deep_copy()
        possible = any(probe.compute_bitmask())
        if probe.is_error() or not possible:  # a schema that holds nothing but itself, or takes more than the limits
            why = "nothing that this model can say is of this form, or it takes too much to say"
            raise RequestError(why, param=source.param)
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(self._text.as_json(), n_vocab=self._vocab_size, eos_token=self._eos_ids)


def _compiled(source: Source) -> str:
    if source.kind == "json":
        return LLMatcher.grammar_from_json_schema(source.text, overrides={"whitespace_pattern": WHITESPACE})
    if source.kind == "regex":
        return LLMatcher.grammar_from_regex(source.text)
    return LLMatcher.grammar_from_lark(source.text)


def _first_lines(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines()[:4] if line.strip())
