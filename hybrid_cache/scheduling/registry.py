"""Orders by name."""

import math
from collections.abc import Callable

from hybrid_cache.errors import ConfigError
from hybrid_cache.scheduling.base import Order
from hybrid_cache.scheduling.learned import Learned
from hybrid_cache.scheduling.published import FCFS, LAMPS, SJF, VLLM, Continuum, InferCept, ProgressTTL

ORDERS: dict[str, Callable[[], Order]] = {
    "learned": Learned,
    "fcfs": FCFS,
    "sjf": SJF,
    "vllm": VLLM,
    "infercept": InferCept,
    "lamps": LAMPS,
    "lamps-unbounded": lambda: LAMPS(math.inf),
    "continuum": Continuum,
    "progress-ttl": ProgressTTL,
    # Told what others have to guess, for simulations.
    "learned-oracle": Learned,
    "infercept-oracle": lambda: InferCept(knows=True),
    "lamps-oracle": lambda: LAMPS(knows=True),
    "lamps-unbounded-oracle": lambda: LAMPS(math.inf, knows=True),
}


def make_order(name: str) -> Order:
    """A fresh order by name. Raises ConfigError for an unknown one."""
    return ORDERS[order_name(name)]()


def order_name(name: str) -> str:
    """The name itself. Raises ConfigError if there is no such order."""
    if name not in ORDERS:
        raise ConfigError(f"unknown order {name!r}, must be one of {', '.join(ORDERS)}")
    return name
