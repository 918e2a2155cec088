"""Messages on their way into the store: parts of prompts, encoded from zero, and answers that become messages."""

from collections.abc import Iterator

import numpy as np

from hybrid_cache.cache.books import Books
from hybrid_cache.choreography.arrangement import Arrangement, closed, message_id
from hybrid_cache.choreography.compiler import Compiler, key_of
from hybrid_cache.choreography.stage import Stage
from hybrid_cache.engine.prefills import Prefills
from hybrid_cache.engine.sequence import Prefill, Sequence


class Encodings:
    """The messages in the making; each holds a lease of its own."""

    def __init__(self, cache: Books, compiler: Compiler, stage: Stage, prefills: Prefills, most: int) -> None:
        """most: messages that hold room at a time; a step computes no more"""
        self._cache = cache
        self._compiler = compiler
        self._stage = stage
        self._prefills = prefills
        self.most = most
        self._messages: list[Prefill] = []

    def __len__(self) -> int:
        return len(self._messages)

    def __iter__(self) -> Iterator[Prefill]:
        return iter(self._messages)

    def __contains__(self, prefill: Prefill) -> bool:
        return prefill in self._messages

    def keep_answer(self, sequence: Sequence) -> None:
        """Has the last tokens of an arranged answer computed, and the answer stored as a message."""
        prefill, arrangement = sequence.prefill, sequence.prefill.arrangement
        lease, program = prefill.lease, prefill.program
        if arrangement is None or arrangement.closing is None or program is None or lease is None:
            return
        tokens = closed(sequence.all_tokens(), arrangement.closing)
        name = message_id(prefill.namespace, tokens[arrangement.answer_start :], arrangement.context)
        if len(tokens) - arrangement.answer_start <= arrangement.seam or not self._cache.extend(lease, len(tokens)):
            return
        last = self._stage.answer(program, key_of(prefill.namespace, name, arrangement.seam), len(tokens), sequence.fed)
        if last is not None:
            message = Prefill(prefill.namespace, tokens, False, False, lease=lease, computed=sequence.fed, program=last)
            prefill.lease = None
            self._messages.append(message)

    def end(self, message: Prefill) -> None:
        self._messages.remove(message)
        self._prefills.release(message)

    def wanted(self, prefill: Prefill) -> bool:
        """Has the parts stored that a prompt wants encoded from zero -> whether it has to wait for any."""
        arrangement = prefill.arrangement
        if arrangement is None or prefill.in_place:
            return False
        starts = np.cumsum([0, *(part.num_tokens for part in arrangement.parts)])
        for index in self._compiler.missing(prefill.namespace, arrangement):
            key = key_of(prefill.namespace, arrangement.parts[index].id, arrangement.seam)
            if self._compiler.is_making(key) or key in prefill.refused:
                continue
            if len(self._messages) >= self.most:
                return True
            tokens = prefill.tokens[starts[index] : starts[index + 1]]
            begun = self._begin(Prefill(prefill.namespace, tokens, False, False), arrangement, index)
            if not begun and self._is_making_any(prefill.namespace, arrangement):
                return True  # there is more room when they are done
            prefill.refused.add(key)  # it is tried once
        return self._is_making_any(prefill.namespace, arrangement)

    def _is_making_any(self, namespace: str, arrangement: Arrangement) -> bool:
        keys = (key_of(namespace, part.id, arrangement.seam) for part in arrangement.parts if part.id)
        return any(self._compiler.is_making(key) for key in keys)

    def _begin(self, message: Prefill, arrangement: Arrangement, index: int) -> bool:
        """Takes room to encode one part from zero -> whether there was any."""
        nothing = self._cache.match(message.namespace, message.tokens[:0])
        lease = self._cache.acquire(nothing, message.keys, publish=False)
        program = None if lease is None else self._compiler.encoding(message.namespace, arrangement, index)
        if lease is None or program is None:
            if lease is not None:
                self._cache.release(lease)
            return False
        message.lease, message.program = lease, program
        self._stage.clear(lease)
        self._messages.append(message)
        return True
