"""Heads of gated delta nets in the order of checkpoints: llama.cpp's Qwen3.5 has the heads of all groups in turn."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_cache.errors import ModelError
from hybrid_cache.models.gguf.metadata import Metadata


@dataclass(frozen=True, slots=True)
class Delta:
    """Sizes of a delta net. Heads of values belong to groups, each with one query and key."""

    num_groups: int
    num_heads: int
    d_state: int
    head_dim: int

    @staticmethod
    def of(meta: Metadata) -> "Delta":
        groups, heads = meta.integer("ssm.group_count"), meta.integer("ssm.time_step_rank")
        inner = meta.integer("ssm.inner_size")
        if not groups or not heads or heads % groups or inner % heads:
            raise ModelError(f"{groups} groups of {heads} heads do not make {inner} channels")
        return Delta(groups, heads, meta.integer("ssm.state_size"), inner // heads)

    def heads(self, tensor: Tensor) -> Tensor:
        """One row for each head, those of all groups in turn -> those of one group together."""
        return self._grouped(tensor, 1)

    def values(self, tensor: Tensor) -> Tensor:
        """The same for `head_dim` rows of each head."""
        return self._grouped(tensor, self.head_dim)

    def values_of_channels(self, tensor: Tensor) -> Tensor:
        """The same for the values behind all queries and keys."""
        keys = 2 * self.num_groups * self.d_state
        return torch.cat([tensor[:keys], self.values(tensor[keys:])])

    def columns(self, tensor: Tensor) -> Tensor:
        """The same for columns."""
        return self.values(tensor.T).T.contiguous()

    def by_group(self, qkv: Tensor, z: Tensor) -> Tensor:
        """Queries, keys, values and gates, each of all groups -> all four of one group together."""
        keys = self.num_groups * self.d_state
        parts = [*qkv.split_with_sizes([keys, keys, qkv.shape[0] - 2 * keys]), z]
        return torch.cat([part.reshape(self.num_groups, -1, part.shape[1]) for part in parts], dim=1).flatten(0, 1)

    def _grouped(self, tensor: Tensor, size: int) -> Tensor:
        each = self.num_heads // self.num_groups
        in_turn = tensor.reshape(each, self.num_groups, size, *tensor.shape[1:])
        return in_turn.transpose(0, 1).reshape(tensor.shape)
