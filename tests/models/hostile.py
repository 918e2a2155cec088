"""Model folders that are broken on purpose: copies of the embedded one in which a file says something absurd."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from hypothesis import strategies as st

from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import adapters, loading

CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer.json", "generation_config.json"
TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LONG_TEXT = "The quick brown fox, 1234 times: 漢字 eeee\n" * 100

# What stands for a literal that no Python value becomes.
TOO_LARGE = "<1e999>"
SURROGATE = "<surrogate>"
_LITERALS = {f'"{TOO_LARGE}"': "1e999", SURROGATE: "\\ud800"}


def nested(depth: int, leaf: object = None) -> object:
    for _ in range(depth):
        leaf = [leaf]
    return leaf


HOSTILE: Sequence[object] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 4096, 2**20, 2**20 + 1, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64),
    *(-(2**63), 10**9, 10**12, 10**30, 10**39, 10**400, 0.5, -0.0, 1e-320, 1e-30, 1e30, 1e38, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf"), TOO_LARGE, SURROGATE),
    *("", "x", "x" * 100_000, "\0", "\u202e", "\x1b[2J", "auto", "mamba", "attention", "e", "../x", "/dev/zero"),
    *([], {}, [None], [[]], [0], [-1], [1.5] * 4, ["mamba"] * 5000, {"": ""}, {"__float__": "Infinity"}),
    *({"type": "Sequence"}, {"type": "ByteLevel"}, {"String": "e"}, {"Regex": ""}, {"Regex": "(a|a)+$"}),
    *(nested(50), nested(900), nested(5000)),
)


def copy_of_the_embedded(folder: Path) -> Path:
    """The large files are links, as in a hub's cache."""
    source = loading.embedded_path()
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(WEIGHTS, "*.md", "scores.json"))
    (folder / WEIGHTS).symlink_to(source / WEIGHTS)
    return folder


def write(path: Path, values: object) -> None:
    """JSON; `TOO_LARGE` and `SURROGATE` become what they stand for."""
    text = dumped(values)
    for word, literal in _LITERALS.items():
        text = text.replace(word, literal)
    path.write_text(text)


def dumped(values: object) -> str:
    """As `json.dumps`, which gives up where values are nested deeply; numbers may be longer than Python reads."""
    match values:
        case list():
            depth = 0
            while isinstance(values, list) and len(values) == 1:
                values, depth = values[0], depth + 1
            inside = ",".join(map(dumped, values)) if isinstance(values, list) else dumped(values)
            inside = f"[{inside}]" if isinstance(values, list) else inside
            return "[" * depth + inside + "]" * depth
        case dict():
            return "{" + ",".join(f"{json.dumps(k)}:{dumped(v)}" for k, v in values.items()) + "}"
        case _:
            return json.dumps(values)


def edit(path: Path, **changes: object) -> None:
    write(path, read(path) | changes)


def read(path: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads(path.read_text())
    return values


def replace_file(path: Path, by: str) -> None:
    """Something at the place of a file: "fifo", or what a link to it leads to."""
    path.unlink(missing_ok=True)
    if by == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(by)


def places(values: object, deep: int = 6) -> list[tuple[str | int, ...]]:
    """Where a value may be replaced: keys and indices from the outside in. Of long lists and objects the first few."""
    if deep == 0:
        return []
    items: list[tuple[str | int, object]] = []
    if isinstance(values, Mapping):
        items = list(values.items())[:60]
    elif isinstance(values, list):
        items = list(enumerate(values))[:4]
    return [(key, *rest) for key, value in items for rest in [(), *places(value, deep - 1)]]


def replaced(values: object, place: tuple[str | int, ...], value: object) -> object:
    """A copy with another value in one place."""
    if not place:
        return value
    key, *rest = place
    if isinstance(values, Mapping) and key in values:
        return {**values, key: replaced(values[key], tuple(rest), value)}
    if isinstance(values, list) and isinstance(key, int) and key < len(values):
        return [*values[:key], replaced(values[key], tuple(rest), value), *values[key + 1 :]]
    return values  # an earlier change has taken the place away


def mutations(values: object) -> st.SearchStrategy[object]:
    """The same with one to three values replaced by hostile ones, or by others of its own."""
    own = places(values)
    spots = st.sampled_from(own)
    new = st.sampled_from(HOSTILE) | st.builds(lambda place: at(values, place), st.sampled_from(own))
    return st.lists(st.tuples(spots, new), min_size=1, max_size=3).map(lambda changes: _changed(values, changes))


def at(values: object, place: tuple[str | int, ...]) -> object:
    for key in place:
        values = values[key]  # type: ignore[index]
    return values


def _changed(values: object, changes: Sequence[tuple[tuple[str | int, ...], object]]) -> object:
    for place, value in changes:
        values = replaced(values, place, value)
    return values


def open_all(folder: Path, adapter: Path | None = None) -> None:
    """What a server reads before it listens, and a text there and back."""
    loading.load(folder, ops=dispatch.select("torch"), adapter=adapter)
    open_text(folder)


def open_text(folder: Path) -> None:
    text = TextModel.load(folder)
    ids = text.tokenizer.encode(LONG_TEXT)
    assert len(ids) <= 300 * len(LONG_TEXT)
    assert len(text.tokenizer.decode(ids)) <= 300 * 64 * len(LONG_TEXT)


def shipped_adapter(folder: Path) -> Path:
    return Path(shutil.copytree(adapters.resolve("embedded-choreo"), folder))
