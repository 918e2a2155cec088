"""Puts options of ours in place of those that other servers have, on a command line or in a file."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from typer.core import TyperArgument, TyperOption

from hybrid_cache.api.cli.config_file import OFF, Value, switched
from hybrid_cache.api.cli.foreign_options import BY_NAME, MODEL, Foreign, Setting, find
from hybrid_cache.errors import ConfigError

Options = Mapping[str, TyperArgument | TyperOption]  # by each of their names, with dashes


def arguments(args: Sequence[str], options: Options) -> list[str]:
    """A command line in options of ours; underscores in names are dashes.

    Raises ConfigError, see `Foreign`, with a sentence for each option that cannot be had.
    """
    line = _Line(args, options)
    found = [*line.translated()]
    if line.refusals:
        raise ConfigError("; ".join(f"{', '.join(names)}: {why}" for why, names in line.refusals.items()))
    return found


class _Line:
    """A command line while it is read."""

    def __init__(self, args: Sequence[str], options: Options) -> None:
        self.refusals: dict[str, list[str]] = {}  # a sentence, and the options that it is about
        self._waiting = deque(args)
        self._options = options
        self._has_model = any(getattr(find(token.partition("=")[0]), "here", None) == MODEL for token in args)

    def translated(self) -> Iterator[str]:
        while self._waiting:
            token = self._waiting.popleft()
            if token == "--":
                yield from (token, *self._waiting)
                return
            name, sign, value = token.partition("=")
            name = name.replace("_", "-") if name.startswith("--") else name
            if name in self._options:
                yield from self._own(name, sign, value)
            elif (foreign := find(name)) is not None:
                yield from self._foreign(foreign, name, [value] if sign else [*_values(foreign, self._waiting)])
            else:
                self._has_model |= not token.startswith("-")
                yield token

    def _own(self, name: str, sign: str, value: str) -> Iterator[str]:
        """An option of ours. One that may be there several times may have several values, as elsewhere, where the
        model is given: a word that follows could be nothing else."""
        yield name + sign + value
        option = self._options[name]
        if sign or getattr(option, "is_flag", False) or not self._waiting:
            return
        yield self._waiting.popleft()
        while getattr(option, "multiple", False) and self._has_model and _is_word(self._waiting):
            yield from (name, self._waiting.popleft())

    def _foreign(self, foreign: Foreign, name: str, values: Sequence[str]) -> Iterator[str]:
        try:
            yield from _typed(checked(foreign, name, values))
        except ConfigError as error:
            self.refusals.setdefault(str(error).removeprefix(f"{name}: "), []).append(name)
            while foreign.settings is None and _is_word(self._waiting):  # what it is for does not matter
                self._waiting.popleft()


def _is_word(waiting: deque[str]) -> bool:
    return bool(waiting) and not waiting[0].startswith("-")


def _values(foreign: Foreign, waiting: deque[str]) -> Iterator[str]:
    """What follows an option as its values."""
    if foreign.num_values is None:
        while _is_word(waiting):
            yield waiting.popleft()
    elif foreign.num_values and waiting:
        yield waiting.popleft()


def checked(foreign: Foreign, name: str, values: Sequence[str]) -> Sequence[Setting]:
    """What it means here. Raises ConfigError if it is for nothing, or lacks a value."""
    if foreign.settings is not None and foreign.num_values == 1 and not values:
        raise ConfigError(f"{name} has no value")
    return foreign.translate(name, values)


def _typed(settings: Sequence[Setting]) -> Iterator[str]:
    for name, value in settings:
        if name == MODEL:
            yield str(value)
        else:
            yield name if value is None else f"{name}={value}"


def of_file(name: str, value: Value) -> Sequence[Setting] | None:
    """What an entry of a file means that has no option of ours; None if no other server has it, either.

    name: without dashes before it   value: `false` for a switch that is off
    """
    foreign = BY_NAME.get(f"--{name}")
    if foreign is None:
        return None
    if value is False or (foreign.num_values == 0 and str(value).lower() in OFF):
        opposite = BY_NAME.get(f"--no-{name}")
        return checked(opposite, f"--no-{name}", ()) if opposite else []
    if foreign.num_values == 0 and foreign.settings is not None:
        switched(name, value)
    if isinstance(value, list) and foreign.num_values == 1:  # an option for each
        return [setting for each in value for setting in checked(foreign, f"--{name}", [each])]
    return checked(foreign, f"--{name}", value if isinstance(value, list) else [str(value)])
