"""An adapter goes from the command line into the model, and everything that the server says of itself names it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.server import launch
from hybrid_cache.api.server.launch import LoadOptions
from hybrid_cache.api.server.process import ServeOptions
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.models import adapters
from hybrid_cache.models.adapters import LoraConfig
from hybrid_cache.models.loading import embedded_path
from hybrid_cache.models.training.lora import Settings
from tests.api.servers import in_process, new_app, new_engine


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """One that changes one matrix of the embedded model."""
    module = "model.layers.0.mamba.out_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 384), f"{module}.lora_B.weight": torch.ones(192, 2)}
    adapters.save(tmp_path / "quiet", LoraConfig(2, 4.0, ("out_proj",), base="embedded"), tensors)
    return tmp_path / "quiet"


def test_serve_hands_the_adapter_over(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[ServeOptions] = []
    monkeypatch.setattr("hybrid_cache.api.server.process.serve", told.append)
    assert CliRunner().invoke(cli.app, ["serve", "--port", "0", "--adapter", "embedded-choreo"]).exit_code == 0
    assert told[0].load == LoadOptions(adapter="embedded-choreo", path=embedded_path())


def test_chat_hands_the_adapter_over(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[LoadOptions] = []
    monkeypatch.setattr("hybrid_cache.api.cli.local_chat.EnginePartner", lambda options, *_: told.append(options))
    monkeypatch.setattr("hybrid_cache.api.cli.terminal.run", lambda *_: 0)
    assert CliRunner().invoke(cli.app, ["chat", "--adapter", "embedded-choreo"]).exit_code == 0
    assert told == [LoadOptions(adapter="embedded-choreo", path=embedded_path())]


def test_a_loaded_model_and_what_is_served_are_named_after_the_adapter(adapter: Path) -> None:
    loaded = launch.load(LoadOptions(adapter=str(adapter), backend="torch"))
    base = launch.load(LoadOptions(backend="torch"))
    assert (base.name, base.adapter) == ("embedded", None)
    assert (loaded.name, loaded.adapter) == ("embedded+quiet", "quiet")
    assert loaded.model.fingerprint != base.model.fingerprint
    options = ServeOptions(
        load=LoadOptions(),
        engine=SimpleNamespace(),  # type: ignore[arg-type]
        budget_bytes=None,
        host="",
        port=0,
        served_names=(),
        api_keys=(),
        shared_cache=False,
        special_tokens_in_content=False,
        keep_billing_header=False,
        tool_parser=None,
        max_body_bytes=1,
        message_book_bytes=1,
        response_store=None,
        response_store_bytes=1,
        response_life_s=1.0,
        vllm_metrics=False,
        drain_timeout_s=1.0,
    )
    settings = options.settings(loaded, [], 0)
    assert (settings.served_names, settings.adapter) == (("embedded+quiet",), "quiet")


@pytest.mark.parametrize("name", [None, "quiet"])
def test_health_names_the_adapter(name: str | None, sum_text: TextModel) -> None:
    async def health() -> dict[str, object]:
        async with in_process(new_app(new_engine(), sum_text, adapter=name)) as client:
            return dict((await client.get("/health")).json())

    assert asyncio.run(health())["adapter"] == name


def test_model_info_tells_about_the_adapter(adapter: Path) -> None:
    told = CliRunner().invoke(cli.app, ["model", "info", "--adapter", str(adapter), "--json"])
    facts = json.loads(told.output)["adapter"]
    expected = {"name": "quiet", "base": "embedded", "rank": 2, "scale": 2.0, "num_weights": 1}
    assert facts == {**expected, "num_parameters": 2 * (384 + 192)}
    told = CliRunner().invoke(cli.app, ["model", "info", "--adapter", str(adapter)], env={"COLUMNS": "200"})
    assert "quiet for embedded: rank 2, 1 weights" in told.output
    assert json.loads(CliRunner().invoke(cli.app, ["model", "info", "--json"]).output)["adapter"] is None


def test_train_lora_hands_its_options_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[tuple[object, ...]] = []
    monkeypatch.setattr("hybrid_cache.api.cli.train_lora.run", lambda *args, **kw: told.append((*args, kw)))
    line = (
        f"train-lora some/model --out {tmp_path} --rank 4 --alpha 8 --lr 0.1 --steps 5 --batch-size 3 --dropout 0.2 "
        "--target q_proj --save-module conv1d --reuse alone --in-place 0.3 --seam 6 --distill 0.4 --seed 7 --every 9 "
        "--stress --start first --focus order --fewest 6 --anew 0.3 "
        "--checked --resume --eval-seeds 2 --eval-each 11 --threads 2"
    )
    assert CliRunner().invoke(cli.app, line.split()).exit_code == 0
    settings = Settings(
        *(4, 8.0, 0.1, 5, 3, 0.2, ("q_proj",), ("conv1d",), 7, "alone", 0.3, 6, 0.4, True, True, "first"),
        focus="order",
        fewest=6,
        anew=0.3,
        checked=True,
    )
    rest = {"resume": True, "every": 9, "num_seeds": 2, "each": 11, "threads": 2}
    assert told == [("some/model", tmp_path, settings, rest)]
    assert CliRunner().invoke(cli.app, ["train-lora", "--out", str(tmp_path)]).exit_code == 0
    assert told[1][2] == Settings()
    line = ["train-lora", "--out", str(tmp_path), "--reads", "embedded-half", "--transfer", "take 0-4, project 5"]
    assert CliRunner().invoke(cli.app, line).exit_code == 0
    assert told[2][2] == Settings(reads="embedded-half", transfer="take 0-4, project 5", distill=1.0)
