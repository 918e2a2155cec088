"""Answers in a form that is asked for: JSON schemas, regular expressions, choices and grammars, by llguidance.

https://github.com/guidance-ai/llguidance (MIT). A grammar becomes a mask over the vocabulary for each token.
"""

import json
import re
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Literal

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from hybrid_cache.api.text.grammar_trial import LIMITS, OPTIONS, Trials, compiled, first_lines
from hybrid_cache.api.text.schema_check import fault_of_schema
from hybrid_cache.api.text.tokenizer import Tokenizer
from hybrid_cache.errors import RequestError
from hybrid_cache.sampling import Mask

MAX_SOURCE = 1 << 17  # characters of a schema or a grammar
MOST_KEPT = 1 << 18  # characters of all that are kept when they are compiled
MOST_GRAMMARS = 64
MOST_S_AT_ONCE = 1.0  # of processor time for one token of an answer
MOST_S_A_TOKEN = 0.02  # and on the average, beside that


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

    def after_thought(self, end: str, token: int | None = None) -> "Source":
        """The same behind a thought that is under way. Raises RequestError for a grammar of the client's own.

        end: what ends it   token: that is this, if it is one
        """
        if self.own:
            raise RequestError("a grammar cannot follow a thought; switch thinking off", param=self.param)
        body = self.as_rule("body")
        thought = f"thought[suffix={json.dumps(end)}]: /(.|\\n)*/"
        if token is not None:
            thought = f"thought: THOUGHT <[{token}]>\nTHOUGHT: /(.|\\n)*/"
        head = f"start: thought SPACE body\n{thought}\nSPACE: /[ \\n]{{0,4}}/"
        return Source("lark", f"{head}\n{body}", self.param)

    def as_rule(self, name: str) -> str:
        """The same as a rule of a larger grammar."""
        if self.kind == "json":
            return f"{name}: %json {_with_options(self.text)}"
        if self.kind == "regex":
            return f"{name}: {lark_regex(self.text, self.param)}"
        return self.text.replace("start:", f"{name}:", 1)


def lark_regex(pattern: str, param: str) -> str:
    """A regular expression as a terminal of a grammar. Raises RequestError for one that ends within an escape."""
    parts = re.findall(r"\\.|[^\\]", pattern, re.DOTALL)
    if sum(map(len, parts)) < len(pattern):
        raise RequestError(f"the pattern {pattern!r} ends with a backslash that escapes nothing", param=param)
    inner = "".join(r"\/" if part == "/" else part for part in parts)
    return f"/{inner or '()'}/"


class GrammarFault(Exception):
    """What the library says of a grammar, which may quote it in any way."""


def json_source(schema: object, param: str) -> Source:
    """A schema as JSON has it, or its text. Raises RequestError."""
    if schema is True:
        schema = {}
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        known = json.loads(text) if len(text) <= MAX_SOURCE else None  # refused when it is compiled
    except RecursionError as error:
        raise RequestError(f"the schema is nested too deeply: {error}", param=param) from None
    except ValueError as error:
        raise RequestError(f"the schema is no JSON, or holds itself: {error}", param=param) from None
    check_schema(known, param)
    return Source("json", text, param)


def check_schema(schema: object, param: str) -> None:
    """Raises RequestError for one that could not be kept to; see `schema_check`."""
    if fault := fault_of_schema(schema):
        raise RequestError(fault, param=param)


def _with_options(text: str) -> str:
    """A schema for use within a grammar."""
    schema = json.loads(text)
    return json.dumps({**schema, "x-guidance": OPTIONS}) if isinstance(schema, dict) else text


def choice_source(choices: Sequence[str], param: str) -> Source:
    """One of these texts."""
    return Source("lark", "start: " + " | ".join(json.dumps(choice) for choice in choices), param)


