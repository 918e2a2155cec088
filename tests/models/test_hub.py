"""Models by their names on a hub: what is downloaded, which commit it is, and what a hub without one says."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid_cache.models.folders import commit_of
from hybrid_cache.models.loading import embedded_path
from tests.models.fake_hub import COMMIT, OLDER_COMMIT, Hub, running

NEEDED = {
    "config.json": b'{"model_type": "jamba"}',
    "generation_config.json": b'{"g": 1}',
    "tokenizer.json": b'{"t": 1}',
    "vocab.json": b'{"v": 1}',
    "merges.txt": b"a b",
    "tokenizer.model": b"\x00",
    "chat_template.jinja": b"{{ 1 }}",
    "additional_chat_templates/tool_use.jinja": b"{{ 2 }}",
    "model.safetensors.index.json": b"{}",
    "model-00001-of-00001.safetensors": b"\x01" * 1000,
}
OTHER = {
    "README.md": b"read me",
    "pytorch_model.bin": b"pickled",
    "model.pt": b"pickled",
    "model-Q4_K_M.gguf": b"GGUF",
    "modeling_own.py": b"raise SystemExit",
    "consolidated.safetensors": b"again",
    "original/consolidated.00.pth": b"pickled",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"again",
    "assets/model.json": b"{}",
}
RESOLVE = "import sys; from hybrid_cache.api.cli.early import find_model; print(find_model(*sys.argv[1:]))"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running(Hub({**NEEDED, **OTHER})) as started:
        yield started


def run(code: str, *args: str, home: Path, url: str, **more: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment)


def resolved(*args: str, home: Path, url: str, **more: str) -> Path:
    done = run(RESOLVE, *args, home=home, url=url, **more)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def error_of(*args: str, home: Path, url: str, **more: str) -> str:
    """The one line that a command about a model leaves, which has not imported torch to say so."""
    code = (
        "import sys; from hybrid_cache.api.cli.main import main\n"
        "try: main(['serve', '--port', '0', *sys.argv[1:]])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = run(code, *args, home=home, url=url, **more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_what_is_needed_is_downloaded_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    folder = resolved("org/model", home=tmp_path, url=hub.url)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == set(NEEDED)
    assert sorted(hub.asked) == sorted(NEEDED)
    assert all((folder / name).read_bytes() == data for name, data in NEEDED.items())
    assert commit_of(folder) == COMMIT


def test_a_second_start_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    folder = resolved("org/model", home=tmp_path, url=hub.url)
    hub.asked.clear()
    assert resolved("org/model", home=tmp_path, url=hub.url) == folder
    assert hub.asked == []


@pytest.mark.parametrize("revision", ["v1", OLDER_COMMIT])
def test_a_revision_is_a_commit_of_its_own(revision: str, hub: Hub, tmp_path: Path) -> None:
    assert commit_of(resolved("org/model", revision, home=tmp_path, url=hub.url)) == OLDER_COMMIT


def test_a_cached_model_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    folder = resolved("org/model", home=tmp_path, url=hub.url)
    assert resolved("org/model", home=tmp_path, url="http://127.0.0.1:9") == folder
    assert resolved("org/model", home=tmp_path, url=hub.url, HF_HUB_OFFLINE="1") == folder
    assert resolved("org/model", COMMIT, home=tmp_path, url="http://127.0.0.1:9") == folder


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["org/none"], "none of this name, or shows it to another HF_TOKEN only"),
        (["org/gated"], "is gated on the hub: ask for access at {url}/org/gated, then set HF_TOKEN"),
        (["org/model", "--revision", "v9"], "the hub at {url} it has no revision 'v9'"),
        (["org/ba..d"], "org/ba..d is not a local folder"),
    ],
)
def test_a_hub_that_has_none_says_why(args: list[str], words: str, hub: Hub, tmp_path: Path) -> None:
    assert words.format(url=hub.url) in error_of(*args, home=tmp_path, url=hub.url)


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    error = error_of("org/model", home=tmp_path, url="http://127.0.0.1:9")
    assert "org/model is not a local folder, and the hub at http://127.0.0.1:9 cannot be reached: " in error


def test_offline_without_a_copy(tmp_path: Path) -> None:
    error = error_of("org/model", home=tmp_path, url="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert f"HF_HUB_OFFLINE is set, and {tmp_path}/hub does not hold all of it" in error


def test_an_architecture_that_is_not_supported_is_told_before_its_weights_are_here(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = b'{"model_type": "gpt2"}'
    assert "model_type 'gpt2' is not supported" in error_of("org/model", home=tmp_path, url=hub.url)
    assert "config.json" in hub.asked
    assert not any(name.endswith(".safetensors") for name in hub.asked)


def test_facts_of_a_model_on_the_hub_need_no_weights(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = (embedded_path() / "config.json").read_bytes()
    code = "import sys; from hybrid_cache.api.cli.main import main; main(['model', 'info', *sys.argv[1:]])"
    for args in (["org/model"], ["org/model", "--revision", "v1", "--json"]):
        done = run(code, *args, home=tmp_path, url=hub.url)
        assert done.returncode == 0, done.stderr
        assert "org/model" in done.stdout
        assert "granitemoehybrid" in done.stdout
    assert "config.json" in hub.asked
    assert not any(name.endswith(".safetensors") for name in hub.asked)
    done = run(code, "org/none", home=tmp_path, url=hub.url)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "none of this name" in done.stderr


def test_a_repository_of_gguf_files_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    del hub.files["config.json"]
    said = "org/model on the hub has no config.json; of GGUF files, download one and name the file"
    assert said in error_of("org/model", home=tmp_path, url=hub.url)


def test_other_folders_have_no_commit(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    assert commit_of(tmp_path / COMMIT) is None
    assert commit_of(tmp_path / "snapshots" / "main") is None
