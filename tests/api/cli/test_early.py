"""What is wrong with a command line is said before anything heavy is imported."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid_cache.kernels import dispatch
from hybrid_cache.kernels.names import BACKENDS, DTYPES
from hybrid_cache.models import loading

# The command line in sys.argv; on standard output, what it has imported of this.
CODE = """
import sys
from hybrid_cache.api.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(*(name for name in ("torch", "transformers") if name in sys.modules))
"""


def told(*args: object) -> str:
    """The error line of a command that has imported neither torch nor transformers."""
    done = subprocess.run([sys.executable, "-c", CODE, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stdout.strip() == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """With a folder that holds no model, one that holds another kind, one that cannot be read, and a file."""
    for name in ("empty", "gpt2", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "broken" / "config.json").write_text("{ no JSON")
    (tmp_path / "weights.bin").write_text("pickled")
    return tmp_path


@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("chat",), ("model", "convert")])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "nowhere is not a local folder"),
        ("weights.bin", "weights.bin is a file, wanted a model's folder"),
        ("empty", "empty: config.json is not there"),
        ("gpt2", "gpt2: model_type 'gpt2' is not supported; supported: "),
        ("broken", "broken: config.json cannot be read"),
    ],
)
def test_what_is_no_model(command: tuple[str, ...], name: str, words: str, folders: Path) -> None:
    out = [folders / "out"] if "convert" in command else []
    assert words in told(*command, folders / name, *out)


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere", "is not a local folder"), ("broken", "config.json cannot be read")]
)
def test_what_model_info_cannot_read(name: str, words: str, folders: Path) -> None:
    assert words in told("model", "info", folders / name)


def test_a_folder_that_would_be_written_over(folders: Path) -> None:
    assert f"{folders}/empty is there already" in told("model", "convert", "embedded", folders / "empty")


def test_a_port_that_is_taken(taken_port: int) -> None:
    assert f"cannot listen on 127.0.0.1:{taken_port}: Address already in use" in told("serve", "--port", taken_port)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--budget", "lots", "'lots' is not a size"),
        ("--backend", "abacus", "backend is 'abacus', must be one of auto, native, "),
        ("--dtype", "int3", "dtype is 'int3', must be one of auto, float32, bfloat16"),
        ("--policy", "magic", "'magic'"),
        ("--order", "magic", "unknown order 'magic'"),
        ("--tool-parser", "magic", "tool_parser is 'magic', must be one of auto, hermes, "),
        ("--max-running", "0", "max_running is 0"),
        ("--served-model-name", "", "served_names is ('',)"),
        ("--api-key", "", "an API key is empty"),
        ("--allow-origin", "*", "without an API key"),
        ("--tls-cert", "a.pem", "tls_key is None"),
        ("--response-ttl", "soon", "'soon'"),
        ("--adapter", "nowhere", "adapter nowhere: neither a folder nor one that ships"),
        ("--variant", "a=nowhere", "nowhere is not a local folder"),
        ("--revision", "v1", "embedded is a folder: revision 'v1' is for names of the hub"),
        ("--host", "256.0.0.1", "cannot listen on 256.0.0.1"),
    ],
)
def test_a_bad_value(option: str, value: str, words: str) -> None:
    assert words in told("serve", "--port", "0", option, value)


def test_the_words_are_those_that_are_known_later() -> None:
    assert set(BACKENDS) == set(dispatch.available())
    assert tuple(loading.COMPUTE_DTYPES) == DTYPES
