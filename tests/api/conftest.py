"""Servers and clients for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.engine.async_engine import AsyncEngine
from tests.api.servers import new_app, new_engine, over_the_wire, write_text_model


@pytest.fixture(scope="session")
def sum_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sum")
    write_text_model(folder)
    return folder


@pytest.fixture(scope="session")
def sum_text(sum_folder: Path) -> TextModel:
    return TextModel.load(sum_folder)


@pytest.fixture(scope="module")
def engine() -> AsyncEngine:
    return new_engine()


@pytest.fixture(scope="module")
def url(engine: AsyncEngine, sum_text: TextModel) -> Iterator[str]:
    """A real server on `engine`."""
    with over_the_wire(new_app(engine, sum_text)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as connection:
        yield connection
