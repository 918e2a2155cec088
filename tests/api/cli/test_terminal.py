"""Chat: what is typed, what is said, what is remembered."""

import asyncio
import io
import os
import signal
from collections.abc import AsyncGenerator, Iterator, Sequence

import pytest
from rich.console import Console

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli.terminal import Asked, Chat, ServerFailed, ServerPartner, Turn, Usage, run
from hybrid_cache.errors import HybridCacheError


class Parrot:
    """Repeats how many messages it was given and the last of them."""

    name = "parrot"

    def __init__(self) -> None:
        self.asked: list[list[Turn]] = []
        self.stopped = False
        self.closed = False

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True

    async def reply(self, turns: Sequence[Turn]) -> AsyncGenerator[str | Usage, None]:
        self.asked.append(list(turns))
        match turns[-1].content:
            case "fail":
                raise HybridCacheError("too long")
            case "break":
                yield "half"
                raise HybridCacheError("the line is cut")
            case "interrupt":
                yield "half"
                os.kill(os.getpid(), signal.SIGINT)
                try:
                    await asyncio.sleep(30)
                finally:
                    self.stopped = True
            case "colour":
                yield "\x1b[31mred\x07 [bold]plain[/bold]\u009b é\n"
        yield f"{len(turns)} {turns[-1].content}"
        yield " ..."
        yield Usage(prompt_tokens=100, cached_tokens=64, completion_tokens=5)


def plain_console(file: io.StringIO) -> Console:
    return Console(file=file, width=200, highlight=False, markup=False, emoji=False)


class Talk:
    """Feeds lines to a chat and keeps what it wrote."""

    def __init__(self, lines: Sequence[str], system: str | None = None) -> None:
        self.parrot = Parrot()
        answers, notes = io.StringIO(), io.StringIO()
        chat = Chat(self.parrot, system, plain_console(answers), plain_console(notes))
        with asyncio.Runner() as runner:
            self.stayed = [chat.take(line, runner) for line in lines]
        self.answers, self.notes = answers.getvalue(), notes.getvalue()


def said(*contents: str) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]


def test_the_conversation_grows() -> None:
    talk = Talk(["one\n", "two\n"])
    assert talk.answers == "1 one ...\n3 two ...\n"
    assert talk.parrot.asked[1] == said("one", "1 one ...", "two")


def test_each_turn_says_what_it_took() -> None:
    note = Talk(["one"]).notes
    assert "64 cached + 36 computed prompt tokens" in note
    assert "first token after" in note
    assert note.count("\n") == 1


def test_a_system_prompt_comes_first_and_starts_over() -> None:
    talk = Talk(["one", "/system be brief", "two", "/system", "three"], system="be kind")
    assert talk.parrot.asked[0] == [Turn("system", "be kind"), Turn("user", "one")]
    assert talk.parrot.asked[1] == [Turn("system", "be brief"), Turn("user", "two")]
    assert talk.parrot.asked[2] == [Turn("user", "three")]


def test_reset_forgets_the_conversation() -> None:
    assert Talk(["one", "/reset", "two"]).parrot.asked[1] == said("two")


def test_retry_asks_the_same_again() -> None:
    parrot = Talk(["one", "two", "/retry"]).parrot
    assert parrot.asked[2] == parrot.asked[1]


def test_retry_needs_something_to_ask_again() -> None:
    talk = Talk(["/retry"])
    assert talk.parrot.asked == []
    assert "nothing" in talk.notes


def test_exit_leaves_and_empty_lines_do_nothing() -> None:
    talk = Talk(["", "  ", "/exit"])
    assert talk.stayed == [True, True, False]
    assert talk.parrot.asked == []


def test_an_unknown_command_is_not_sent() -> None:
    talk = Talk(["/quiet"])
    assert talk.parrot.asked == []
    assert "/quiet" in talk.notes


def test_help_lists_the_commands() -> None:
    notes = Talk(["/help"]).notes
    assert all(command in notes for command in ("/reset", "/system", "/retry", "/exit"))


def test_a_failed_message_is_forgotten() -> None:
    talk = Talk(["one", "fail", "two"])
    assert "error: too long" in talk.notes
    assert talk.parrot.asked[2] == said("one", "1 one ...", "two")


def test_what_was_said_before_a_failure_stays() -> None:
    talk = Talk(["break", "two"])
    assert "the line is cut" in talk.notes
    assert talk.parrot.asked[1] == said("break", "half", "two")


@pytest.fixture
def _ctrl_c_arrives() -> Iterator[None]:
    """A shell starts what it runs in the background with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_arrives")
def test_ctrl_c_stops_the_answer_and_the_work_but_not_the_chat() -> None:
    talk = Talk(["interrupt", "two"])
    assert talk.parrot.stopped
    assert "stopped" in talk.notes
    assert talk.parrot.asked[1] == said("interrupt", "half", "two")


def test_an_answer_cannot_command_the_terminal() -> None:
    assert Talk(["colour"]).answers.startswith("[31mred [bold]plain[/bold] é\n1 colour")


def test_a_pipe_gets_answers_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/exit\ntwo\n"))
    parrot = Parrot()
    assert run(parrot, None) == 0
    assert capsys.readouterr().out == "1 one ...\n"
    assert parrot.closed


@pytest.mark.parametrize("key", [EOFError, KeyboardInterrupt])
def test_ctrl_c_and_ctrl_d_leave_the_prompt(key: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    lines = iter(["one"])

    def typed(prompt: str) -> str:
        for line in lines:
            return line
        raise key

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    parrot = Parrot()
    assert run(parrot, None) == 0
    assert parrot.asked == [said("one")]
    assert parrot.closed


def test_messages_without_an_answer_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\nfail\ntwo\nbreak\n"))
    assert run(Parrot(), None) == 2


def test_a_pipe_with_an_unanswered_message_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 40_000 + "\nHello\n"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["chat", "--max-tokens", "2"])
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert "error: prompt is too long: the messages are" in captured.err
    assert len(captured.out.splitlines()) == 2


def test_the_embedded_model_answers_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello, how are you?\n/retry\n"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["chat", "--temperature", "0", "--max-tokens", "8"])
    captured = capsys.readouterr()
    assert not caught.value.code
    first, again = captured.out.splitlines()
    assert first == again
    notes = captured.err.splitlines()
    assert notes[0].startswith("0 cached + ")
    assert " + 0 computed prompt tokens" in notes[1]


@pytest.mark.parametrize(("options", "cached"), [([], 64), (["--system", ""], 0)])
def test_the_second_turn_with_the_embedded_model_shows_cached_tokens(
    options: list[str], cached: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a system prompt of its own, which may be left out."""
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\nWho are you?\n"))
    with pytest.raises(SystemExit):
        cli.main(["chat", "--temperature", "0", "--max-tokens", "8", *options])
    assert capsys.readouterr().err.splitlines()[1].startswith(f"{cached} cached + ")


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "file:///etc", "http://", "http://[::1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ServerFailed):
        ServerPartner(url, None, None, Asked())
