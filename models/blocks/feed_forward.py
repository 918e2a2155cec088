"""Feed-forward parts, dense and with experts."""

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid_cache.kernels.codes import Matrix, joined
from hybrid_cache.kernels.elementwise import gated, sigmoid
from hybrid_cache.kernels.ops import Experts, Linear, Ops
from hybrid_cache.models.blocks.common import FeedForward, Norm, linear
from hybrid_cache.models.shapes import MLPShape, MoEShape, SharedMoEShape
from hybrid_cache.models.weights import Scope, Weights

Router = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""logits [R, experts], k -> ids of the chosen experts [R, k] int64, and their weights [R, k] float32."""


class MLP(FeedForward):
    """Gated feed-forward layer.

    gate_mul  [R, 2 * inner], gates first -> [R, inner]; None for `ops.silu_mul`
    """

    shape: MLPShape

    def __init__(
        self, ops: Ops, gate_up: Linear, down: Linear, gate_mul: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._gate_up = gate_up
        self._down = down
        self._gate_mul = gate_mul or ops.silu_mul
        self._add_at_once = ops.add_gated_mlp if gate_mul is None else None
        self.shape = MLPShape(gate_up.in_features, down.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._gate_mul(self._gate_up(x)))

    def add_to(self, hidden: Tensor, norm: Norm, multiplier: float = 1.0) -> Tensor:
        if self._add_at_once is None:
            return super().add_to(hidden, norm, multiplier)
        self._add_at_once(hidden, norm.weights, multiplier, self._gate_up, self._down)
        return hidden


def gated_mlp(
    hidden: int,
    inner: int,
    weights: Weights,
    ops: Ops,
    *,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    bias: bool = False,
    gate_mul: Callable[[Tensor], Tensor] | None = None,
) -> MLP:
    """`names` of the matrices: gate and up [inner, hidden], down [hidden, inner].

    gate_mul  [R, 2 * inner], gates first -> [R, inner]; None for `ops.silu_mul`
    """
    gate, up, down = names
    gate_up = linear(ops, weights, {gate: inner, up: inner}, hidden, bias=bias)
    return MLP(ops, gate_up, linear(ops, weights, {down: hidden}, inner, bias=bias), gate_mul)


class PlainMLP(FeedForward):
    """Two matrices with an activation between them, `act` [R, inner] -> [R, inner]."""

    shape: MLPShape

    def __init__(self, up: Linear, down: Linear, act: Callable[[Tensor], Tensor]) -> None:
        self._up = up
        self._down = down
        self._act = act
        self.shape = MLPShape(up.in_features, down.in_features, gated=False)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._act(self._up(x)))


def relu2(x: Tensor) -> Tensor:
    """Squared relu (So et al. 2021); x [...] -> [...]."""
    return x.relu().square()


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x); x [...] -> [...]."""
    return gated(x, x)


