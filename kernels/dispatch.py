"""Which backends this machine can run, why not the others, and the choice of one at start-up."""

import os
import re
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec

import torch

from hybrid_cache.kernels import native_library
from hybrid_cache.kernels.compiled_ops import CompiledOps
from hybrid_cache.kernels.native_ops import NativeOps
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.kernels.torch_ops import TorchOps

ENVIRONMENT_VARIABLE = "HYBRID_CACHE_BACKEND"
TRITON = {"triton": (3, 6)}  # package -> oldest version
MAMBA_SSM = {"mamba_ssm": (2, 2, 4), "causal_conv1d": (1, 5)}
OLDEST_CAPABILITY = (8, 0)  # Ampere


class BackendUnavailable(RuntimeError):
    """Asked by name for a backend that is unknown, or that this machine cannot run."""


def available() -> dict[str, str | None]:
    """Backend name -> None if it can be selected, else why it cannot."""
    return {
        "native": native_library.reason_missing(),
        "torch": None,
        "torch-compile": None,  # with no compiler it does what torch does, and says why
        "triton": _gpu_reason(TRITON),
        "mamba_ssm": _gpu_reason(MAMBA_SSM),
    }


def exact_backends() -> list[str]:
    """Those that can be selected here and promise exact results."""
    reasons = available()
    return [name for name in ("native", "torch", "triton") if reasons[name] is None]


def select(name: str = "auto", *, fast: bool = False) -> Ops:
    """The named backend; "auto" is `$HYBRID_CACHE_BACKEND`, else native, else torch.

    Triton has to be asked for by name while its kernels have been compiled and interpreted, but not run on a GPU.

    fast: bits may depend on the batch where that is faster; so far in products of the Triton backend

    Raises BackendUnavailable for a name that is unknown or cannot be used here.
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

        return CheckedTritonOps(fast)
    if name == "mamba_ssm":
        from hybrid_cache.kernels.mamba_ssm_ops import MambaSsmOps

        return MambaSsmOps(torch.device("cuda", torch.cuda.current_device()))
    if name == "torch-compile":
        return CompiledOps()
    return NativeOps() if name == "native" else TorchOps()


def _gpu_reason(packages: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why these packages cannot be used on a GPU here."""
    missing = [f"{name} not installed" for name in packages if not find_spec(name)]
    device = _device_reason()
    if missing or device:
        return ", ".join(missing + ([device] if device else []))
    for name, oldest in packages.items():
        try:
            version: str = import_module(name).__version__
        except (ImportError, OSError) as error:
            return f"{name} cannot be imported: {error}"
        if tuple(int(part) for part in re.findall(r"\d+", version)[: len(oldest)]) < oldest:
            return f"{name} {version}, needs {_dotted(oldest)}"
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
