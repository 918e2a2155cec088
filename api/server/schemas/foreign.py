"""Fields that other servers take in request bodies, and what becomes of them where this server has no such field.

A field is refused where its value asks for something: its absence would change the answer in silence. It is harmless
where it cannot change an answer. It is noted, in a header and in the log, where only something beside the answer is
missing; so are fields that nobody has heard of. What a request's class has as a field of its own comes first.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum


class Fate(Enum):
    """What becomes of a field."""

    REFUSED = "refused"
    NOTED = "noted"
    HARMLESS = "harmless"


@dataclass(frozen=True, slots=True)
class Foreign:
    """A field of other servers.

    why: what to do instead of one that is refused, or why a harmless one changes nothing
    asks: whether a value that is not null asks for something
    code: of the error for one that is refused, where clients know what to do about it
    """

    fate: Fate
    why: str
    asks: Callable[[object], bool] = bool
    code: str | None = None

    def fate_of(self, value: object) -> Fate:
        return self.fate if value is not None and self.asks(value) else Fate.HARMLESS


def but(*neutral: object) -> Callable[[object], bool]:
    """Whether a value is none of those that ask for nothing."""
    return lambda value: value not in neutral


def _always(value: object) -> bool:
    return True


def _edits_context(value: object) -> bool:
    """Whether Anthropic's context_management drops anything: to keep all thoughts is to leave the messages alone."""
    edits = value.get("edits") if isinstance(value, dict) else value
    if not isinstance(edits, list):
        return bool(value)
    return any(not isinstance(edit, dict) or edit.get("keep") != "all" for edit in edits)


def _refused(why: str, *names: str, asks: Callable[[object], bool] = bool) -> dict[str, Foreign]:
    return {name: Foreign(Fate.REFUSED, why, asks) for name in names}


def _noted(why: str, *names: str) -> dict[str, Foreign]:
    return {name: Foreign(Fate.NOTED, why) for name in names}


def _harmless(why: str, *names: str) -> dict[str, Foreign]:
    return {name: Foreign(Fate.HARMLESS, why) for name in names}


THREAD_UNSUPPORTED = "thread_unsupported_request"

_BUDGET = "thoughts have no limit of their own, max_tokens bounds them with the answer"
_LOGITS = "logit_bias and structured_outputs say which tokens may come"
_OTHER_FORM = "response_format and structured_outputs say what an answer has to be"
_SAMPLING = "temperature, top_k, top_p and min_p say how tokens are sampled"
_PENALTY = "repetition_penalty, presence_penalty and frequency_penalty are"
_ADAPTER = "an adapter is a model here, name it in model"
_LENGTH = "max_tokens bounds the answer"
_MEDIA = "models here take and give text alone"
_IN_MESSAGES = "write what belongs to the prompt into messages"
_THOUGHTS = "reasoning_effort and chat_template_kwargs say whether a model thinks"
_CUT = "prompts are never cut: send the part that is to be read"
_CLIENT = "it is an argument of a client library, whose content belongs at the top of the body"

# What changes a prompt, so that it is refused where tokens are merely counted, too.
OF_PROMPTS: Mapping[str, Foreign] = {
    **_refused("a template comes with the model, chat_template_kwargs sets its variables", "chat_template", "template"),
    **_refused(_CUT, "truncate_prompt_tokens", "truncate", "prompt_truncate_len", asks=_always),
    **_refused(_CUT, "truncation_side", "transforms", "context_length_exceeded_behavior"),
    **_refused("a template says which special tokens there are", "add_special_tokens"),
    **_refused(_MEDIA, "images", "image", "image_data", "video_data", "audio_data", "multi_modal_data", "attachments"),
    **_refused(_MEDIA, "use_audio_in_video", "prompt_embeds"),
    **_refused(
        "send tokens to /v1/completions as prompt", "input_ids", "prompt_token_ids", "token_ids", "input_embeds"
    ),
    **_refused(_IN_MESSAGES, "context", "raw", "tool_prompt", "guideline", "task", "preset", "input_extra"),
    **_refused("nothing is searched here: " + _IN_MESSAGES, "web_search_options", "search_parameters", "data_sources"),
    **_refused("nothing is searched here: " + _IN_MESSAGES, "enable_search", "search_options", "plugins"),
    **_refused("nothing is searched here: " + _IN_MESSAGES, "citation_options", "tool_resources", "file_ids"),
    **_refused("tools run at the client: offer them in tools", "mcp_servers", "container", "compound_custom"),
    **_refused(_ADAPTER, "lora_path", "lora", "lora_request", "adapter_id", "adapters", "lora_adapter"),
    **_refused("send all messages: conversations are not stored", "conversation", "session_params"),
    # Anthropic's clients send it unasked, and send all messages once they are told so.
    "thread": Foreign(Fate.REFUSED, "send all messages: conversations are not stored", code=THREAD_UNSUPPORTED),
    **_refused("messages are never shortened here", "compaction", "context_compaction", "memory"),
    **_refused("messages are never shortened here", "context_management", asks=_edits_context),
    **_refused("stored prompts are not known here: " + _IN_MESSAGES, "prompt_template", "prompt_id"),
    **_refused("safety prompts are not known here: " + _IN_MESSAGES, "safe_prompt", "prompt_mode"),
    **_refused(_CLIENT, "extra_body", "extra_query", "model_kwargs", "options", "parameters", "sampling_params"),
    **_refused("it is the form of another server, send messages or a prompt", "inputs", "contents"),
}

