"""Several servers behind one address, on Ray Serve.

    serve run hybrid_cache.api.ray:app
    serve run hybrid_cache.api.ray:build model=DIR replicas=2 budget=4GiB
    python -m hybrid_cache.api.ray model=DIR replicas=2 budget=4GiB port=8000

See docs/ray.md. Needs the extra `ray`.
"""

from typing import TYPE_CHECKING, Any

from hybrid_cache.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve import Application

MISSING = "Ray Serve is not installed: pip install 'hybrid-cache[ray]'"


def build(args: dict[str, Any]) -> "Application":
    """An application with these arguments, see `arguments`. Raises ConfigError."""
    try:
        from ray import serve  # noqa: F401
    except ImportError as error:
        raise ConfigError(MISSING) from error
    from hybrid_cache.api.ray.deployment import application

    return application(args)


def __getattr__(name: str) -> Any:
    """`app` is the application without arguments: two replicas of the embedded model."""
    if name == "app":
        return build({"replicas": 2})
    raise AttributeError(name)
