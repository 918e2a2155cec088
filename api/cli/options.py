"""Options that several commands have."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from hybrid_cache.api.cli.foreign_options import whole
from hybrid_cache.errors import ConfigError


def parse_tokens(text: str | int) -> int:
    """`8192`, `8k` (8,000) or `8K` (8,192), at least 1. Raises typer.BadParameter."""
    try:
        count = whole(str(text))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    if count < 1:
        raise typer.BadParameter(f"{count}, must be at least 1")
    return count


Model = Annotated[
    str | None,
    typer.Argument(
        help="A folder in Hugging Face format, a GGUF file, a delta, a hub name, or recall, which ships; the embedded "
        "model if left out."
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit, where the model is a name of the Hugging Face hub; main if left out."),
]
Budget = Annotated[str, typer.Option(help="Memory for KV pages and states together, such as 2GiB.")]
AutoBudget = Annotated[
    str,
    typer.Option(
        help="Memory limit of the cache: KV pages and states together, such as 2GiB; auto is three quarters of what is "
        "free once the model is loaded, in a container of its memory, less what the process needs beside it."
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        help="auto, native, torch, torch-compile (starts a minute later), triton (needs a GPU; new) or mamba_ssm "
        "(needs a GPU; to compare)."
    ),
]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast/--exact",
        help="Let bits depend on the batch where that is faster: cuBLAS with --backend triton, so far. "
        "The CPU backends have nothing of the kind.",
    ),
]
Dtype = Annotated[str, typer.Option(help="What the model is computed in: auto, float32 or bfloat16.")]
Weights = Annotated[
    str,
    typer.Option(
        help="What the model's weights are rounded to when they are read: int8 or int4 in groups of 32, with rows in "
        "bfloat16; bf16 for none. auto: as the file has them."
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(help="LoRA adapter to merge: a folder in PEFT's layout, or embedded-choreo, which ships."),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--max-model-len",
        metavar="TOKENS",
        parser=parse_tokens,
        help="Context length: the longest prompt and answer together, such as 8192 or 8K; at most the model's own, "
        "which it is if left out.",
    ),
]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads that compute; 0 leaves it to torch.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="File with API keys, one a line. HYBRID_CACHE_API_KEY in the environment may hold some, too."),
]
KEY_VARIABLE = "HYBRID_CACHE_API_KEY"  # keys with spaces or commas between them


def api_keys(given: Iterable[str] = (), path: Path | None = None) -> tuple[str, ...]:
    """Those of the command line, of a file and of the environment, each once. Raises ConfigError."""
    of_file = read_api_keys(path) if path else ()
    of_environment = filter(None, re.split(r"[\s,]+", os.environ.get(KEY_VARIABLE, "")))
    return tuple(dict.fromkeys((*(key.strip() for key in given), *of_file, *of_environment)))


def read_api_keys(path: Path) -> tuple[str, ...]:
    """One key a line; empty lines and lines that begin with # are left out. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"API keys in {path} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"{path} holds no API key, wanted one a line")
    return keys


def named_folders(option: str, given: Iterable[str], *, all_named: bool = False) -> tuple[str | None, dict[str, str]]:
    """From [NAME=]DIR, each once -> the one without a name, and the others by name. Raises ConfigError.

    all_named: each has to have a name
    """
    unnamed, named = list[str](), dict[str, str]()
    for text in given:
        name, sign, folder = text.partition("=")
        if not all_named and (not sign or Path(text).is_dir()):  # a folder's name may have the sign in it
            unnamed.append(text)
            continue
        if not (sign and name.strip() and folder):
            raise ConfigError(f"{option} {text[:200]!r}: wanted NAME=DIR")
        if name.strip() in named:
            raise ConfigError(f"{option}: the name {name.strip()!r} is there twice")
        named[name.strip()] = folder
    if len(unnamed) > 1:
        raise ConfigError(
            f"{option} without a name is there {len(unnamed)} times: one can be merged, others need NAME="
        )
    return next(iter(unnamed), None), named
