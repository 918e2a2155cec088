"""The files of deploy/: what they name is there in a real server, and they say what the tools that read them take."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from hybrid_cache.api.cli.main import app
from hybrid_cache.cache.misses import Reason
from hybrid_cache.request import FinishReason
from tests.soak.server import Server, serve

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
EVENTS = '{"enable_kv_cache_events": true, "endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*"}'
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/hybrid-cache.json").read_text())
DOCUMENTS = sorted(path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".yml"))
UNIT = (DEPLOY / "hybrid-cache.service").read_text()
SCRAPED = {"up": {"job", "instance"}}  # what Prometheus itself says of a target
OF_TARGET = {"job", "instance"}
LINKED = ("api", "bench", "kernels", "models")
FORCED_END_S = 5  # a server ends that long after --drain-timeout, whatever hangs in it


def documents(path: Path) -> list[Any]:
    return [*yaml.safe_load_all(path.read_text())]


def compose() -> dict[str, Any]:
    return documents(DEPLOY / "compose.yaml")[0]


def kubernetes() -> dict[str, Any]:
    return {document["kind"]: document for document in documents(DEPLOY / "kubernetes.yaml")}


def container() -> dict[str, Any]:
    return kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def entry_point() -> list[str]:
    text = (DEPLOY / "Dockerfile").read_text()
    return json.loads(
        next(line for line in text.splitlines() if line.startswith("ENTRYPOINT ")).removeprefix("ENTRYPOINT ")
    )


def unit_command() -> list[str]:
    text = UNIT.replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    return [word for word in shlex.split(line.removeprefix("ExecStart=")) if not word.startswith("$")]


def defaults(text: str) -> str:
    """Compose's ${NAME:-default} without variables."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


COMMANDS = {
    "Dockerfile": entry_point(),
    "compose.yaml": [*entry_point(), *map(defaults, compose()["services"]["server"]["command"])],
    "kubernetes.yaml": [*entry_point(), *container()["args"]],
    "hybrid-cache.service": unit_command(),
}


def options_of(command: list[str]) -> dict[str, Any]:
    """What `serve` understands of a command line, by name of the parameter."""
    parser = typer.main.get_command(app)
    return parser.commands["serve"].make_context("serve", command[command.index("serve") + 1 :]).params


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_is_one_that_serve_takes(name: str) -> None:
    command = COMMANDS[name]
    assert Path(command[0]).name == "hybrid-cache"
    assert options_of(command)["port"] == 8000


def test_they_wait_longer_than_a_server_takes_to_end() -> None:
    def end_s(name: str) -> float:
        return options_of(COMMANDS[name])["drain_timeout"] + FORCED_END_S

    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    sleep_s = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= sleep_s + end_s("kubernetes.yaml")
    assert int(compose()["services"]["server"]["stop_grace_period"].removesuffix("s")) > end_s("compose.yaml")
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[1]) > end_s("hybrid-cache.service")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_yaml_is_read(path: Path) -> None:
    assert all(documents(path))


@pytest.mark.parametrize("service", ["server", "prometheus", "grafana"])
def test_what_compose_mounts_from_here_is_here(service: str) -> None:
    volumes = [defaults(each).split(":")[0] for each in compose()["services"][service]["volumes"]]
    here = [each for each in volumes if each.startswith(".")]
    assert here
    assert all((DEPLOY / each).is_dir() for each in here)
    assert {each for each in volumes if not each.startswith(".")} <= set(compose()["volumes"])


