"""How a tensor of a Hugging Face checkpoint comes out of the tensors of a GGUF file: what llama.cpp did, undone.

A rule is a function of tensors, so that its shape can be asked of tensors that have shapes only.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Make = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """sources: names in the file   make: of these tensors   expert: which one of them is meant, None for all"""

    sources: tuple[str, ...]
    make: Make
    expert: int | None = None


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()


def log_of_minus(tensor: Tensor) -> Tensor:
    """A [...] -> A_log, of A = -exp(A_log)."""
    return torch.log(-tensor.float())


def flat_log_of_minus(tensor: Tensor) -> Tensor:
    return log_of_minus(tensor).flatten()


def depthwise(tensor: Tensor) -> Tensor:
    """A convolution's weights [channels, width] -> [channels, 1, width]."""
    return tensor.reshape(tensor.shape[0], 1, tensor.shape[-1])


def less_one(tensor: Tensor) -> Tensor:
    """Of a norm that multiplies by one plus its weight."""
    return tensor - 1


def rows_joined(*tensors: Tensor) -> Tensor:
    """Of matrices, or of the matrices of all experts."""
    return torch.cat(tensors, dim=-2)


def two_halves(num_heads: int) -> Make:
    """Rows of heads whose rotated pairs lie side by side -> in two halves, as the library has them."""

    def unpermuted(tensor: Tensor) -> Tensor:
        pairs = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    return unpermuted


@dataclass(frozen=True, slots=True)
class Names:
    """Names of a family's weights in a GGUF file by those in its checkpoints.

    top    of whole names: `token_embd.weight`
    layer  of what follows `blk.3.` and, for checkpoints, `layers`
    each   of what follows it and holds all experts; {} in the name stands for the expert's number
    """

    layers: str
    top: Mapping[str, Rule]
    layer: Mapping[str, Rule]
    each: Mapping[str, Rule] | None = None

    def rules(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Rule]]:
        """For what is there, by its name in a checkpoint. `shapes`: of the tensors in the file."""
        yield from _there(self.top, shapes)
        for index in sorted({name.split(".")[1] for name in shapes if name.startswith("blk.")}):
            inside = {
                f"{self.layers}{index}.{name}": _within(f"blk.{index}.", rule) for name, rule in self.layer.items()
            }
            yield from _there(inside, shapes)
            each = {
                f"{self.layers}{index}.{name}": _within(f"blk.{index}.", rule)
                for name, rule in (self.each or {}).items()
            }
            for name, rule in _there(each, shapes):
                for expert in range(shapes[rule.sources[0]][0]):
                    yield name.format(expert), replace(rule, expert=expert)


def _there(rules: Mapping[str, Rule], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Rule]]:
    return ((name, rule) for name, rule in rules.items() if all(source in shapes for source in rule.sources))


def _within(prefix: str, rule: Rule) -> Rule:
    return replace(rule, sources=tuple(prefix + source for source in rule.sources))


def of(*sources: str, by: Make = as_it_is) -> Rule:
    return Rule(sources, by)


def linear(name: str, source: str, by: Make = as_it_is) -> dict[str, Rule]:
    """A projection's matrix and, where it has one, its bias."""
    return {f"{name}.{part}": of(f"{source}.{part}", by=by) for part in ("weight", "bias")}


def one_row(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1)
