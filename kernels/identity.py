"""Which kernels compute here, as far as names tell. Whether they give equal bits, only numbers do."""

import platform
from pathlib import Path

import torch

from hybrid_cache.kernels import native_library
from hybrid_cache.kernels.ops import Ops


def kernels_of(ops: Ops) -> str:
    """Of two that are told apart, bits may differ."""
    parts = [ops.name, ops.inexact, f"torch {torch.__version__}", platform.machine()]
    if ops.device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(ops.device)))
        parts += [torch.cuda.get_device_name(ops.device), capability, f"cuda {torch.version.cuda}"]
    else:
        parts += [torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"]
    if ops.name == "native":
        parts.append(Path(native_library.load()._name).stem)
    return ", ".join(parts)
