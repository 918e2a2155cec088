"""Policies by name."""

from collections.abc import Callable

from hybrid_cache.cache.policies import foreign
from hybrid_cache.cache.policies.base import Policy
from hybrid_cache.cache.policies.gdsf import GDSF
from hybrid_cache.cache.policies.learned import Learned
from hybrid_cache.cache.policies.lru import LRU
from hybrid_cache.cache.policies.marconi import Marconi
from hybrid_cache.cache.policies.nothing import Nothing
from hybrid_cache.cache.policies.sae import SAELike
from hybrid_cache.cache.policies.seglen import SegLen
from hybrid_cache.cache.policies.sglang_radix import PathLRU, SGLangRadix, SGLangUnified
from hybrid_cache.cache.policies.sparse_prefix import SparsePrefix
from hybrid_cache.cache.policies.tail_lru import TailLRU
from hybrid_cache.cache.policies.value import FlopsPerByte, FlopsPerByteTwo
from hybrid_cache.cache.policies.vllm_block import VLLMAlign, VLLMBlock, VLLMFine, equal_page_tokens
from hybrid_cache.errors import ConfigError
from hybrid_cache.spec import CacheSpec, PrefillCost

SIMPLE: tuple[type[Policy], ...] = (
    *(Learned, FlopsPerByte, LRU, GDSF, Nothing, SegLen, SGLangRadix, SGLangUnified),
    *(FlopsPerByteTwo, PathLRU, TailLRU, SAELike, SparsePrefix),
)
POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in SIMPLE}
# Policies that depend on the model, or on the size of the cache.
FITTED: dict[str, Callable[[CacheSpec, PrefillCost, int], Policy]] = {
    "marconi": lambda spec, cost, budget_bytes: Marconi(None, spec, cost, budget_bytes),
    "vllm-block": lambda spec, cost, budget_bytes: VLLMBlock(equal_page_tokens(spec)),
    "vllm-align": lambda spec, cost, budget_bytes: VLLMAlign(equal_page_tokens(spec)),
    "vllm-fine": lambda spec, cost, budget_bytes: VLLMFine(equal_page_tokens(spec)),
}


ALIASES = {"ours": Learned.name}  # former names


def policy_names() -> tuple[str, ...]:
    return (*POLICIES, *FITTED)


def make_policy(
    name: str, spec: CacheSpec | None = None, cost: PrefillCost | None = None, budget_bytes: int = 0
) -> Policy:
    """A fresh policy by name, for a cache with these arguments. Raises ConfigError for an unknown one, or one from
    elsewhere that cannot be used; see `foreign`.

    The simple ones, in `POLICIES`, need nothing but their name.
    """
    name = canonical_name(name)
    if name in POLICIES:
        return POLICIES[name]()
    if name not in FITTED:
        return foreign.make(name, spec, cost, budget_bytes)
    if spec is None or cost is None or budget_bytes < 1:
        raise ConfigError(f"policy {name!r} needs the model's cache spec and cost, and the budget of the cache")
    return FITTED[name](spec, cost, budget_bytes)


def canonical_name(name: str) -> str:
    """The policy's name, which may be given by an alias or as `package.module:Class`. Raises ConfigError for one that
    is unknown or cannot be loaded.
    """
    name = ALIASES.get(name, name)
    if name in policy_names():
        return name
    if not foreign.is_foreign(name):
        names = ", ".join((*policy_names(), *foreign.offered()))
        raise ConfigError(f"unknown policy {name!r}, must be one of {names}, or package.module:Class")
    foreign.load(name)
    return name
