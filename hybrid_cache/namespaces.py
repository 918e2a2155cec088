"""Which entries of the cache a request may find: those of its model, its tenant and its salt, and no others."""


def namespace_of(salt: str, fingerprint: str, lane: str = "") -> str:
    """The model (weights with the adapter, dtype) and the tenant's salt: no hit ever crosses either.

    lane: of entries that were made from another model's and are not the model's own, see `engine.senders`
    A fingerprint has neither slash nor tilde, and a lane no slash, so no two have one namespace.
    """
    return f"{fingerprint}~{lane}/{salt}" if lane else f"{fingerprint}/{salt}"


def namespace_beside(namespace: str, fingerprint: str, lane: str = "") -> str:
    """Of the same salt, and another model or lane."""
    return namespace_of(salt_in(namespace), fingerprint, lane)


def fingerprint_in(namespace: str) -> str:
    """The model that a namespace says."""
    return namespace.partition("/")[0].partition("~")[0]


def lane_in(namespace: str) -> str:
    """Empty for a namespace of a model's own entries."""
    return namespace.partition("/")[0].partition("~")[2]


def salt_in(namespace: str) -> str:
    """The tenant's salt that a namespace says."""
    return namespace.partition("/")[2]