# What changes an answer.
OF_ANSWERS: Mapping[str, Foreign] = {
    # Forms
    **_refused(_OTHER_FORM + "; its grammars are in Lark", "ebnf", "gbnf", "grammar_triggers"),
    **_refused(_OTHER_FORM, "structural_tag", "output_schema", "guided_json_object", "format", "output_format"),
    **_refused(_OTHER_FORM, "json_mode", "guidance", "result_format", asks=but("message", "", {}, False)),
    **_refused("grammars in GBNF are not read; structured_outputs.grammar takes one in Lark", "grammar"),
    **_refused("custom code does not run here: " + _LOGITS, "logits_processors", "custom_logit_processor"),
    **_refused("custom code does not run here: " + _LOGITS, "custom_params", "vllm_xargs", "nvext"),
    **_refused(_LOGITS, "bad_words", "bad_words_ids", "allowed_token_ids", "banned_tokens", "force_words"),
    **_refused("stop takes texts and stop_token_ids tokens", "stop_regex", "stop_words", "bad_stop", "stop_strings"),
    **_refused("include_stop_str_in_output keeps the text that stops an answer", "no_stop_trim"),
    **_refused("stop ends an answer", "repetition_detection", "truncate_sequences"),
    # Samplers
    **_refused("one answer is sampled at a time, n asks for several", "use_beam_search", "do_beam_search"),
    **_refused("one answer is sampled at a time, n asks for several", "num_beams", "beam_width", asks=but(0, 1)),
    **_refused("one answer is sampled at a time, n asks for several", "best_of", asks=but(0, 1)),
    **_refused(_SAMPLING, "typical_p", "tfs_z", "typical", asks=but(1, 1.0)),
    **_refused(_SAMPLING, "mirostat", "mirostat_mode", "dynatemp_range", "dynatemp", "xtc_probability", "top_a"),
    **_refused(_SAMPLING, "epsilon_cutoff", "eta_cutoff", "smoothing_factor", "penalty_alpha", "min_keep"),
    **_refused(_SAMPLING, "samplers", "sampler_priority", "sampler_order", "watermark", "watermarking"),
    **_refused(_SAMPLING, "top_n_sigma", "nsigma", asks=lambda value: isinstance(value, int | float) and value > 0),
    **_refused(_SAMPLING, "adaptive_target", asks=lambda value: isinstance(value, int | float) and value >= 0),
    **_refused("temperature 0 is greedy, and more than 0 samples", "do_sample", asks=_always),
    **_refused("seed is", "random_seed", "sampling_seed", asks=_always),
    **_refused(_PENALTY, "repeat_penalty", "rep_pen", "encoder_repetition_penalty", asks=but(1, 1.0)),
    **_refused(_PENALTY, "dry_multiplier", "no_repeat_ngram_size", "penalize_nl"),
    **_refused("one prompt guides an answer", "guidance_scale", "cfg_scale", asks=but(0, 1, 1.0)),
    **_refused("one prompt guides an answer", "negative_prompt"),
    # Lengths
    **_refused(_LENGTH, "max_new_tokens", "n_predict", "num_predict", "max_length", "max_gen_len", asks=but(-1)),
    **_refused(_LENGTH, "t_max_predict_ms", "t_max_prompt_ms", "max_time", "n_indent", asks=but(0, -1)),
    **_refused("min_tokens is", "min_length", "min_new_tokens"),
    **_refused(_BUDGET, "thinking_budget", "thinking_token_budget", "thinking_budget_tokens", asks=but(-1)),
    **_refused(_BUDGET, "reasoning_budget", "reasoning_budget_tokens", "max_reasoning_tokens", asks=but(-1)),
    # Thoughts
    **_refused(_THOUGHTS, "think", "thinking_mode", "reasoning_mode", asks=_always),
    **_refused("thoughts come in reasoning_content", "reasoning_format", asks=but("auto", "deepseek", "parsed")),
    **_refused("thoughts come in reasoning_content", "separate_reasoning", asks=lambda value: value is False),
    **_refused("thoughts come in reasoning_content", "thinking_forced_open", "merge_reasoning_content"),
    **_refused("models here know one verbosity, medium", "verbosity", asks=but("medium")),
    # Other things than text
    **_refused(_MEDIA, "audio", "voice"),
    **_refused(_MEDIA, "modalities", asks=but([], ["text"])),
    **_refused("answers are not looked over", "moderation", "safety_model", "guardrails", "safety_settings"),
    **_refused("tools says which functions there are", "tool_config", "enable_auto_tool_choice", "bot_id"),
    **_refused("tool calls are always read", "parse_tool_calls", asks=lambda value: value is False),
    **_refused("the answer is to this request alone", "deferred", "background"),
    # Log-probabilities
    **_refused("logprobs and top_logprobs are", "n_probs", "top_n_tokens", "logprob_token_ids", "return_logprob"),
    **_refused("logprobs, echo and prompt_logprobs are", "decoder_input_details", "details", "input_logprobs"),
    **_refused("logprobs, echo and prompt_logprobs are", "logprob_start_len", asks=but(-1)),
    **_refused("logprobs are those before temperature and penalties", "post_sampling_probs"),
    **_refused("return_token_ids is", "return_tokens", "return_tokens_as_token_ids", "return_prompt_token_ids"),
    **_refused("echo is, of /v1/completions", "return_full_text"),
    # Answers in other shapes
    **_refused(
        "replies have one shape", "response_fields", "raw_output", "return_hidden_states", "return_routed_experts"
    ),
    **_refused("chunks hold what is new", "incremental_output", asks=lambda value: value is False),
    **_refused("this server holds its whole prompt itself", "kv_transfer_params", "ec_transfer_params"),
    **_refused("this server holds its whole prompt itself", "bootstrap_host", "bootstrap_room"),
}

