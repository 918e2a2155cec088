"""The start-up check passes an exact model and stops one that depends on its company."""

from torch import Tensor

from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.engine.selfcheck import check_model
from tests.fakes import SumModel


class NeighbourModel(SumModel):
    """Lets the number of rows in the batch leak into its logits."""

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        self.shift = 1e-3 * batch.layout.num_rows
        return super().forward(batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        logits[:, 0] += self.shift
        return logits


def test_an_exact_model_passes() -> None:
    assert check_model(SumModel()) == []


def test_a_model_that_depends_on_its_company_does_not() -> None:
    assert check_model(NeighbourModel())
