"""What generation_config.json asks for where a request says nothing, within the bounds that requests have.

Every field is honoured, or ignored and named in `GenerationDefaults.ignored`, or changes no answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_cache.api.text.stops import stops_of
from hybrid_cache.errors import BadSampling, ModelError
from hybrid_cache.models.files import errors_begin_with, own_or, read_json_if_there, shown
from hybrid_cache.sampling import MAX_INT, SamplingParams

FILE = "generation_config.json"
MAX_EOS = 256
MAX_LISTED = 12
HONOURED = (
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "eos_token_id",
    "stop_strings",
)
# Values that ask for nothing, of fields that we ignore; for all others what is null, false, zero or empty.
NEUTRAL: Mapping[str, object] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "guidance_scale": 1.0,
}
# Of a program rather than of its answers; so are names that begin with an underscore.
BOOKKEEPING = frozenset(
    {
        "transformers_version",
        "pad_token_id",
        "bos_token_id",
        "decoder_start_token_id",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "return_legacy_cache",
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "low_memory",
        "compile_config",
        "disable_compile",
        "prefill_chunk_size",
        "is_assistant",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "trust_remote_code",
        "auto_map",
    }
)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What holds when a request leaves a value out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    max_length: int | None = None  # of prompt and answer, where `max_new_tokens` is not given
    min_new_tokens: int = 0
    eos_ids: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    honoured: tuple[str, ...] = ()  # `name=value` of the fields that were read
    ignored: tuple[str, ...] = ()  # and of those that would change answers elsewhere

    def answer_length(self, num_prompt_tokens: int, otherwise: int) -> int:
        """Tokens that an answer may have, at least one; `otherwise` where the model says nothing."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return otherwise if self.max_length is None else max(1, self.max_length - num_prompt_tokens)


def load_defaults(folder: Path, eos_id: int | None = None, base: Path | None = None) -> GenerationDefaults:
    """Reads generation_config.json, falling back to config.json for the end tokens; `eos_id` is one more.

    base: a folder whose files stand in for those that are not there   Raises ModelError with the value and the bound.
    """
    values, model = (read_json_if_there(own_or(base, folder / name)) for name in (FILE, "config.json"))
    source, name = (values, FILE) if values.get("eos_token_id") is not None else (_with_eos(model), "config.json")
    with errors_begin_with(name):
        eos_ids = _eos_ids(source)
    if eos_id is not None:
        eos_ids |= {eos_id}
    with errors_begin_with(FILE):
        return _defaults(values, tuple(sorted(eos_ids)))


def _with_eos(config: Mapping[str, object]) -> Mapping[str, object]:
    """A config, or of a multimodal one the text model's part where only that names end tokens."""
    text = config.get("text_config")
    return text if config.get("eos_token_id") is None and isinstance(text, Mapping) else config


def listed(fields: Sequence[str]) -> str:
    """For people: the first of them, and how many more there are."""
    more = f" and {len(fields) - MAX_LISTED} more" if len(fields) > MAX_LISTED else ""
    return ", ".join(fields[:MAX_LISTED]) + more


def _defaults(values: Mapping[str, object], eos_ids: tuple[int, ...]) -> GenerationDefaults:
    greedy = values.get("do_sample") is False and values.get("temperature") is None
    top_k = _whole(values, "top_k", -1)
    max_new_tokens = _whole(values, "max_new_tokens", 1)
    min_new_tokens = _whole(values, "min_new_tokens", 0) or 0
    if max_new_tokens is not None and min_new_tokens > max_new_tokens:
        raise ModelError(f"min_new_tokens is {min_new_tokens}, must be in [0, {max_new_tokens}], as max_new_tokens is")
    try:
        sampling = SamplingParams(
            temperature=0.0 if greedy else _number(values, "temperature", 1.0),
            top_p=_number(values, "top_p", 1.0),
            top_k=max(0, top_k or 0),
            min_p=_number(values, "min_p", 0.0),
            repetition_penalty=_number(values, "repetition_penalty", 1.0),
        )
        stops = tuple(stops_of(values.get("stop_strings")) or ())
    except BadSampling as e:
        raise ModelError(str(e)) from e
    except ValueError as e:
        raise ModelError(f"stop_strings: {e}") from e
    return GenerationDefaults(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_new_tokens=max_new_tokens,
        max_length=_whole(values, "max_length", 1),
        min_new_tokens=min_new_tokens,
        eos_ids=eos_ids,
        stops=stops,
        honoured=tuple(_named(name, values[name]) for name in HONOURED if values.get(name) is not None),
        ignored=tuple(_named(name, value) for name, value in values.items() if _is_ignored(name, value)),
    )


def _is_ignored(name: str, value: object) -> bool:
    if name in HONOURED or name in BOOKKEEPING or name.startswith("_"):
        return False
    return bool(value) and value != NEUTRAL.get(name)


def _named(name: str, value: object) -> str:
    return f"{name if name.isidentifier() else shown(name)}={shown(value)}"


def _number(values: Mapping[str, object], name: str, default: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"{name} is {shown(value)}, must be a number")
    return float(value)


def _whole(values: Mapping[str, object], name: str, low: int) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_INT:
        raise ModelError(f"{name} is {shown(value)}, must be a whole number in [{low}, {MAX_INT}]")
    return value


def _eos_ids(values: Mapping[str, object]) -> set[int]:
    """Negative ones, which some configs have, stand for none."""
    eos = values.get("eos_token_id")
    found: list[object] = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ids = [i for i in found if isinstance(i, int) and not isinstance(i, bool)]
    if len(ids) != len(found) or len(ids) > MAX_EOS:
        raise ModelError(f"eos_token_id is {shown(eos)}, must be a token or a list of at most {MAX_EOS} tokens")
    return {i for i in ids if i >= 0}
