"""What somebody new to the project looks for is found by one `grep -i WORD`.

It is looked for where they look first: in `serve --help`, whose options are whole lines, and in docs/README.md.
"""

from functools import cache

import pytest
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from tests.docs.pages import ROOT

MOST_LINES = 8  # that a look-up may show; more is a page to read

IN_HELP = {
    "memory limit": "--budget",
    "api key": "--api-key",
    "api-key": "HYBRID_CACHE_API_KEY",
    "context length": "--max-model-len",
    "max-model-len": "--max-model-len",
    "ctx-size": "--max-model-len",
    "cache off": "--no-prefix-cache",
    "disable": "--no-prefix-cache",
    "enable-prefix-caching": "--prefix-cache",
    "several models": "--variant",
    "lora": "--adapter",
    "run time": "--allow-adapter-loading",
    "json": "--log-format",
    "nginx": "--forwarded-allow-ips",
    "proxy": "--forwarded-allow-ips",
    "tls": "--tls-cert",
    "https": "--tls-cert",
    "ssl": "--tls-cert",
    "at once": "--max-running",
    "concurren": "--max-running",
    "parallel": "--max-running",
    "max-num-seqs": "--max-running",
    "not cached": "x-cache-report",
    "metrics": "GET /metrics",
    "prometheus": "GET /metrics",
    "anthropic": "docs/serving.md",
    "structured": "docs/serving.md",
    "temperature": "fields of a request",
    "gguf": "model TEXT",
    "dtype": "--dtype",
    "threads": "--threads",
    "graceful": "--drain-timeout",
    "shutdown": "--drain-timeout",
    "tenant": "--shared-cache",
    "policy": "package.module:Class",
    "yaml": "--config",
    "environment": "HYBRID_CACHE_*",
    "chat template": "--chat-template",
    "version": "hybrid-cache --version",
    "vulnerab": "SECURITY.md",
    "cors": "--allow-origin",
    "kubernetes": "docs/deploying.md",
}
IN_INDEX = {
    "memory": "--budget",
    "api key": "--api-key-file",
    "tenant": "cache_salt",
    "isolation": "cache_salt",
    "context": "--max-model-len",
    "cache off": "--no-prefix-cache",
    "at once": "--max-running",
    "several models": "--variant",
    "lora": "--allow-adapter-loading",
    "gguf": "(gguf.md)",
    "awq": "(checkpoints.md)",
    "dtype": "--dtype",
    "threads": "--threads",
    "chat template": "--chat-template",
    "config file": "--config",
    "vllm": "--help-aliases",
    "llama-server": "--help-aliases",
    "anthropic": "serving.md#anthropics-clients",
    "structured": "response_format",
    "not cached": "x-cache-report",
    "metrics": "/metrics",
    "json log": "--log-format json",
    "nginx": "operations.md#behind-nginx",
    "tls": "--tls-cert",
    "graceful": "--drain-timeout",
    "policy of your own": "--policy",
    "custom": "--policy",
    "cors": "--allow-origin",
    "docker": "(deploying.md)",
    "health": "/ready",
    "gpu": "--backend triton",
    "rate limit": "429",
    "cancel": "close the connection",
    "outlives": "Not there",
    "speculative": "Not there",
    "embeddings": "Not there",
    "version": "CHANGELOG.md",
    "vulnerab": "SECURITY.md",
}


@cache
def help_lines() -> list[str]:
    return CliRunner().invoke(cli.app, ["serve", "--help"]).output.splitlines()


def grep(word: str, lines: list[str]) -> list[str]:
    return [line for line in lines if word in line.lower()]


@pytest.mark.parametrize(("word", "answer"), IN_HELP.items())
def test_help_answers(word: str, answer: str) -> None:
    found = grep(word, help_lines())
    assert any(answer in line for line in found)
    assert len(found) <= MOST_LINES


@pytest.mark.parametrize(("word", "answer"), IN_INDEX.items())
def test_the_index_answers(word: str, answer: str) -> None:
    found = grep(word, (ROOT / "docs" / "README.md").read_text().splitlines())
    assert any(answer in line for line in found)
    assert len(found) <= MOST_LINES


def test_the_readme_leads_to_the_index() -> None:
    assert "docs/README.md#where-is-" in (ROOT / "README.md").read_text()
