"""Feed-forward parts, dense and with experts."""

from collections.abc import Callable

from torch import Tensor

from hybrid_cache.kernels.ops import Experts, Linear
from hybrid_cache.models.shapes import MLPShape, MoEShape

Router = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class MLP:
    """Gated feed-forward layer; `gate_mul` is `ops.silu_mul` or `ops.gelu_mul`."""

    def __init__(self, gate_up: Linear, down: Linear, gate_mul: Callable[[Tensor], Tensor]) -> None:
        self._gate_up = gate_up
        self._down = down
        self._gate_mul = gate_mul
        self.shape = MLPShape(gate_up.in_features, down.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._gate_mul(self._gate_up(x)))


def softmax_of_chosen(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights of the k chosen experts add up to one."""
    chosen, ids = logits.float().topk(k, dim=-1)
    return ids, chosen.softmax(dim=-1)


def chosen_of_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights of all experts add up to one; the k largest are used as they are."""
    chosen, ids = logits.float().softmax(dim=-1).topk(k, dim=-1)
    return ids, chosen


class MoE:
    """A few experts for each row, chosen by a router."""

    def __init__(self, shape: MoEShape, router: Linear, experts: Experts, route: Router) -> None:
        self.shape = shape
        self._router = router
        self._experts = experts
        self._route = route

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = self._route(self._router(x), self.shape.num_active)
        return self._experts(x, ids, weights)
