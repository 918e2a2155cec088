"""Ray Serve's router of requests, as it asks a fleet. It is made in each process that calls replicas."""

import time

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from hybrid_cache.api.ray.call import Call
from hybrid_cache.api.ray.fleet import mark_of


class UsablePrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Ranks replicas by what they can resume of a request, see `fleet`. Anything but our calls goes anywhere."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        call = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if not isinstance(call, Call) or call.fleet is None:
            return [candidate_replicas]
        by_mark = {mark_of(each.replica_id.unique_id): each for each in candidate_replicas}
        now = time.monotonic()
        call.fleet.hear({mark: each.routing_stats or {} for mark, each in by_mark.items()}, now)
        return [[by_mark[mark]] for mark in call.fleet.rank(call, now) if mark in by_mark]