# Of one API, where another one is spoken. The value says what that one has in its place.
OF_ANOTHER_API: Mapping[str, Foreign] = {
    **_refused("messages belong to /v1/chat/completions and /v1/messages", "messages"),
    **_refused("input belongs to /v1/responses", "input"),
    **_refused("a prompt is for /v1/completions, and stored ones are not known", "prompt"),
    **_refused("send a message with role 'system'", "system", "system_prompt", "instructions"),
    **_refused("stop and stop_sequences end an answer, by the API that is spoken", "stop", "stop_sequences"),
    **_refused("max_tokens bounds the answer, in Responses max_output_tokens", "max_tokens", "max_completion_tokens"),
    **_refused("max_tokens bounds the answer, in Responses max_output_tokens", "max_output_tokens"),
    **_refused("it is no field of this API", "n", asks=but(0, 1)),
    **_refused("it is no field of this API", "top_p", "repetition_penalty", asks=but(1, 1.0)),
    **_refused("it is no field of this API", "temperature", "seed", asks=_always),
    **_refused("it is no field of this API", "top_k", asks=but(0, -1)),
    **_refused("it is no field of this API", "presence_penalty", "frequency_penalty", "min_p", "logit_bias"),
    **_refused("it is no field of this API", "skip_special_tokens", asks=lambda value: value is False),
    **_refused(
        "it is no field of this API", "min_tokens", "ignore_eos", "stop_token_ids", "include_stop_str_in_output"
    ),
    **_refused("it is no field of this API", "return_token_ids", "return_token_strs", "prompt_logprobs"),
    **_refused("it is no field of this API", "logprobs", "top_logprobs", "echo", "suffix"),
    **_refused("it is no field of this API", "response_format", asks=but({"type": "text"}, {})),
    **_refused("it is no field of this API", "structured_outputs", "guided_json", "guided_regex", "guided_choice"),
    **_refused("it is no field of this API", "guided_grammar", "json_schema", "regex", "output_config"),
    **_refused("it is no field of this API", "text", asks=but({}, {"format": {"type": "text"}})),
    **_refused("it is no field of this API", "include", "truncation", asks=but([], "disabled")),
    **_refused("it is no field of this API", "tools", "functions"),
    **_refused("it is no field of this API", "tool_choice", "function_call", asks=but("auto", "none", {})),
    **_refused("it is no field of this API", "parallel_tool_calls", asks=lambda value: value is False),
    **_refused("it is no field of this API", "documents", "chat_template_kwargs", "choreography", "tokens"),
    **_refused("it is no field of this API", "continue_final_message"),
    **_refused("it is no field of this API", "add_generation_prompt", asks=lambda value: value is False),
    **_refused("it is no field of this API", "previous_response_id", "cache_salt", "diagnostics", "cache_control"),
    **_refused("it is no field of this API", "reasoning_effort", "enable_thinking", asks=but(None)),
    **_refused("it is no field of this API", "thinking", "reasoning", asks=but({})),
    **_refused("it is no field of this API", "include_reasoning", asks=lambda value: value is False),
    **_refused("it is no field of this API", "sharing", asks=but({}, {"fidelity": "exact"})),
    **_refused("it is no field of this API", "cache_report", "stream_options", "prompt_cache_options"),
    **_refused("it is no field of this API", "stream"),
}

