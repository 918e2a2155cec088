"""Options from the environment and from files: what they set, what comes first, what is refused."""

import re
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hybrid_cache.api.cli import main as cli
from hybrid_cache.api.cli.config_file import read
from hybrid_cache.api.cli.configured import Parameter, spellings, variable_of
from hybrid_cache.api.server.process import ServeOptions
from hybrid_cache.errors import ConfigError

KEY = "HYBRID_CACHE_API_KEY"


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[ServeOptions]:
    """What servers are started with."""
    found: list[ServeOptions] = []
    monkeypatch.setattr("hybrid_cache.api.server.process.serve", found.append)
    monkeypatch.setattr("hybrid_cache.api.cli.early.check_port", lambda host, port: None)
    return found


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(each) for each in args])
    return int(caught.value.code or 0)


def shown(*args: object) -> list[str]:
    """The lines of --show-config."""
    done = CliRunner().invoke(cli.app, ["serve", "--show-config", *map(str, args)])
    assert done.exit_code == 0, done.exception
    return done.output.splitlines()


def file(folder: Path, text: str, name: str = "options.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("o.yaml", "max-running: 5\nserved_model_name: [a, '1.10']\nfast: yes\nbudget: 64MiB\napi-key: 007\n"),
        (
            "o.toml",
            'max_running = 5\nserved-model-name = ["a", "1.10"]\nfast = true\nbudget = "64MiB"\napi-key = "007"\n',
        ),
    ],
)
def test_a_file_sets_options(name: str, text: str, told: list[ServeOptions], tmp_path: Path) -> None:
    assert run("serve", "--config", file(tmp_path, text, name)) == 0
    (options,) = told
    assert options.engine.max_running == 5
    assert options.served_names == ("a", "1.10")
    assert options.load.fast is True
    assert options.budget_bytes == 64 << 20
    assert options.api_keys == ("007",)  # as it is written, no octal number


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(
    told: list[ServeOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path, "max-running: 2\nmax-waiting: 2\nmax-tiles: 2\nprefix-cache: false\nmodel: recall\n")
    for name in ("RUNNING", "WAITING"):
        monkeypatch.setenv(f"HYBRID_CACHE_MAX_{name}", "3")
    monkeypatch.setenv("HYBRID_CACHE_PREFIX_CACHE", "1")
    monkeypatch.setenv("HYBRID_CACHE_CONFIG", str(path))
    assert run("serve", "--max-running", "4") == 0
    engine = told[0].engine
    assert (engine.max_running, engine.max_waiting, engine.max_tiles) == (4, 3, 2)
    assert engine.prefix_cache is True
    assert told[0].load.model == "recall"


@pytest.mark.parametrize(("text", "names"), [("a,b c", ("a", "b c")), ("a,b\nc\n", ("a,b", "c")), (" ", ())])
def test_lists_in_the_environment_have_commas_or_lines(
    text: str, names: tuple[str, ...], told: list[ServeOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_CACHE_SERVED_MODEL_NAME", text)
    assert run("serve") == 0
    assert told[0].served_names == names


@pytest.mark.parametrize(("text", "fast"), [("1", True), ("true", True), ("0", False), ("False", False)])
def test_a_switch_in_the_environment(
    text: str, fast: bool, told: list[ServeOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_CACHE_FAST", text)
    assert run("serve") == 0
    assert told[0].load.fast is fast


def test_both_names_of_a_switch_may_stand_in_a_file(told: list[ServeOptions], tmp_path: Path) -> None:
    assert run("serve", "--config", file(tmp_path, "no-prefix-cache: true\nexact: no\n")) == 0
    assert told[0].engine.prefix_cache is False
    assert told[0].load.fast is True


def test_chat_reads_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("hybrid_cache.api.cli.terminal.ServerPartner", lambda url, *_: asked.append(url))
    monkeypatch.setattr("hybrid_cache.api.cli.terminal.run", lambda *_: 0)
    monkeypatch.setenv("HYBRID_CACHE_URL", "http://there")
    assert run("chat") == 0
    assert asked == ["http://there"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("o.yaml", "max_runing: 3", "o.yaml: there is no option 'max-runing'; the nearest is max-running"),
        ("o.toml", "qqq = 3", "o.toml: there is no option 'qqq'; `hybrid-cache serve --help` shows all"),
        ("o.yaml", "port: lots", "o.yaml: port is 'lots': "),
        ("o.yaml", "port: 70000", "o.yaml: port is '70000': "),
        ("o.yaml", "port: [1, 2]", "o.yaml: port is a list, wanted one value"),
        ("o.yaml", "port:", "o.yaml: port has no value"),
        ("o.yaml", "fast: perhaps", "o.yaml: fast is 'perhaps': "),
        ("o.toml", "port = true", "o.toml: port is true, wanted a value"),
        ("o.yaml", "max-running: 1\nmax_running: 2", "o.yaml: max-running is there twice"),
        ("o.yaml", "serve:\n  port: 1", "o.yaml: serve is a section"),
        ("o.toml", "[serve]\nport = 1", "o.toml: serve is a section"),
        ("o.toml", "port = 1979-05-27", "o.toml: port is datetime.date(1979, 5, 27), wanted"),
        ("o.yaml", "- port", "o.yaml: wanted lines of `option: value`"),
        ("o.yaml", "port: [", "o.yaml: this is no YAML"),
        ("o.toml", "port", "o.toml: this is no TOML"),
        ("o.json", "{}", "o.json: the name of a config file ends in .yaml, .yml or .toml"),
        ("o.yaml", "config: other.yaml", "o.yaml: there is no option 'config'"),
        ("o.yaml", "show-config: true", "o.yaml: there is no option 'show-config'"),
        ("o.yaml", "exact: perhaps", "o.yaml: exact is 'perhaps', wanted true or false"),
        ("o.yaml", "fast: true\nexact: true", "o.yaml: exact sets fast, which is set already"),
        ("o.yaml", "port: Null", "o.yaml: port has no value"),
        ("o.yaml", "host: !secret x", "o.yaml: the tag '!secret' means nothing here"),
        ("o.yaml", "port: !!python/object/apply:os.system ['true']", "o.yaml: port is a list, wanted one value"),
        ("o.yaml", "[a, b]: 1", "o.yaml: a list or a section stands where the name of an option is wanted"),
        ("o.yaml", "served-model-name: &a [*a]", "o.yaml: served-model-name is [], wanted a text"),
        ("o.yaml", "max-step-ms: 1e999", "max-step-ms is inf, must be a finite number"),
        ("o.yaml", "port:\t1", "o.yaml: this is no YAML: found character '\\t' that cannot start any token in line 1"),
    ],
)
def test_what_a_file_cannot_set_is_said_in_one_line(
    name: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", "--config", file(tmp_path, text, name)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["api-key: secret: x", "api-key: [secret", "api-key: {secret: x}", "api-keys: secret"])
@pytest.mark.parametrize("name", ["o.yaml", "o.toml"])
def test_an_error_quotes_no_key(name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = text.replace(": ", " = ", 1) if name == "o.toml" else text
    assert run("serve", "--config", file(tmp_path, text, name)) == 2
    assert "secret" not in capsys.readouterr().err


def test_aliases_within_a_file_that_would_fill_the_memory_are_not_followed(tmp_path: Path) -> None:
    lines = ["a: &a0 [x, x]", *(f"k{n}: &a{n + 1} [*a{n}, *a{n}]" for n in range(60))]
    with pytest.raises(ConfigError, match="wanted a text"):
        read(file(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize("what", ["folder", "binary", "large"])
def test_a_file_that_cannot_be_read(what: str, tmp_path: Path) -> None:
    path = tmp_path / "o.yaml"
    if what == "folder":
        path.mkdir()
    else:
        path.write_bytes(bytes(range(256)) if what == "binary" else b" " * (2 << 20))
    with pytest.raises(ConfigError, match=f"^{path} (is not a regular file|cannot be read|has 2097152 bytes)"):
        read(path)


def values_of(parameter: Parameter, place: str) -> str:
    """A value that says where it is from, where the type lets it."""
    number = {"command": "1001", "environment": "1002", "file": "1003"}[place]
    if getattr(parameter, "is_flag", False):
        return {"command": "true", "environment": "false", "file": "true"}[place]
    return number


@pytest.mark.parametrize("places", [("file",), ("file", "environment"), ("file", "environment", "command")])
def test_the_last_place_that_says_something_counts_for_every_option(
    places: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    parameters = [each for each in serve.configurable() if each.name != "api_key"]  # keys add up
    lines = [f"{spellings(each)[0]}: {values_of(each, 'file')}" for each in parameters]
    args = ["--config", str(file(tmp_path, "\n".join(lines)))]
    for each in parameters:
        if "environment" in places:
            monkeypatch.setenv(variable_of(each), values_of(each, "environment"))
        if "command" in places:
            name = [] if each.name == "model" else [f"--{spellings(each)[0]}"]
            args += name if getattr(each, "is_flag", False) else [*name, values_of(each, "command")]
    found = {
        line.split(":")[0]: line.split(": ")[1].split("  # ")[0].strip("[]") for line in shown(*args) if line[0] != "#"
    }
    for each in parameters:
        value = values_of(each, places[-1])
        assert (
            float(found[spellings(each)[0]]) == float(value) if value.isdigit() else found[spellings(each)[0]] == value
        )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/none\.yaml is not there"):
        read(tmp_path / "none.yaml")


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert read(file(tmp_path, "# nothing\n")) == {}


def test_a_bad_variable_is_named_with_its_value(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_CACHE_MAX_RUNNING", "many")
    assert run("serve") == 2
    assert capsys.readouterr().err.startswith("error: HYBRID_CACHE_MAX_RUNNING is 'many': ")
    assert run("serve", "--help") == 0


def test_a_misspelt_variable_is_warned_of(
    told: list[ServeOptions], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_CACHE_MAX_RUNING", "3")
    monkeypatch.setenv("HYBRID_CACHE_SOMETHING", "3")
    assert run("serve") == 0
    warning = "WARNING: HYBRID_CACHE_MAX_RUNING is not used: did you mean HYBRID_CACHE_MAX_RUNNING?\n"
    assert capsys.readouterr().err == warning


def test_the_variables_that_kubernetes_sets_for_a_service_of_our_name_are_not_ours(
    told: list[ServeOptions], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_CACHE_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("HYBRID_CACHE_SERVICE_PORT", "8000")
    monkeypatch.setenv("HYBRID_CACHE_PORT_8000_TCP_ADDR", "10.0.0.1")
    assert run("serve") == 0
    assert told[0].port == 8000
    assert capsys.readouterr().err == ""


def test_what_holds_is_shown_with_its_origin_and_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file(tmp_path, "max-tiles: 2\napi-key: [secret-of-file]\n")
    monkeypatch.setenv("HYBRID_CACHE_POLICY", "lru")
    monkeypatch.setenv(KEY, "secret-of-environment")
    lines = shown("--config", path, "--port", "7")
    assert "port: 7  # command line" in lines
    assert "policy: lru  # HYBRID_CACHE_POLICY" in lines
    assert f"max-tiles: 2  # {path}: max-tiles" in lines
    assert "host: 127.0.0.1  # default" in lines
    assert f"# api-key: ***  # {path}: api-key, and {KEY}" in lines
    assert "secret" not in "\n".join(lines)


def test_what_is_shown_can_be_read_as_a_file(told: list[ServeOptions], tmp_path: Path) -> None:
    args = ["--served-model-name", "a: b", "--served-model-name", "true", "--tls-cert", "no: such", "--fast"]
    lines = shown("some/model", *args, "--budget", "64MiB", "--max-step-ms", "0")
    again = shown("--config", file(tmp_path, "\n".join(lines)))
    assert [line.split("  # ")[0] for line in lines] == [line.split("  # ")[0] for line in again]


def test_help_names_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    output = CliRunner().invoke(cli.app, ["serve", "--help"]).output
    for name in ("CONFIG", "MODEL", "PORT", "MAX_RUNNING", "API_KEY", "BACKEND", "PREFIX_CACHE", "FAST"):
        assert re.search(rf"\[HYBRID_CACHE_{name}[];]", output), name
