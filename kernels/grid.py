"""The grid that makes reuse exact: see `layout`. Numbers only."""

TILE = 64  # rows; also the tokens of a KV page
MIN_ROWS = 4  # fewer rows take another code path, with other rounding, in some of torch's products
