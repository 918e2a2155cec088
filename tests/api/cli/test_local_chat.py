"""A model in this process is asked as a server asks it."""

import asyncio
import json
import shutil
from pathlib import Path

from hybrid_cache.api.cli.local_chat import EnginePartner
from hybrid_cache.api.cli.terminal import Asked, Turn, Usage
from hybrid_cache.api.server.launch import LoadOptions
from hybrid_cache.models import registry

EMBEDDED = Path(registry.__file__).parent / "embedded"


def changed(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def answer(folder: Path, budget_bytes: int) -> tuple[str, Usage]:
    async def ask() -> tuple[str, Usage]:
        asked = Asked(temperature=0.0, max_tokens=None, seed=0)
        partner = EnginePartner(LoadOptions(str(folder)), budget_bytes, asked)
        await partner.open()
        pieces = [piece async for piece in partner.reply([Turn("user", "Hello!")])]
        await partner.close()
        *text, usage = pieces
        assert isinstance(usage, Usage)
        return "".join(map(str, text)), usage

    return asyncio.run(ask())


def test_a_context_beyond_the_budget_and_a_stop_token_beyond_the_vocabulary_are_no_matter(tmp_path: Path) -> None:
    """The answer's length was left open: it ends where the budget does."""
    folder = shutil.copytree(EMBEDDED, tmp_path / "model")
    defaults = json.loads((folder / "generation_config.json").read_text())
    eos = defaults["eos_token_id"]
    changed(folder, "config.json", max_position_embeddings=10_000_000)
    stops = [*(eos if isinstance(eos, list) else [eos]), 10_000_000]
    changed(folder, "generation_config.json", eos_token_id=stops, max_new_tokens=None)
    text, usage = answer(folder, 4 << 20)
    assert text == answer(EMBEDDED, 64 << 20)[0]
    assert usage.completion_tokens > 0
