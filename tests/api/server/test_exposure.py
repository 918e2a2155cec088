"""Who may reach a server: names in the Host header, web pages of other origins, TLS, proxies."""

import asyncio
import socket
import ssl
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from hybrid_cache.api.server.addresses import bind
from hybrid_cache.api.server.exposure import LOOPBACK_NAMES, Exposure, is_loopback
from hybrid_cache.api.server.process import url_of
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.errors import ConfigError
from tests.api.servers import in_process, new_app, new_engine, over_the_wire

ASKED = {"prompt": "x", "max_tokens": 1}
PAGE = "https://chat.example"


def run(test: Callable[[], Coroutine[object, object, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


GOOD_HOSTS = ("localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:65535", "My.Example:8000")
BAD_HOSTS = (
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "localhost@evil.example",
    "127.0.0.1.nip.io",
    "localhost:",
    "localhost:80:80",
    "localhost:http",
    "::1",
    "[::2]",
    "0.0.0.0",
    "",
)


def test_only_names_of_this_server_are_answered(sum_text: TextModel) -> None:
    async def test() -> None:
        app = new_app(new_engine(), sum_text, allowed_hosts=(*LOOPBACK_NAMES, "my.example"), api_keys=("key",))
        async with in_process(app) as client:
            for host in GOOD_HOSTS:
                assert (await client.get("/health", headers={"Host": host})).status_code == 200, host
            for host in BAD_HOSTS:
                for path in ("/health", "/metrics", "/v1/models", "/nowhere"):
                    reply = await client.get(path, headers={"Host": host})
                    assert reply.status_code == 421, host
                    assert reply.json()["error"]["code"] == "wrong_host"
                    assert repr(host) in reply.json()["error"]["message"]
                    assert reply.headers["x-request-id"]
            reply = await client.post("/v1/completions", content=b"x" * 100, headers={"Host": "evil.example"})
            assert reply.status_code == 421  # neither the key nor the body has been looked at

    run(test)


def test_two_hosts_or_none_are_no_way_around(sum_text: TextModel) -> None:
    with over_the_wire(new_app(new_engine(), sum_text, allowed_hosts=LOOPBACK_NAMES)) as url:
        port = int(url.rpartition(":")[2])
        for request, status in (
            (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"200"),
            (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b"400"),
            (b"GET /health HTTP/1.1\r\n\r\n", b"400"),
            (b"GET /health HTTP/1.0\r\n\r\n", b"421"),
            (b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
        ):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                client.sendall(request)
                assert client.recv(100).split()[1] == status, request


def test_nothing_redirects_to_a_host_that_the_client_names(client: httpx.Client) -> None:
    for path in ("/health/", "/v1/completions/", "/metrics/", "/cache/", "//evil.example/"):
        reply = client.get(f"{client.base_url}{path}", headers={"Host": "evil.example"})
        assert reply.request.url.raw_path == path.encode()
        assert reply.status_code == 404
        assert "location" not in reply.headers


@pytest.mark.parametrize(
    ("host", "allowed", "names"),
    [
        ("127.0.0.1", (), {*LOOPBACK_NAMES}),
        ("127.0.0.2", (), {*LOOPBACK_NAMES, "127.0.0.2"}),
        ("localhost", ("a.example",), {*LOOPBACK_NAMES, "a.example"}),
        ("0.0.0.0", (), set()),
        ("0.0.0.0", ("a.example", "[fd00::1]"), {*LOOPBACK_NAMES, "0.0.0.0", "a.example", "[fd00::1]"}),
    ],
)
def test_a_loopback_address_has_loopback_names(host: str, allowed: tuple[str, ...], names: set[str]) -> None:
    with closing(bind(host, 0)) as bound:
        assert set(Exposure(allow_hosts=allowed).hosts(host, bound)) == names
        assert is_loopback(bound) is (host != "0.0.0.0")


def test_pages_of_other_origins_may_read_nothing_by_default(client: httpx.Client) -> None:
    reply = client.post("/v1/completions", json=ASKED, headers={"Origin": PAGE})
    assert not [name for name in reply.headers if name.startswith("access-control-")]
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    reply = client.options("/v1/completions", headers=asked)
    assert reply.status_code == 405
    assert not [name for name in reply.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(("origins", "other"), [((PAGE,), False), (("*",), True)])
def test_pages_of_allowed_origins_may_ask_first_and_then_read(
    sum_text: TextModel, origins: tuple[str, ...], other: bool
) -> None:
    async def test() -> None:
        app = new_app(new_engine(), sum_text, api_keys=("key",), allowed_origins=origins)
        async with in_process(app) as client:
            for origin, allowed in ((PAGE, True), ("https://evil.example", other), ("null", other)):
                asked = {
                    "Origin": origin,
                    "Access-Control-Request-Method": "POST",
                    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
                }
                reply = await client.options("/v1/completions", headers=asked)  # browsers send no key with it
                assert (reply.status_code == 200) is allowed
                assert (reply.headers.get("access-control-allow-origin") in (origin, "*")) is allowed
                for key, status in (("key", 200), ("wrong", 401)):
                    headers = {"Origin": origin, "Authorization": f"Bearer {key}"}
                    reply = await client.post("/v1/completions", json=ASKED, headers=headers)
                    assert reply.status_code == status
                    assert (reply.headers.get("access-control-allow-origin") in (origin, "*")) is allowed
                    assert "access-control-allow-credentials" not in reply.headers

    run(test)


def test_a_page_of_an_allowed_origin_does_not_make_up_for_a_wrong_host(sum_text: TextModel) -> None:
    async def test() -> None:
        app = new_app(new_engine(), sum_text, allowed_hosts=LOOPBACK_NAMES, allowed_origins=(PAGE,))
        async with in_process(app) as client:
            asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Host": "evil.example"}
            assert (await client.options("/v1/completions", headers=asked)).status_code == 421

    run(test)


Certificate = tuple[Path, Path]


def new_certificate(folder: Path, name: str) -> Certificate:
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", str(cert), "-keyout", str(key)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return cert, key


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return new_certificate(tmp_path_factory.mktemp("tls"), "one")


@pytest.fixture(scope="module")
def secure_url(sum_text: TextModel, certificate: Certificate) -> Iterator[str]:
    cert, key = certificate
    options = Exposure(tls_cert=cert, tls_key=key).uvicorn_options()
    with over_the_wire(new_app(new_engine(), sum_text), max_connections=8, **options) as url:
        yield url


def test_with_a_certificate_it_speaks_https(secure_url: str, certificate: Certificate) -> None:
    assert secure_url.startswith("https://")
    trusting = ssl.create_default_context(cafile=certificate[0])
    with httpx.Client(verify=trusting, base_url=secure_url) as client:
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json=ASKED).status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{secure_url}/health")
    with pytest.raises(httpx.TransportError):
        httpx.get(secure_url.replace("https", "http") + "/health")


def test_connections_that_never_finish_the_handshake_make_room(secure_url: str, certificate: Certificate) -> None:
    trusting = ssl.create_default_context(cafile=certificate[0])
    address = ("127.0.0.1", int(secure_url.rpartition(":")[2]))
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(address, timeout=5))
        for _ in range(3):
            assert httpx.get(f"{secure_url}/health", verify=trusting, timeout=2).status_code == 200


def test_the_scheme_is_that_of_the_certificate(certificate: Certificate) -> None:
    cert, key = certificate
    with closing(bind("127.0.0.1", 0)) as bound:
        assert url_of(bound, Exposure().scheme).startswith("http://127.")
        assert url_of(bound, Exposure(tls_cert=cert, tls_key=key).scheme).startswith("https://127.")


def test_a_certificate_that_cannot_be_used_is_refused(certificate: Certificate, tmp_path: Path) -> None:
    cert, key = certificate
    _, other_key = new_certificate(tmp_path, "two")
    locked = tmp_path / "locked.key"
    lock = ["openssl", "ec", "-in", str(key), "-out", str(locked), "-aes256", "-passout", "pass:secret"]
    subprocess.run(lock, check=True, capture_output=True)
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("this is no certificate\n")
    for files, word in (
        ((cert, None), "tls_key is None"),
        ((None, key), "tls_cert is None"),
        ((cert, other_key), "MISMATCH"),
        ((cert, locked), "password"),
        ((nonsense, key), "nonsense"),
        ((cert, nonsense), "nonsense"),
        ((key, cert), "no certificate"),
        ((tmp_path / "missing", key), "No such file"),
        ((cert, tmp_path), "directory"),
    ):
        with pytest.raises(ConfigError, match=word):
            Exposure(tls_cert=files[0], tls_key=files[1])


@pytest.mark.parametrize(
    ("trusted", "client"), [(None, "127.0.0.1"), ("10.0.0.0/8", "127.0.0.1"), ("127.0.0.1,10.0.0.0/8", "192.0.2.7")]
)
def test_only_trusted_proxies_say_who_asks(trusted: str | None, client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def who(request: Request) -> JSONResponse:
        assert request.client is not None
        return JSONResponse([request.client.host, request.url.scheme])

    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")  # what uvicorn would take
    options = Exposure(trusted_proxies=trusted).uvicorn_options()
    with over_the_wire(Starlette(routes=[Route("/", who)]), **options) as url:
        reply = httpx.get(url, headers={"X-Forwarded-For": "192.0.2.7", "X-Forwarded-Proto": "https"}).json()
        assert reply == [client, "http" if client == "127.0.0.1" else "https"]
