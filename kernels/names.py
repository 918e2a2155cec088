"""What can be said of backends without torch."""

BACKENDS = ("native", "torch", "torch-compile", "triton", "mamba_ssm")
DTYPES = ("auto", "float32", "bfloat16")  # that rows may be computed and cached in
