"""What is lost when one model makes its entries from another's, as it was measured: the file beside a variant."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hybrid_cache.errors import ConfigError
from hybrid_cache.transfer import Transfer, transfer_of

FORMAT = 1
MAX_BYTES = 1 << 20
PROFILES = "sharing-*.json"  # in a receiver's folder


@dataclass(frozen=True, slots=True)
class Plan:
    """One transfer, and what it did to answers."""

    transfer: Transfer
    loss: float  # Kullback-Leibler divergence from the receiver alone, mean over tokens of answers, in nats
    agreement: float  # share of these tokens that are the first choice of the receiver alone
    flops: float  # of the receiver, as a part of computing everything
    input_bytes: int  # that the sender keeps for it, a token

    def __post_init__(self) -> None:
        if not (math.isfinite(self.loss) and self.loss >= 0):
            raise ConfigError(f"the loss of {self.transfer} is {self.loss}, must be a number of at least 0")


@dataclass(frozen=True, slots=True)
class Profile:
    """Plans for one direction of one pair of models, none of which another beats in loss and in FLOPs."""

    sender: str  # fingerprints: weights, dtype and backend
    receiver: str
    num_layers: int
    data: str  # what it was measured on
    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        if self.sender == self.receiver:
            raise ConfigError(f"a profile of {self.sender} and itself, must be of two models")

    def save(self, path: Path) -> None:
        values = {"format": FORMAT, **asdict(self)}
        values["plans"] = [asdict(plan) | {"transfer": str(plan.transfer)} for plan in self.plans]
        path.write_text(json.dumps(values, indent=2) + "\n")


def file_name(sender: str, fingerprint: str) -> str:
    """Of the profile of a sender, in the receiver's folder."""
    return PROFILES.replace("*", f"{sender}-{fingerprint[:8]}")


def frontier(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """Those that no other beats in loss and in FLOPs, from the cheapest on."""
    best, least = list[Plan](), math.inf
    for plan in sorted(plans, key=lambda plan: (plan.flops, plan.loss)):
        if plan.loss < least:
            best.append(plan)
            least = plan.loss
    return tuple(best)


def load_profile(path: Path) -> Profile:
    """Raises ConfigError for a file that is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"profile {path} has {path.stat().st_size} bytes, limit {MAX_BYTES}")
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise ConfigError(f"profile {path} has format {values['format']!r}, this version reads {FORMAT}")
        layers = int(values["num_layers"])
        plans = tuple(
            Plan(
                transfer_of(each["transfer"], layers),
                float(each["loss"]),
                float(each["agreement"]),
                float(each["flops"]),
                int(each["input_bytes"]),
            )
            for each in values["plans"]
        )
        return Profile(str(values["sender"]), str(values["receiver"]), layers, str(values["data"]), plans)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"profile {path} cannot be read: {type(error).__name__}: {error}") from error
