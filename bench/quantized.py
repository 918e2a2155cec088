"""`python -m hybrid_cache.bench.quantized`, see `kernels/low_bit.py`."""

import typer

from hybrid_cache.bench.kernels.low_bit import quantized

if __name__ == "__main__":
    typer.run(quantized)
