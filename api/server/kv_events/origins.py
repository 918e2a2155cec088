"""What others may know of a namespace of the cache: whose blocks are published, and under which names."""

from hybrid_cache.api.server.kv_events.wire import Origin
from hybrid_cache.api.server.serving import Serving
from hybrid_cache.api.server.tenants import salt_of_tenant, tenant_of
from hybrid_cache.namespaces import lane_in, salt_in


class Origins:
    """Maps a namespace to what events say of it; None where they say nothing.

    Many routers do not read salts. So blocks under a salt, and those of one of several tenants, are left out unless
    they are asked for: a router that credits them to others tells these that they exist.
    """

    def __init__(self, serving: Serving, *, salted: bool) -> None:
        """salted: whether blocks under a salt are published"""
        keys = serving.settings.api_keys
        self._serving = serving
        self._salted = salted
        self._only_tenant = salt_of_tenant(tenant_of(keys[0]), None) if len(keys) == 1 else ""

    def __call__(self, namespace: str) -> Origin | None:
        served = self._serving.whose(namespace)
        if not served or lane_in(namespace):  # a lane has what was made with a loss, for those who allow that
            return None
        salt = salt_in(namespace).removeprefix(self._only_tenant)
        if salt and not self._salted:
            return None
        model = served[0].model
        return Origin(None if model.parent is None else model.name, salt or None)
