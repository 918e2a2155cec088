"""What requests and replies say about entries of the cache that one model makes from another's, in all dialects."""

from pydantic import BaseModel

from hybrid_cache.api.server.schemas.sharing import Sharing, SharingReport
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.text.answer import Answer
from hybrid_cache.api.text.generation import Shared

NOTHING = "no other model has more of this prompt that would lose at most {:g} nats a token"


def max_loss_of(settings: ServerSettings, asked: BaseModel) -> float | None:
    """What a request allows to be lost, in nats a token; None where its bits must be the model's own."""
    sharing = getattr(asked, "sharing", None)
    if not isinstance(sharing, Sharing):
        return settings.max_loss
    if sharing.fidelity == "exact":
        return None
    return settings.max_loss_asked if sharing.max_loss is None else sharing.max_loss


def shown_sharing(answer: Answer) -> dict[str, object]:
    """The field of a reply, `sharing`: where a request allowed a loss, or something came from another model. Several
    prompts have a list.
    """
    reports = [_report(each).model_dump(exclude_none=True) for each in answer.shared]
    return {"sharing": reports[0] if len(reports) == 1 else reports} if reports else {}


def _report(shared: Shared) -> SharingReport:
    received = shared.received
    if received is None:
        return SharingReport(fidelity="exact", why=NOTHING.format(shared.max_loss))
    return SharingReport(
        fidelity="exact" if received.loss is None else "profiled",
        sender=received.sender or shared.first_model,
        tokens=received.end - received.start,
        layers=received.transfer,
        expected_loss=received.loss,
    )
