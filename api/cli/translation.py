"""Puts options of ours in place of those that other servers have, on a command line or in a file."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from typer.core import TyperArgument, TyperOption

from hybrid_cache.api.cli.foreign_options import BY_NAME, MODEL, Foreign, Setting
from hybrid_cache.errors import ConfigError

OFF = ("false", "no", "off")
Options = Mapping[str, TyperArgument | TyperOption]  # by each of their names, with dashes


def arguments(args: Sequence[str], options: Options) -> list[str]:
    """A command line in options of ours; underscores in names are dashes. Raises ConfigError, see `Foreign`."""
    return [*_arguments(deque(args), options)]


def _arguments(waiting: deque[str], options: Options) -> Iterator[str]:
    while waiting:
        token = waiting.popleft()
        if token == "--":
            yield from (token, *waiting)
            return
        name, sign, value = token.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        foreign = BY_NAME.get(name)
        if name in options:
            yield name + sign + value
            if waiting and not sign and not getattr(options[name], "is_flag", False):
                yield waiting.popleft()
        elif foreign is None:
            yield token
        else:
            values = [value] if sign else [*_values(foreign, waiting)]
            yield from _typed(checked(foreign, name, values))


def _values(foreign: Foreign, waiting: deque[str]) -> Iterator[str]:
    """What follows an option as its values."""
    if foreign.num_values is None:
        while waiting and not waiting[0].startswith("-"):
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


def of_file(name: str, value: str | bool | list[str]) -> Sequence[Setting] | None:
    """What an entry of a file means that has no option of ours; None if no other server has it, either.

    name: without dashes before it   value: `false` for a switch that is off
    """
    foreign = BY_NAME.get(f"--{name}")
    if foreign is None:
        return None
    if value is False or (foreign.num_values == 0 and str(value).lower() in OFF):
        opposite = BY_NAME.get(f"--no-{name}")
        return checked(opposite, f"--no-{name}", ()) if opposite else []
    return checked(foreign, f"--{name}", value if isinstance(value, list) else [str(value)])
