"""C's structures and functions as ctypes sees them; `native/*.c` and `native/*.h` declare the same."""

import ctypes
from ctypes import c_float, c_int64, c_void_p

LAYOUT_SIZES = ("num_rows", "num_tiles", "num_decode", "decode_row", "num_chunks", "num_captures", "max_pages")
LAYOUT_TENSORS = (
    *("chunk_row", "chunk_tile", "chunk_tiles", "chunk_start", "chunk_len", "chunk_slot", "chunk_fresh"),
    "tile_start",
    *("capture_chunk", "capture_tiles", "capture_slot", "decode_slot", "decode_len", "page_table", "kv_rows"),
)
DRAWS = ("temperature", "top_p", "min_p", "top_k", "point")
SHARING_TENSORS = ("decode_order", "trees", "segments")


class Layout(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in LAYOUT_SIZES),
        *((name, c_void_p) for name in (*LAYOUT_TENSORS, *SHARING_TENSORS)),
        ("num_trees", c_int64),
    )


class Mamba2(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_heads", "head_dim", "d_state", "num_groups")),
        *((name, c_int64) for name in ("width", "norm_group", "norm_first")),
        *((name, c_float) for name in ("norm_eps", "dt_min", "dt_max")),
        *((name, c_void_p) for name in ("taps", "bias", "dt_bias", "A", "D", "norm")),
    )


class Attention(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_heads", "num_kv_heads", "head_dim")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride", "window")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("key_page_size", "value_page_size")),
    )


class Scan(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("channels", "d_state")),
        *((name, c_void_p) for name in ("A", "D", "dt_bias", "x", "dt", "B", "C", "z")),
        *((name, c_int64) for name in ("x_stride", "dt_stride", "b_stride", "c_stride", "z_stride")),
    )


class Rows(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("row", c_int64), ("head", c_int64))


class Heads(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_heads", "num_groups", "head_dim", "d_state")),
        *((name, Rows) for name in ("q", "k", "v", "g", "beta")),
    )


class Draws(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in DRAWS)


class Pages(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("page", c_int64), ("row", c_int64))


class Unit(ctypes.Structure):
    _fields_ = (
        ("channels", c_int64),
        *((name, c_void_p) for name in ("decay", "x", "input_gate", "gate")),
        *((name, c_int64) for name in ("x_stride", "input_gate_stride", "gate_stride")),
    )


class Linear(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("in_features", "out_features", "bits")),
        *((name, c_void_p) for name in ("weight", "bias", "beside")),
    )


class LowRank(ctypes.Structure):
    _fields_ = (("rank", c_int64), ("A", c_void_p), ("B", c_void_p))


class AdaptedRows(ctypes.Structure):
    _fields_ = (("num_rows", c_int64), ("num_blocks", c_int64), ("blocks", c_void_p), ("rows", c_void_p))


class Beside(ctypes.Structure):
    _fields_ = (
        ("adapted", c_void_p),
        *((name, c_int64) for name in ("in_features", "out_features", "num_parts")),
        ("parts", c_void_p),
    )


class Residual(ctypes.Structure):
    _fields_ = (
        ("hidden", c_void_p),
        *((name, c_int64) for name in ("num_rows", "size")),
        ("norm", c_void_p),
        *((name, c_float) for name in ("eps", "multiplier")),
        *((name, c_int64) for name in ("max_threads", "min_values")),
    )


class Experts(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("num_experts", "num_choices", "hidden", "inner")),
        *((name, c_void_p) for name in ("w_in", "w_out")),
        *((name, c_int64) for name in ("max_threads", "min_values")),
    )


# Argument types: p pointer, i int64, f float.
_SIGNATURES = {
    "mamba2": "pppppipipii",
    "mamba2_scratch": "ppi",
    "attention": "pppppppii",
    "attention_scratch": "ppi",
    "find_shared_prefixes": "pi",
    "causal_conv": "ppiiippppiiii",
    "mamba1_scan": "ppppipii",
    "mamba1_scratch": "pi",
    "linear_attention": "ppppipii",
    "linear_attention_scratch": "pi",
    "gated_delta": "ppppipii",
    "kimi_delta": "ppppipii",
    "delta_scratch": "pi",
    "rg_lru": "ppppiii",
    "linear": "ppiipi",
    "linear_supported": "",
    "low_bit_supported": "",
    "add_low_rank": "ppipi",
    "add_gated_mlp": "pppp",
    "add_gated_mlp_scratch": "ppp",
    "add_mamba2": "ppppppipipp",
    "add_mamba2_scratch": "ppppp",
    "experts": "ppiipppp",
    "experts_scratch": "pi",
    "sample": "piipppi",
    "sample_scratch": "ii",
    "mask_tokens": "piippiii",
    "log_sum_exp": "piipppi",
    "rms_norm": "piiipfpii",
    "silu_mul": "piiipii",
    "rotary": "piiiipppii",
    "relocate_keys": "ppppipppiiiii",
}
_TYPES = {"p": c_void_p, "i": c_int64, "f": c_float}


def bind(library: ctypes.CDLL) -> None:
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [_TYPES[letter] for letter in signature]
        function.restype = c_int64 if name.endswith(("_scratch", "_supported")) else None
