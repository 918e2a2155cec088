"""Attacks that are bytes: requests, and the statuses they may have. 0 is a connection closed without an answer."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from tests.soak.wire import head, post

CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
REFUSED = frozenset({400})
SERVED = frozenset({200, 400})


@dataclass(frozen=True, slots=True)
class Volley:
    name: str
    requests: tuple[bytes, ...]
    allowed: frozenset[int]


def _messages(content: object, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1, **more}


def _prompts(key: str, *fields: dict[str, object]) -> tuple[bytes, ...]:
    return tuple(post(TEXT, {"prompt": "Once", "max_tokens": 1, **more}, key=key) for more in fields)


def volleys(key: str) -> list[Volley]:
    """key: a valid one"""
    return [*_framing(key), *_keys(key), *_paths(key), *_fields(key), *_json(key), *_large(key)]


def _framing(key: str) -> Iterable[Volley]:
    body = json.dumps({"prompt": "Once", "max_tokens": 1}).encode()

    def framed(*lines: str, version: str = "1.1", host: str = "Host: 127.0.0.1", data: bytes = body) -> bytes:
        top = [f"POST {TEXT} HTTP/{version}", host, "Connection: close", "Content-Type: application/json"]
        return "\r\n".join([*top, f"Authorization: Bearer {key}", *lines, "", ""]).encode() + data

    size, chunked = f"Content-Length: {len(body)}", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    yield Volley(
        "lengths that lie",
        (
            *(framed(f"Content-Length: {text}") for text in ("+5", "-1", "abc", "5, 6", "9" * 30)),
            framed(size, f"Content-Length: {len(body) + 1}"),
            framed(f"Content-Length : {len(body)}"),
            framed("Transfer-Encoding: xchunked", data=chunked),
        ),
        frozenset({400, 408, 413, 501}),
    )
    yield Volley(
        "Content-Length with Transfer-Encoding", (framed(size, "Transfer-Encoding: chunked", data=chunked),), REFUSED
    )
    yield Volley("two hosts", (framed(size, "Host: evil.example"),), REFUSED)
    yield Volley("HTTP/9.9", (framed(size, version="9.9"),), frozenset({400, 505}))
    yield Volley("headers of 1 MB", (framed(size, "x: " + "y" * 10**6),), frozenset({0, 400, 431}))
    yield Volley("a million empty headers", (framed(size, *["a:"] * 10**6),), frozenset({0, 400, 431}))
    yield Volley(
        "no JSON content type",
        tuple(
            post(TEXT, body, key=key, headers={"Content-Type": kind})
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")
        ),
        frozenset({400, 415}),
    )
    bomb = {"Content-Encoding": "gzip"}
    yield Volley("gzip", (post(TEXT, b"\x1f\x8b\x08" + b"\0" * 10**5, key=key, headers=bomb),), frozenset({400, 415}))


def _keys(key: str) -> Iterable[Volley]:
    body = {"prompt": "Once", "max_tokens": 1}
    forms = (
        "",
        "Bearer",
        "Bearer ",
        f"Basic {key}",
        key,
        f"Bearer {key}x",
        f"Bearer {key[:-1]}",
        f"Bearer {key} {key}",
    )
    yield Volley(
        "wrong forms of a key",
        tuple(post(TEXT, body, headers={"Authorization": form}) for form in forms)
        + tuple(post(TEXT, body, headers={"x-api-key": form}) for form in ("", "x", key.upper())),
        frozenset({401}),
    )
    closed = (CHAT, TEXT, TOKENIZE, DETOKENIZE, "/v1/models", "/v1/models/embedded", "/tokenizer_info", "/openapi.json")
    spelled = (
        "//v1/models",
        "/v1//models",
        "/%76%31/models",
        "/v1/./models",
        "/health/../v1/models",
        "/health/../../v1/models",
    )
    yield Volley(
        "no key",
        tuple(
            head(method, path) for method in ("GET", "POST", "HEAD", "PUT", "OPTIONS") for path in (*closed, *spelled)
        ),
        frozenset({401, 404}),
    )


def _paths(key: str) -> Iterable[Volley]:
    names = ("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "%00", "%ff", "a" * 5000)
    paths = tuple(head("GET", f"/v1/models/{name}", key=key) for name in names)
    yield Volley("paths out of the models", paths, frozenset({400, 404}))
    yield Volley(
        "a redirect to a host of the client's",
        (head("GET", "/health/", key=key, headers={"Host": "evil.example"}),),
        frozenset({404, 421}),
    )
    hosts = ("evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "")
    yield Volley(
        "another host (DNS rebinding)",
        tuple(post(TEXT, {"prompt": "Once", "max_tokens": 1}, key=key, headers={"Host": host}) for host in hosts)
        + tuple(head("GET", "/v1/models", key=key, headers={"Host": host}) for host in hosts),
        frozenset({400, 403, 421}),
    )


def _fields(key: str) -> Iterable[Volley]:
    ends: list[dict[str, object]] = [
        {"stop_token_ids": list(range(256)), "min_tokens": 1, "ignore_eos": True},
        {"logit_bias": {str(i): 1 for i in range(1024)}},
        {"repetition_penalty": 1e-300},
        {"temperature": 1e-320},
        {"n": -1},
        {"n": 100},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"seed": 2**63},
        {"max_tokens": 2**31},
        {"top_k": -2},
    ]
    yield Volley("numbers at their ends", _prompts(key, *ends), SERVED)
    yield Volley(
        "biases of one token under several names",
        _prompts(key, {"logit_bias": {"1": 1, "01": 2}}, {"logit_bias": {"٣": 5}}, {"logit_bias": {"-1": 5}}),
        REFUSED,
    )
    tokens = ([10**6], [-1], [2**63], [True], [1.5], ["1"], [None], [[1]])
    yield Volley(
        "tokens that are none",
        tuple(post(DETOKENIZE, {"tokens": each}, key=key) for each in tokens)
        + tuple(post(TEXT, {"prompt": each, "max_tokens": 1}, key=key) for each in tokens[:5]),
        REFUSED,
    )
    odd = ("\udfff", "\0", "\u202e", "\ufdd0", "x" * 10**5)
    call = {"id": "\udfff", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": None}
    fields = ("name", "reasoning_content", "tool_call_id")
    plain: dict[str, object] = {"role": "user", "content": "x"}
    messages: list[list[dict[str, object]]] = [[{"role": "user", "ref": text}] for text in odd]
    messages += [[{**plain, field: text}] for field in (*fields, "content") for text in odd]
    messages += [[plain, {**answer, "tool_calls": [call]}]]
    asked: list[dict[str, object]] = [{"messages": each} for each in messages]
    asked += [{"messages": [plain], name: text} for name in ("user", "model", "cache_salt", "stop") for text in odd]
    asked += [{**each, "choreography": {}} for each in asked]
    yield Volley(
        "odd unicode in every text",
        tuple(post(CHAT, {"max_tokens": 1, **each}, key=key) for each in asked),
        frozenset({200, 400, 404}),
    )
    yield Volley(
        "what would need other code",
        tuple(
            post(CHAT, body, key=key)
            for body in (
                _messages("x", response_format={"type": "json_schema"}),
                _messages("x", tool_choice="required"),
                _messages("x", chat_template_kwargs={"messages": []}),
                _messages([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]),
            )
        ),
        REFUSED,
    )
    deep: dict[str, object] = {"type": "integer"}
    for _ in range(200):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    circle = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    outputs: list[dict[str, object]] = [
        {"regex": "(a+)+$"},
        {"regex": "((a{1,99}){1,99}){1,99}"},
        {"regex": "(" * 5000 + ")" * 5000},
        {"regex": "(?=a)b(?<!c)"},
        {"json": deep},
        {"json": circle},
        {"json": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "minLength": 10**6}},
        {"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
        {"json": {"enum": [f"{i}" * 9 for i in range(9999)]}},
        {"grammar": "start: start start"},
        {"grammar": 'start: ("a" | start "b")+ start'},
        {"grammar": "start: /" + "(a?){30}" * 300 + "/"},
        {"choice": ["x" * 10**4] * 9},
    ]
    yield Volley(
        "grammars that explode",
        tuple(post(CHAT, _messages("x", structured_outputs=each, max_tokens=4), key=key) for each in outputs),
        frozenset({200, 400}),
    )
    template = {"chat_template": "{{ 7 * 7 }}", "tokenize": False, "x": "{{ 7 * 7 }}"}
    yield Volley(
        "a template of the client's", (post(CHAT, _messages("x", chat_template_kwargs=template), key=key),), SERVED
    )


def _json(key: str) -> Iterable[Volley]:
    def raw(text: str) -> bytes:
        return b'{"max_tokens":1,"prompt":"x",' + text.encode("utf-8", "surrogatepass") + b"}"

    texts = ['"seed":' + "1" * 10**6, '"temperature":1e999', '"temperature":NaN', '"temperature":-Infinity']
    texts += ['"seed":' + "[" * depth + "]" * depth for depth in (10**5, 4 * 10**6)]
    texts += ['"logit_bias":' + '{"a":' * 10**5 + "1" + "}" * 10**5, '"user":"\0"']
    bodies = tuple(post(TEXT, raw(text), key=key) for text in texts)
    yield Volley("JSON that is none, or is deep", bodies, frozenset({400, 413}))
    twice = (raw('"prompt":"y"'), raw('"user":"\\u0000\\ud800"'), raw('"user":"\ud800"'), raw('"user":"\u202e\u2066"'))
    yield Volley("JSON that is odd", tuple(post(TEXT, body, key=key) for body in twice), SERVED)


def _large(key: str) -> Iterable[Volley]:
    many = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 2048
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "description": "d" * 70_000, "parameters": {}}}
        for i in range(128)
    ]
    hidden = [{"role": "user", "content": "x", "reasoning_content": "z1" * (4 << 20)}]
    yield Volley("4,096 messages", (post(TOKENIZE, {"messages": many}, key=key),), SERVED)
    yield Volley("9 MB of tools", (post(CHAT, _messages("x", tools=tools), key=key),), SERVED)
    yield Volley("8 MB that no template shows", (post(CHAT, {"messages": hidden, "max_tokens": 1}, key=key),), SERVED)
    emoji = post(CHAT, json.dumps(_messages("\U0001f600" * 2_000_000), ensure_ascii=False).encode(), key=key)
    yield Volley("8 MB of emoji", (emoji,), REFUSED)
    yield Volley("a prompt of 5 MB", (post(TEXT, {"prompt": "word " * 10**6, "max_tokens": 1}, key=key),), REFUSED)
    yield Volley("a body over the limit", (post(TEXT, b" " * (11 << 20), key=key),), frozenset({413}))
    yield Volley("a body far over the limit", (post(TEXT, b" " * (60 << 20), key=key),), frozenset({0, 413}))