def softmax_of_chosen(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A `Router`, logits [R, experts] -> [R, k] twice: the weights of the k chosen experts add up to one."""
    chosen, ids = logits.float().topk(k, dim=-1)
    return ids, chosen.softmax(dim=-1)


def chosen_of_softmax(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A `Router`, logits [R, experts] -> [R, k] twice: the k largest of weights that add up to one over all experts."""
    chosen, ids = logits.float().softmax(dim=-1).topk(k, dim=-1)
    return ids, chosen


class SigmoidRouter:
    """The k experts with the largest sum of sigmoid and `bias` are chosen; their weights are the sigmoids.

    bias        [experts] float32; None for none
    eps         the weights of the chosen are divided by their sum plus this; None leaves them as they are
    scale       multiplies the weights
    num_groups  groups of experts, of which only the `top_groups` whose best two experts have the largest sum are used
    """

    def __init__(
        self, bias: Tensor | None, *, eps: float | None, scale: float, num_groups: int = 1, top_groups: int = 1
    ) -> None:
        self._bias = bias
        self._eps = eps
        self._scale = scale
        self._num_groups = num_groups
        self._top_groups = top_groups

    def __call__(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """logits [R, experts] -> ids [R, k] int64, weights [R, k] float32."""
        scores = sigmoid(logits)
        wanted = scores if self._bias is None else scores + self._bias
        if self._top_groups < self._num_groups:
            wanted = wanted.masked_fill(~_in_best_groups(wanted, self._num_groups, self._top_groups), -torch.inf)
        ids = wanted.topk(k, dim=-1).indices
        chosen = scores.gather(1, ids)
        if self._eps is not None:
            chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + self._eps)
        return ids, chosen * self._scale


def _in_best_groups(scores: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """scores [R, experts] -> bool [R, experts]. A group is as good as its two best experts together."""
    rows, num_experts = scores.shape
    best, second = scores.view(rows, num_groups, -1).topk(2, dim=-1).values.unbind(-1)
    chosen = (best + second).topk(top_groups, dim=-1).indices
    mask = torch.zeros(rows, num_groups, dtype=torch.bool, device=scores.device).scatter_(1, chosen, True)
    return mask.repeat_interleave(num_experts // num_groups, dim=1)


class MoE(FeedForward):
    """A few experts for each row, chosen by a router."""

    shape: MoEShape

    def __init__(self, shape: MoEShape, router: Linear, experts: Experts, route: Router) -> None:
        self.shape = shape
        self._router = router
        self._experts = experts
        self._route = route

    def __call__(self, x: Tensor) -> Tensor:
        ids, weights = self._route(self._router(x), self.shape.num_active)
        return self._experts(x, ids, weights)


class SharedMoE(FeedForward):
    """Experts plus an MLP for all rows (DeepSeek)."""

    shape: SharedMoEShape

    def __init__(self, experts: MoE, shared: MLP) -> None:
        self.shape = SharedMoEShape(experts.shape, shared.shape, gated=False)
        self._experts = experts
        self._shared = shared

    def __call__(self, x: Tensor) -> Tensor:
        y = self._experts(x)
        y += self._shared(x)
        return y


class Float32Router:
    """Logits in float32, whatever the rows are: a last bit of bfloat16 is enough to choose another expert."""

    def __init__(self, ops: Ops, weights: Weights, name: str, num_experts: int, hidden: int) -> None:
        self.in_features, self.out_features = hidden, num_experts
        self._linear = ops.linear(weights.take_float32(f"{name}.weight", num_experts, hidden))

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, hidden] -> logits [R, experts] float32."""
        return self._linear(x.float())


class GatedSharedMoE(FeedForward):
    """Experts plus an MLP for all rows, which is scaled by the sigmoid of a gate (Qwen).

    `router` gives the experts' logits and, last, that of the gate.
    """

    shape: SharedMoEShape

    def __init__(self, shape: MoEShape, router: Linear, experts: Experts, route: Router, shared: MLP) -> None:
        self.shape = SharedMoEShape(shape, shared.shape, gated=True)
        self._split = [shape.num_experts, 1]
        self._num_active = shape.num_active
        self._router = router
        self._experts = experts
        self._route = route
        self._shared = shared

    def __call__(self, x: Tensor) -> Tensor:
        logits, gate = self._router(x).split_with_sizes(self._split, dim=1)
        ids, weights = self._route(logits, self._num_active)
        y = self._experts(x, ids, weights)
        y += gated(self._shared(x), gate)
        return y


def expert_matrices(
    weights: Weights, shape: MoEShape, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[list[Matrix], list[Matrix]]:
    """For each expert gate and up [2 * inner, hidden], and down [hidden, inner], as `ops.experts` takes them.

    The file has `experts.{i}.{gate, up, down}.weight`, or all experts in two tensors.
    """
    hidden, inner, num_experts = shape.hidden, shape.inner, shape.num_experts
    if weights.has("experts.gate_up_proj"):
        w_in = weights.take("experts.gate_up_proj", num_experts, 2 * inner, hidden)
        return matrices_of(weights, w_in), matrices_of(
            weights, weights.take("experts.down_proj", num_experts, hidden, inner)
        )
    experts = [Scope(weights, f"experts.{i}.") for i in range(num_experts)]
    w_in_each = [joined([e.take_matrix(f"{name}.weight", inner, hidden) for name in (gate, up)]) for e in experts]
    return w_in_each, [e.take_matrix(f"{down}.weight", hidden, inner) for e in experts]


def matrices_of(weights: Weights, experts: Tensor) -> list[Matrix]:
    """[experts, out, in], taken as one, -> each as it is multiplied."""
    return [weights.scheme.matrix(each) for each in experts]
