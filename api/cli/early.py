"""What is checked before torch is imported, so that who misspells something hears of it at once.

The same is checked where it is used: here only what needs no model is looked at.
"""

from collections.abc import Iterable
from pathlib import Path

from hybrid_cache.api.server.addresses import bind
from hybrid_cache.api.text.tool_formats import FORMATS
from hybrid_cache.errors import ConfigError
from hybrid_cache.kernels.names import BACKENDS, DTYPES
from hybrid_cache.models import folders
from hybrid_cache.models.files import errors_begin_with, is_there, read_json


def find_model(model: str | None, revision: str | None = None) -> Path:
    """The folder of a model that looks as if it could be loaded; one of the hub is downloaded. Raises ModelError."""
    folder = folders.resolve(model, revision)
    folders.check(folder)
    return folder


def find_config(model: str | None, revision: str | None = None) -> str | None:
    """Of `model info`: the model, or where it is one of the hub, the folder of its small files.

    Raises ModelError for a path that is not there, and a folder whose config.json cannot be read.
    """
    path = Path(model or "")
    if not model or ("/" not in model and not path.is_dir() and revision is None):
        return model
    if not path.is_file():
        path = folders.resolve_text(model, revision)
    if path.is_dir() and not is_there(path / folders.DELTA) and folders.find_gguf(path) is None:
        with errors_begin_with(path):
            read_json(path / folders.CONFIG)
    return str(path)


def check_beside(variants: Iterable[str], adapters: Iterable[str]) -> None:
    """Folders of what is served beside a model, or merged into it. Raises ModelError."""
    for variant in variants:
        find_model(variant)
    for adapter in adapters:
        folders.check_adapter(adapter)


def check_port(host: str, port: int) -> None:
    """Raises ConfigError if it cannot be listened on now."""
    bind(host, port).close()


def check_words(*, backend: str = "auto", dtype: str = "auto", tool_parser: str = "auto") -> None:
    """Values that are one of a few words. Raises ConfigError."""
    known = {
        "backend": (backend, ("auto", *BACKENDS)),
        "dtype": (dtype, DTYPES),
        "tool_parser": (tool_parser, ("auto", *FORMATS)),
    }
    for name, (value, words) in known.items():
        if value not in words:
            raise ConfigError(f"{name} is {value[:100]!r}, must be one of {', '.join(words)}")


def check_absent(path: Path) -> None:
    """Raises ConfigError if there is something already."""
    if is_there(path):
        raise ConfigError(f"{path} is there already")
