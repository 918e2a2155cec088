"""A request for every route that the server answers with 200, and from which mutations start."""

from tests.soak.wire import Json

_USER = {"role": "user", "content": "What does the cat do all day?"}
_TALK = [
    {"role": "system", "content": "You are brief."},
    _USER,
    {"role": "assistant", "content": "It sleeps."},
    {"role": "user", "content": "And at night?"},
]
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
_CALLS = [
    {"role": "user", "content": "Look up owl."},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "A tool knows that.",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "owl"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "name": "look_up", "content": "A bird."},
]
_PARTS = [
    {
        "role": "user",
        "name": "ann",
        "content": [
            {"type": "text", "text": "One part.", "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "5m"}},
            {"type": "text", "text": "Another part."},
        ],
    }
]
_SAMPLING = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.01,
    "seed": 7,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {"12": 1.5, "13": -100},
    "stop": ["\n\n", "END"],
    "stop_token_ids": [5, 6],
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "min_tokens": 1,
    "ignore_eos": True,
    "return_token_ids": True,
}
_CACHE = {
    "cache_salt": "salt",
    "prompt_cache_key": "talk-1",
    "prompt_cache_options": {"mode": "explicit", "ttl": "10m"},
    "user": "ann",
}
_ARRANGED = {"fidelity": "exact", "order": "any", "seam": 0, "composition": "ordered", "positions": "consecutive"}
_TEXT = "Once upon a time there was a cat"

_SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "maxLength": 9, "pattern": "^[a-z]+$"}, "n": {"enum": [1, None, "x"]}},
    "required": ["word"],
    "additionalProperties": False,
}
_POINT = {"mode": "explicit", "ttl": "5m"}
_MARK = {"type": "ephemeral", "ttl": "1h"}
_BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "Look up owl.", "cache_control": _MARK}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "A tool knows that.", "signature": ""},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {"word": "owl"}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "A bird."}]},
            {"type": "text", "text": "Go on."},
        ],
    },
]
_ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "Look up owl.", "prompt_cache_breakpoint": _POINT}]},
    {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "A tool knows."}],
    },
    {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "I look."}]},
    {"type": "function_call", "call_id": "call_1", "name": "look_up", "arguments": '{"word": "owl"}'},
    {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "A bird."}]},
    {"role": "user", "content": "Go on."},
]
_OUR_TOOL = {"name": "look_up", "description": "Looks up.", "input_schema": _SCHEMA, "cache_control": _MARK}

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
RESPONSES = "/v1/responses"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"

