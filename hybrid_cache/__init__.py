"""hybrid-cache: serve attention + state-space models behind one exact prefix cache."""

import os

# Idle OpenMP threads that spin make a shared machine about five times slower. This must be set before
# torch loads its OpenMP runtime, and a user's own choice wins.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

__version__ = "0.1.0"
