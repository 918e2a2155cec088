"""`hybrid-cache model info` and `model list`: what models keep in the cache, from their configs only."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hybrid_cache.api.server.budget import CONVERSATION_TOKENS, beside, conversation_bytes
from hybrid_cache.api.server.response_store import memory_bytes
from hybrid_cache.api.server.settings import MAX_BODY_BYTES, MESSAGE_BOOK_BYTES, RESPONSE_STORE_BYTES
from hybrid_cache.api.text.defaults import listed, load_defaults
from hybrid_cache.config import EngineConfig
from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.models import adapters, loading
from hybrid_cache.models.files import errors_begin_with
from hybrid_cache.models.folders import GGUF
from hybrid_cache.models.gguf.text import text_folder
from hybrid_cache.models.shapes import ModelShape
from hybrid_cache.models.tools.presets import PRESETS, preset
from hybrid_cache.models.tools.published import CONFIGS
from hybrid_cache.sizes import format_bytes, format_count

LIST_WIDTH = 120  # characters, where no terminal says how many it has


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about a model. A preset that is a shape and no config has no number of parameters and no context."""

    dtype: str  # what rows are computed and cached in
    layers: dict[str, int]  # what the cache holds something for, by kind
    num_parameters: int | None
    vocab_size: int
    max_length: int | None
    stretched: str | None  # how positions make more of it than the model was trained for
    kv_bytes_per_token: int
    checkpoint_bytes: int
    break_even_tokens: int | None  # from this length on a checkpoint is smaller than the KV; None if one is missing
    budget_bytes: int
    conversation_tokens: int
    conversations_in_budget: int  # each with its KV and one checkpoint
    weight_bytes: int | None
    beside_bytes: int | None  # most that a server takes beside weights and budget; None without a context


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """Facts about a LoRA adapter. Once merged, it takes no memory of its own."""

    name: str
    base: str | None  # what it was made for, as it says itself
    rank: int
    scale: float
    num_weights: int  # that it changes
    num_parameters: int


@dataclass(frozen=True, slots=True)
class Report:
    """What there is to say about one model."""

    path: str  # or the name of a preset
    model_type: str | None
    supported: bool
    reason: str | None  # why it is not supported
    facts: Facts | None
    adapter: AdapterFacts | None = None
    honoured: tuple[str, ...] = ()  # fields of generation_config.json, each as `name=value`
    ignored: tuple[str, ...] = ()  # and those that would change answers elsewhere
    quantized: tuple[str, ...] = ()  # how its matrices are stored, and what the file asks for that is not done


def examine(
    model: str | Path | None,
    budget_bytes: int,
    dtype: str = "auto",
    adapter: str | Path | None = None,
    max_model_len: int | None = None,
) -> Report:
    """Of a preset, of the config of a folder or of a config.json; None is the embedded model.

    A preset's name comes first. max_model_len: tokens of context where a server is to have fewer than the model
    Raises ModelError for a broken config or a broken adapter, ConfigError for a context larger than the model's.
    """
    report = _examine_model(model, budget_bytes, dtype, max_model_len)
    if (folder := _folder(model)) is not None:
        with errors_begin_with(folder):
            defaults = load_defaults(folder)
        report = replace(report, honoured=defaults.honoured, ignored=defaults.ignored)
        report = _with_quantization(report, folder)
    return report if adapter is None else replace(report, adapter=_adapter_facts(adapter))


def _with_quantization(report: Report, folder: Path) -> Report:
    """What files beside config.json say, too."""
    try:
        stored = loading.stored_in(folder) if report.supported else None
    except UnsupportedModel as error:
        return replace(report, supported=False, reason=str(error), facts=None)
    return report if stored is None else replace(report, quantized=(stored.title, *stored.notes))


def _folder(model: str | Path | None) -> Path | None:
    """Of a model that has one."""
    if model is None or model == "embedded":
        return loading.embedded_path()
    path = Path(model)
    return text_folder(path) if model not in PRESETS and (path.is_dir() or path.suffix == GGUF) else None


def _adapter_facts(path: str | Path) -> AdapterFacts:
    adapter = adapters.load(path)
    config = adapter.config
    num_weights = len(adapter.weights)
    return AdapterFacts(adapter.name, config.base, config.rank, config.scale, num_weights, adapter.num_parameters)


def _examine_model(model: str | Path | None, budget_bytes: int, dtype: str, max_model_len: int | None = None) -> Report:
    name = "the embedded model" if model is None else str(model)
    if model in PRESETS and model != "embedded" and model not in CONFIGS:
        shape_only = "it is known by its shape, its config is not one that we load"
        return Report(name, None, False, shape_only, _facts(preset(str(model)), None, budget_bytes))
    model_type = None
    try:
        config = _config("embedded" if model is None else str(model))
        kind = config.get("model_type")
        model_type = kind if isinstance(kind, str) else None
        info = loading.describe(config, dtype=dtype)
        if max_model_len is not None:
            info = replace(info, max_length=loading.context(max_model_len, info.max_length))
    except UnsupportedModel as error:
        return Report(name, model_type, False, " ".join(str(error).split()), None)
    return Report(name, model_type, True, None, _facts(info.shape, info, budget_bytes))


def examine_presets(budget_bytes: int) -> list[Report]:
    return [examine(name, budget_bytes) for name in PRESETS]


def _config(model: str) -> Mapping[str, object]:
    if model in CONFIGS:
        return CONFIGS[model]
    path = loading.embedded_path() if model == "embedded" else Path(model)
    if not path.exists():
        raise ModelError(f"{model!r} is no folder, no config.json and no preset; `hybrid-cache model list` names those")
    return loading.load_config(path) if path.is_dir() or path.suffix == GGUF else loading.read_config(path)


