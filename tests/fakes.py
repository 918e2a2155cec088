"""A model whose answer a reader can work out by hand, and which notices when the cache mixes anything up.

`SumModel` keeps the sum of all tokens twice: in its recurrent state, and as the sum over its KV rows. The next token is
`(sum + length) % V`. If state and pages ever disagree, or hold what an honest run would not, the answer is wrong.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hybrid_cache.device.batch import CacheTensors, ForwardBatch
from hybrid_cache.kernels import runs
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.ops import KVTensors, StateTensors
from hybrid_cache.kernels.torch_ops import TorchOps
from hybrid_cache.spec import AttentionSpec, CacheSpec, PrefillCost, StateSpec
from hybrid_cache.tokens import TokenArray

VOCAB = 997


def sum_model_answer(prompt: Sequence[int] | TokenArray, num_tokens: int) -> list[int]:
    """What `SumModel` says after a prompt, greedily."""
    tokens = [int(t) for t in prompt]
    for _ in range(num_tokens):
        tokens.append((sum(tokens) + len(tokens)) % VOCAB)
    return tokens[len(prompt) :]


def written_rows(batch: ForwardBatch, kv: KVTensors) -> tuple[Tensor, Tensor]:
    """Writes tokens and positions to their rows -> all keys and values, [pages, TILE] each."""
    keys, values = kv.k[:, :, 0, 0], kv.v[:, :, 0, 0]
    for row, place in enumerate(batch.layout.kv_rows.tolist()):
        if place >= 0:
            keys[place // TILE, place % TILE] = batch.token_ids[row]
            values[place // TILE, place % TILE] = batch.positions[row]
    return keys, values


class SumModel:
    """See the module docstring. State slots hold [sum]; K holds the token, V the position."""

    cache_spec = CacheSpec(
        layers=(
            AttentionSpec(num_kv_heads=1, head_dim=2, dtype=torch.float32),
            StateSpec(conv_shape=(1, 2), state_shape=(600,), conv_dtype=torch.float32, effect=(600,)),
        ),
        hidden_size=2,
        hidden_dtype=torch.float32,
    )
    prefill_cost = PrefillCost(per_token=1000.0, per_token_per_position=1.0)
    vocab_size = VOCAB
    max_length = 4096
    fingerprint = "sum-model"
    chain = ()
    layers = ()
    device = torch.device("cpu")
    ops = TorchOps()
    packs = True
    fidelities = ()
    commutes = True
    invocation = ()

    def __init__(self) -> None:
        self.rows_computed = 0  # rows of real tokens, padding left out

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        kv, states = cache
        assert isinstance(kv, KVTensors)
        assert isinstance(states, StateTensors)
        layout, hidden = batch.layout, torch.full((batch.layout.num_rows, 2), torch.nan)
        keys, values = written_rows(batch, kv)
        batch.pause()

        def finish_row(row: int, state: Tensor, pages: Tensor) -> None:
            position = int(batch.positions[row])
            seen = keys[pages].flatten()[: position + 1]
            assert torch.equal(values[pages].flatten()[: position + 1], torch.arange(position + 1.0))
            assert float(seen.sum()) == float(state[0]), "state and pages tell different stories"
            hidden[row] = torch.tensor([float(state[0]), position + 1.0])
            self.rows_computed += 1

        chunks = runs.read(layout).chunks
        for c in range(len(layout.chunk_slot)):
            slot, first = int(layout.chunk_slot[c]), int(layout.chunk_row[c])
            state = torch.zeros(600) if layout.chunk_fresh[c] else states.state[slot].clone()
            captures = dict(chunks[c].captures)
            for i in range(int(layout.chunk_len[c])):
                assert int(batch.positions[first + i]) == int(layout.chunk_start[c]) + i
                state += float(batch.token_ids[first + i])
                finish_row(first + i, state, layout.page_table[c])
                if i + 1 in captures:
                    states.state[captures[i + 1]] = state
            states.state[slot] = state
        batch.pause()
        first = layout.decode_row
        for d in range(layout.num_decode):
            state = states.state[int(layout.decode_slot[d])]
            assert int(layout.decode_len[d]) == int(batch.positions[first + d]) + 1
            state += float(batch.token_ids[first + d])
            finish_row(first + d, state, layout.page_table[len(layout.chunk_slot) + d])
        return hidden[batch.output_rows]

    def logits(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(len(hidden), VOCAB)
        best = (hidden[:, 0] + hidden[:, 1]).long() % VOCAB
        logits[torch.arange(len(hidden)), best] = 10.0
        return logits


def tokens_of(seed: int, length: int) -> TokenArray:
    """Seeded random tokens, int32 [length]."""
    return np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)


class PageSumModel(SumModel):
    """The same with attention alone: K holds the token, V the position."""

    cache_spec = CacheSpec(
        layers=(AttentionSpec(num_kv_heads=1, head_dim=2, dtype=torch.float32),),
        hidden_size=2,
        hidden_dtype=torch.float32,
    )
    fingerprint = "page-sum-model"

    def forward(self, batch: ForwardBatch, cache: CacheTensors) -> Tensor:
        (kv,) = cache
        assert isinstance(kv, KVTensors)
        layout, hidden = batch.layout, torch.full((batch.layout.num_rows, 2), torch.nan)
        keys, values = written_rows(batch, kv)
        batch.pause()
        rows = [
            (int(first) + i, c)
            for c, (first, length) in enumerate(zip(layout.chunk_row, layout.chunk_len, strict=True))
            for i in range(int(length))
        ]
        rows += [(layout.decode_row + i, len(layout.chunk_row) + i) for i in range(layout.num_decode)]
        for row, of in rows:
            position, pages = int(batch.positions[row]), layout.page_table[of]
            seen = keys[pages].flatten()[: position + 1]
            assert torch.equal(values[pages].flatten()[: position + 1], torch.arange(position + 1.0))
            hidden[row] = torch.tensor([float(seen.sum()), position + 1.0])
            self.rows_computed += 1
        return hidden[batch.output_rows]
