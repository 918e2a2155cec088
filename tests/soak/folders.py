"""Model folders made to hurt: python -m tests.soak.folders

Each is a copy of the embedded model with one file changed. Either `serve` refuses it soon, with one clear line and no
traceback, or it serves; then a conversation is answered or refused soon, and `/health` goes on. Memory has a bound
throughout.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hybrid_cache.models.folders import ADAPTERS
from hybrid_cache.models.loading import embedded_path
from tests.soak.common import HEALTH_S, Options, Report, parse, told
from tests.soak.server import DEFAULTS, PROGRAM, ROOT, get, resident_mib
from tests.soak.wire import exchange, post

START_S, ANSWER_S = 40.0, 15.0
MAX_MIB = 2048.0
TALK = {"messages": [{"role": "user", "content": "here we eat"}], "max_tokens": 1}
DEEP = "[" * 100_000 + "]" * 100_000

Change = Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class Folder:
    name: str
    change: Change
    must_refuse: bool = True
    adapter: bool = False  # the change is to a copy of the shipped adapter


def text(file: str, content: str) -> Change:
    return lambda folder: _rewrite(folder / file, content)


def fields(file: str, **values: object) -> Change:
    return lambda folder: _rewrite(folder / file, json.dumps({**json.loads((folder / file).read_text()), **values}))


def raw_field(file: str, name: str, raw: str) -> Change:
    """A value that json would not write, such as 1e999."""

    def change(folder: Path) -> None:
        values = {**json.loads((folder / file).read_text()), name: "HERE"}
        _rewrite(folder / file, json.dumps(values).replace('"HERE"', raw))

    return change


def special(file: str, make: Callable[[Path], None]) -> Change:
    """A pipe, or a link to a device, in the place of a file."""

    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        make(folder / file)

    return change


def _rewrite(path: Path, content: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(content)


def index(content: str) -> Change:
    """Weights in several files, as an index says."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        _rewrite(folder / INDEX, content)

    return change


