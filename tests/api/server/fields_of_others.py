"""The request fields of other servers, by endpoint: read off their documentation and request classes, 2026-11."""

import anthropic.types as anthropic_types
import anthropic.types.beta as anthropic_beta
import openai.types as openai_types
import openai.types.chat as openai_chat
import openai.types.responses as openai_responses


def names(text: str) -> list[str]:
    return text.split()


VLLM = names(
    "use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids"
    " include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens"
    " truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words"
    " add_special_tokens structured_outputs guided_json guided_regex guided_choice guided_grammar"
    " guided_decoding_backend guided_whitespace_pattern structural_tag priority request_id session_id"
    " return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params ec_transfer_params vllm_xargs"
    " logits_processors repetition_detection stream_interval routed_experts_prompt_start"
)
VLLM_CHAT = names(
    "echo add_generation_prompt continue_final_message documents chat_template chat_template_kwargs media_io_kwargs"
    " mm_processor_kwargs thinking_token_budget include_reasoning reasoning_effort return_prompt_text return_mm_kwargs"
    " return_token_offsets"
)
SGLANG = names(
    "return_hidden_states return_routed_experts routed_experts_start_len return_cached_tokens_details regex ebnf"
    " stop_regex no_stop_trim lora_path session_params custom_params custom_logit_processor images_config"
    " bootstrap_host bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank data_parallel_rank rid"
    " extra_key ngram_corpus_id custom_labels json_schema"
)
SGLANG_CHAT = names(
    "return_prompt_token_ids return_meta_info task separate_reasoning stream_reasoning max_dynamic_patch"
    " min_dynamic_patch use_audio_in_video input_ids reasoning"
)
LLAMA_SERVER = names(
    "n_predict n_keep n_discard n_indent n_cache_reuse t_max_prompt_ms t_max_predict_ms id_slot cache_prompt"
    " return_tokens return_progress samplers timings_per_token post_sampling_probs response_fields lora dynatemp_range"
    " dynatemp_exponent typical_p repeat_penalty repeat_last_n penalize_nl dry_multiplier dry_base dry_allowed_length"
    " dry_penalty_last_n dry_sequence_breakers xtc_probability xtc_threshold mirostat mirostat_tau mirostat_eta grammar"
    " json_schema n_probs min_keep top_n_sigma adaptive_target adaptive_decay backend_sampling grammar_lazy"
    " grammar_triggers preserved_tokens speculative.n_max speculative.n_min speculative.p_min reasoning_format"
    " thinking_forced_open parse_tool_calls verbose image_data"
)
TGI = names(
    "best_of do_sample watermark details decoder_input_details return_full_text truncate typical_p top_n_tokens"
    " adapter_id tool_prompt guideline max_new_tokens"
)
OLLAMA_AND_LM_STUDIO = names(
    "options keep_alive format think raw template context images num_ctx num_predict ttl draft_model"
)
GATEWAYS = names(  # LiteLLM, OpenRouter, Groq, Fireworks, DeepSeek, DashScope, Mistral, xAI, Azure
    "drop_params allowed_openai_params extra_body extra_headers extra_query timeout num_retries litellm_metadata"
    " provider route models transforms plugins usage top_a preset trace include_reasoning reasoning_format"
    " citation_options compound_custom search_parameters deferred enable_thinking thinking_budget enable_search"
    " search_options result_format incremental_output random_seed safe_prompt prompt_mode prompt_truncate_len"
    " context_length_exceeded_behavior raw_output perf_metrics_in_response speculation safety_model data_sources"
    " enhancements user_security_context thinking client_metadata"
)
OPENAI_CHAT = list(openai_chat.completion_create_params.CompletionCreateParamsBase.__annotations__)
OPENAI_TEXT = list(openai_types.completion_create_params.CompletionCreateParamsBase.__annotations__)
OPENAI_RESPONSES = list(openai_responses.response_create_params.ResponseCreateParamsBase.__annotations__)
ANTHROPIC = [
    *anthropic_types.message_create_params.MessageCreateParamsBase.__annotations__,
    *anthropic_beta.message_create_params.MessageCreateParamsBase.__annotations__,
    *("output_format", "anthropic_version", "anthropic_beta"),
]
ANTHROPIC_COUNT = list(anthropic_types.message_count_tokens_params.MessageCountTokensParams.__annotations__)
EVERYBODY = [*VLLM, *SGLANG, *LLAMA_SERVER, *TGI, *OLLAMA_AND_LM_STUDIO, *GATEWAYS]
CHAT = {*EVERYBODY, *VLLM_CHAT, *SGLANG_CHAT, *OPENAI_CHAT}
FIELDS: dict[str, set[str]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {*EVERYBODY, *OPENAI_TEXT},
    "/v1/responses": {*EVERYBODY, *OPENAI_RESPONSES},
    "/v1/messages": {*EVERYBODY, *ANTHROPIC},
    "/v1/messages/count_tokens": {*EVERYBODY, *ANTHROPIC_COUNT},
    "/tokenize": CHAT,
}
