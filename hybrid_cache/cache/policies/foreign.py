"""Policies from elsewhere: a class that is named `package.module:Class`, or an entry point of another package.

A package offers a policy under a short name with

    [project.entry-points."hybrid_cache.policies"]
    newest = "their_package.policies:Newest"

A class is made without arguments; one with a class method `for_cache(spec, cost, budget_bytes)` is made by that. See
`base.Policy` for what it is asked, and `base.ScoredPolicy` for a start.
"""

import sys
import traceback
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from hybrid_cache.cache.policies.base import Policy, ScoredPolicy
from hybrid_cache.errors import ConfigError
from hybrid_cache.spec import CacheSpec, PrefillCost

GROUP = "hybrid_cache.policies"
FORMER = {"ended": "finished"}  # a method, and what a policy of an earlier version has in its place
METHODS = tuple(name for name, value in vars(Policy).items() if callable(value) and not name.startswith("_"))


@cache
def offered() -> dict[str, EntryPoint]:
    """The policies that installed packages offer, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def is_foreign(name: str) -> bool:
    return ":" in name or name in offered()


def load(name: str) -> type[Policy]:
    """The class of a foreign policy, with all that a cache asks of it. Raises ConfigError."""
    module, _, attribute = (offered()[name].value if name in offered() else name).partition(":")
    found = getattr(imported(name, module), attribute, None)
    if not isinstance(found, type):
        raise ConfigError(f"policy {name!r}: module {module} has no class {attribute!r}")
    if missing := lacking(found):
        raise ConfigError(f"policy {name!r}: {attribute} lacks {', '.join(missing)}; see {Policy.__module__}.Policy")
    return found


def imported(name: str, module: str, what: str = "policy") -> object:
    """The module, also from the current folder. Raises ConfigError, which says what was wanted of it."""
    if "" not in sys.path:
        sys.path.append("")
    try:
        return import_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{what} {name!r}: module {module!r} cannot be imported: {described(error)}") from error


def lacking(found: type) -> list[str]:
    """The methods that a cache will ask for and a class does not have."""
    either = [(method, FORMER.get(method, method)) for method in METHODS]
    missing = [names[0] for names in either if not any(callable(getattr(found, name, None)) for name in names)]
    if issubclass(found, ScoredPolicy) and found._score is ScoredPolicy._score:
        missing += [name for name in ("score", "clock") if getattr(found, name) is getattr(ScoredPolicy, name)]
    return missing


def make(name: str, spec: CacheSpec | None, cost: PrefillCost | None, budget_bytes: int) -> Policy:
    """A fresh foreign policy that bears the name it was asked for by. Raises ConfigError."""
    found = load(name)
    fitted = cast(
        "Callable[[CacheSpec | None, PrefillCost | None, int], Policy] | None", getattr(found, "for_cache", None)
    )
    try:
        policy = found() if fitted is None else fitted(spec, cost, budget_bytes)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"policy {name!r}: its constructor raised {described(error)}") from error
    policy.name = name
    for attribute in ("keeps_states", "wants_rises"):
        if not isinstance(getattr(policy, attribute, None), bool):
            raise ConfigError(f"policy {name!r}: {attribute} must be True or False")
    return policy


def described(error: BaseException) -> str:
    """An exception in one line, with the place that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
