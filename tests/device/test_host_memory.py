"""The bytes of the second tier: each item comes back as it left, wherever it was kept meanwhile."""

import pytest
import torch

from hybrid_cache.cache.commands import Load, MoveHost, Store
from hybrid_cache.cache.geometry import Geometry, Kind
from hybrid_cache.device.arena import Arena
from hybrid_cache.device.host_memory import HostMemory
from tests.cache.driver import SPECS


@pytest.mark.parametrize("name", ["slot of four pages", "page of four slots"])
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("moved", [False, True])
def test_an_item_comes_back_with_the_bytes_that_it_left_with(name: str, kind: Kind, moved: bool) -> None:
    spec = SPECS[name]
    geometry = Geometry.of(spec, 1 << 16)
    device = Arena(spec, geometry, "cpu")
    host = HostMemory(spec, geometry, device)
    for item in (1, 2):
        row = device.row(kind, item)
        assert row is not None
        row.fill_(10 + item)
    host.run(Store(kind, 1, 3))
    host.run(Store(kind, 2, 4))
    if moved:
        host.run(MoveHost(kind, ((3, 0), (4, 2))))
    places = (0, 2) if moved else (3, 4)
    for place, item in zip(places, (2, 1), strict=True):  # each to where the other was
        host.run(Load(kind, place, item))
    for item, byte in ((1, 12), (2, 11)):
        row = device.row(kind, item)
        assert row is not None
        assert bool(torch.all(row == byte))