BODIES: tuple[tuple[str, Json], ...] = (
    (CHAT, {"messages": [_USER], "max_tokens": 2}),
    (CHAT, {"messages": _TALK, "max_tokens": 2, "n": 2, **_SAMPLING}),
    (CHAT, {"messages": _TALK, "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 3}),
    (CHAT, {"messages": _CALLS, "tools": [_TOOL], "tool_choice": "auto", "parallel_tool_calls": True, "max_tokens": 2}),
    (CHAT, {"messages": _PARTS, "max_tokens": 2, **_CACHE}),
    (CHAT, {"messages": _TALK, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2}),
    (CHAT, {"messages": _TALK[:3], "continue_final_message": True, "add_generation_prompt": False, "max_tokens": 2}),
    (
        CHAT,
        {"messages": [_USER], "response_format": {"type": "text"}, "chat_template_kwargs": {"x": 1}, "max_tokens": 1},
    ),
    (CHAT, {"messages": _TALK, "choreography": _ARRANGED, "max_tokens": 2}),
    (
        CHAT,
        {"messages": _CALLS, "tools": [_TOOL], "choreography": {"fidelity": "composed", "seam": 8}, "max_tokens": 2},
    ),
    (CHAT, {"messages": _TALK, "choreography": {"fidelity": "relocated", "encode": "alone"}, "max_tokens": 2}),
    (CHAT, {"messages": [_USER], "choreography": {}, "stream": True, "n": 2, "max_tokens": 2, **_CACHE}),
    (
        CHAT,
        {
            "messages": [_USER],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA, "strict": True}},
            "max_tokens": 2,
        },
    ),
    (CHAT, {"messages": [_USER], "structured_outputs": {"regex": "[a-z]{1,4}"}, "max_tokens": 3}),
    (CHAT, {"messages": [_USER], "tools": [_TOOL], "tool_choice": "required", "n": 2, "max_tokens": 2}),
    (COMPLETIONS, {"prompt": _TEXT, "structured_outputs": {"choice": ["yes", "no"]}, "max_tokens": 2}),
    (COMPLETIONS, {"prompt": _TEXT, "structured_outputs": {"grammar": 'start: "a" | "b" "c"*'}, "max_tokens": 2}),
    (MESSAGES, {"model": "embedded", "messages": [_USER], "max_tokens": 2}),
    (
        MESSAGES,
        {
            "model": "embedded",
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cch=1\nBe brief.", "cache_control": _MARK}
            ],
            "messages": _BLOCKS,
            "tools": [_OUR_TOOL],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "thinking": {"type": "adaptive"},
            "stop_sequences": ["END"],
            "metadata": {"user_id": "ann"},
            "stream": True,
            "max_tokens": 2,
        },
    ),
    (
        MESSAGES,
        {
            "model": "embedded",
            "messages": _TALK[1:3],
            "output_config": {"format": {"type": "json_schema", "schema": _SCHEMA}},
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "max_tokens": 2,
        },
    ),
    (RESPONSES, {"input": _TEXT, "max_output_tokens": 2}),
    (
        RESPONSES,
        {
            "input": _ITEMS,
            "instructions": "Be brief.",
            "tools": [{"type": "function", **_TOOL["function"], "strict": True}],
            "tool_choice": {"type": "function", "name": "look_up"},
            "parallel_tool_calls": False,
            "stream": True,
            "stream_options": {"include_obfuscation": False},
            "max_output_tokens": 2,
            "cache_salt": "salt",
            "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
        },
    ),
    (
        RESPONSES,
        {
            "input": [_USER],
            "text": {"format": {"type": "json_schema", "name": "x", "schema": _SCHEMA, "strict": True}},
            "reasoning": {"effort": "none", "summary": "auto"},
            "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
            "top_logprobs": 2,
            "truncation": "auto",
            "temperature": 0.5,
            "top_p": 0.9,
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "max_output_tokens": 2,
        },
    ),
    (COUNT, {"model": "embedded", "system": "Be brief.", "messages": _BLOCKS, "tools": [_OUR_TOOL]}),
    (COMPLETIONS, {"prompt": _TEXT, "max_tokens": 2}),
    (COMPLETIONS, {"prompt": _TEXT, "max_tokens": 2, "echo": True, "logprobs": 2, "n": 2, "best_of": 2, **_SAMPLING}),
    (COMPLETIONS, {"prompt": [5, 6, 7, 8, 9], "max_tokens": 2, "stream": True, **_CACHE}),
    (COMPLETIONS, {"prompt": [_TEXT, "Another one", [5, 6, 7]], "max_tokens": 2, "add_special_tokens": False}),
    (COMPLETIONS, {"prompt": [[5, 6], [7, 8, 9]], "max_tokens": 0, "echo": True, "logprobs": 0, "suffix": ""}),
    (TOKENIZE, {"prompt": _TEXT, "add_special_tokens": True, "return_token_strs": True}),
    (TOKENIZE, {"messages": _CALLS, "tools": [_TOOL], "add_generation_prompt": True, "return_token_strs": True}),
    (DETOKENIZE, {"tokens": [5, 6, 7, 300]}),
)
NO_RESPONSE = "/v1/responses/resp_00000000000000000000000000000000"
LOOKUPS = ("/health", "/ready", "/ping", "/version", "/metrics", "/v1/models", "/v1/models/embedded", "/tokenizer_info")
REFERENCE = {"role": "user", "ref": "msg_000000000000000000000000"}  # of a message that nobody has sent
