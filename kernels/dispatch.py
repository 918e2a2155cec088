"""Which backends this machine can run, why not the others, and the choice of one at start-up."""

import os
import re
import warnings
from importlib import import_module
from importlib.util import find_spec

import torch

from hybrid_cache.kernels import native_library
from hybrid_cache.kernels.native_ops import NativeOps
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.kernels.torch_ops import TorchOps

ENVIRONMENT_VARIABLE = "HYBRID_CACHE_BACKEND"
OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # Ampere


class BackendUnavailable(RuntimeError):
    """Asked by name for a backend that is unknown, or that this machine cannot run."""


def available() -> dict[str, str | None]:
    """Backend name -> None if it can be selected, else why it cannot."""
    return {
        "native": native_library.reason_missing(),
        "torch": None,
        "triton": _triton_reason(),
        "mamba_ssm": _mamba_ssm_reason(),
    }


def select(name: str = "auto") -> Ops:
    """The named backend; "auto" is `$HYBRID_CACHE_BACKEND`, else native, else torch.

    Triton is asked for by name as long as its kernels have been compiled and interpreted, but not run on a card.
    """
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    reasons = available()
    if name == "auto":
        name = next(backend for backend in ("native", "torch") if reasons[backend] is None)
    if name not in reasons or reasons[name] is not None:
        usable = ", ".join(backend for backend, reason in reasons.items() if reason is None)
        raise BackendUnavailable(f"backend {name!r}: {reasons.get(name) or 'no such backend'}; usable here: {usable}")
    if name == "triton":
        from hybrid_cache.kernels.triton_ops import CheckedTritonOps  # it needs triton

        return CheckedTritonOps()
    return NativeOps() if name == "native" else TorchOps()


def _triton_reason() -> str | None:
    missing = [] if find_spec("triton") else ["triton not installed"]
    device = _device_reason()
    if missing or device:
        return ", ".join(missing + ([device] if device else []))
    try:
        version: str = import_module("triton").__version__
    except (ImportError, OSError) as error:
        return f"triton cannot be imported: {error}"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        return f"triton {version}, needs {_dotted(OLDEST_TRITON)}"
    return None


def _device_reason() -> str | None:
    """Why there is no CUDA device that our kernels run on."""
    try:
        with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that does not fit
            warnings.simplefilter("always")
            there = torch.cuda.is_available()
        if not there:
            return "; ".join(["no CUDA device", *(str(warning.message).splitlines()[0] for warning in caught)])
        capability = torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        return f"no CUDA device that works: {str(error).splitlines()[0]}"
    if capability < OLDEST_CAPABILITY:
        return f"CUDA device of compute capability {_dotted(capability)}, needs {_dotted(OLDEST_CAPABILITY)}"
    return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _mamba_ssm_reason() -> str:
    """It needs an adapter that this release does not have."""
    missing = [package for package in ("mamba_ssm", "causal_conv1d") if find_spec(package) is None]
    reasons = ["this release has no code for it"]
    if missing:
        reasons.append(f"{' and '.join(missing)} not installed")
    device = _device_reason()
    return ", ".join([*reasons, device] if device else reasons)