HARMLESS: Mapping[str, Foreign] = {
    **_harmless("it labels a request for its sender", "metadata", "user", "safety_identifier", "client_metadata"),
    **_harmless("it labels a request for its sender", "user_profile_id"),
    **_harmless("it labels a request for its sender", "workspace_id", "request_id", "rid", "trace", "trace_id"),
    **_harmless("it labels a request for its sender", "custom_labels", "extra_key", "litellm_metadata", "tags"),
    **_harmless("it labels a request for its sender", "litellm_call_id", "user_id", "end_user_id", "generation_id"),
    **_harmless("it labels a request for its sender", "session_id", "user_security_context", "inference_geo"),
    **_harmless("it says where a request may run, and it runs here", "provider", "route", "models", "fallbacks"),
    **_harmless("it says where a request may run, and it runs here", "routed_dp_rank", "data_parallel_rank"),
    **_harmless("it says where a request may run, and it runs here", "id_slot", "slot_id", "access_programs"),
    **_harmless("it says where a request may run, and it runs here", "disagg_prefill_dp_rank", "bootstrap_port"),
    **_harmless("it is about price and order of service", "service_tier", "priority", "speed", "billing_policy"),
    **_harmless("it is about price and order of service", "fallback_credit_token", "num_retries", "timeout"),
    **_harmless("it is about price and order of service", "max_retries", "request_timeout", "stream_timeout"),
    **_harmless("chat completions are not stored", "store"),
    **_harmless("the cache keeps what it can, with the same answers", "prompt_cache_key", "prompt_cache_retention"),
    **_harmless("the cache keeps what it can, with the same answers", "cache_prompt", "n_cache_reuse", "use_cache"),
    **_harmless("the cache keeps what it can, with the same answers", "prompt_cache_breakpoint", "cache"),
    **_harmless("the model stays loaded, in its own context", "keep_alive", "ttl", "num_ctx", "n_ctx", "n_keep"),
    **_harmless("the model stays loaded, in its own context", "n_discard", "num_gpu", "num_thread", "low_vram"),
    **_harmless("drafts change no answer", "draft_model", "prediction", "speculative", "speculation"),
    **_harmless("drafts change no answer", "speculative.n_max", "speculative.n_min", "speculative.p_min"),
    **_harmless("drafts change no answer", "ngram_corpus_id", "backend_sampling", "disable_speculation"),
    **_harmless("it only weighs beams, of which there are none", "length_penalty", "early_stopping"),
    **_harmless("it does nothing without mirostat, which is refused", "mirostat_tau", "mirostat_eta", "mirostat_lr"),
    **_harmless("it does nothing without mirostat, which is refused", "mirostat_target"),
    **_harmless("it does nothing without dynatemp_range, which is refused", "dynatemp_exponent"),
    **_harmless("it does nothing without dry_multiplier, which is refused", "dry_base", "dry_allowed_length"),
    **_harmless("it does nothing without dry_multiplier, which is refused", "dry_penalty_last_n"),
    **_harmless("it does nothing without dry_multiplier, which is refused", "dry_sequence_breakers"),
    **_harmless("it does nothing without xtc_probability, which is refused", "xtc_threshold"),
    **_harmless("it does nothing without smoothing_factor, which is refused", "smoothing_curve"),
    **_harmless("it does nothing without adaptive_target, which is refused", "adaptive_decay"),
    **_harmless("it does nothing without repeat_penalty, which is refused", "repeat_last_n"),
    **_harmless("it does nothing without media, which are refused", "mm_processor_kwargs", "media_io_kwargs"),
    **_harmless("it does nothing without media, which are refused", "images_config", "max_dynamic_patch"),
    **_harmless("it does nothing without media, which are refused", "min_dynamic_patch", "document_image_limit"),
    **_harmless("it does nothing without media, which are refused", "vl_high_resolution_images", "image_url_detail"),
    **_harmless("it does nothing without media, which are refused", "document_page_limit", "return_mm_kwargs"),
    **_harmless("it does nothing without hidden states or experts", "routed_experts_start_len"),
    **_harmless("it does nothing without hidden states or experts", "routed_experts_prompt_start"),
    **_harmless("grammars have one engine here", "guided_decoding_backend", "guided_whitespace_pattern"),
    **_harmless("grammars have one engine here", "grammar_lazy", "preserved_tokens", "grammar_root"),
    **_harmless("texts are joined as the tokenizer says", "spaces_between_special_tokens"),
    **_harmless("texts are joined as the tokenizer says", "clean_up_tokenization_spaces"),
    **_harmless("thoughts come as they are thought", "stream_reasoning"),
    **_harmless("it bounds tools that run at the vendor, of which there are none", "max_tool_calls"),
    **_harmless("it is for the client's library", "drop_params", "allowed_openai_params", "betas", "anthropic_beta"),
    **_harmless("it is for the client's library", "anthropic_version", "api_version", "custom_llm_provider"),
    **_harmless("it is for the client's library", "extra_headers", "api_base", "base_url", "caching"),
}