class AddedTokens:
    """Tokens that a tokenizer has besides those that spell text. A grammar that wants their text wants it spelled:

    the mask of llguidance names the token, and its matcher then refuses it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        ids = sorted(token for token in tokenizer.added_ids if token < vocab_size)
        self._ids = np.asarray(ids, np.int64)
        self._bits = np.int32(1) << (self._ids % 32).astype(np.int32)
        self._first = {token: first for token in ids if (first := _first_of(tokenizer, token)) is not None}

    def spelled(self, matcher: LLMatcher, mask: Mask) -> Mask:
        """A mask with the first token of such a text in place of the token that stands for all of it."""
        found = self._ids[(mask[self._ids // 32] & self._bits) != 0].tolist()
        wrong = [token for token in found if not matcher.validate_tokens([token])]
        if not wrong:
            return mask
        mask = mask.copy()
        for token in wrong:
            mask[token // 32] &= ~_bit(token)
            first = self._first.get(token)
            if first is not None and matcher.validate_tokens([first]):
                mask[first // 32] |= _bit(first)
        return mask


def _first_of(tokenizer: Tokenizer, token: int) -> int | None:
    """The first token of its text where that is spelled; None where it cannot be."""
    try:
        return next(iter(tokenizer.encode_literal(tokenizer.decode([token]))), None)
    except RequestError:
        return None


def _bit(token: int) -> np.int32:
    return np.int32(1) << np.int32(token % 32)


class Walk:
    """One answer's way through a grammar; see `sampling.Constraint`.

    While the model's pass over a token is made, a thread computes the mask of the next one.

    done: nothing may follow
    """

    def __init__(self, matcher: LLMatcher, first: Mask, added: "AddedTokens", thread: Executor) -> None:
        """first: the mask of its first token"""
        self.done = False
        self._matcher = matcher
        self._num_words = len(first)
        self._added = added
        self._num_tokens = 0
        self._spent_s = 0.0  # of processor time
        self._mask: Mask | Future[Mask] | None = first
        self._thread = thread
        self._forced = deque[int]()  # tokens that the matcher has passed already

    def mask(self) -> Mask:
        if self._mask is None:
            self._mask = self._next_mask()
        elif isinstance(self._mask, Future):
            self._mask = self._mask.result()
        return self._mask

    def note(self, token: int) -> None:
        if self._forced:
            assert token == self._forced.popleft()
        else:
            self.mask()  # a matcher does one thing at a time
            self._pass([token])
            self._mask = None
        self.done = self._ends and not self._forced

    def ahead(self, most: int) -> Sequence[int]:
        if self.done:
            return ()
        forced = self._matcher.compute_ff_tokens()[:most] if most > 0 else []
        forced = forced[: self._matcher.validate_tokens(forced)]  # up to a text that looks like an added token
        if forced:
            self._pass(forced)
            self._forced.extend(forced)
        if not self._ends:
            self._mask = self._thread.submit(self._next_mask)
        return forced

    def _pass(self, tokens: list[int]) -> None:
        began_s = time.thread_time()
        self._matcher.consume_tokens(tokens)
        self._check()
        self._ends = bool(self._matcher.is_stopped())
        self._num_tokens += len(tokens)
        self._charge(began_s)

    def _next_mask(self) -> Mask:
        began_s = time.thread_time()
        found = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: self._num_words]
        self._check()
        found = self._added.spelled(self._matcher, found)
        self._charge(began_s)
        return found

    def _charge(self, began_s: float) -> None:
        """Raises RequestError for a grammar that is too much work: an ambiguous one may take seconds for a token."""
        spent_s = time.thread_time() - began_s
        self._spent_s += spent_s
        if spent_s > MOST_S_AT_ONCE or self._spent_s > MOST_S_AT_ONCE + MOST_S_A_TOKEN * self._num_tokens:
            raise RequestError(
                f"the form that is asked for takes too long to follow: {self._spent_s:.1f} s of processor time for"
                f" {self._num_tokens} tokens, at most {MOST_S_AT_ONCE:g} at once and {MOST_S_A_TOKEN:g} a token"
            )

    def _check(self) -> None:
        """Raises RequestError where the grammar takes more than its limits from here on."""
        if self._matcher.is_error():
            why = first_lines(self._matcher.get_error().partition("<state>")[0])
            raise RequestError(f"the form that is asked for cannot be followed any further: {why}")


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that is compiled. Safe to use from several threads."""

    matcher: LLMatcher
    first: Mask  # of the first token
    added: AddedTokens
    thread: Executor

    def start(self) -> Walk:
        return Walk(self.matcher.deep_copy(), self.first, self.added, self.thread)


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the latest. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """vocab_size: of the logits   eos_ids: tokens that may end an answer"""
        self._text = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._trials = Trials()
        self._thread = ThreadPoolExecutor(1, "masks")  # of all answers
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._lock = Lock()

    def compile(self, source: Source) -> Grammar:
        """Takes milliseconds, at times seconds. Raises RequestError for what is no grammar, or too large a one."""
        key = (source.kind, source.text)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        if len(source.text) > MAX_SOURCE:
            raise RequestError(
                f"{len(source.text)} characters of a schema or a grammar, at most {MAX_SOURCE}", param=source.param
            )
        if fault := self._trials.fault_of(source.kind, source.text):
            raise RequestError(fault, param=source.param) from GrammarFault(fault)
        grammar = self._compile(source)
        with self._lock:
            self._kept[key] = grammar
            while sum(len(text) for _, text in self._kept) > MOST_KEPT or len(self._kept) > MOST_GRAMMARS:
                self._kept.popitem(last=False)
        return grammar

    def _compile(self, source: Source) -> Grammar:
        matcher = LLMatcher(self._tokenizer, compiled(source.kind, source.text), log_level=0, limits=LIMITS)
        probe = matcher.deep_copy()
        first = np.frombuffer(probe.compute_bitmask(), np.int32)[: -(-self._vocab_size // 32)]
        first = self._added.spelled(probe, first)
        if matcher.is_error() or probe.is_error() or not first.any():  # such as a schema that holds nothing but itself
            why = first_lines(matcher.get_error().partition("<state>")[0])
            nothing = "nothing that this model can say is of this form, or it takes too much to say"
            raise RequestError(why or nothing, param=source.param) from GrammarFault(why)
        return Grammar(matcher, first, self._added, self._thread)

    @cached_property
    def _added(self) -> AddedTokens:
        return AddedTokens(self._text, self._vocab_size)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(self._text.as_json(), n_vocab=self._vocab_size, eos_token=self._eos_ids)