def exploding_tokenizer(folder: Path) -> None:
    """Each e becomes a thousand, three times."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    grow = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 1000}
    values["normalizer"] = {"type": "Sequence", "normalizers": [grow] * 3}
    _rewrite(path, json.dumps(values))


CONFIG, GENERATION, ADAPTER, INDEX = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
)
TEMPLATES = (
    *("{{ '%900000000d' % 1 }}", "{{ '%900000000s'|format('x') }}", "{{ 'x'|center(900000000) }}"),
    *("{{ 'x'.ljust(900000000) }}", "{{ 'x'|indent(900000000) }}", "{{ '{:>900000000}'.format('x') }}"),
    *("{{ [1]|slice(100000000)|list }}", "{{ lipsum(n=2000000) }}", "{{ ('x ' * 5000000)|wordwrap(1) }}"),
    *("{{ ('x ' * 5000000)|urlize }}", "{% for i in range(10**9) %}{% endfor %}", "{{ 9 ** 9 ** 9 }}"),
    *("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}"),
)
FOLDERS = (
    Folder("config nested", text(CONFIG, DEEP)),
    Folder("index nested", index(DEEP)),
    Folder("tokenizer nested", text("tokenizer.json", DEEP)),
    Folder("tokenizer_config nested", text("tokenizer_config.json", DEEP)),
    Folder("generation_config nested", text(GENERATION, DEEP)),
    Folder("10^9 layers", fields(CONFIG, num_hidden_layers=10**9)),
    Folder("2^63 positions", fields(CONFIG, max_position_embeddings=2**63)),
    Folder("10^30 hidden", fields(CONFIG, hidden_size=10**30)),
    Folder("a vocabulary of 10^12", fields(CONFIG, vocab_size=10**12)),
    Folder("minus one head", fields(CONFIG, num_attention_heads=-1)),
    Folder("config a pipe", special(CONFIG, os.mkfifo)),
    Folder("config a link to /dev/zero", special(CONFIG, lambda path: path.symlink_to("/dev/zero"))),
    Folder("template a pipe", special("chat_template.jinja", os.mkfifo)),
    Folder("weights a pipe", special("model.safetensors", os.mkfifo)),
    Folder("weights elsewhere", index('{"weight_map": {"x": "../x.safetensors"}}')),
    Folder("temperature -5", fields(GENERATION, temperature=-5)),
    Folder("temperature inf", raw_field(GENERATION, "temperature", "Infinity")),
    Folder("temperature NaN", raw_field(GENERATION, "temperature", "NaN")),
    Folder("top_p 0", fields(GENERATION, top_p=0)),
    Folder("repetition_penalty 0", fields(GENERATION, repetition_penalty=0)),
    Folder("top_k 1e999", raw_field(GENERATION, "top_k", "1e999")),
    Folder("a tokenizer that explodes", exploding_tokenizer, must_refuse=False),
    *(
        Folder(f"lora_alpha {raw[:9]}", raw_field(ADAPTER, "lora_alpha", raw), adapter=True)
        for raw in ("NaN", "Infinity", "1e38", "1" + "0" * 400)
    ),
    Folder("adapter nested", text(ADAPTER, DEEP), adapter=True),
    *(Folder(f"template {t}", text("chat_template.jinja", t), must_refuse=False) for t in TEMPLATES),
)


@contextmanager
def _made(folder: Folder) -> Iterator[list[str]]:
    """The arguments of `serve` for it."""
    with tempfile.TemporaryDirectory() as name:
        source = embedded_path().parent / ADAPTERS["embedded-choreo"] if folder.adapter else embedded_path()
        path = Path(name, "model")
        shutil.copytree(source, path)
        folder.change(path)
        yield ["--adapter", str(path)] if folder.adapter else [str(path)]


def try_folder(folder: Folder, serve_args: tuple[str, ...]) -> tuple[bool, str]:
    """-> whether it was dealt with as it should be, and what happened."""
    with _made(folder) as arguments, tempfile.TemporaryFile("w+b") as log:
        command = [*PROGRAM, *DEFAULTS, *serve_args, *arguments]
        with subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT) as process:
            try:
                return _watched(folder, process, log)
            finally:
                process.kill()


def _watched(folder: Folder, process: "subprocess.Popen[bytes]", log: IO[bytes]) -> tuple[bool, str]:
    begin, most = time.monotonic(), 0.0
    while process.poll() is None:
        most = max(most, resident_mib(process.pid))
        said = _read(log)
        if found := re.search(r"curl http://127\.0\.0\.1:(\d+)/", said):
            return _served(folder, process.pid, int(found[1]))
        if most > MAX_MIB or time.monotonic() - begin > START_S:
            return False, f"neither refused nor served after {time.monotonic() - begin:.0f} s, {most:.0f} MiB"
        time.sleep(0.05)
    said = _read(log)
    clear = process.returncode in (1, 2) and "Traceback" not in said and "error" in said.lower()
    return (
        clear,
        f"exit {process.returncode}, {most:.0f} MiB, {time.monotonic() - begin:.1f} s: {' '.join(said.split())[-160:]}",
    )


def _served(folder: Folder, pid: int, port: int) -> tuple[bool, str]:
    """A conversation, and the health right after it and meanwhile."""
    if folder.must_refuse:
        return False, "it is served"
    deadline = time.monotonic() + START_S
    while get(port, "/ready")[0] != 200 and time.monotonic() < deadline:
        time.sleep(0.05)
    status, seconds, health, most = asyncio.run(_talk(pid, port))
    result = f"answered {status} after {seconds:.1f} s, /health {health:.2f} s, {most:.0f} MiB"
    return status in (200, 400) and health <= HEALTH_S and most <= MAX_MIB, result


async def _talk(pid: int, port: int) -> tuple[int, float, float, float]:
    begin, health, most = time.monotonic(), 0.0, 0.0
    talk = asyncio.ensure_future(exchange(port, post("/v1/chat/completions", TALK), leave_after_s=ANSWER_S))
    while not talk.done():
        asked = time.monotonic()
        await asyncio.to_thread(get, port, "/health", timeout_s=ANSWER_S)
        health, most = max(health, time.monotonic() - asked), max(most, resident_mib(pid))
        await asyncio.sleep(0.05)
    return (await talk).status, time.monotonic() - begin, health, most


def _read(log: IO[bytes]) -> str:
    return os.pread(log.fileno(), 1 << 20, 0).decode(errors="replace")


def folders(report: Report, options: Options, tried: tuple[Folder, ...] = FOLDERS) -> None:
    for folder in tried:
        kept, result = try_folder(folder, options.serve_args)
        print(f"{folder.name}: {result}", file=sys.stderr, flush=True)
        report.holds(
            folder.name, kept, result, "refused in one line" if folder.must_refuse else "refused, or answered soon"
        )


def main() -> int:
    options, report = parse(__doc__, Options()), Report("folders")
    folders(report, options)
    return told(report)


if __name__ == "__main__":
    sys.exit(main())
