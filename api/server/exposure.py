"""How far a server is open: the names it answers to, web pages, certificates, proxies, and patience with clients."""

import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_cache.api.server.protocol import Patience
from hybrid_cache.errors import ConfigError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

_NAME = re.compile(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", re.ASCII)
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s]+")


@dataclass(frozen=True, slots=True)
class Exposure:
    """Checked when made, the files of a certificate too."""

    allow_hosts: tuple[str, ...] = ()  # beside the loopback names and the host that is listened on
    allow_origins: tuple[str, ...] = ()  # as in ServerSettings
    tls_cert: Path | None = None
    tls_key: Path | None = None
    trusted_proxies: str | None = None  # addresses and networks whose X-Forwarded headers count, or "*"
    max_connections: int | None = None  # None: as many as there is room for, up to a bound
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        for name in self.allow_hosts:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"allow_host is {name!r}, must be a name without a port; IPv6 addresses in brackets")
        for origin in self.allow_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"allow_origin is {origin!r}, must be '*' or like 'https://chat.example', no path")
        if self.trusted_proxies is not None:
            _check_proxies(self.trusted_proxies)
        _check_certificate(self.tls_cert, self.tls_key)

    @property
    def scheme(self) -> str:
        return "http" if self.tls_cert is None else "https"

    def hosts(self, host: str, bound: socket.socket) -> tuple[str, ...]:
        """What the Host header may name, where `host` is listened on; empty if anything."""
        if not self.allow_hosts and not is_loopback(bound):
            return ()
        return (*LOOPBACK_NAMES, f"[{host}]" if ":" in host else host, *self.allow_hosts)

    def uvicorn_options(self) -> dict[str, object]:
        return {
            "ssl_certfile": self.tls_cert,
            "ssl_keyfile": self.tls_key,
            "proxy_headers": self.trusted_proxies is not None,
            "forwarded_allow_ips": self.trusted_proxies or "",
        }


def check_keys(keys: Sequence[str], operator_keys: Sequence[str], origins: Sequence[str]) -> None:
    """Raises ConfigError where a server without API keys would be open to more than whoever started it means."""
    if operator_keys and not keys:
        raise ConfigError("there is an operator's key and no other API key: then anybody could use this server")
    if "*" in origins and not keys:
        raise ConfigError("allow_origin is '*' without an API key: any web page could use this server")


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def _check_proxies(addresses: str) -> None:
    for address in addresses.split(","):
        try:
            if address.strip() != "*":
                ipaddress.ip_network(address.strip())
        except ValueError:
            raise ConfigError(f"{address.strip()!r} is no address or network of a proxy, nor '*'") from None


def _check_certificate(cert: Path | None, key: Path | None) -> None:
    """Raises ConfigError when there is only one, or when they cannot be used."""
    if cert is None and key is None:
        return
    if cert is None or key is None:
        raise ConfigError(f"tls_cert is {cert} and tls_key is {key}, must be given together")
    for path in (cert, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: b"")
    except ssl.SSLError as error:
        reason = error.reason or "no PEM"
        raise ConfigError(f"{cert} and {key} are no certificate and its key without a password: {reason}") from error