def test_services_find_each_other() -> None:
    services = compose()["services"]
    source = documents(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"][0]
    provider = documents(DEPLOY / "grafana/provisioning/dashboards/hybrid-cache.yaml")[0]["providers"][0]
    scrape = documents(DEPLOY / "prometheus/prometheus.yml")[0]
    assert httpx.URL(source["url"]).host in services
    assert scrape["scrape_configs"][0]["static_configs"][0]["targets"] == ["server:8000"]
    assert "server" in services
    assert scrape["rule_files"] == ["alerts.yml"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


# Expressions.


def rules() -> list[dict[str, Any]]:
    return documents(DEPLOY / "prometheus/alerts.yml")[0]["groups"][0]["rules"]


def expressions() -> dict[str, str]:
    """By where they stand; a dashboard's variables have values."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in rules()}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            text = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            found[f"{panel['title']}, {target['refId']}"] = text
    return found


def nodes(expression: Any) -> Iterator[Any]:
    """An expression and all within it."""
    yield expression
    below = [getattr(expression, name, None) for name in ("lhs", "rhs", "expr", "vector_selector")]
    for each in [*below, *getattr(expression, "args", [])]:
        if each is not None:
            yield from nodes(each)


def grouped_by(expression: Any) -> list[str]:
    modifier = getattr(expression, "modifier", None)
    return modifier.labels if isinstance(modifier, promql_parser.AggModifier) else []


def wrong_names(expression: Any, metrics: dict[str, dict[str, set[str]]]) -> list[str]:
    """What an expression names and a server does not have.

    metrics: the values of each label of each metric
    """
    wrong = []
    for node in nodes(expression):
        if isinstance(node, promql_parser.VectorSelector):
            labels = metrics.get(node.name)
            wrong += [node.name] if labels is None else []
            for matcher in node.matchers.matchers if labels is not None else []:
                values = matcher.value.split("|") if matcher.name not in OF_TARGET else []
                known = labels.get(matcher.name, set())
                wrong += [f"{node.name}{{{matcher.name}={value}}}" for value in values if value not in known]
        for label in grouped_by(node):
            inside = [each.name for each in nodes(node.expr) if isinstance(each, promql_parser.VectorSelector)]
            wrong += [f"{name} by {label}" for name in inside if label not in {*metrics.get(name, {}), *OF_TARGET}]
    return wrong


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It has answered so many questions that some had to leave, and each a second time; its policy declines ends of
    prompts. It has a disk, and publishes events.
    """
    disk = ["--disk", str(tmp_path_factory.mktemp("disk")), "--disk-budget", "1GiB"]
    with serve(["--budget", "4MiB", "--policy", "gdsf", *disk, "--kv-events-config", EVENTS], keys=()) as started:
        for question in range(16):
            content = f"Question {question // 2}. " + "My name is Ann. " * 80
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
            reply = httpx.post(f"http://127.0.0.1:{started.port}/v1/chat/completions", json=body, timeout=60)
            assert reply.status_code == 200
        yield started


@pytest.fixture(scope="module")
def metrics(server: Server) -> dict[str, dict[str, set[str]]]:
    """What a server says of itself: the values of each label of each metric, and those that come later."""
    text = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
    found: dict[str, dict[str, set[str]]] = {
        name: {label: set() for label in labels} for name, labels in SCRAPED.items()
    }
    for family in text_string_to_metric_families(text):
        if family.type == "counter" and not family.samples:  # by kind, and nothing of any kind has happened yet
            found[f"{family.name}_total"] = {"kind": set()}
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    found["hybrid_cache_missed_tokens_total"]["kind"] |= {reason.value for reason in Reason}
    found["hybrid_cache_choices_finished_total"]["finished_reason"] |= {reason.value for reason in FinishReason}
    return found


@pytest.mark.parametrize("place", expressions())
def test_an_expression_names_what_a_server_has(place: str, metrics: dict[str, dict[str, set[str]]]) -> None:
    assert not wrong_names(promql_parser.parse(expressions()[place]), metrics)


@pytest.mark.parametrize(
    "text", ["hybrid_cache_nothing", 'up{kind="x"}', "sum by (kind) (up)", 'hybrid_cache_cache_bytes{kind="stone"}']
)
def test_a_name_that_is_wrong_is_found(text: str, metrics: dict[str, dict[str, set[str]]]) -> None:
    assert wrong_names(promql_parser.parse(text), metrics)


def test_panels_do_not_overlap_and_ask_a_known_source() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & own
        cells |= own
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {"${source}"}
    assert "source" in {variable["name"] for variable in DASHBOARD["templating"]["list"]}


# Probes.


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_kubernetes_probes_are_answered(server: Server, probe: str) -> None:
    get = container()[probe]["httpGet"]
    assert get["port"] in {port["name"] for port in container()["ports"]}
    assert httpx.get(f"http://127.0.0.1:{server.port}{get['path']}").status_code == 200


def health_check() -> list[str]:
    text = (DEPLOY / "Dockerfile").read_text()
    return json.loads(re.search(r"^HEALTHCHECK .*\\\n +CMD (\[.*\])$", text, re.MULTILINE)[1])


@pytest.mark.parametrize(("path", "status"), [("/health", 0), ("/nowhere", 1)])
def test_the_health_check_of_the_image_tells_a_server_from_none(server: Server, path: str, status: int) -> None:
    python, *arguments = health_check()
    arguments[-1] = arguments[-1].replace(":8000/health", f":{server.port}{path}")
    assert f"127.0.0.1:{server.port}{path}" in arguments[-1]
    assert python == "python"
    assert subprocess.run([sys.executable, *arguments], capture_output=True, timeout=60).returncode == status


# Tools that read the files.


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    program = shutil.which("hadolint", path=sysconfig.get_path("scripts"))
    if program is None:
        pytest.skip("hadolint is installed on x86_64 Linux only")
    done = subprocess.run([program, DEPLOY / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_made_from_all_that_it_needs(tmp_path: Path) -> None:
    """A wheel of what .dockerignore lets through has what the tree has."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    for name in (line[1:] for line in lines if line.startswith("!")):
        copy = shutil.copytree if (ROOT / name).is_dir() and not (ROOT / name).is_symlink() else shutil.copy2
        options = {"symlinks": True, "ignore": shutil.ignore_patterns("__pycache__")} if copy is shutil.copytree else {}
        copy(ROOT / name, tmp_path / name, **options)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", tmp_path]
    subprocess.run(command, capture_output=True, check=True, timeout=300)
    (wheel,) = (tmp_path / "dist").glob("hybrid_cache-*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "made"], check=True, timeout=60)
    made = {str(path.relative_to(tmp_path / "made")) for path in (tmp_path / "made").rglob("*.py")}
    tree = [path for name in ("hybrid_cache", *LINKED) for path in (ROOT / name).rglob("*.py")]
    wanted = {str(path.relative_to(ROOT)).removeprefix("hybrid_cache/") for path in tree}
    assert wanted <= {name.removeprefix("hybrid_cache/") for name in made}
    assert (tmp_path / "made/hybrid_cache/models/embedded/model.safetensors").is_file()


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """With a program that is there: systemd looks for it."""
    path = tmp_path / "hybrid-cache.service"
    path.write_text(UNIT.replace("ExecStart=/opt/hybrid-cache/bin/hybrid-cache ", f"ExecStart={sys.executable} "))
    return path


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
@pytest.mark.parametrize("arguments", [["verify"], ["security", "--offline=yes", "--threshold=25"]], ids=lambda a: a[0])
def test_systemd_takes_the_unit(unit: Path, arguments: list[str]) -> None:
    """security: exposure from 0 to 100, as in `systemd-analyze security`"""
    done = subprocess.run(["systemd-analyze", *arguments, unit], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert arguments[0] == "security" or not done.stderr
