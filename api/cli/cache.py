"""The commands about what is cached, on a running server or on a disk. Nothing heavy is imported before one runs."""

from pathlib import Path
from typing import Annotated

import typer

from hybrid_cache.api.cli.help_page import SearchedCommand
from hybrid_cache.api.cli.options import Json, KeyFile, api_keys

app = typer.Typer(
    help="What is cached: on a running server (ls, show, drop), or on a disk (verify, pack, unpack).",
    no_args_is_help=True,
)

Url = Annotated[str, typer.Option(help="The server.", envvar="HYBRID_CACHE_URL")]
Key = Annotated[str | None, typer.Option(help="Your API key there. Other users may see it in ps.")]
Salt = Annotated[str | None, typer.Option(help="Only what was cached with this cache_salt.")]
Name = typer.Argument(help="A name from `cache ls`, or its first digits.")
DEFAULT_URL = "http://127.0.0.1:8000"


@app.command(cls=SearchedCommand)
def ls(
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    api_key_file: KeyFile = None,
    salt: Salt = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Conversations that are listed at most.")] = 100,
    as_json: Json = False,
) -> None:
    """The conversations that are cached, those used last first."""
    from hybrid_cache.api.cli.server_cache import ServerCache, list_conversations

    with ServerCache(url, _key(api_key, api_key_file), salt) as server:
        list_conversations(server, limit, as_json=as_json)


@app.command(cls=SearchedCommand)
def show(
    name: Annotated[str, Name],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    api_key_file: KeyFile = None,
    salt: Salt = None,
    as_json: Json = False,
) -> None:
    """The states of a cached conversation, and its last text."""
    from hybrid_cache.api.cli.server_cache import ServerCache, show_conversation

    with ServerCache(url, _key(api_key, api_key_file), salt) as server:
        show_conversation(server, name, as_json=as_json)


@app.command(cls=SearchedCommand)
def drop(
    name: Annotated[str | None, Name] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that `cache ls` knows of, instead of one.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    api_key_file: KeyFile = None,
    salt: Salt = None,
    as_json: Json = False,
) -> None:
    """Drops a cached conversation, or all, as far as no request uses it now."""
    from hybrid_cache.api.cli.server_cache import ServerCache, drop_conversations
    from hybrid_cache.errors import ConfigError

    if (name is None) is not everything:
        raise ConfigError("give either the name of a conversation or --all")
    with ServerCache(url, _key(api_key, api_key_file), salt) as server:
        drop_conversations(server, name, as_json=as_json)


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


def _key(given: str | None, path: Path | None) -> str | None:
    keys = api_keys((given,) if given else (), path)
    return keys[0] if keys else None
