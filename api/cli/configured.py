"""Commands whose options may come from the environment and from a file, too.

What counts is the command line, else the environment, else the file, else the default. An option --some-name is
HYBRID_CACHE_SOME_NAME in the environment, and `some-name` or `some_name` in the file.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperOption

from hybrid_cache.api.cli import config_file
from hybrid_cache.api.cli.foreign_options import MODEL, Setting, table
from hybrid_cache.api.cli.help_page import SearchedCommand
from hybrid_cache.api.cli.options import KEY_VARIABLE
from hybrid_cache.api.cli.translation import of_file
from hybrid_cache.errors import ConfigError
from hybrid_cache.models.files import shown

PREFIX = "HYBRID_CACHE_"
SECRET = ("api_key",)  # values that are never shown; and they add up, wherever they come from, see `options.api_keys`
ASIDE = ("help", "config", "show_config", "help_aliases")
_PLACES = "hybrid_cache.places"  # in a context: parameter -> where its value in `default_map` comes from
_PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off)$)[\w/.][\w./+:-]*(?<!:)", re.I)
_OF_KUBERNETES = re.compile(r"(SERVICE_(HOST|PORT)|PORT_[0-9]+_)")  # variables about a service named hybrid-cache

Parameter = TyperArgument | TyperOption


class ConfiguredCommand(SearchedCommand):
    """Reads HYBRID_CACHE_* for each of its options, and shows these names in its help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.configurable():
            parameter.envvar = variable_of(parameter)
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises ConfigError about a value of the environment or of a file, with its place."""
        ctx.default_map = dict(self._environment(ctx))
        try:
            rest = super().parse_args(ctx, self.translated(args))
        except typer.BadParameter as error:
            name = str(getattr(error.param, "name", None))
            if source(ctx, name) != "DEFAULT_MAP":
                raise
            raise ConfigError(f"{places(ctx)[name]} is {shown(ctx.default_map[name])}: {error.message}") from error
        self._check_finite(ctx)
        return rest

    def translated(self, args: list[str]) -> list[str]:
        """A command line in the options of this command. Raises ConfigError."""
        return args

    def configurable(self) -> Iterator[Parameter]:
        for parameter in self.params:
            if isinstance(parameter, Parameter) and parameter.name not in ASIDE:
                yield parameter

    def by_option(self) -> dict[str, Parameter]:
        """All parameters by their names on a command line; the argument by its place in help."""
        found: dict[str, Parameter] = {}
        for parameter in self.params:
            if isinstance(parameter, TyperArgument):
                found[MODEL] = parameter
            elif isinstance(parameter, TyperOption):
                found |= dict.fromkeys((*parameter.opts, *parameter.secondary_opts), parameter)
        return found

    def _check_finite(self, ctx: Any) -> None:
        """Raises ConfigError: no time, size or temperature is infinite."""
        for parameter in self.configurable():
            value = ctx.params.get(parameter.name)
            if isinstance(value, float) and not isfinite(value):
                raise ConfigError(f"{spellings(parameter)[0]} is {value}, must be a finite number")

    def _environment(self, ctx: Any) -> Iterator[tuple[str, object]]:
        for parameter in self.configurable():
            name, text = variable_of(parameter), os.environ.get(variable_of(parameter), "").strip()
            if not text or parameter.name in SECRET or (name == f"{PREFIX}PORT" and text.startswith("tcp://")):
                continue
            places(ctx)[str(parameter.name)] = name
            yield str(parameter.name), entries(text) if takes_many(parameter) else text


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """A callback of --config: what the file says becomes the default. Raises ConfigError."""
    assert isinstance(ctx.command, ConfiguredCommand)
    of_environment, values = dict(ctx.default_map or {}), dict[str, object]()
    for name, value in ({} if path is None else config_file.read(path)).items():
        for parameter, fitting in _entry(ctx.command, path, name, value):
            if str(parameter.name) in values:
                raise ConfigError(f"{path}: {name} sets {spellings(parameter)[0]}, which is set already")
            values[str(parameter.name)] = fitting
            places(ctx).setdefault(str(parameter.name), f"{path}: {name}")
    ctx.default_map = {**values, **of_environment}
    return path


def _entry(
    command: ConfiguredCommand, path: Path | None, name: str, value: config_file.Value
) -> list[tuple[Parameter, object]]:
    """What an entry of a file sets: options of this command, or what those of another server mean here."""
    parameters = {name: each for each in command.configurable() for name in spellings(each)}
    if name in parameters:
        return [(parameters[name], _fitting(f"{path}: {name}", parameters[name], value))]
    for parameter in command.configurable():
        if f"--{name}" in parameter.secondary_opts:  # the other name of a switch, such as no-prefix-cache
            return [(parameter, not config_file.switched(f"{path}: {name}", value))]
    try:
        settings = of_file(name, value)
        if settings is None:
            raise config_file.unknown("", name, parameters)
        return _together(name, settings, command.by_option())
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix(': ')}") from error


def _together(
    name: str, settings: Sequence[Setting], options: Mapping[str, Parameter]
) -> list[tuple[Parameter, object]]:
    """Values by parameter; those of one that takes many in a list. Raises ConfigError for several of another one."""
    found = dict[str, tuple[Parameter, list[object]]]()
    for option, text in settings:
        parameter = options[option]
        values = found.setdefault(str(parameter.name), (parameter, []))[1]
        values.append(option in parameter.opts if text is None else text)
        if len(values) > 1 and not takes_many(parameter):
            raise ConfigError(f"{name} is a list, wanted one value")
    return [(parameter, values if takes_many(parameter) else values[0]) for parameter, values in found.values()]


Config = Annotated[
    Path | None,
    typer.Option(
        help="File with options, `option: value` in YAML or `option = value` in TOML, by the end of its name. The "
        "command line comes first, then the environment, then this file.",
        envvar=f"{PREFIX}CONFIG",
        callback=read_config,
        is_eager=True,
    ),
]
ShowConfig = Annotated[
    bool, typer.Option("--show-config", help="Print all options as such a file, each with its origin, and leave.")
]


def _print_aliases(wanted: bool) -> None:
    if wanted:
        typer.echo(table())
        raise typer.Exit


HelpAliases = Annotated[
    bool,
    typer.Option(
        "--help-aliases",
        help="Print what options of vLLM, SGLang and llama-server are here, and leave. They are taken as well.",
        callback=_print_aliases,
        is_eager=True,
    ),
]


def show(ctx: typer.Context) -> str:
    """What holds, as a file in YAML that --config reads; with a comment on each line that says where it is from."""
    assert isinstance(ctx.command, ConfiguredCommand)
    return "\n".join(_line(ctx, each, ctx.params.get(str(each.name))) for each in ctx.command.configurable())


def warn_of_misspelt(ctx: typer.Context) -> list[str]:
    """Variables that are no option's, and look as if they were meant to be one."""
    assert isinstance(ctx.command, ConfiguredCommand)
    known = [variable_of(parameter).removeprefix(PREFIX) for parameter in ctx.command.configurable()]
    found = [name.removeprefix(PREFIX) for name in os.environ if name.startswith(PREFIX)]
    strange = [each for each in found if each not in (*known, "CONFIG") and not _OF_KUBERNETES.match(each)]
    nearest = {each: get_close_matches(each, known, 1, 0.8) for each in strange}
    return [f"{PREFIX}{each} is not used: did you mean {PREFIX}{near[0]}?" for each, near in nearest.items() if near]


