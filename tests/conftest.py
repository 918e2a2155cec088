"""What has to be in the environment before anything is imported or any server started.

Triton reads TRITON_INTERPRET when it is imported, and other packages import it. HYBRID_CACHE_VERIFY makes the caches of
all tests compare what they published with its digest, servers' caches too.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HYBRID_CACHE_VERIFY", "1")
