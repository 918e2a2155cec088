"""Policies by name."""

from hybrid_cache.errors import ConfigError
from hybrid_cache.policies.base import Policy
from hybrid_cache.policies.lru import LRU
from hybrid_cache.policies.value import FlopsPerByte

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (FlopsPerByte, LRU)}


def make_policy(name: str) -> Policy:
    """A fresh policy by name. Raises ConfigError for an unknown one."""
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}, must be one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
