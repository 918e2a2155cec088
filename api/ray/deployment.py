"""The application as Ray Serve runs it: an ingress, and replicas behind a router of ours.

Ray's HTTP proxy -> Door (reads bodies, makes keys, tries again) -> UsablePrefixRouter -> Replica (a whole server)
"""

import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack

from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message

from hybrid_cache.api.ray.arguments import Placement, options_of, parse
from hybrid_cache.api.ray.call import Call
from hybrid_cache.api.ray.fleet import Fleet, mark_of
from hybrid_cache.api.ray.ingress import Gone, ingress
from hybrid_cache.api.ray.replica import Server
from hybrid_cache.api.ray.router import UsablePrefixRouter
from hybrid_cache.api.server.logs import log_stream, logging_to
from hybrid_cache.api.server.process import ServeOptions, assemble

STATS_S = 1.0  # between two looks at what replicas hold
SPARE = 64  # requests that wait in a replica beside those of its engine, so that it refuses the next one itself
ENDING_S = 10.0  # beside what the server gives running requests
DOOR_CPUS = 0.1
MOST_AT_A_DOOR = 10_000


class Replica:
    """A server in an actor."""

    async def __init__(self, words: Sequence[str]) -> None:  # type: ignore[misc]  # Ray awaits it
        options = options_of(words)
        self._open = AsyncExitStack()
        self._open.enter_context(logging_to(log_stream(), options.log))
        made = assemble(options)
        self._server = Server(made.app, made.engine, mark_of(serve.get_replica_context().replica_id.unique_id))
        await self._server.start()
        self._open.push_async_callback(self._server.aclose)

    async def __call__(self, call: Call) -> AsyncGenerator[list[Message]]:
        async for batch in self._server.answer(call):
            yield batch

    async def check_health(self) -> None:
        """Raises EngineStopped, upon which Ray replaces it."""
        self._server.check()

    async def record_routing_stats(self) -> Mapping[str, object]:
        return {**self._server.stats()}

    async def __del__(self) -> None:
        await self._open.aclose()


class Door:
    """The ingress in an actor."""

    def __init__(self, replicas: DeploymentHandle, words: Sequence[str], secret: bytes) -> None:
        self._replicas, self._options, self._secret = replicas.options(stream=True), options_of(words), secret

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return ingress(self._options, Fleet(), self._reach, self._secret)

    async def _reach(self, call: Call) -> AsyncGenerator[list[Message]]:
        answer = self._replicas.remote(call)
        try:
            async for batch in answer:
                yield batch
        except (RayActorError, RayServeException) as error:
            raise Gone from error
        finally:
            answer.cancel()


def application(given: Mapping[str, object]) -> Application:
    """Raises ConfigError."""
    found = parse(given)
    options = options_of(found.serve)
    replicas = serve.deployment(**replica_options(found.placement, options))(Replica).bind(found.serve)
    door = serve.deployment(
        name="Door",
        num_replicas=found.placement.ingresses,
        max_ongoing_requests=MOST_AT_A_DOOR,
        ray_actor_options={"num_cpus": DOOR_CPUS},
        graceful_shutdown_timeout_s=options.drain_timeout_s + ENDING_S,
    )(serve.ingress()(Door))
    return door.bind(replicas, found.serve, secrets.token_bytes(16))


def replica_options(placement: Placement, options: ServeOptions) -> dict[str, object]:
    """Of the deployment of replicas."""
    scale: dict[str, object] = {"num_replicas": placement.replicas}
    if placement.max_replicas > placement.replicas:
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=placement.replicas,
                max_replicas=placement.max_replicas,
                target_ongoing_requests=placement.target_requests,
            )
        }
    router = {"request_router_class": UsablePrefixRouter} if placement.routing == "usable-prefix" else {}
    return {
        **scale,
        "name": "Replica",
        "max_ongoing_requests": options.engine.max_running + options.engine.max_waiting + SPARE,
        "ray_actor_options": {"num_cpus": placement.cpus, "num_gpus": placement.gpus},
        "request_router_config": RequestRouterConfig(request_routing_stats_period_s=STATS_S, **router),
        "health_check_period_s": 5.0,
        "graceful_shutdown_timeout_s": options.drain_timeout_s + ENDING_S,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
