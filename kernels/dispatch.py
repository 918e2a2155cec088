"""Which backends this machine can run, why not the others, and the choice of one at start-up."""

import os
from importlib.util import find_spec

import torch

from hybrid_cache.kernels import native_library
from hybrid_cache.kernels.native_ops import NativeOps
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.kernels.torch_ops import TorchOps

ENVIRONMENT_VARIABLE = "HYBRID_CACHE_BACKEND"


class BackendUnavailable(RuntimeError):
    """Asked by name for a backend that is unknown, or that this machine cannot run."""


def available() -> dict[str, str | None]:
    """Backend name -> None if it can be selected, else why it cannot."""
    return {
        "native": native_library.reason_missing(),
        "torch": None,
        "triton": _gpu_reason("triton", ("triton",)),
        "mamba_ssm": _gpu_reason("mamba_ssm", ("mamba_ssm", "causal_conv1d")),
    }


def select(name: str = "auto") -> Ops:
    """The named backend; "auto" is `$HYBRID_CACHE_BACKEND`, else native, else torch."""
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name == "auto":
        name = "torch" if native_library.reason_missing() else "native"
    reasons = available()
    if name not in reasons or reasons[name] is not None:
        usable = ", ".join(backend for backend, reason in reasons.items() if reason is None)
        raise BackendUnavailable(f"backend {name!r}: {reasons.get(name) or 'no such backend'}; usable here: {usable}")
    return NativeOps() if name == "native" else TorchOps()


def _gpu_reason(name: str, packages: tuple[str, ...]) -> str:
    """These need kernels of ours, or an adapter, that this release does not have."""
    missing = [package for package in packages if find_spec(package) is None]
    reasons = ["this release has no code for it"]
    if missing:
        reasons.append(f"{' and '.join(missing)} not installed")
    if not torch.cuda.is_available():
        reasons.append("no CUDA device")
    return ", ".join(reasons)
