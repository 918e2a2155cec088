"""Policies by name."""

from collections.abc import Callable

from hybrid_cache.cache.policies.base import Policy
from hybrid_cache.cache.policies.gdsf import GDSF
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.policies.marconi import Marconi
from hybrid_cache.cache.policies.nothing import Nothing
from hybrid_cache.cache.policies.seglen import SegLen
from hybrid_cache.cache.policies.sglang_radix import SGLangRadix, SGLangUnified
from hybrid_cache.cache.policies.value import FlopsPerByte
from hybrid_cache.cache.policies.vllm_block import VLLMBlock, equal_page_tokens
from hybrid_cache.errors import ConfigError
from hybrid_cache.spec import CacheSpec, PrefillCost

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (Learned, FlopsPerByte, LRU, GDSF, Nothing, SegLen, SGLangRadix, SGLangUnified)
}
# Policies that depend on the model, or on the size of the cache.
FITTED: dict[str, Callable[[CacheSpec, PrefillCost, int], Policy]] = {
    "marconi": lambda spec, cost, budget_bytes: Marconi(None, spec, cost, budget_bytes),
    "vllm-block": lambda spec, cost, budget_bytes: VLLMBlock(equal_page_tokens(spec)),
}


ALIASES = {"ours": Learned.name}  # former names


def policy_names() -> tuple[str, ...]:
    return (*POLICIES, *FITTED)


def make_policy(
    name: str, spec: CacheSpec | None = None, cost: PrefillCost | None = None, budget_bytes: int = 0
) -> Policy:
    """A fresh policy by name, for a cache with these arguments. Raises ConfigError for an unknown one.

    The simple ones, in `POLICIES`, need nothing but their name.
    """
    name = canonical_name(name)
    if name in POLICIES:
        return POLICIES[name]()
    if spec is None or cost is None or budget_bytes < 1:
        raise ConfigError(f"policy {name!r} needs the model's cache spec and cost, and the budget of the cache")
    return FITTED[name](spec, cost, budget_bytes)


def canonical_name(name: str) -> str:
    """The policy's name, which may be given by an alias. Raises ConfigError for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in policy_names():
        raise ConfigError(f"unknown policy {name!r}, must be one of {', '.join(policy_names())}")
    return name
