"""The JSON of entries of the cache that one model makes from another's."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Sharing(BaseModel):
    """max_loss: what a profile may expect to be lost in the answer, in nats a token; the server's if left out"""

    model_config = ConfigDict(extra="forbid", strict=True)

    fidelity: Literal["exact", "profiled"] = "exact"
    max_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class SharingReport(BaseModel):
    """What was made of a prompt from another model's entries; `exact`: with the bits of the model's own."""

    fidelity: Literal["exact", "profiled"]
    sender: str | None = None  # the other model's name
    tokens: int = 0  # of the prompt, made from the other model's now
    layers: str | None = None  # what was done with each layer
    expected_loss: float | None = None  # in nats a token of the answer, of all that is profiled in its prefix
    why: str | None = None  # nothing was shared where it might have been
