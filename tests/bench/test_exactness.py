"""The exactness benchmark finds nothing on an exact model, and does find what it is there to find."""

from torch import Tensor

from hybrid_cache.batch import CacheTensors, ForwardBatch
from hybrid_cache.bench.exactness import Report, compare
from tests.fakes import SumModel


def report(model: SumModel, rows: int = 2000) -> Report:
    return compare(model, Report("fake", "float32", seed=1), rows)


def test_an_exact_model_shows_no_differing_bit_in_many_rows() -> None:
    r = report(SumModel())
    assert r.exact
    assert r.rows >= 2000
    assert r.answers > 0
    assert r.cached_tokens > 0


class NeighbourModel(SumModel):
    """Lets the number of rows in the batch leak into the last bit of each logit."""

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        self.shift = 1e-6 * batch.layout.num_rows
        return super().forward(batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden) + self.shift


def test_a_row_that_depends_on_its_neighbours_is_found() -> None:
    r = report(NeighbourModel(), rows=200)
    assert not r.exact
    assert r.differing_bits > 0


class ForgetfulModel(SumModel):
    """Gives another answer wherever a chunk starts from a state rather than from nothing."""

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        self.lost = bool((batch.layout.chunk_fresh == 0).any())
        return super().forward(batch, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        return logits.roll(1, dims=1) if self.lost else logits


def test_a_resumed_state_that_gives_another_answer_is_found() -> None:
    r = report(ForgetfulModel(), rows=200)
    assert r.differing_rows + r.unknown_rows > 0
    assert not r.exact
