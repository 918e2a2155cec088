"""A server whose every answer can be worked out by hand: `SumModel` behind the real engine, and a tokenizer to match.

`SumModel` says `(sum + length) % 997`, so after a token t comes 2t + 1. Token ids are handed out such that this walk
spells `SCRIPT`, one entry a token, and ends in `<|im_end|>`.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.connections import Connections, Listener
from hybrid_cache.api.server.process import url_of
from hybrid_cache.api.server.protocol import Patience, ServerConfig
from hybrid_cache.api.server.serving import Variant
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import CacheTensors, ForwardBatch, HybridModel
from hybrid_cache.engine.async_engine import AsyncEngine
from tests.fakes import VOCAB, SumModel

BOS, IM_START, IM_END = 256, 257, 260  # the walk that ends in the last of them stays clear of the bytes
# The euro sign is one character in two tokens, the stop strings of the tests begin and end inside of tokens.
Script = tuple[str | bytes, ...]
SCRIPT: Script = ("Hel", "lo", " ", b"\xe2", b"\x82\xac", " ST", "OP", " and", " on")
TEXT = "Hello € STOP and on"
CALLS: Script = (  # text, and two calls in Hermes' form
    *("Let me", " see.", " <tool", "_call>", '{"name": "f", "argu', 'ments": {"x": [1]}}', "</tool_call>"),
    *("\n", '<tool_call>{"name": "g"}</tool_call>'),
)
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def script_ids(script: Script = SCRIPT) -> list[int]:
    """The tokens of a script, then `IM_END`."""
    ids = [IM_END]
    for _ in script:
        ids.insert(0, (ids[0] - 1) * pow(2, -1, VOCAB) % VOCAB)
    assert min(ids) > IM_START
    assert len(set(ids)) == len(ids)
    return ids


def write_text_model(folder: Path, script: Script = SCRIPT) -> None:
    """The text files of a model folder: bytes are tokens 0 to 255, no merges, words that only the model says."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = iter(range(0x100, 0x200))
    char_of = [chr(b if b in printable else next(stand_ins)) for b in range(256)]

    def spelled(data: bytes) -> str:
        return "".join(char_of[b] for b in data)

    vocab = {char_of[b]: b for b in range(256)}
    words = {
        i: spelled(s.encode() if isinstance(s, str) else s) for i, s in zip(script_ids(script), script, strict=False)
    }
    single = {i for i, word in words.items() if word in vocab}
    specials = {"<|bos|>": BOS, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
    vocab |= specials
    for i in sorted(set(range(256, VOCAB)) - set(specials.values())):
        vocab[words[i] if i in words and i not in single else spelled(f" w{i}".encode())] = i
    # A word of one byte is that byte's token: they trade places.
    for i in single:
        vocab[spelled(f" w{i}".encode())], vocab[words[i]] = vocab[words[i]], i
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    assert [tokenizer.token_to_id(name) for name in specials] == list(specials.values())
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": [IM_END]}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def prompt_for(first: int, *, length: int = 5) -> list[int]:
    """A prompt of tokens after which `SumModel` says `first`, and then walks on from there."""
    prompt = [7] * (length - 1)
    return [*prompt, (first - sum(prompt) - length) % VOCAB]


def script_prompt() -> list[int]:
    """A prompt after which `SumModel` says `SCRIPT`."""
    return prompt_for(script_ids()[0])


def script_messages(text: TextModel, script: Script = SCRIPT) -> list[dict[str, object]]:
    """Messages after which `SumModel` says a script."""
    for content in ("a" * count + chr(last) for count in range(40) for last in range(0x21, 0x7F)):
        tokens = text.tokenizer.encode(f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n")
        if (sum(tokens) + len(tokens)) % VOCAB == script_ids(script)[0]:
            return [{"role": "user", "content": content}]
    raise AssertionError("no content does it")


class GatedModel(SumModel):
    """A `SumModel` that computes nothing while its gate is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.reached = threading.Event()  # set while a step waits at the gate, and ever after

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        self.reached.set()
        assert self.gate.wait(30)
        return super().forward(batch, cache)


def new_engine(model: HybridModel | None = None, **config: object) -> AsyncEngine:
    settings = {"budget_bytes": 4 << 20, **config}
    return AsyncEngine(model or SumModel(), EngineConfig(**settings))


def new_app(engine: AsyncEngine, text: TextModel, variants: Iterable[Variant] = (), **settings: object) -> FastAPI:
    fields = {"served_names": ("sum", "sum-alias"), "backend": "fake", "model_path": "models/sum"}
    return create_app(engine, text, ServerSettings(**{**fields, "drain_timeout_s": 1.0, **settings}), variants)


@asynccontextmanager
async def in_process(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that runs on this event loop."""
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            yield client


@contextmanager
def over_the_wire(
    app: ASGIApp,
    *,
    max_connections: int = 1024,
    patience: Patience | None = None,
    send_buffer: int = 0,
    **more: object,
) -> Iterator[str]:
    """The address of a real server. send_buffer: bytes, 0 leaves it to the kernel; more: as for `uvicorn.Config`"""
    connections = Connections(max_connections)
    listener = Listener(socket.create_server(("127.0.0.1", 0)), connections)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    config = ServerConfig(app, connections, patience or Patience(), **{"timeout_graceful_shutdown": 3, **more})
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield url_of(listener, "https" if config.is_ssl else "http")
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


async def until_free(engine: AsyncEngine) -> None:
    """Waits until no request holds anything."""
    for _ in range(500):
        stats = engine.stats()
        if stats.running == stats.waiting == stats.cache.working_bytes == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still held: {engine.stats()}")


def events_of(text: str) -> Any:
    """The JSON of server-sent events, which must end in [DONE]."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""], blocks[-2:]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2] if not block.startswith(":")]
