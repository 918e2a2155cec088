"""The JSON of what routers ask about a server and its KV events."""

from hybrid_cache.api.server.schemas.common import Response


class ServerInfo(Response):
    model_id: str
    model_path: str
    served_model_name: str
    instance_id: str  # another one after each start
    kv_block_size: int  # tokens
    max_model_len: int


class KVEventSource(Response):
    enable_kv_cache_events: bool
    publisher: str
    transport: str
    encoding: str
    schema_version: int
    data_parallel_rank: int
    endpoint: str  # `*` in place of the address by which the server is reached
    replay_endpoint: str | None
    topic: str
    buffer_steps: int
    hwm: int