def entries(text: str) -> list[str]:
    """A list in a variable: one entry a line, or where there is one line only, commas between them."""
    parts = text.splitlines() if "\n" in text.strip() else text.split(",")
    return [part.strip() for part in parts if part.strip()]


def variable_of(parameter: Parameter) -> str:
    return PREFIX + spellings(parameter)[0].replace("-", "_").upper()


def spellings(parameter: Parameter) -> list[str]:
    """The long names of an option, without dashes before them; of an argument its name."""
    if isinstance(parameter, TyperArgument):
        return [str(parameter.name)]
    return [name.removeprefix("--") for name in parameter.opts if name.startswith("--")]


def takes_many(parameter: Parameter) -> bool:
    return bool(getattr(parameter, "multiple", False))


def places(ctx: typer.Context) -> dict[str, str]:
    found: dict[str, str] = ctx.meta.setdefault(_PLACES, {})
    return found


def source(ctx: typer.Context, name: str | None) -> str:
    """COMMANDLINE, DEFAULT_MAP or DEFAULT, as the library names them."""
    found = ctx.get_parameter_source(str(name))
    return "DEFAULT" if found is None else found.name


def _fitting(place: str, parameter: Parameter, value: config_file.Value) -> object:
    if isinstance(value, list) and not takes_many(parameter):
        raise ConfigError(f"{place} is a list, wanted one value")
    if isinstance(value, bool) and not getattr(parameter, "is_flag", False):
        raise ConfigError(f"{place} is {str(value).lower()}, wanted a value")
    return [value] if takes_many(parameter) and not isinstance(value, list) else value


def _line(ctx: typer.Context, parameter: Parameter, value: object) -> str:
    name, origin = spellings(parameter)[0], _origin(ctx, parameter)
    if parameter.name in SECRET and (value or os.environ.get(KEY_VARIABLE)):
        return f"# {name}: ***  # {origin}"
    if value is None or value in ([], ()):
        return f"# {name}:  # not set"
    text = f"[{', '.join(map(_written, value))}]" if isinstance(value, list | tuple) else _written(value)
    return f"{name}: {text}  # {origin}"


def _origin(ctx: typer.Context, parameter: Parameter) -> str:
    where = source(ctx, parameter.name)
    place = places(ctx).get(str(parameter.name), "default") if where == "DEFAULT_MAP" else where
    origin = {"COMMANDLINE": "command line", "DEFAULT": "default"}.get(place, place)
    if parameter.name in SECRET and os.environ.get(KEY_VARIABLE):
        return KEY_VARIABLE if origin == "default" else f"{origin}, and {KEY_VARIABLE}"
    return origin


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if _PLAIN.fullmatch(str(value)) else json.dumps(str(value), ensure_ascii=False)
