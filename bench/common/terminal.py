"""How commands read lists and show progress."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hybrid_cache.errors import ConfigError


def listed(what: str, text: str) -> tuple[str, ...]:
    """The items of a list with commas, each once. Raises ConfigError if there is none."""
    items = tuple(dict.fromkeys(item.strip() for item in text.split(",") if item.strip()))
    if not items:
        raise ConfigError(f"{what} {text!r} names nothing, wanted a list with commas")
    return items


def progress_bar() -> Progress:
    """On the error stream, gone when it is done; each task has a description."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
