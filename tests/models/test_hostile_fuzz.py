"""Random hostile values in the files of a folder: an error of ours in bounded time, or a model. Nothing else."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_cache.errors import HybridCacheError
from hybrid_cache.models import adapters, loading
from hybrid_cache.models.tools.published import CONFIGS
from tests.models import hostile

MAX_SECONDS = 2.0  # of processor time
FEW, MANY = 8, 300
EMBEDDED = loading.embedded_path()
GENERATION_FIELDS: dict[str, object] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "max_new_tokens": 64,
    "max_length": 1000,
    "min_new_tokens": 2,
    "eos_token_id": [4],
    "stop_strings": ["END"],
    "num_beams": 4,
    "typical_p": 0.9,
    "bad_words_ids": [[3]],
    "_from_model_config": True,
    "pad_token_id": 0,
}
INDEX: dict[str, object] = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": hostile.WEIGHTS}}
# Tokenizers of which the embedded one has no part.
STEPS: dict[str, object] = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "_"},
            {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"},
            {"type": "Replace", "pattern": {"Regex": "[0-9]+"}, "content": "0"},
            {"type": "NFKC"},
        ],
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.copy_of_the_embedded(tmp_path_factory.mktemp("hostile") / "model")


@contextmanager
def only_our_errors() -> Iterator[None]:
    began = time.process_time()
    try:
        yield
    except HybridCacheError as error:
        assert len(str(error)) < 2000  # noqa: PT017
    assert time.process_time() - began < MAX_SECONDS


def fuzz(values: st.SearchStrategy[object], check: Callable[[object], None], examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(values)
    def run(mutated: object) -> None:
        with only_our_errors():
            check(mutated)

    run()


@contextmanager
def restored(path: Path) -> Iterator[Path]:
    before = path.read_bytes() if path.exists() else None
    yield path
    path.unlink(missing_ok=True)
    if before is not None:
        path.write_bytes(before)


def fuzz_file(path: Path, base: object, check: Callable[[], object], examples: int) -> None:
    with restored(path):

        def one(mutated: object) -> None:
            hostile.write(path, mutated)
            check()

        fuzz(hostile.mutations(base), one, examples)


num_examples = pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


@num_examples
def test_a_config_of_any_family(examples: int, tmp_path: Path) -> None:
    path = tmp_path / hostile.CONFIG

    def check(mutated: object) -> None:
        hostile.write(path, mutated)
        loading.describe(loading.load_config(tmp_path))

    bases = [dict(config) for config in CONFIGS.values()]
    fuzz(st.sampled_from(bases).flatmap(hostile.mutations), check, 5 * examples)


@num_examples
def test_a_config_beside_its_weights(examples: int, folder: Path) -> None:
    path = folder / hostile.CONFIG
    fuzz_file(path, hostile.read(path), lambda: hostile.open_all(folder), examples)


@num_examples
@pytest.mark.parametrize("steps", [{}, STEPS], ids=["embedded", "other steps"])
def test_a_tokenizer(examples: int, steps: dict[str, object], folder: Path) -> None:
    path = folder / hostile.TOKENIZER
    fuzz_file(path, hostile.read(path) | steps, lambda: hostile.open_text(folder), examples)


@num_examples
@pytest.mark.parametrize("name", [hostile.TOKENIZER_CONFIG, hostile.GENERATION])
def test_settings_of_text(examples: int, name: str, folder: Path) -> None:
    base = hostile.read(folder / name) | (GENERATION_FIELDS if name == hostile.GENERATION else {})
    fuzz_file(folder / name, base, lambda: hostile.open_text(folder), examples)


@num_examples
def test_an_index_of_weights(examples: int, folder: Path, tmp_path: Path) -> None:
    many = hostile.copy_of_the_embedded(tmp_path / "many")
    (many / "one.safetensors").symlink_to(EMBEDDED / hostile.WEIGHTS)
    (many / hostile.WEIGHTS).unlink()
    base = {**INDEX, "weight_map": dict.fromkeys(["a", "b", "c"], "one.safetensors")}
    fuzz_file(many / hostile.INDEX, base, lambda: hostile.open_all(many), examples)


@num_examples
def test_an_adapter(examples: int, folder: Path, tmp_path: Path) -> None:
    adapter = hostile.shipped_adapter(tmp_path / "adapter")
    path = adapter / adapters.CONFIG
    fuzz_file(path, hostile.read(path), lambda: hostile.open_all(folder, adapter), examples)
