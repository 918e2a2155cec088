"""The JSON of adapters that come and go."""

from typing import Annotated

from pydantic import Field

from hybrid_cache.api.server.schemas.common import Request

Name = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^\S+$")]


class LoadAdapter(Request):
    """POST /v1/load_lora_adapter"""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadAdapter(Request):
    """POST /v1/unload_lora_adapter"""

    lora_name: Name
