"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them: variants that come and go."""

import asyncio
from collections.abc import Callable, Sequence

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from hybrid_cache.api.server.bodies import JsonRoute
from hybrid_cache.api.server.errors import ModelNotFound, NotAllowed, quoted
from hybrid_cache.api.server.openapi import ERRORS
from hybrid_cache.api.server.schemas.adapters import LoadAdapter, UnloadAdapter
from hybrid_cache.api.server.serving import Serving, Variant
from hybrid_cache.api.server.tenants import is_operator
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.device.free_memory import give_back_freed
from hybrid_cache.errors import ConfigError, ModelError, RequestError
from hybrid_cache.profile import Profile
from hybrid_cache.sizes import format_bytes

LoadVariant = Callable[[str, str, int], tuple[Variant, HybridModel, Sequence[Profile]]]
"""From a name, a folder with an adapter and the bytes of weights that were loaded since the start to a variant, its
model, and the profiles beside it. Raises HybridCacheError.
"""


def router(serving: Serving, load: LoadVariant) -> APIRouter:
    """The routes, bound to what they change. Where there are operators' keys, others are refused."""
    routes = APIRouter(route_class=JsonRoute, tags=["Adapters"], responses=ERRORS)
    engine, changing = serving.text.engine, asyncio.Lock()
    later = dict[str, int]()  # bytes of weights that were loaded since the start, by the name of their adapter

    def check_allowed() -> None:
        if serving.settings.operator_keys and not is_operator.get():
            raise NotAllowed("adapters are loaded and unloaded with an operator's key (--operator-key-file)")

    @routes.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load_adapter(asked: LoadAdapter) -> str:
        """Serves the model with an adapter, a folder on the server, under a name of its own."""
        check_allowed()
        name = asked.lora_name
        async with changing:
            if name in (*serving.model.names, *serving.variants):
                raise RequestError(f"the name {quoted(name)} is taken", param="lora_name", code="name_taken")
            refusal = ""
            try:
                variant, model, profiles = await asyncio.to_thread(load, name, asked.lora_path, sum(later.values()))
                await engine.ask(lambda core: core.add_variant(name, model, profiles))
            except (ModelError, ConfigError) as error:
                refusal = str(error)  # without what the error holds of what was loaded
            if refusal:
                await asyncio.to_thread(give_back_freed)
                raise RequestError(refusal, param="lora_path")
            serving.add(variant)
            later[name] = variant.own_bytes
        taken = f"Its own weights take {format_bytes(variant.own_bytes)}."
        return f"Success: LoRA adapter '{name}' added successfully. {taken}"

    @routes.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload_adapter(asked: UnloadAdapter) -> str:
        """Forgets an adapter and what is cached of it; refused while requests use it."""
        check_allowed()
        name = asked.lora_name
        async with changing:
            if name not in serving.variants or serving.variants[name].model.adapter is None:
                raise ModelNotFound(f"there is no adapter {quoted(name)}", param="lora_name")
            await engine.ask(lambda core: core.remove_variant(name))  # to its end, whoever has hung up
            del serving.variants[name]
            later.pop(name, None)
            await asyncio.to_thread(give_back_freed)
        return f"Success: LoRA adapter '{name}' removed successfully."

    return routes
