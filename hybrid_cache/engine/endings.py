"""What the policy was told of requests that have ended, to tell it again when more is known of one.

That an answer called a tool is known once its text has been read, and that its client is gone once the connection is
closed.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from hybrid_cache.cache.policies.signals import Ending, Finish

MOST_ENDINGS = 4096  # the latest


class Endings:
    """Those of one engine, by the id of the request; of several choices, the last one's."""

    def __init__(self, tell: Callable[[Ending], None]) -> None:
        self._tell = tell
        self._latest: OrderedDict[str, Ending] = OrderedDict()

    def begins(self, request_id: str) -> None:
        """A request with this id has come: what is said of the id from now on is not of an earlier one."""
        self._latest.pop(request_id, None)

    def ended(self, request_id: str, ending: Ending | None) -> None:
        """The policy was told of the end of a request, unless that is None. Of a client that is gone, all is said."""
        if ending is not None and ending.finish is not Finish.GONE:
            self._latest[request_id] = replace(ending, again=True)
            if len(self._latest) > MOST_ENDINGS:
                self._latest.popitem(last=False)

    def called(self, request_id: str) -> None:
        """The answer of a request that has ended was a tool call. Unknown ids are ignored."""
        ending = self._latest.get(request_id)
        if ending is not None and ending.finish is not Finish.TOOL_CALL:
            self._amend(request_id, replace(ending, finish=Finish.TOOL_CALL))

    def left(self, request_id: str) -> None:
        """The client of a request that has ended has closed its connection. Unknown ids are ignored."""
        ending = self._latest.get(request_id)
        if ending is not None and ending.connected is not False:
            self._amend(request_id, replace(ending, connected=False))

    def _amend(self, request_id: str, ending: Ending) -> None:
        self._latest[request_id] = ending
        self._tell(ending)
