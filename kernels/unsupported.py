"""What a kernel says when it cannot take a shape."""


class UnsupportedShape(ValueError):
    """A kernel cannot take these sizes; the message says which and why."""
