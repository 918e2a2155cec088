"""Where a model is: a folder, one that ships, or one of the Hugging Face hub; and what can be said of it at once.

Nothing heavy is imported here, so that whoever misspells a name hears of it before torch is loaded.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models.files import errors_begin_with, few, is_there, read_json, shown

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
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
NUMBERED = "model-*-of-*.safetensors"  # where a tool wrote no index
# Other forms of the same weights; and all folders but `additional_chat_templates`, by how they begin.
UNWANTED = ["consolidated*", f"*{GGUF}", "[!a]*/*", "a[!d]*/*", "ad[!d]*/*"]
ALIASES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}  # text models by themselves

PARTS = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")  # of one model, in several files
_OF_EYES = "mmproj"  # how files of vision towers beside a model begin
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


def resolve_text(model: str, revision: str | None = None) -> Path:
    """As `resolve`, but of a repository on the hub only the small files, no weights."""
    is_hub = model not in SHIPPED and not is_there(Path(model)) and model.count("/") == 1
    return _snapshot(model, revision, SMALL) if is_hub and model[0] not in "/.~" else resolve(model, revision)


def commit_of(folder: Path) -> str | None:
    """Of the hub's repository that a folder was downloaded from; None for any other folder."""
    whole = folder.absolute()
    return whole.name if whole.parent.name == "snapshots" and _COMMIT.fullmatch(whole.name) else None


def check(folder: Path) -> None:
    """Whether it looks like a model that can be served, from its config.json. Raises ModelError.

    Not of GGUF files, whose headers are read when they are loaded.
    """
    if is_there(folder / DELTA) or find_gguf(folder) is not None:
        return
    with errors_begin_with(folder):
        kind = read_json(folder / CONFIG).get("model_type")
        if kind not in supported() and kind not in ALIASES:
            names = ", ".join(supported())
            raise UnsupportedModel(f"model_type {shown(kind)} is not supported; supported: {names}")


def find_gguf(path: Path) -> Path | None:
    """The GGUF file, or the first of its parts, that a path means; None where it means something else.

    A folder means the one in it, unless it has safetensors weights. Raises ModelError for a folder with several.
    """
    if path.suffix == GGUF and not path.is_dir():
        return path
    if not path.is_dir() or any((path / name).is_file() for name in SAFETENSORS) or any(path.glob(NUMBERED)):
        return None
    found = sorted(each for each in path.glob(f"*{GGUF}") if _is_first(each.name))
    if len(found) > 1:
        raise ModelError(f"{path} has several GGUF files, name one of them: {few(each.name for each in found)}")
    return found[0] if found else None


def _is_first(name: str) -> bool:
    part = PARTS.fullmatch(name)
    return not name.startswith(_OF_EYES) and (part is None or int(part[2]) == 1)


def check_adapter(name: str) -> None:
    """Raises ModelError if there is none of this name."""
    if not Path(name).is_dir() and name not in ADAPTERS:
        raise ModelError(f"adapter {name}: neither a folder nor one that ships ({', '.join(ADAPTERS)})")


def supported() -> list[str]:
    """The architectures: files of that name in `arch/`."""
    return sorted(path.stem for path in (Path(__file__).parent / "arch").glob("*.py"))


def _snapshot(name: str, revision: str | None, patterns: Sequence[str] = (*SMALL, *WEIGHTS)) -> Path:
    """Files of a repository, of one commit. Raises ModelError."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2

    try:
        small = snapshot_download(name, revision=revision, allow_patterns=SMALL, ignore_patterns=UNWANTED)
        _check_snapshot(Path(small), name)  # before the weights, which may be many
        commit = commit_of(Path(small)) or revision
        return Path(snapshot_download(name, revision=commit, allow_patterns=[*patterns], ignore_patterns=UNWANTED))
    except (OSError, ValueError, HTTPError) as error:
        reason = _reason(error, name, revision, constants.ENDPOINT)
        raise ModelError(f"{name} is not a local folder, and {reason}") from error


def _check_snapshot(folder: Path, name: str) -> None:
    """As `check`. Says so where a repository has no config.json, as those of GGUF files have none."""
    if not is_there(folder / CONFIG) and not is_there(folder / DELTA):
        raise ModelError(f"{name} on the hub has no {CONFIG}; of GGUF files, download one and name the file")
    check(folder)


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
