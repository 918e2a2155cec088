"""`TorchOps` whose elementwise groups, and the tile of the Mamba-2 scan, go through torch.compile.

What stays: matrix products, attention, the delta rules, the loops over tiles and tokens. A group that cannot be
compiled, for want of a compiler say, runs as plain torch.
"""

from collections.abc import Callable
from typing import Any

import torch

from hybrid_cache.kernels.torch_ops import P, R, TorchOps


class CompiledOps(TorchOps):
    """See the module. The first call of each group compiles it, which takes seconds.

    reasons: group -> why it was not compiled
    """

    name = "torch-compile"

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """backend: of torch.compile"""
        super().__init__()
        self.reasons: dict[str, str] = {}
        self._backend = backend
        self._compiled: dict[Callable[..., object], Callable[..., Any]] = {}

    def _fused(self, part: Callable[P, R]) -> Callable[P, R]:
        compiled: Callable[P, R] | None = self._compiled.get(part)
        if compiled is None:
            compiled = self._compiled[part] = self._compile(part)
        return compiled

    def _compile(self, part: Callable[P, R]) -> Callable[P, R]:
        attempt = torch.compile(part, fullgraph=True, dynamic=True, backend=self._backend)

        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return attempt(*args, **kwargs)
            except RuntimeError as error:  # all that torch's compilers raise; an error of the group itself comes again
                result = part(*args, **kwargs)
                cause = getattr(error, "inner_exception", error)
                self.reasons[part.__name__.removeprefix("_")] = f"{type(cause).__name__}: {cause}".splitlines()[0]
                self._compiled[part] = part
                return result

        return run
