"""`hybrid-cache demo` shows what the cache saves, and says so if it ever changes an answer."""

import re

import pytest

from hybrid_cache.api.cli import demo
from hybrid_cache.api.cli.main import main
from hybrid_cache.api.llm import LLM


def test_each_request_has_a_line_and_a_bar_of_its_cached_part(capsys: pytest.CaptureFixture[str]) -> None:
    demo.run(None, "auto", as_json=False)
    printed = capsys.readouterr().out
    rows = re.findall(r"^(.{17}) (█*)(░*) +(\d+) \+ +(\d+) +[\d.]+ +[\d.]+$", printed, flags=re.MULTILINE)
    assert [what.strip() for what, *_ in rows] == [
        *("first message", "next message", "next message", "message 2 edited", "the same again")
    ]
    for _, full, empty, cached, computed in rows:
        assert len(full + empty) == demo.BAR
        assert len(full) == round(demo.BAR * int(cached) / (int(cached) + int(computed)))
    assert [int(row[3]) > 0 for row in rows] == [False, True, True, True, True]
    assert int(rows[-1][4]) == 0
    assert "The same tokens in every answer" in printed


def test_an_answer_that_the_cache_changes_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = demo._answer

    def shorter_with_cache(llm: LLM, messages: list[dict[str, str]], *, use_cache: bool) -> object:
        return llm.chat(messages, max_tokens=1) if use_cache else ask(llm, messages, use_cache=False)

    monkeypatch.setattr(demo, "_answer", shorter_with_cache)
    with pytest.raises(SystemExit) as left:
        main(["demo"])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert "answers with the cache and without it differ" in printed.err
    assert "The same tokens in every answer" not in printed.out
