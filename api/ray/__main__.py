"""`python -m hybrid_cache.api.ray NAME=VALUE ...`: a local Ray with nothing but this application, until a signal.

Beside the application's arguments: host=127.0.0.1, port=8000, temp=DIR.
Signals drain: running requests are finished, as far as drain_timeout allows. A second one ends at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Mapping

from hybrid_cache.api.cli.main import one_line
from hybrid_cache.api.ray import MISSING, build
from hybrid_cache.api.server.exposure import LOOPBACK_NAMES
from hybrid_cache.errors import ConfigError, HybridCacheError

# Nothing is reported to anybody. Ray's own niceness of 15 would let every other process come before the replicas.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
NAME = "default"  # of the application
STORE_BYTES = 100 << 20  # of Ray's shared memory, through which only large bodies go


def main(words: list[str]) -> None:
    try:
        run(dict(map(_argument, words)))
    except HybridCacheError as error:
        print("error:", one_line(str(error)), file=sys.stderr)
        sys.exit(2)


def run(given: Mapping[str, str]) -> None:
    """Raises ConfigError."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError(MISSING) from error
    host, port, temp = given.get("host", "127.0.0.1"), _port(given.get("port", "8000")), given.get("temp")
    arguments = {name: value for name, value in given.items() if name not in ("host", "port", "temp")}
    if host in LOOPBACK_NAMES:  # as `hybrid-cache serve`: a web page whose name leads here has one of its own
        arguments.setdefault("allow_host", host)
    app = build(arguments)
    end = threading.Event()
    ray.init(include_dashboard=False, object_store_memory=STORE_BYTES, _temp_dir=temp, configure_logging=False)
    _on_signals(end)
    try:
        serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
        serve.run(app, name=NAME)
        print(f"serving on http://{host}:{port}/v1", file=sys.stderr, flush=True)
        end.wait()
        print("finishing running requests, once more to end at once", file=sys.stderr, flush=True)
        serve.delete(NAME)  # waits for running requests, while `shutdown` ends the proxy at once
        serve.shutdown()
    finally:
        ray.shutdown()


def _on_signals(end: threading.Event) -> None:
    def hear(number: int, _: object) -> None:
        if end.is_set():
            os._exit(1)
        end.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, hear)


def _argument(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not name or not equals:
        raise ConfigError(f"{word!r} is no argument: NAME=VALUE is, such as replicas=2")
    return name, value


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise ConfigError(f"port is {text!r}, must be a number in [1, 65535]")
    return int(text)


if __name__ == "__main__":
    main(sys.argv[1:])
