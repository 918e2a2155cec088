"""What the README and the pages of docs/ show works: commands, Python, links.

A bash block is run as a script beside a real server on a port that takes the place of 8000; `hybrid-cache serve` and
`make` in it are parsed only. A Python block is run by itself. One behind `<!-- check: parse -->` is not run: what it
names of our command line, modules and Makefile is checked. A fence behind `<!-- file: NAME -->` is a file beside them.
"""

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.api.server.test_server_process import server
from tests.docs.command import Refused, check_line, check_mention, commands_in
from tests.docs.pages import PAGES, ROOT, Block, all_blocks, blocks_of, language_of, mentions_in, write_files

MOST_WORDS = 900
WIDEST = 160
LIMIT_S = 300  # for one block, on a busy machine
PRELUDE = f"""set -eu -o pipefail
hybrid-cache() {{ python -m tests.docs.command "$@"; }}
make() {{ python -c 'import sys; from tests.docs.command import check_make; check_make(sys.argv[1:])' "$@"; }}
curl() {{ command curl --fail-with-body -sS "$@"; }}
PATH={Path(sys.executable).parent}:$PATH
"""


def named(block: Block) -> str:
    return block.name


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with server() as started:
        found = urlsplit(started.url).port
        assert found is not None
        yield found


@pytest.mark.parametrize("block", all_blocks("bash", "run"), ids=named)
def test_commands_run(block: Block, port: int, tmp_path: Path) -> None:
    write_files(block.page, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        ["bash", "-c", PRELUDE + block.at(port)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert run.returncode == 0, f"{block.name}\n{run.stdout}\n{run.stderr}"


@pytest.mark.parametrize("block", all_blocks("python", "run"), ids=named)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # examples leave their clients to the end of the process
def test_python_runs(block: Block, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.at(port), block.name, "exec"), {"__name__": "__main__"})
    gc.collect()  # here, where it is no fault


@pytest.mark.parametrize("block", all_blocks("bash", "parse"), ids=named)
def test_commands_that_are_not_run_are_such_as_their_programs_take(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(block.page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in commands_in(block.text):
        check_line(words)


def test_python_that_is_not_run_is_python() -> None:
    for block in all_blocks("python", "parse"):
        compile(block.text, block.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_the_text_names_are_there(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for line in sorted(mentions_in(page)):
        check_mention(line)


@pytest.mark.parametrize(
    "line",
    [
        "hybrid-cache no-such-thing",
        "hybrid-cache bench no-such-thing",
        "hybrid-cache serve [MODEL] --no-such-option",
        "make no-such-target",
    ],
)
def test_a_command_that_is_named_and_not_there_is_seen(line: str) -> None:
    with pytest.raises(Refused):
        check_mention(line)


def test_the_first_commands_show_cached_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """What `make demo` runs, and what the README says that it prints."""
    first = next(blocks_of(ROOT / "README.md"))
    assert [words[:2] for words in commands_in(first.text)][2:3] == [["make", "demo"]]
    plan = subprocess.run(
        ["make", "-n", "--no-print-directory", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert plan.splitlines()[-1].split()[:2] == [".venv/bin/hybrid-cache", "demo"]
    rows = demo_rows()
    assert rows[0]["cached_tokens"] == 0
    assert all(row["cached_tokens"] > 400 for row in rows[1:])
    assert all(row["same"] for row in rows)
    printed = next(block.text for block in blocks_of(ROOT / "README.md") if "░" in block.text)
    counts = [(int(cached), int(computed)) for cached, computed in re.findall(r"[█░] +(\d+) \+ +(\d+)", printed)]
    assert counts == [(row["cached_tokens"], row["prompt_tokens"] - row["cached_tokens"]) for row in rows]


def demo_rows() -> list[dict[str, int]]:
    command = [sys.executable, "-m", "tests.docs.command", "demo", "--json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    rows: list[dict[str, int]] = json.loads(run.stdout)
    return rows


def test_the_request_of_the_readme_is_cached_the_second_time(port: int) -> None:
    text = (ROOT / "README.md").read_text()
    (said,) = map(int, re.findall(r"all (\d+) prompt tokens are cached", text))
    (curl,) = (block for block in all_blocks("bash", "run") if block.text.startswith("curl") and block.page == PAGES[0])
    body = next(commands_in(curl.text))[-1]
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    for _ in range(2):
        usage = httpx.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=LIMIT_S).json()[
            "usage"
        ]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] == said


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors_of(page: Path) -> set[str]:
    """As GitHub names headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> Iterator[str]:
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            yield link


@pytest.mark.parametrize(
    "page",
    [*PAGES, *(ROOT / n for n in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "bench/RESULTS.md"))],
    ids=lambda p: p.name,
)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page, page.read_text())) == []


def test_links_that_lead_nowhere_are_seen() -> None:
    page = ROOT / "docs" / "README.md"
    wrong = (
        "[a](nowhere.md) [b](serving.md#nothing) [c](serving.md#chat) [d](../README.md#start) [e](https://x.example)"
    )
    assert list(broken_links(page, wrong)) == ["nowhere.md", "serving.md#nothing"]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and f"({page.name})" not in index] == []


def test_the_readme_is_short_and_lines_are_not_long() -> None:
    assert len(PAGES[0].read_text().split()) <= MOST_WORDS
    lines = [(f"{p.name}:{n}", line) for p in PAGES for n, line in enumerate(p.read_text().splitlines(), 1)]
    long = [place for place, line in lines if len(line) > WIDEST and not line.startswith("|")]  # rows cannot be broken
    assert long == []


@pytest.mark.parametrize(
    "line",
    [
        "hybrid-cache serve --no-such-option",
        "hybrid-cache bench policy --no-such-option 1",
        "hybrid-cache no-such-command",
        "make no-such-target",
        "make serve ARGS=--no-such-option",
        "python -m hybrid_cache.bench.gpu_check --no-such-option",
        "python -m hybrid_cache.no_such_module",
    ],
)
def test_a_command_that_would_fail_is_seen(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((Refused, SystemExit)):
        check_line(next(commands_in(line)))


def test_scripts_are_read_as_a_shell_does() -> None:
    script = "a 'b; c' \\\n  d  # e\nx=1 f | g && curl -d '{\n \"h\": 1}'\n"
    assert list(commands_in(script)) == [["a", "b; c", "d"], ["x=1", "f"], ["g"], ["curl", "-d", '{\n "h": 1}']]


def test_files_that_a_page_shows_lie_beside_its_commands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text.\n\n<!-- file: server.yaml -->\n```yaml\nport: 8080\n```\n\n```yaml\nport: 1\n```\n")
    write_files(page, tmp_path)
    assert (tmp_path / "server.yaml").read_text() == "port: 8080\n"


def test_fences_without_a_label_are_commands_if_they_begin_with_a_program() -> None:
    assert language_of("", "hybrid-cache serve\n") == language_of("sh", "ls\n") == "bash"
    assert language_of("", "api  text\n") == language_of("", "\n") == "text"
