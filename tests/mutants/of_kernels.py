"""Faults of the portable attention, convolution and scan: what a row sees, and what is left for the next."""

from functools import partial

from tests.mutants.mutant import Mutant

REFERENCE = "tests/kernels/test_against_reference.py::"
PLAIN = (REFERENCE + "test_a_backend_agrees_with_the_reference[torch-attention-fp32]",)
WINDOW = (REFERENCE + "test_a_backend_agrees_with_the_reference[torch-attention window 20-fp32]",)
CONV = (REFERENCE + "test_a_backend_agrees_with_the_reference[torch-conv-fp32]",)
MAMBA2 = (REFERENCE + "test_a_backend_agrees_with_the_reference[torch-mamba2-fp32]",)
DELTA = (REFERENCE + "test_a_backend_agrees_with_the_reference[torch-delta-fp32]",)
KEYS = tuple(
    REFERENCE + f"test_relocated_keys_agree_with_the_reference[torch-fp32-{case}]"
    for case in ("None-0", "inv_freq1-0", "inv_freq2-6")
)

torch_ops = partial(Mutant, "kernels/torch_ops.py")

MUTANTS = [
    torch_ops(
        "a window is one too wide in prefill",
        "visible &= positions > positions[-TILE:, None] - window",
        "visible &= positions >= positions[-TILE:, None] - window",
        WINDOW,
    ),
    torch_ops(
        "a window is one too wide in decode",
        "first = 0 if window is None else max(0, run.end - window)",
        "first = 0 if window is None else max(0, run.end - window - 1)",
        WINDOW,
    ),
    torch_ops(
        "a row does not see itself in decode",
        "keys[:, first : run.end], values[:, first : run.end]",
        "keys[:, first : run.end - 1], values[:, first : run.end - 1]",
        PLAIN,
    ),
    torch_ops(
        "a row sees the one behind it",
        "visible = positions <= positions[-TILE:, None]",
        "visible = positions <= positions[-TILE:, None] + 1",
        PLAIN,
    ),
    torch_ops("rows that nobody wrote are read", "    rows[num_tokens:] = 0.0\n", "", PLAIN),
    torch_ops(
        "rows of no page are written to the last one",
        "rows = (layout.kv_rows >= 0).nonzero()",
        "rows = (layout.kv_rows >= -1).nonzero()",
        PLAIN,
    ),
    torch_ops(
        "a key that is moved is rotated the wrong way",
        "_rotary(keys[:, :, rotated], delta, inv_freq)",
        "_rotary(keys[:, :, rotated], -delta, inv_freq)",
        KEYS,
    ),
    torch_ops(
        "all of a key is rotated, the part without positions too",
        "rotated = slice(first, first + 2 * len(inv_freq))",
        "rotated = slice(0, 2 * len(inv_freq))",
        KEYS,
    ),
    torch_ops("values are not moved", "        kv.v[target] = kv.v[source]\n", "", KEYS),
    torch_ops(
        "a window of a convolution is one row old",
        "conv[slot] = rows[num_tokens : num_tokens + width - 1]",
        "conv[slot] = rows[max(num_tokens - 1, 0) :][: width - 1]",
        CONV,
    ),
    torch_ops(
        "a prompt that is resumed begins with an empty window",
        "window = torch.zeros_like(conv[0]) if run.fresh else conv[run.slot]",
        "window = torch.zeros_like(conv[0])",
        CONV,
    ),
    torch_ops(
        "padding moves the state",
        "    tile = rows.new_zeros((TILE, *rows.shape[1:]))\n",
        "    tile = rows.new_ones((TILE, *rows.shape[1:]))\n",
        MAMBA2,
    ),
    torch_ops(
        "a state is that of the tile before",
        "        h, y_tile = scan_tile(h, ",
        "        _, y_tile = scan_tile(h, ",
        MAMBA2,
    ),
    torch_ops(
        "a delta net does not decay in decode",
        "h = state[layout.decode_slot] * g[rows, :, None].exp()",
        "h = state[layout.decode_slot] * 1.0",
        DELTA,
    ),
]
