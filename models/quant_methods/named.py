"""Which quantization a model folder names, in config.json or in the file that some tools write beside it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from hybrid_cache.errors import UnsupportedModel
from hybrid_cache.models import quantized
from hybrid_cache.models.config import Config
from hybrid_cache.models.files import is_there, read_json, shown
from hybrid_cache.models.quant_methods.compressed import METHOD, CompressedTensors
from hybrid_cache.models.quant_methods.fp8 import Float8
from hybrid_cache.models.quant_methods.gptq import Awq, Gptq
from hybrid_cache.models.quant_methods.method import Method
from hybrid_cache.models.quant_methods.own import Own

FIELDS = ("quantization_config", "compression_config", "quantization")
# Files of tools that leave config.json as it was.
SIDECARS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
INSTEAD = "serve what it was made from, or a compressed-tensors, GPTQ, AWQ, FP8 or GGUF checkpoint of it"
AUTO_ROUND = "auto_round:"


def method_of(config: Mapping[str, object], folder: Path | None = None) -> Method | None:
    """None for plain weights. Raises UnsupportedModel for a method that is not read, by its name, and ModelError.

    folder: where files beside config.json may say it
    """
    for place, found in _settings(config, folder):
        if not isinstance(found, Mapping):
            raise UnsupportedModel(f"{place} is {shown(found)}, expected an object with a quant_method")
        return _read(place, found)
    return None


def _settings(config: Mapping[str, object], folder: Path | None) -> Iterator[tuple[str, object]]:
    """Wherever a quantization is named, the first in force."""
    for name in FIELDS:
        for place, values in (("", config), ("text_config.", config.get("text_config"))):
            if isinstance(values, Mapping) and values.get(name):
                yield place + name, values[name]
    for name, method in SIDECARS.items():
        if folder is not None and is_there(folder / name):
            yield name, {"quant_method": method, **read_json(folder / name)}


def _read(place: str, values: Mapping[str, object]) -> Method:
    name = values.get("quant_method")
    if name is None and "bits" in values and "group_size" in values:
        raise UnsupportedModel(f"{place} has no quant_method, as MLX writes it, which is not read: {INSTEAD}")
    read = METHODS.get(name) if isinstance(name, str) else None
    if read is None:
        supported = ", ".join(sorted(METHODS))
        raise UnsupportedModel(f"{place}.quant_method is {shown(name)}, supported: {supported}; {INSTEAD}")
    return read(Config(values, f"{place}."), values)


def _own(config: Config, values: Mapping[str, object]) -> Method:
    return Own(quantized.format_of(values))


def _fp8(config: Config, values: Mapping[str, object]) -> Method:
    config.choice("fmt", "e4m3", ["e4m3", "float8_e4m3fn"])
    return Float8(config, "FP8")


def _auto_round(config: Config, values: Mapping[str, object]) -> Method:
    """Its own packing is that of GPTQ or AWQ."""
    packings = [AUTO_ROUND + name for name in ("auto_gptq", "auto_awq", "gptqmodel")]
    packing = config.choice("packing_format", packings[0], packings)
    if packing == packings[1]:
        return Awq(config, "AutoRound")
    return Gptq(config, "AutoRound", zeros_less_one=packing == packings[0])


def _modelopt(config: Config, values: Mapping[str, object]) -> Method:
    """`hf_quant_config.json` has it all one level deeper."""
    inner = config.section("quantization") if "quantization" in values else config
    inner.choice("quant_algo", None, ["FP8"])
    return Float8(inner, "ModelOpt FP8", cache=inner.has("kv_cache_quant_algo") or inner.has("kv_cache_scheme"))


METHODS: Mapping[str, Callable[[Config, Mapping[str, object]], Method]] = {
    quantized.METHOD: _own,
    METHOD: lambda config, values: CompressedTensors(values),
    "gptq": lambda config, values: Gptq(config),
    "awq": lambda config, values: Awq(config),
    "auto-round": _auto_round,
    "fp8": _fp8,
    "fbgemm_fp8": lambda config, values: Float8(config, "FBGEMM FP8"),
    "modelopt": _modelopt,
}
