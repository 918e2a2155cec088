"""`python -m hybrid_cache.bench.gpu_check`, see `gpu/command.py`."""

import sys

from hybrid_cache.bench.gpu.command import main

if __name__ == "__main__":
    sys.exit(main())
