"""Who asks: the tenant of the request that is being handled.

Each API key is a tenant of its own. What is cached for one is found by no other, and the engine is shared out among
tenants (`engine.shares`). Requests without keys are told apart by their `cache_salt` alone.
"""

import hashlib
from contextvars import ContextVar

TENANT_CHARACTERS = 16  # of a digest: as many for each key, so that no key and salt look like another key and salt

current_tenant: ContextVar[str] = ContextVar("current_tenant", default="")
shared_cache: ContextVar[bool] = ContextVar("shared_cache", default=False)
is_operator: ContextVar[bool] = ContextVar("is_operator", default=False)  # may look after what all tenants have cached


def tenant_of(key: str) -> str:
    """Names a tenant by a digest of its API key."""
    return hashlib.sha256(b"tenant\0" + key.encode()).hexdigest()[:TENANT_CHARACTERS]


def current_tenant_or(cache_salt: str | None) -> str:
    """Whose share of the server the request takes that is being handled; without keys, salts tell tenants apart."""
    return current_tenant.get() or cache_salt or ""


def salt_of(cache_salt: str | None) -> str:
    """What no cache entry of the request that is being handled crosses: its tenant, unless keys share one cache, and
    the salt that the client sends.
    """
    return salt_of_tenant("" if shared_cache.get() else current_tenant.get(), cache_salt)


def salt_of_tenant(tenant: str, cache_salt: str | None) -> str:
    """`salt_of` for a request of a tenant; empty: where there are none."""
    return f"{tenant}:{cache_salt or ''}" if tenant else cache_salt or ""


def owner_of() -> str | None:
    """What the salts begin with of all that is the tenant's whose request is being handled, see `Request.owner`.

    Without keys, salts tell tenants apart, and nobody owns two; where keys share one cache, nobody owns any.
    """
    if shared_cache.get():
        return None
    return f"{tenant}:" if (tenant := current_tenant.get()) else ""