NOTED: Mapping[str, Foreign] = _noted(
    "the reply says nothing of it",
    *("timings_per_token", "return_progress", "return_meta_info", "return_cached_tokens_details", "verbose"),
    *("perf_metrics_in_response", "return_prompt_text", "return_token_offsets", "sse_ping_interval"),
    *("debug", "stream_interval", "include_usage", "usage", "enhancements", "tool_stream", "api_key"),
)


def _table(*tables: Mapping[str, Foreign]) -> Mapping[str, Foreign]:
    return {name: entry for table in tables for name, entry in table.items()}


def _merely_counted(names: Iterable[str]) -> Mapping[str, Foreign]:
    return _harmless("tokens are counted, nothing is answered", *names)


# Of endpoints that answer; their own fields come first.
ANSWERED = _table(HARMLESS, NOTED, OF_ANOTHER_API, OF_ANSWERS, OF_PROMPTS)
# Of those that only count tokens.
_RENDERED = ("tools", "functions", "documents", "chat_template_kwargs", "system", "messages", "input", "prompt")
_RENDERED_TOO = ("instructions", "system_prompt", "thinking", "reasoning", "reasoning_effort", "enable_thinking")
COUNTED = _table(
    ANSWERED,
    _merely_counted(OF_ANSWERS),
    _merely_counted(name for name in OF_ANOTHER_API if name not in (*_RENDERED, *_RENDERED_TOO)),
)

# Of the objects within a request.
PARSED = _harmless("a client's library has read it from the text beside it", "parsed", "parsed_arguments")
MESSAGE = _table(
    PARSED,
    _refused(_MEDIA, "images", "audio", "attachments", "experimental_attachments", "files"),
    _refused("continue_final_message goes on from the last message", "prefix", "partial"),
    _refused("offer tools in the tools of the request", "tools"),
    _harmless("it is about how an answer came to be, not what it says", "annotations", "citations", "id", "weight"),
    _harmless("it is about how an answer came to be, not what it says", "provider_specific_fields", "finish_reason"),
    _harmless("the cache keeps what it can, with the same answers", "cache_control"),
)
PART = _table(
    _harmless("it is about where a text came from, not what it says", "annotations", "citations", "signature"),
    _harmless("it is about where a text came from, not what it says", "cache_control", "logprobs", "closed"),
    PARSED,
)
CALL = _table(
    _harmless("it is about how a call came to be", "index", "extra_content", "provider_specific_fields", "caller"),
    PARSED,
)
TOOL = _table(
    _noted("all tools are shown from the beginning", "defer_loading"),
    _refused("tools are called by the model", "allowed_callers", asks=but([], ["direct"])),
    _harmless("arguments come as they are written", "eager_input_streaming"),
)
OUTPUTS = _table(
    _refused(_OTHER_FORM, "structural_tag"),
    _harmless("grammars have one engine here", "backend", "disable_fallback", "disable_additional_properties"),
)
OBFUSCATION = _harmless("there is none", "include_obfuscation")
SCHEMA_WRAPPER = _table(
    _refused(
        "the schema belongs into json_schema.schema",
        *("type", "properties", "required", "items", "anyOf", "oneOf", "allOf", "enum", "const", "$ref", "$defs"),
    ),
    _harmless("it describes the form, and does not change it", "description", "title"),
)
LABELS = _harmless("it labels a request for its sender", "session_id", "tags")
DESCRIBED = _harmless("it describes the form, and does not change it", "description", "name", "strict")
