"""Command lines of the documentation: whether the programs that they name would take them.

python -m tests.docs.command ARGS     as `hybrid-cache ARGS`, but a server is not started: its options are parsed
"""

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from typer.core import TyperCommand

from hybrid_cache.api.cli.main import main
from tests.docs.pages import ROOT

BLOCKING = "serve"
OPERATORS = "();<>|&"
VARIABLE = re.compile(r"[A-Za-z_]\w*=")


class Parsed(Exception):
    """The arguments are such as the command takes."""


class Refused(AssertionError):
    """They are not."""


def parse(args: Sequence[str]) -> None:
    """Raises Refused unless a command of ours takes these arguments; runs nothing."""
    taken = TyperCommand.invoke

    def invoke(self: TyperCommand, context: Any) -> Any:
        if self.context_settings.get("ignore_unknown_options"):  # it hands them to a command that it imports
            return taken(self, context)
        raise Parsed

    with patch.object(TyperCommand, "invoke", invoke):
        try:
            main(list(args))
        except Parsed:
            return
        except SystemExit as left:
            if left.code == 0:  # --help, --version
                return
    raise Refused(f"hybrid-cache does not take {shlex.join(args)}")


def check_line(words: Sequence[str]) -> None:
    """Raises Refused for a program of ours that does not take its arguments. Other programs are not looked at."""
    words = list(words)
    while words and VARIABLE.match(words[0]):
        words.pop(0)
    match words:
        case [program, *args] if program.split("/")[-1] == "hybrid-cache":
            parse(args)
        case ["make", *args]:
            check_make(args)
        case [program, "-m", module, *args] if program.split("/")[-1] == "python":
            check_module(module, args)


def check_mention(line: str) -> None:
    """Raises Refused if a command that a text names is not there, or has none of the options that stand with it."""
    program, *words = line.split()
    if program == "make":
        return check_make([word for word in words if word.islower()])
    names = list(takewhile(lambda word: word[0].islower(), words))
    command = next((names[:n] for n in range(len(names), 0, -1) if help_of(names[:n])), [])
    shown = help_of(command)
    if command != names and (not command or " COMMAND " in shown):  # what follows a group is no argument
        raise Refused(f"{line!r}: there is no such command")
    for option in (word.split("=")[0] for word in words if word.startswith("--")):
        if option not in shown:
            raise Refused(f"{line!r}: {option} is not in the help")
    return None


@cache
def _help_of(command: tuple[str, ...]) -> str:
    shown = StringIO()
    with redirect_stdout(shown), redirect_stderr(StringIO()), suppress(SystemExit):
        main([*command, "--help"])
    return shown.getvalue()


def help_of(command: Sequence[str]) -> str:
    """Empty if there is no such command."""
    return _help_of(tuple(command))


def check_make(args: Sequence[str]) -> None:
    """What a target would run is parsed in turn."""
    plan = subprocess.run(["make", "-n", "-C", str(ROOT), *args], capture_output=True, text=True, check=False)
    if plan.returncode:
        raise Refused(f"make {shlex.join(args)}: {plan.stderr.strip()}")
    for line in plan.stdout.splitlines():
        if ".venv/bin/hybrid-cache" in line.split(maxsplit=1)[:1]:
            check_line(shlex.split(line))


def check_module(module: str, args: Sequence[str]) -> None:
    """A module of ours is there, and its source names the options, or that of a module of ours that it imports."""
    if not module.startswith("hybrid_cache"):
        return
    source = _source_of(module)
    sources = [source, *(_source_of(name) for name in re.findall(r"^from (hybrid_cache[\w.]+) import", source, re.M))]
    for option in (arg.split("=")[0] for arg in args if arg.startswith("--")):
        if not any(f'"{option}"' in each for each in sources):
            raise Refused(f"python -m {module} has no {option}")


def _source_of(module: str) -> str:
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise Refused(f"there is no module {module}")
    return Path(found.origin).read_text()


def commands_in(script: str) -> Iterator[list[str]]:
    """The commands of a script, each as its words, with the contents of quotes as one."""
    open_line = ""
    for line in script.splitlines():
        open_line += line + "\n"
        if open_line.endswith("\\\n"):
            open_line = open_line.removesuffix("\\\n")
            continue
        with suppress(ValueError):  # a quote goes on in the next line
            yield from _commands_of_line(open_line)
            open_line = ""
    assert not open_line, f"no end of a quote in {script!r}"


def _commands_of_line(line: str) -> list[list[str]]:
    """Raises ValueError for a quote without an end."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=OPERATORS)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(OPERATORS):
            commands.append([])
        else:
            commands[-1].append(word)
    return [words for words in commands if words]


if __name__ == "__main__":
    if sys.argv[1:2] == [BLOCKING]:
        parse(sys.argv[1:])
    else:
        main(sys.argv[1:])
