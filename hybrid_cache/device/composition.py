"""Carries out what choreography asks of the memory: rows relocated, effects noted, composed and kept."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.choreography.arrangement import Composition
from hybrid_cache.choreography.commands import Clear, Command, Compose, KeepEffect, Relocate, StoredEffect
from hybrid_cache.device.compose import compose
from hybrid_cache.device.effects import Effect, EffectMap, Numbers, Recorder, StatePart
from hybrid_cache.device.memory import CacheMemory
from hybrid_cache.kernels.ops import Ops, StateTensors
from hybrid_cache.work import Noted

MOST_TOGETHER = 16  # messages whose effects are composed in one operation, where one after the other gives the same


class Composer:
    """The effects of one memory.

    maps: where each model, by its fingerprint, has its states and keys, and what tokens do to them; each is filled by
    the first pass of its model that notes effects
    """

    def __init__(self, memory: CacheMemory, ops: Ops, num_sums: int) -> None:
        """num_sums: numbers of an effect that add up over tokens"""
        self.maps = defaultdict[str, EffectMap](EffectMap)
        self._memory = memory
        self._ops = ops
        self._num_sums = num_sums
        self._states = [t for t in memory.tensors if isinstance(t, StateTensors)]
        self._making: dict[int, Effect] = {}  # by the first item that it is noted in

    def recorder(self, model: str, noted: Iterable[tuple[slice, Noted]]) -> Recorder | None:
        """Takes notes of a model's pass: rows of the batch, and what they belong to. None if there is nothing to note.

        model: its fingerprint
        """
        runs = [(rows, self._effect(each)) for rows, each in noted]
        return Recorder(self.maps[model], runs) if runs else None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is noted meanwhile belongs to no message."""
        making, self._making = self._making, {}
        yield
        self._making = making

    def alias(self, model: str, others: Iterable[str]) -> None:
        """Other models have their states and keys where this one has them: it computes their rows."""
        for other in others:
            self.maps[other] = self.maps[model]

    def forget(self, model: str) -> None:
        """To be called when nothing of a model is stored any more."""
        self.maps.pop(model, None)

    def run(self, command: Command) -> None:
        match command:
            case Clear():
                for tensors in self._states:
                    tensors.conv[command.slot] = 0
                    tensors.state[command.slot] = 0
            case Relocate():
                self._relocate(command)
            case Compose():
                self._compose(command)
            case KeepEffect():
                self._keep(command)

    def effects(self, model: str, slot: int, items: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Copies of (P, S) of a stored message, one pair for each state: P as its transition has it, S [*shape]."""
        numbers = Numbers(self._memory.numbers, items)
        return [(part.of(numbers), part.state[slot].clone()) for part in self.maps[model].states]

    def _effect(self, noted: Noted) -> Effect:
        if not noted.items:  # the model has no states
            return Effect(Numbers(self._memory.numbers, ()), 0)
        if noted.first:
            self._making[noted.items[0]] = Effect(Numbers(self._memory.numbers, noted.items), self._num_sums)
        return self._making[noted.items[0]]

    def _relocate(self, command: Relocate) -> None:
        moved = command.relocations
        keys = self.maps[command.model].keys
        device = keys[0].kv.k.device
        source, target, rotation = (
            torch.from_numpy(np.concatenate(rows)).to(device)
            for rows in (
                [m.sources for m in moved],
                [m.targets for m in moved],
                [np.full(len(m.sources), m.rotation) for m in moved],
            )
        )
        for rows in keys:
            self._ops.relocate_keys(rows.kv, source, target, rotation, rows.inv_freq, rows.first)

    def _compose(self, command: Compose) -> None:
        effects, slot = command.effects, command.slot
        most = MOST_TOGETHER if command.how is Composition.ORDERED else len(effects)
        for first in range(0, len(effects), most):
            some = effects[first : first + most]
            states = self.maps[command.model].states
            self._compose_states(states, slot, command.how, some, from_zero=command.from_zero and not first)
        for tensors in self._states:
            if command.from_zero:
                tensors.conv[slot] = 0
            long = [i for i, effect in enumerate(effects) if effect.num_tokens >= tensors.conv.shape[1]]
            for effect in effects[long[-1] if long else 0 :]:  # what came before a long one has left the window
                slide(tensors.conv[slot], tensors.conv[effect.slot], effect.num_tokens)

    def _compose_states(
        self,
        states: Sequence[StatePart],
        slot: int,
        how: Composition,
        effects: Sequence[StoredEffect],
        *,
        from_zero: bool,
    ) -> None:
        numbers = [Numbers(self._memory.numbers, effect.items) for effect in effects]
        for part in states:
            sums = [part.state[effect.slot] for effect in effects]
            compose(how, part.transition, part.state[slot], part.of_all(numbers), sums, from_zero=from_zero)

    def _keep(self, command: KeepEffect) -> None:
        if command.items:
            self._making.pop(command.items[0]).flush()
        if command.base is not None:
            numbers = Numbers(self._memory.numbers, command.items)
            for part in self.maps[command.model].states:
                part.transition.take_away(part.state[command.slot], part.of(numbers), part.state[command.base])


def slide(window: Tensor, later: Tensor, num_tokens: int) -> None:
    """Moves a window [K - 1, channels] on by a message of num_tokens, whose own window is `later` [K - 1, channels]."""
    width = len(window)
    if num_tokens >= width:
        window.copy_(later)
    elif num_tokens:
        window.copy_(torch.cat([window[num_tokens:], later[width - num_tokens :]]))
