"""Tries grammars out in a process of its own: one that takes too long to compile, or too much memory, ends only that.

Nothing can interrupt llguidance while it compiles, and a schema of 30 KB can keep it busy for minutes.
"""

import json
import subprocess
import sys
import weakref
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector
from threading import Lock
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

NAME = "hybrid_cache.api.text.grammar_trial"  # `__name__` is another where it runs
MOST_SECONDS = 2.0
START_SECONDS = 10.0  # for the process itself, on a busy machine
MOST_BYTES = 128 << 20  # of memory
# Space between the parts of a JSON value: an answer that goes on with nothing else would never end.
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,16}"
# Whatever a schema's own `x-guidance` says: no keyword is passed over, and what comes is JSON. No character of a string
# is written by its number, or a name that is not listed in a schema could be one that is.
STRICT: "JsonCompileOptions" = {"coerce_one_of": False, "lenient": False, "json_allowed_escapes": 'bfnrt"\\'}
OPTIONS: "JsonCompileOptions" = {
    **STRICT,
    "whitespace_pattern": WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
}
NO_TOKENIZER = "no tokenizer"  # to check the ids in a grammar with: the server's own do, when it is compiled there
LIMITS = LLParserLimits(max_grammar_size=200_000, max_lexer_states=50_000, step_lexer_fuel=100_000)


def compiled(kind: str, text: str) -> str:
    """What llguidance's matchers take. kind: json, regex or lark. Raises ValueError for what is no JSON."""
    if kind == "json":
        return LLMatcher.grammar_from_json_schema(text, overrides=OPTIONS)
    return LLMatcher.grammar_from_regex(text) if kind == "regex" else LLMatcher.grammar_from_lark(text)


def fault_of(kind: str, text: str) -> str:
    """Why something is no grammar, or too large a one; empty if it is one."""
    try:
        _, messages = LLMatcher.validate_grammar_with_warnings(compiled(kind, text), limits=LIMITS)
    except (ValueError, RecursionError) as error:
        messages = [str(error)]
    faults = [message for message in messages if NO_TOKENIZER not in message]
    return first_lines(faults[0]) if faults else ""


def first_lines(text: str) -> str:
    """Of a message, in one line."""
    return " ".join(line.strip() for line in text.splitlines()[:4] if line.strip())


class Trials:
    """The process: started when it is first needed, and again when it had to be ended; it ends with this object.

    Safe to use from several threads.
    """

    def __init__(self, most_seconds: float = MOST_SECONDS) -> None:
        self._most_seconds = most_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def fault_of(self, kind: str, text: str) -> str:
        """See above; also for what takes too much time or memory to compile."""
        with self._lock:
            process = self._process = self._process or self._start()
            try:
                answer = _asked(process, [kind, text], self._most_seconds)
            except (OSError, ValueError):  # it has ended
                answer = None
            if answer is None:
                _end(process)
                self._process = None
                return f"it takes more than {self._most_seconds:g} seconds or {MOST_BYTES >> 20} MiB to compile"
            return answer

    def _start(self) -> "subprocess.Popen[bytes]":
        """Raises OSError."""
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-m", NAME], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        weakref.finalize(self, _end, process)
        if _asked(process, ["regex", "a"], START_SECONDS) is None:
            _end(process)
            raise OSError("the process that tries grammars out does not start")
        return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not read by the other end
                pipe.close()


def _asked(process: "subprocess.Popen[bytes]", question: list[str], seconds: float) -> str | None:
    """The answer of the process; None if it does not come in time. Raises OSError or ValueError if it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question).encode() + b"\n")
    process.stdin.flush()
    with DefaultSelector() as selector:
        selector.register(process.stdout, EVENT_READ)
        if not selector.select(seconds):
            return None
    return str(json.loads(process.stdout.readline()))


def main() -> None:
    """Answers questions, a line each, until there are no more."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    for line in sys.stdin:
        print(json.dumps(fault_of(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
