"""Triton reads TRITON_INTERPRET when it is imported, and other packages import it: so it is set before all tests."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
