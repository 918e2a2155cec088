"""What requests for chat and text completions share, from their JSON to a `GenerationSpec`."""

from collections.abc import Callable, Sequence
from functools import partial

from hybrid_cache.api.server.schemas.common import GenerationRequest, StructuredOutputs
from hybrid_cache.api.server.tenants import current_tenant_or, salt_of
from hybrid_cache.api.text.answer_parser import AnswerForm
from hybrid_cache.api.text.generation import GenerationSpec
from hybrid_cache.api.text.grammars import Grammar, Source, choice_source, json_source
from hybrid_cache.api.text.messages import Talk
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.choreography.arrangement import Arrangement
from hybrid_cache.errors import BadSampling, RequestError
from hybrid_cache.request import CacheMode
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt


def spec_of(
    text: TextEngine,
    asked: GenerationRequest,
    prompt: Prompt,
    sampling: SamplingParams,
    *,
    form: AnswerForm | None = None,
    grammar: Grammar | None = None,
    arrangement: Arrangement | None = None,
    talk: Talk | None = None,
    one_call: bool = False,
) -> GenerationSpec:
    mode = _cache_mode(asked, sampling)
    return GenerationSpec(
        prompt,
        sampling,
        n=asked.n or 1,
        stops=(*(asked.stop or ()), *(() if asked.ignore_eos else text.defaults.stops)),
        named_stop_ids=tuple(asked.stop_token_ids or ()),
        include_stop=bool(asked.include_stop_str_in_output),
        show_special=asked.skip_special_tokens is False,
        form=form or AnswerForm(),
        one_call=one_call,
        grammar=grammar,
        namespace=salt_of(asked.cache_salt),
        tenant=current_tenant_or(asked.cache_salt),
        cache_mode=mode,
        arrangement=arrangement,
        talk=talk if mode is CacheMode.IMPLICIT else None,
    )


def sampling_params(
    text: TextEngine,
    asked: GenerationRequest,
    max_tokens: int,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """What the request asks for, else what the model's generation_config.json says, else OpenAI's defaults."""
    defaults = text.defaults
    eos = () if asked.ignore_eos else text.eos_ids
    return SamplingParams(
        temperature=_or(asked.temperature, defaults.temperature),
        top_p=_or(asked.top_p, defaults.top_p),
        top_k=max(0, defaults.top_k if asked.top_k is None else asked.top_k),
        min_p=_or(asked.min_p, defaults.min_p),
        presence_penalty=_or(asked.presence_penalty, 0.0),
        frequency_penalty=_or(asked.frequency_penalty, 0.0),
        repetition_penalty=_or(asked.repetition_penalty, defaults.repetition_penalty),
        logit_bias=asked.logit_bias or {},
        seed=asked.seed,
        max_tokens=max_tokens,
        min_tokens=min(defaults.min_new_tokens, max_tokens) if asked.min_tokens is None else asked.min_tokens,
        stop_token_ids=(*eos, *(i for i in asked.stop_token_ids or () if i not in eos)),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def asks_for_form(asked: GenerationRequest) -> bool:
    """Whether an answer has to be anything."""
    return bool(_forms(asked))


def source_of(asked: GenerationRequest) -> Source | None:
    """What an answer has to be. Raises RequestError, also where two fields say that."""
    forms = _forms(asked)
    if len(forms) > 1:
        one, other = [*forms][:2]
        raise RequestError(f"{one} and {other} cannot both be there", param=other)
    return next((make() for make in forms.values()), None)


def _forms(asked: GenerationRequest) -> dict[str, Callable[[], Source]]:
    """By the fields that ask for them: OpenAI's, vLLM's, its older ones, and those of SGLang and llama-server."""
    forms: dict[str, Callable[[], Source]] = {}
    wanted = None if asked.response_format is None else asked.response_format.wanted
    if wanted is not None:
        forms["response_format"] = partial(json_source, wanted, "response_format")
    if asked.structured_outputs is not None:
        forms["structured_outputs"] = partial(_source_of_outputs, asked.structured_outputs, "structured_outputs")
    older: tuple[tuple[str, dict[str, object]], ...] = (
        ("guided_json", {"json": asked.guided_json}),
        ("guided_regex", {"regex": asked.guided_regex}),
        ("guided_choice", {"choice": asked.guided_choice}),
        ("guided_grammar", {"grammar": asked.guided_grammar}),
        ("json_schema", {"json": asked.json_schema}),
        ("regex", {"regex": asked.regex}),
    )
    for name, outputs in older:
        if any(outputs.values()):
            forms[name] = partial(_source_of_outputs, StructuredOutputs.model_validate(outputs), name)
    return forms


def _source_of_outputs(outputs: StructuredOutputs, param: str) -> Source:
    if outputs.json_ is not None:
        return json_source(outputs.json_, param)
    if outputs.json_object:
        return json_source({"type": "object"}, param)
    if outputs.regex is not None:
        return Source("regex", outputs.regex, param)
    if outputs.choice is not None:
        return choice_source(outputs.choice, param)
    assert outputs.grammar is not None
    return Source("lark", outputs.grammar, param, own=True)


def most_of(one: int | None, other: int | None) -> int | None:
    """The larger of two numbers of log-probabilities; None where neither is asked for."""
    return max((number for number in (one, other) if number is not None), default=None)


def check_tokens(text: TextEngine, asked: GenerationRequest) -> None:
    """Raises BadSampling for tokens that the model does not have."""
    named: Sequence[tuple[str, Sequence[int]]] = (
        ("logit_bias", tuple(asked.logit_bias or ())),
        ("stop_token_ids", tuple(asked.stop_token_ids or ())),
    )
    for name, tokens in named:
        for token in tokens:
            if not 0 <= token < text.vocab_size:
                raise BadSampling(f"{name} names token {token}, the vocabulary is [0, {text.vocab_size})", param=name)


def _cache_mode(asked: GenerationRequest, sampling: SamplingParams) -> CacheMode:
    """Log-probabilities of a prompt need all of it computed, so they do not use the cache."""
    if sampling.prompt_logprobs is not None:
        return CacheMode.OFF
    options = asked.prompt_cache_options
    return CacheMode.EXPLICIT if options and options.mode == "explicit" else CacheMode.IMPLICIT


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
