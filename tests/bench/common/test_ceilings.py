import pytest

from hybrid_cache.bench.common.ceilings import Ceilings


def test_the_roofline_is_the_longer_of_bytes_and_flops():
    ceilings = Ceilings(gigabytes_per_s=10, gigaflops_per_s=1000)
    assert ceilings.seconds(1e9, flops=1e9) == pytest.approx(0.1)
    assert ceilings.bound(1e9, flops=1e9) == "memory"
    assert ceilings.seconds(1e9, flops=1e12) == pytest.approx(1.0)
    assert ceilings.bound(1e9, flops=1e12) == "arithmetic"
