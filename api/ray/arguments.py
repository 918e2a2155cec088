"""Arguments of an application of Ray Serve: some of its own, all others are options of `hybrid-cache serve`.

serve run hybrid_cache.api.ray:build model=DIR replicas=2 budget=4GiB api_key_file=keys
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import typer
from typer.main import get_command

from hybrid_cache.api.cli import main
from hybrid_cache.api.cli.configured import ConfiguredCommand
from hybrid_cache.api.server.process import ServeOptions
from hybrid_cache.errors import ConfigError

BUDGET = "1GiB"  # of each replica where nothing is said, as several may share a machine
Routing = Literal["usable-prefix", "balanced"]
OF_PROXY = ("host", "port", "tls_cert", "tls_key", "forwarded_allow_ips", "max_connections", "header_timeout")
FOR_ONE = ("kv_events_config", "response_store", "record")  # a place that only one process can have


@dataclass(frozen=True, slots=True)
class Placement:
    """How many replicas there are, and what each gets."""

    replicas: int = 1
    max_replicas: int = 0  # as many as are asked for, up to these; 0: always `replicas`
    target_requests: float = 8.0  # of each replica, at which there are to be more
    cpus: float = 0.5  # of each replica
    gpus: float = 0.0
    ingresses: int = 1
    routing: Routing = "usable-prefix"

    def __post_init__(self) -> None:
        for name, least in (("replicas", 1), ("ingresses", 1), ("max_replicas", 0), ("gpus", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if self.max_replicas and self.max_replicas < self.replicas:
            raise ConfigError(f"max_replicas is {self.max_replicas}, must be at least replicas, {self.replicas}")
        for name in ("cpus", "target_requests"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, must be more than 0")
        if self.routing not in get_args(Routing):
            raise ConfigError(f"routing is {self.routing!r}, must be one of {', '.join(get_args(Routing))}")


@dataclass(frozen=True, slots=True)
class Arguments:
    placement: Placement = field(default_factory=Placement)
    serve: tuple[str, ...] = ()  # a command line


def parse(given: Mapping[str, object]) -> Arguments:
    """Raises ConfigError."""
    own = {name: given[name] for name in Placement.__dataclass_fields__ if name in given}
    placement = Placement(**{name: _typed(name, value) for name, value in own.items()})  # type: ignore[arg-type]
    others = {name.replace("-", "_"): value for name, value in given.items() if name not in own}
    for name in others:
        if name in OF_PROXY:
            raise ConfigError(f"{name} belongs to Ray's HTTP proxy, see http_options in its configuration")
        if name in FOR_ONE:
            raise ConfigError(f"{name} is for one server, not for replicas of one")
    others.setdefault("threads", max(1, int(placement.cpus)))
    if not placement.gpus:
        others.setdefault("budget", BUDGET)
    model = others.pop("model", None)
    return Arguments(placement, (*([] if model is None else [str(model)]), *_words(others)))


def options_of(words: Sequence[str]) -> ServeOptions:
    """What `hybrid-cache serve` makes of a command line. Raises ConfigError."""
    found = list[ServeOptions]()
    try:
        get_command(main.app).main(["serve", *words, "--port", "0"], "serve", obj=found.append, standalone_mode=False)
    except typer.BadParameter as error:
        raise ConfigError(error.format_message()) from error
    return found[0]


def _typed(name: str, value: object) -> object:
    """What comes from a command line is text."""
    wanted = type(getattr(Placement(), name))
    try:
        return wanted(str(value))
    except ValueError:
        raise ConfigError(f"{name} is {value!r}, must be {'a whole number' if wanted is int else 'a number'}") from None


def _words(given: Mapping[str, object]) -> list[str]:
    words, command = list[str](), _serve_command()
    options = command.by_option()
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if option not in options:
            raise ConfigError(f"{name} is neither an argument of this application nor an option of hybrid-cache serve")
        is_switch = getattr(options[option], "is_flag", False)
        for each in value if isinstance(value, list) else [value]:
            words += _switch(name, option, options, each) if is_switch else [option, str(each)]
    return words


def _switch(name: str, option: str, options: Mapping[str, object], value: object) -> list[str]:
    text, off = str(value).lower(), option.replace("--", "--no-", 1)
    if text not in ("true", "false"):
        raise ConfigError(f"{name} is {value!r}, must be true or false")
    if text == "true":
        return [option]
    return [off] if off in options else []


def _serve_command() -> ConfiguredCommand:
    command = get_command(main.app).commands["serve"]  # type: ignore[attr-defined]
    assert isinstance(command, ConfiguredCommand)
    return command
