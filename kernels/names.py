"""What can be said of backends without torch."""

BACKENDS = ("native", "torch", "torch-compile", "triton", "mamba_ssm")
DTYPES = ("auto", "float32", "bfloat16")  # that rows may be computed and cached in
WEIGHTS = ("auto", "bf16", "int8", "int4")  # that projections may be multiplied with
CODED = ("int8", "int4")  # those that are rounded when they are read
STORED = ("bfloat16", "float32", "float16")  # that weights may be converted to
LEAST_CONTEXT = 256  # tokens, four tiles, with room for the prompts of the check before a model is served
