"""The commands about what is cached, on a running server or on a disk. Nothing heavy is imported before one runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrid_cache.api.cli.help_page import SearchedCommand
from hybrid_cache.api.cli.options import Json, KeyFile, api_keys

if TYPE_CHECKING:
    from hybrid_cache.api.cli.server_cache import Cached

app = typer.Typer(
    help="What is cached: on a running server or a disk (ls, show, drop), or on a disk (verify, pack, unpack).",
    no_args_is_help=True,
)

Where = Annotated[
    str | None, typer.Argument(help="A folder of `serve --disk`, or the address of a server.", show_default=False)
]
Url = Annotated[str, typer.Option(help="The server, if no WHERE is given.", envvar="HYBRID_CACHE_URL")]
Key = Annotated[str | None, typer.Option(help="Your API key there. Other users may see it in ps.")]
Salt = Annotated[str | None, typer.Option(help="Only what was cached with this cache_salt.")]
Name = typer.Argument(help="A name from `cache ls`, or its first digits.")
WORDS = "A name from `cache ls`, or its first digits; before it a folder or the address of a server."
DEFAULT_URL = "http://127.0.0.1:8000"


@app.command(cls=SearchedCommand)
def ls(
    where: Where = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    api_key_file: KeyFile = None,
    salt: Salt = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Conversations that are listed at most.")] = 100,
    as_json: Json = False,
) -> None:
    """The conversations that are cached, those used last first."""
    from hybrid_cache.api.cli.server_cache import list_conversations

    with _cached(where, url, _key(api_key, api_key_file), salt) as cached:
        list_conversations(cached, limit, as_json=as_json)


@app.command(cls=SearchedCommand)
def show(
    words: Annotated[list[str], typer.Argument(metavar="[WHERE] NAME", help=WORDS, show_default=False)],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    api_key_file: KeyFile = None,
    salt: Salt = None,
    as_json: Json = False,
) -> None:
    """The states of a cached conversation, and its last text; of one on a disk its files, which are read."""
    from hybrid_cache.api.cli.server_cache import show_conversation
    from hybrid_cache.errors import ConfigError

    if len(words) > 2:
        raise ConfigError(f"{len(words)} arguments, must be the name of a conversation, and before it where it is")
    where = words[0] if len(words) == 2 else None
    with _cached(where, url, _key(api_key, api_key_file), salt) as cached:
        show_conversation(cached, words[-1], as_json=as_json)


@app.command(cls=SearchedCommand)
def drop(
    words: Annotated[list[str] | None, typer.Argument(metavar="[WHERE] [NAME]", help=WORDS, show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that `cache ls` knows of, instead of one.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    api_key_file: KeyFile = None,
    salt: Salt = None,
    as_json: Json = False,
) -> None:
    """Drops a cached conversation, or all, as far as no request uses it now."""
    from hybrid_cache.api.cli.server_cache import drop_conversations
    from hybrid_cache.errors import ConfigError

    given = list(words or ())
    name = given.pop() if given and not everything else None
    if (name is None) is not everything or len(given) > 1:
        raise ConfigError("give either the name of a conversation or --all, and before it at most where it is")
    with _cached(given[0] if given else None, url, _key(api_key, api_key_file), salt) as cached:
        drop_conversations(cached, name, as_json=as_json)


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of `serve --disk`.", show_default=False)]
Pack = Annotated[Path, typer.Argument(metavar="FILE", help="A pack.", show_default=False)]


@app.command(cls=SearchedCommand)
def verify(
    folder: Folder,
    drop: Annotated[
        bool, typer.Option("--drop", help="Remove what is not what it was, and all that needs it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read all files of a disk tier, and compare them with their checksums. A server may be using it.

    Leaves with 1 if a file is not what it was.
    """
    from hybrid_cache.api.cli.folders import verify_folder

    raise typer.Exit(verify_folder(folder, drop=drop, as_json=as_json))


@app.command(cls=SearchedCommand)
def pack(folder: Folder, name: Annotated[str, Name], file: Pack, as_json: Json = False) -> None:
    """Make one file of a cached prefix on a disk tier, such as a system prompt with its tools, for `cache unpack`."""
    from hybrid_cache.api.cli.folders import pack_prefix

    pack_prefix(folder, name, file, as_json=as_json)


@app.command(cls=SearchedCommand)
def unpack(
    file: Pack,
    folder: Folder,
    disk_budget: Annotated[str, typer.Option(help="As for `serve`.")] = "20GiB",
    as_json: Json = False,
) -> None:
    """Take a pack into the folder of a disk tier: a server that runs the same model in the same way begins warm."""
    from hybrid_cache.api.cli.folders import unpack_prefix
    from hybrid_cache.sizes import parse_bytes

    unpack_prefix(file, folder, parse_bytes(disk_budget), as_json=as_json)


@contextmanager
def _cached(where: str | None, url: str, key: str | None, salt: str | None) -> "Iterator[Cached]":
    """What has the cache: a folder, or a server where that is an address or none is given."""
    from hybrid_cache.api.cli.folder_cache import folder_cache
    from hybrid_cache.api.cli.server_cache import ServerCache

    if where is None or "://" in where:
        with ServerCache(where or url, key, salt) as server:
            yield server
    else:
        with folder_cache(Path(where).expanduser(), key, salt) as folder:
            yield folder


def _key(given: str | None, path: Path | None) -> str | None:
    keys = api_keys((given,) if given else (), path)
    return keys[0] if keys else None
