"""Where a model is: a folder, one that ships, or one of the Hugging Face hub; and what can be said of it at once.

Nothing heavy is imported here, so that whoever misspells a name hears of it before torch is loaded.
"""

import re
from pathlib import Path

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models.files import errors_begin_with, is_there, read_json, shown

# Models inside the package, by name: folders beside this file.
SHIPPED = {
    "embedded": "embedded",
    "embedded-style": "embedded_style",
    "embedded-half": "embedded_half",
    "recall": "recall",
    "recall-style": "recall_style",
}
ADAPTERS = {"embedded-choreo": "embedded_choreo", "embedded-polite": "embedded_polite"}  # likewise
CONFIG, DELTA, GGUF = "config.json", "delta.json", ".gguf"
SMALL = ["*.json", "*.jinja", "*.model", "merges.txt"]  # what is needed of a repository on the hub
WEIGHTS = ["*.safetensors"]
# Other forms of the same weights; and all folders but `additional_chat_templates`, by how they begin.
UNWANTED = ["consolidated*", f"*{GGUF}", "[!a]*/*", "a[!d]*/*", "ad[!d]*/*"]
ALIASES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}  # text models by themselves

_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(model: str | None, revision: str | None = None) -> Path:
    """The folder of a model: a local one or a GGUF file as it is; else one that ships, None for the embedded one; else
    one of the hub, downloaded, or taken from its cache where the hub cannot be reached.

    revision: a branch, a tag or a commit of the hub, there is none elsewhere   Raises ModelError.
    """
    name = "embedded" if model is None else model
    ships = model is None or (name in SHIPPED and not Path(name).is_dir())
    folder = Path(__file__).parent / SHIPPED[name] if ships else Path(name)
    if folder.is_dir() or (folder.suffix == GGUF and is_there(folder)):
        if revision is not None:
            kind = "folder" if folder.is_dir() else "file"
            raise ModelError(f"{name} is a {kind}: revision {shown(revision)} is for names of the hub")
        return folder
    if is_there(folder):
        raise ModelError(f"{name} is a file, wanted a model's folder or a GGUF file")
    if folder.suffix == GGUF:
        raise ModelError(f"{name} is not a local file")
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        raise ModelError(f"{name} is not a local folder")
    return _snapshot(name, revision)


def commit_of(folder: Path) -> str | None:
    """Of the hub's repository that a folder was downloaded from; None for any other folder."""
    whole = folder.absolute()
    return whole.name if whole.parent.name == "snapshots" and _COMMIT.fullmatch(whole.name) else None


def check(folder: Path) -> None:
    """Whether it looks like a model that can be served, from its config.json. Raises ModelError.

    Not of GGUF files, whose headers are read when they are loaded.
    """
    if (
        is_there(folder / DELTA)
        or folder.suffix == GGUF
        or (not is_there(folder / CONFIG) and any(folder.glob(f"*{GGUF}")))
    ):
        return
    with errors_begin_with(folder):
        kind = read_json(folder / CONFIG).get("model_type")
        if kind not in supported() and kind not in ALIASES:
            names = ", ".join(supported())
            raise UnsupportedModel(f"model_type {shown(kind)} is not supported; supported: {names}")


def check_adapter(name: str) -> None:
    """Raises ModelError if there is none of this name."""
    if not Path(name).is_dir() and name not in ADAPTERS:
        raise ModelError(f"adapter {name}: neither a folder nor one that ships ({', '.join(ADAPTERS)})")


def supported() -> list[str]:
    """The architectures: files of that name in `arch/`."""
    return sorted(path.stem for path in (Path(__file__).parent / "arch").glob("*.py"))


def _snapshot(name: str, revision: str | None) -> Path:
    """What is needed of a repository, of one commit. Raises ModelError."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2

    try:
        small = snapshot_download(name, revision=revision, allow_patterns=SMALL, ignore_patterns=UNWANTED)
        check(Path(small))  # before the weights, which may be many
        commit = commit_of(Path(small)) or revision
        every = SMALL + WEIGHTS
        return Path(snapshot_download(name, revision=commit, allow_patterns=every, ignore_patterns=UNWANTED))
    except (OSError, ValueError, HTTPError) as error:
        reason = _reason(error, name, revision, constants.ENDPOINT)
        raise ModelError(f"{name} is not a local folder, and {reason}") from error


def _reason(error: Exception, name: str, revision: str | None, endpoint: str) -> str:
    """What the hub said, in one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case GatedRepoError():
            return f"is gated on the hub: ask for access at {endpoint}/{name}, then set HF_TOKEN"
        case RepositoryNotFoundError():
            return f"the hub at {endpoint} has none of this name, or shows it to another HF_TOKEN only"
        case RevisionNotFoundError():
            return f"on the hub at {endpoint} it has no revision {shown(revision)}"
        case LocalEntryNotFoundError() if constants.is_offline_mode():
            return f"HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold all of it"
        case LocalEntryNotFoundError():
            return f"the hub at {endpoint} cannot be reached: {_first_line(error.__cause__ or error)}"
    return f"the hub at {endpoint} could not give it: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
