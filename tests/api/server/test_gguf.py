"""GGUF files that llama.cpp wrote, from the command line to an answer."""

import asyncio
import json
from pathlib import Path

import httpx
import torch
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli.local_chat import EnginePartner
from hybrid_cache.api.cli.model_info import examine
from hybrid_cache.api.cli.terminal import Asked, Turn, Usage
from hybrid_cache.api.server import launch
from hybrid_cache.api.server.launch import LoadOptions
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.errors import UnsupportedModel
from tests.api.servers import new_app, over_the_wire

DATA = Path(__file__).parents[2] / "models" / "data" / "gguf"
FILE = DATA / "falcon-h1-q4_k_m.gguf"


def test_a_file_serves_chat_and_the_second_request_is_cached() -> None:
    loaded = launch.load(LoadOptions(str(FILE)))
    assert (loaded.name, loaded.dtype) == ("falcon-h1-q4_k_m", torch.bfloat16)
    engine = AsyncEngine(loaded.model, EngineConfig(budget_bytes=64 << 20))
    message = {"role": "user", "content": "a long message " * 20}
    body = {"messages": [message], "max_tokens": 8, "temperature": 0}
    with over_the_wire(new_app(engine, TextModel.load(loaded.path))) as url:
        first, second = (httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json() for _ in range(2))
    assert first["choices"][0]["message"] == second["choices"][0]["message"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_chat_in_the_terminal_runs_a_file() -> None:
    async def ask() -> list[str | Usage]:
        partner = EnginePartner(LoadOptions(str(FILE)), 64 << 20, Asked(temperature=0.0, max_tokens=4, seed=0))
        await partner.open()
        pieces = [piece async for piece in partner.reply([Turn("user", "hello")])]
        await partner.close()
        return pieces

    usage = asyncio.run(ask())[-1]
    assert isinstance(usage, Usage)
    assert usage.completion_tokens > 0


def test_model_info_of_a_file() -> None:
    report = examine(FILE, 1 << 30)
    assert report.supported
    assert report.model_type == "falcon_h1"
    assert report.honoured == ("eos_token_id=[2]",)
    assert report.facts is not None
    assert (report.facts.layers, report.facts.max_length) == ({"Mamba-2": 1, "attention": 1}, 512)


def test_model_convert_makes_a_folder_of_a_file_that_answers_alike(tmp_path: Path) -> None:
    out = tmp_path / "folder"
    result = CliRunner().invoke(cli.app, ["model", "convert", str(FILE), str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    models = [launch.load(LoadOptions(str(path))) for path in (FILE, out)]
    texts = [TextModel.load(model.path) for model in models]
    assert texts[0].tokenizer.as_json() == texts[1].tokenizer.as_json()
    assert texts[0].chat_templates.keys() == texts[1].chat_templates.keys() == {"default"}
    assert models[0].info == models[1].info


def test_a_file_of_another_architecture_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(FILE.read_bytes().replace(b"falcon-h1", b"falcon-h9"))
    result = CliRunner().invoke(cli.app, ["model", "convert", str(path), str(tmp_path / "out")])
    assert isinstance(result.exception, UnsupportedModel)
    assert str(result.exception).startswith(f"{path}: general.architecture is 'falcon-h9', supported in GGUF files")