def _facts(shape: ModelShape, info: loading.ModelInfo | None, budget_bytes: int) -> Facts:
    kv_bytes, checkpoint_bytes = shape.cache_spec.kv_bytes_per_token, shape.cache_spec.slot_bytes
    return Facts(
        dtype=str(shape.dtype).removeprefix("torch."),
        layers=dict(Counter(layer.kind for layer in shape.layers if layer.cache is not None)),
        num_parameters=info.num_parameters if info else None,
        vocab_size=shape.vocab_size,
        max_length=info.max_length if info else None,
        stretched=info.stretched if info else None,
        kv_bytes_per_token=kv_bytes,
        checkpoint_bytes=checkpoint_bytes,
        break_even_tokens=checkpoint_bytes // kv_bytes + 1 if kv_bytes and checkpoint_bytes else None,
        budget_bytes=budget_bytes,
        conversation_tokens=CONVERSATION_TOKENS,
        conversations_in_budget=budget_bytes // conversation_bytes(shape.cache_spec),
        weight_bytes=info.num_parameters * shape.dtype.itemsize if info else None,
        beside_bytes=_beside_bytes(shape, info.max_length, budget_bytes) if info else None,
    )


def _beside_bytes(shape: ModelShape, max_length: int, budget_bytes: int) -> int:
    """With the default settings of a server on a CPU."""
    config = EngineConfig()
    needed = beside(
        shape,
        config,
        max_length=max_length,
        max_body_bytes=MAX_BODY_BYTES,
        book_bytes=MESSAGE_BOOK_BYTES,
        response_bytes=memory_bytes(None, RESPONSE_STORE_BYTES),
    )
    return needed.total(budget_bytes)


def to_json(reports: Report | Sequence[Report]) -> str:
    """An object, or an array of such objects."""
    values = asdict(reports) if isinstance(reports, Report) else [asdict(report) for report in reports]
    return json.dumps(values, indent=2)


def print_table(report: Report) -> None:
    """Writes a report for people to the standard output."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(report):
        table.add_row(name, value)
    Console(highlight=False, markup=False).print(table)


def print_list(reports: Sequence[Report]) -> None:
    """Writes a line for each report to the standard output."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("model", no_wrap=True)
    table.add_column("type", no_wrap=True)
    for name in ("parameters", "KV a token", "checkpoint", "break-even"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        table.add_row(report.path, report.model_type or "-", *_cells(report.facts))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = LIST_WIDTH
    console.print(table)


def _cells(facts: Facts | None) -> tuple[str, ...]:
    if facts is None:
        return ("-",) * 4
    return (
        "-" if facts.num_parameters is None else format_count(facts.num_parameters),
        format_bytes(facts.kv_bytes_per_token) if facts.kv_bytes_per_token else "-",
        format_bytes(facts.checkpoint_bytes) if facts.checkpoint_bytes else "-",
        "-" if facts.break_even_tokens is None else f"{facts.break_even_tokens:,} tokens",
    )


def _rows(report: Report) -> list[tuple[str, str]]:
    named = [("model", report.path), ("type", report.model_type or "not named")]
    if (adapter := report.adapter) is not None:
        size = f"rank {adapter.rank}, {adapter.num_weights} weights, {format_count(adapter.num_parameters)} parameters"
        named.append(("adapter", f"{adapter.name} for {adapter.base or 'a model it does not name'}: {size}"))
    rows = [*named, ("supported", "yes" if report.supported else f"no: {report.reason}")]
    rows += [("generation", listed(report.honoured))] if report.honoured else []
    rows += [("not honoured", listed(report.ignored))] if report.ignored else []
    rows += [("quantized", "; ".join(report.quantized))] if report.quantized else []
    facts = report.facts
    if facts is None:
        return rows
    rows.append(("layers", "; ".join(f"{count} {kind}" for kind, count in sorted(facts.layers.items()))))
    if facts.num_parameters is not None:
        rows.append(("parameters", f"{format_count(facts.num_parameters)} ({facts.num_parameters:,})"))
    rows.append(("dtype", facts.dtype))
    if facts.max_length is not None:
        rows.append(("context", f"{facts.max_length:,} tokens" + (f" ({facts.stretched})" if facts.stretched else "")))
    conversations = f"{facts.conversations_in_budget:,} of {facts.conversation_tokens:,} tokens with a checkpoint each"
    return [
        *rows,
        ("vocabulary", f"{facts.vocab_size:,} tokens"),
        ("KV", f"{format_bytes(facts.kv_bytes_per_token)} a token"),
        ("checkpoint", format_bytes(facts.checkpoint_bytes)),
        ("break-even", _break_even(facts)),
        (f"in {format_bytes(facts.budget_bytes)}", f"conversations: {conversations}"),
        *_memory(facts),
    ]


def _memory(facts: Facts) -> list[tuple[str, str]]:
    if facts.weight_bytes is None or facts.beside_bytes is None:
        return []
    parts = facts.weight_bytes, facts.budget_bytes, facts.beside_bytes
    weights, cache, more = map(format_bytes, parts)
    total = format_bytes(sum(parts))
    return [("memory", f"{weights} of weights, {cache} of cache and up to {more} beside them on a CPU: {total}")]


def _break_even(facts: Facts) -> str:
    if not facts.kv_bytes_per_token:
        return "this model has no KV"
    if facts.break_even_tokens is None:
        return "this model has no state, and a checkpoint takes nothing"
    return f"a checkpoint is smaller than the KV from {facts.break_even_tokens:,} tokens on"
