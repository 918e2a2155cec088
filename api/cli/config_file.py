"""The options of a command from a file: `option: value`, in YAML or TOML, without sections."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from hybrid_cache.errors import ConfigError, ModelError
from hybrid_cache.models.files import read_text, shown

MOST_BYTES = 1 << 20
Value = str | bool | list[str]
ON, OFF = ("true", "yes", "on", "1", "y", "t"), ("false", "no", "off", "0", "n", "f")
_TAGS = "tag:yaml.org,2002:"  # how those begin that YAML itself has


def read(path: Path) -> dict[str, Value]:
    """What a file sets, by option in the spelling of the command line. Raises ConfigError with the file's name.

    Values of a YAML file are texts as they are written there, so that `007` and `1.10` stay what they are.
    """
    read_pairs = {".yaml": _yaml, ".yml": _yaml, ".toml": _toml}.get(path.suffix.lower())
    if read_pairs is None:
        raise ConfigError(f"{path}: the name of a config file ends in .yaml, .yml or .toml")
    try:
        text = read_text(path, MOST_BYTES)
    except ModelError as error:
        raise ConfigError(f"{path.parent / str(error)}") from error
    found = dict[str, Value]()
    for key, value in read_pairs(path, text):
        name = key.replace("_", "-")
        if name in found:
            raise ConfigError(f"{path}: {name} is there twice")
        found[name] = _value(path, name, value)
    return found


def switched(place: str, value: Value) -> bool:
    """Raises ConfigError, which begins with the place, for what is neither true nor false."""
    text = str(value).lower()
    if text not in (*ON, *OFF):
        raise ConfigError(f"{place} is {shown(value)}, wanted true or false")
    return text in ON


def unknown(place: object, name: str, known: Mapping[str, object]) -> ConfigError:
    """What to say about a name that no option has."""
    nearest = get_close_matches(name, known, 1)
    hint = f"; the nearest is {nearest[0]}" if nearest else "; `hybrid-cache serve --help` shows all"
    return ConfigError(f"{place}: there is no option {shown(name)}{hint}")


def _yaml(path: Path, text: str) -> list[tuple[str, object]]:
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: this is no YAML: {_fault(error)}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: wanted lines of `option: value`")
    return [(_key(path, key), _plain(path, node)) for key, node in root.value]


def _fault(error: Exception) -> str:
    """What is wrong and where, without the line itself: it may hold an API key."""
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or type(error).__name__}{where}"


def _key(path: Path, node: object) -> str:
    import yaml

    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{path}: a list or a section stands where the name of an option is wanted")
    return str(node.value)


def _plain(path: Path, node: object) -> object:
    """A text, a list of texts, or a mapping, which nothing takes, as lists within lists: these are not looked into,
    since aliases may repeat what they hold without end.
    """
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return [_scalar(path, each) for each in node.value]
    return _scalar(path, node)


def _scalar(path: Path, node: object) -> object:
    """A text, None, or an empty mapping or list for what is neither. Raises ConfigError for a tag."""
    import yaml

    if not isinstance(node, yaml.ScalarNode):
        return [] if isinstance(node, yaml.SequenceNode) else {}
    if not node.tag.startswith(_TAGS):
        raise ConfigError(f"{path}: the tag {shown(node.tag)} means nothing here")
    return None if node.style is None and node.value.lower() in ("", "~", "null") else str(node.value)


def _toml(path: Path, text: str) -> list[tuple[str, object]]:
    import tomllib

    try:
        return [*tomllib.loads(text).items()]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: this is no TOML: {error}") from error


def _value(path: Path, name: str, value: object) -> Value:
    if isinstance(value, list):
        return [_text(path, name, each) for each in value]
    return value if isinstance(value, bool) else _text(path, name, value)


def _text(path: Path, name: str, value: object) -> str:
    match value:
        case None:
            raise ConfigError(f"{path}: {name} has no value")
        case str() | int() | float() if not isinstance(value, bool):
            return str(value)
        case dict():
            raise ConfigError(f"{path}: {name} is a section, wanted a value: options stand side by side, without any")
    raise ConfigError(f"{path}: {name} is {shown(value)}, wanted a text, a number, true or false, or a list of texts")
