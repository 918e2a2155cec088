"""What has to be in the environment before anything is imported or any server started, and what every test needs.

Triton reads TRITON_INTERPRET when it is imported, and other packages import it. HYBRID_CACHE_VERIFY makes the caches of
all tests compare what they published with its digest, servers' caches too.
"""

import gc
import os

import torch
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("untimed")
gc.disable()  # until the tests are collected
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HYBRID_CACHE_VERIFY", "1")


def pytest_collection_finish():
    """Thousands of tests and all modules stay until the end: no collection of garbage has to look at them again."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    gc.unfreeze()
