"""What a request says of the task that it belongs to: which tools may be called, and how long they take.

The header `x-tool-time-ms` is a hint, as the session is: it changes no answer, only what is kept while a tool runs.
"""

import re
from collections.abc import Mapping
from hashlib import blake2b

import numpy as np
from pydantic import BaseModel

from hybrid_cache.api.server.errors import quoted
from hybrid_cache.api.text.answer_parser import AnswerForm
from hybrid_cache.api.text.generation import GenerationSpec
from hybrid_cache.engine.engine import MOST_TOOL_S
from hybrid_cache.errors import RequestError

HEADER = "x-tool-time-ms"
MOST_MS = MOST_TOOL_S * 1000
NUMBER = re.compile(r"[0-9]{1,12}(\.[0-9]{0,12})?")
KIND_BYTES = 8
SYSTEM = ("system", "developer")  # roles of a message that a program writes


def tool_time_of(headers: Mapping[str, str]) -> float | None:
    """Seconds that the tools take which the answer may call; None if the client says nothing of them.

    Raises RequestError for a header that is no time, or one out of bounds.
    """
    said = headers.get(HEADER, "").strip()
    if not said:
        return None
    if not NUMBER.fullmatch(said) or float(said) > MOST_MS:
        raise RequestError(
            f"the header {HEADER} is {quoted(said)}, must be a number of milliseconds in [0, {MOST_MS}]", param=HEADER
        )
    return float(said) / 1000


def template_of(asked: BaseModel, spec: GenerationSpec) -> str:
    """As in `Request`: a digest of the dialect, the tools that may be called, and the system message; empty without
    tools and system message.
    """
    kind, first = kind_of(asked, spec.form), next(iter(spec.prompt.boundaries), None)
    system = spec.prompt.tokens[: first.position] if first is not None and first.role in SYSTEM else ()
    if not (kind or len(system)):
        return ""
    named = f"{type(asked).__name__}\0{kind}\0".encode() + np.asarray(system, np.int32).tobytes()
    return blake2b(named, digest_size=KIND_BYTES).hexdigest()


def kind_of(asked: BaseModel, form: AnswerForm) -> str:
    """As in `Request`: a digest of the dialect and the tools that may be called; empty where there are none."""
    if form.tools is None:
        return ""
    named = "\0".join([type(asked).__name__, *sorted(form.types)])
    return blake2b(named.encode("utf-8", "surrogatepass"), digest_size=KIND_BYTES).hexdigest()
