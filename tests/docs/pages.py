"""The user's documentation, and what it shows in fences: commands, Python, everything else."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- check: (\w+) -->\s*$")
FILE = re.compile(r"<!-- file: ([\w.-]+) -->\n```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CHECKS = ("run", "parse")
SHELLS = ("bash", "sh", "shell", "console")
PROGRAMS = ("hybrid-cache", "make", "python", "pip", "curl", "docker", "git", "export", ".venv/bin/hybrid-cache")


@dataclass(frozen=True)
class Block:
    """One fence of a page."""

    page: Path
    line: int
    language: str  # bash, python or something else
    check: str  # run, or parse where the comment `<!-- check: parse -->` stands before it
    text: str

    @cached_property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def at(self, port: int) -> str:
        """For a server on another port than the default one."""
        return re.sub(r"\b(127\.0\.0\.1|localhost):8000\b", rf"\1:{port}", self.text)


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in FENCE.finditer(text):
        before = text[: found.start()]
        mark = MARK.search(before)
        body = "".join(line.removeprefix(found[1]) for line in found[3].splitlines(keepends=True))
        check = mark[1] if mark else "run"
        assert check in CHECKS, f"{page}: check: {check}, must be one of {CHECKS}"
        yield Block(page, before.count("\n") + 1, language_of(found[2], body), check, body)


def write_files(page: Path, folder: Path) -> None:
    """Those that commands of a page read: fences behind the comment `<!-- file: NAME -->`."""
    for name, text in FILE.findall(page.read_text()):
        (folder / name).write_text(text)


def mentions_in(page: Path) -> set[str]:
    """Commands of ours in running text, in tables and in code that is only indented."""
    text = FENCE.sub("", page.read_text())
    spans = re.findall(r"`((?:hybrid-cache|make) [^`\n]+)`", text)
    indented = re.findall(r"^ {4}((?:hybrid-cache|make) .+)$", text, flags=re.MULTILINE)
    return {*spans, *indented}


def language_of(label: str, body: str) -> str:
    """A fence without a label that begins with a program holds commands."""
    if label in SHELLS or (not label and body.split(maxsplit=1)[:1] and body.split()[0] in PROGRAMS):
        return "bash"
    return label or "text"


def all_blocks(language: str, check: str) -> list[Block]:
    return [b for page in PAGES for b in blocks_of(page) if (b.language, b.check) == (language, check)]
