"""What has changed since an earlier request, in Anthropic's words: `diagnostics.cache_miss_reason`.

A client names the message that answered the earlier request. Both requests must have had `diagnostics`. What a request
consists of is known by digests, a bounded number of them; marks for the cache count for nothing. Where nothing has
changed, there is no reason here, though the cache may have lost the prefix since: `cache_report` says that.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from pydantic import BaseModel

from hybrid_cache.api.server.gate import body_size
from hybrid_cache.api.server.schemas.anthropic import Message, MessagesRequest
from hybrid_cache.api.server.tenants import current_tenant_or
from hybrid_cache.api.text.text_work import TextWork

MOST_REQUESTS = 4096
REQUESTS_BYTES = 4 << 20  # most that these take; measured: 2.6 MiB


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a request consists of."""

    tenant: str
    model: str
    system: bytes
    tools: bytes
    others: bytes  # fields beside these that change a prompt
    messages: bytes
    num_messages: int
    messages_before: bytes  # of the messages that the earlier request had; empty if it is not known


@dataclass(frozen=True, slots=True)
class Earlier:
    """A request that was answered."""

    fingerprint: Fingerprint
    num_tokens: int  # of its prompt


class Diagnoses:
    """The latest requests, by the messages that answered them."""

    def __init__(self, most: int = MOST_REQUESTS) -> None:
        self._most = most
        self._requests: OrderedDict[str, Earlier] = OrderedDict()

    def find(self, message_id: str, tenant: str) -> Earlier | None:
        """The request that a message has answered; None if it was none of this tenant's."""
        earlier = self._requests.get(message_id)
        return earlier if earlier is not None and earlier.fingerprint.tenant == tenant else None

    def keep(self, message_id: str, request: Earlier) -> None:
        self._requests[message_id] = request
        if len(self._requests) > self._most:
            self._requests.popitem(last=False)


def fingerprint(asked: MessagesRequest, tenant: str, earlier: Earlier | None) -> Fingerprint:
    """Reads all of a request: to be called on a thread if it is large."""
    num_before = earlier.fingerprint.num_messages if earlier else len(asked.messages) + 1
    before = asked.messages[:num_before] if num_before <= len(asked.messages) else None
    return Fingerprint(
        tenant=tenant,
        model=asked.model,
        system=_digest(asked.system),
        tools=_digest(asked.tools or []),
        others=_digest([asked.thinking, asked.tool_choice]),
        messages=_digest(_turns(asked.messages)),
        num_messages=len(asked.messages),
        messages_before=b"" if before is None else _digest(_turns(before)),
    )


@dataclass(frozen=True, slots=True)
class Changes:
    """A request beside an earlier one, if it names one."""

    now: Fingerprint
    named: bool  # it names one
    earlier: Earlier | None  # if that is known

    def diagnosis(self, cached: int) -> dict[str, object] | None:
        """The field `diagnostics` of a reply; None where nothing has changed. cached: tokens that were read"""
        if not self.named:
            return None
        if self.earlier is None:
            return {"cache_miss_reason": {"type": "previous_message_not_found"}}
        before, now = self.earlier.fingerprint, self.now
        changes = {
            "model_changed": before.model != now.model,
            "system_changed": before.system != now.system,
            "tools_changed": before.tools != now.tools,
            "messages_changed": before.messages != now.messages_before,
        }
        for name, changed in changes.items():
            if changed:
                missed = max(self.earlier.num_tokens - cached, 0)
                return {"cache_miss_reason": {"type": name, "cache_missed_input_tokens": missed}}
        return {"cache_miss_reason": {"type": "unavailable"}} if before.others != now.others else None


async def changes_of(work: TextWork, diagnoses: Diagnoses, asked: MessagesRequest) -> Changes | None:
    """None if nobody wants to know."""
    if asked.diagnostics is None:
        return None
    tenant, name = current_tenant_or(None), asked.diagnostics.previous_message_id
    earlier = diagnoses.find(name, tenant) if name is not None else None
    now = await work.run(tenant, body_size(), lambda: fingerprint(asked, tenant, earlier))
    return Changes(now, name is not None, earlier)


def _turns(messages: Sequence[Message]) -> list[object]:
    """A text is the same as one block of it."""
    return [
        [m.role, [{"type": "text", "text": m.content}] if isinstance(m.content, str) else m.content] for m in messages
    ]


def _digest(value: object) -> bytes:
    text = json.dumps(value, default=_plain, ensure_ascii=False, sort_keys=True)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _plain(model: object) -> object:
    assert isinstance(model, BaseModel)
    return {name: value for name, value in model if name != "cache_control" and value is not None}
