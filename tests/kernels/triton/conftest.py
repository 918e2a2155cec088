"""Kernels run in Triton's interpreter unless there is a CUDA device (tests/conftest.py). Without Triton: skipped."""

import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


class WithoutTriton(pytest.Module):
    def collect(self):
        pytest.skip("triton is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return WithoutTriton.from_parent(parent, path=module_path) if find_spec("triton") is None else None


@pytest.fixture(autouse=True)
def floats_as_on_a_gpu():
    """The interpreter computes with numpy, which warns of an overflow in exp(100); 1 / (1 + inf) is what is meant."""
    with np.errstate(all="ignore"):
        yield
