"""`hybrid-cache model info`: what a model keeps in the cache, from its config alone."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hybrid_cache.api.sizes import format_bytes, format_count
from hybrid_cache.errors import UnsupportedModel
from hybrid_cache.kernels.layout import TILE
from hybrid_cache.models import loading

CONVERSATION_TOKENS = 2000


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts about a model that we can serve."""

    dtype: str  # what rows are computed and cached in
    layers: dict[str, int]  # what the cache holds something for, by kind
    num_parameters: int
    vocab_size: int
    max_length: int
    kv_bytes_per_token: int
    checkpoint_bytes: int
    break_even_tokens: int | None  # from this length on a checkpoint is smaller than the KV; None if there is no KV
    budget_bytes: int
    conversation_tokens: int
    conversations_in_budget: int  # each with its KV and one checkpoint


@dataclass(frozen=True, slots=True)
class Report:
    """What there is to say about one folder."""

    path: str
    model_type: str | None
    supported: bool
    reason: str | None  # why it is not supported
    facts: Facts | None


def examine(path: Path | None, budget_bytes: int, dtype: str = "auto") -> Report:
    """Reads the config of a folder; None is the embedded model. Raises ModelError for a broken config."""
    folder = path or loading.embedded_path()
    name = "the embedded model" if path is None else str(path)
    model_type = None
    try:
        config = loading.load_config(folder)
        kind = config.get("model_type")
        model_type = kind if isinstance(kind, str) else None
        facts = _facts(loading.describe(config, dtype=dtype), budget_bytes)
    except UnsupportedModel as error:
        return Report(name, model_type, False, " ".join(str(error).split()), None)
    return Report(name, model_type, True, None, facts)


def _facts(info: loading.ModelInfo, budget_bytes: int) -> Facts:
    pages = -(-CONVERSATION_TOKENS // TILE)
    conversation_bytes = pages * TILE * info.kv_bytes_per_token + info.checkpoint_bytes
    return Facts(
        dtype=str(info.dtype).removeprefix("torch."),
        layers=dict(info.layers),
        num_parameters=info.num_parameters,
        vocab_size=info.vocab_size,
        max_length=info.max_length,
        kv_bytes_per_token=info.kv_bytes_per_token,
        checkpoint_bytes=info.checkpoint_bytes,
        break_even_tokens=info.checkpoint_bytes // info.kv_bytes_per_token + 1 if info.kv_bytes_per_token else None,
        budget_bytes=budget_bytes,
        conversation_tokens=CONVERSATION_TOKENS,
        conversations_in_budget=budget_bytes // conversation_bytes,
    )


def to_json(report: Report) -> str:
    return json.dumps(asdict(report), indent=2)


def print_table(report: Report) -> None:
    """Writes a report for people to the standard output."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(report):
        table.add_row(name, value)
    Console(highlight=False, markup=False).print(table)


def _rows(report: Report) -> list[tuple[str, str]]:
    rows = [("model", report.path), ("type", report.model_type or "not named")]
    facts = report.facts
    if facts is None:
        return [*rows, ("supported", f"no: {report.reason}")]
    layers = ", ".join(f"{count} {kind}" for kind, count in sorted(facts.layers.items()))
    conversations = f"{facts.conversations_in_budget:,} of {facts.conversation_tokens:,} tokens with a checkpoint each"
    return [
        *rows,
        ("supported", "yes"),
        ("layers", layers),
        ("parameters", f"{format_count(facts.num_parameters)} ({facts.num_parameters:,})"),
        ("dtype", facts.dtype),
        ("context", f"{facts.max_length:,} tokens"),
        ("vocabulary", f"{facts.vocab_size:,} tokens"),
        ("KV", f"{format_bytes(facts.kv_bytes_per_token)} a token"),
        ("checkpoint", format_bytes(facts.checkpoint_bytes)),
        ("break-even", _break_even(facts.break_even_tokens)),
        (f"in {format_bytes(facts.budget_bytes)}", f"conversations: {conversations}"),
    ]


def _break_even(tokens: int | None) -> str:
    return (
        "this model has no KV" if tokens is None else f"a checkpoint is smaller than the KV from {tokens:,} tokens on"
    )
