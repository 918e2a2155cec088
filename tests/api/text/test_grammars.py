"""Answers in a form that is asked for: whatever a model prefers, what comes out is of that form."""

import json
import random
import time
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from hybrid_cache.api.text.answer_parser import AnswerForm
from hybrid_cache.api.text.call_readers import json_call
from hybrid_cache.api.text.grammars import Grammar, Grammars, Source, choice_source, json_source
from hybrid_cache.api.text.tool_formats import FORMATS, ThoughtFormat
from hybrid_cache.api.text.tool_grammars import call_source, open_source
from hybrid_cache.errors import RequestError
from tests.api.small_text import NUM_TOKENS, small_text
from tests.api.text.reading import Call, parse

LOOK: dict[str, Any] = {
    "name": "look",
    "parameters": {
        "type": "object",
        "properties": {
            "at": {"type": "string", "maxLength": 9},
            "times": {"type": "integer", "minimum": 0, "maximum": 99},
            "how": {"type": "string", "enum": ["fast", "slow"]},
        },
        "required": ["at", "times", "how"],
        "additionalProperties": False,
    },
}
WAIT: dict[str, Any] = {"name": "wait"}
CLOSED: dict[str, Any] = {"additionalProperties": False}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    tokenizer = small_text().tokenizer
    return Grammars(tokenizer, NUM_TOKENS, [tokenizer.id_of("<|im_end|>") or 0])


def walk(grammar: Grammar, rng: random.Random, most: int = 4000) -> str | None:
    """What a model says that likes all tokens as much; None if it comes to no end."""
    way, tokens, end = grammar.start(), list[int](), small_text().tokenizer.id_of("<|im_end|>")
    while not way.done:
        allowed = np.flatnonzero(np.unpackbits(way.mask().view(np.uint8), count=NUM_TOKENS, bitorder="little")).tolist()
        assert allowed
        token = end if end in allowed else rng.choice(allowed)
        way.note(token)
        if token != end:
            tokens.append(token)
        if len(tokens) > most:
            return None
    return small_text().tokenizer.decode(tokens)


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    kind = rng.choice(["string", "integer", "number", "boolean", "null", "enum", "const", "array", "object", "anyOf"])
    if kind == "string":
        low = rng.randrange(4)
        shapes = ({}, {"minLength": low, "maxLength": low + rng.randrange(9)}, {"pattern": "^[a-c]{1,4}x?$"})
        return {"type": "string", **rng.choice([*shapes[1:], {"maxLength": 12}])}
    if kind in ("integer", "number"):
        low = rng.randrange(-50, 50)
        return {"type": kind, "minimum": low, "maximum": low + rng.randrange(1, 100)}
    if kind == "enum":
        return {"enum": rng.sample(["a", 1, None, True, "\u20ac\n", 2.5, ""], rng.randrange(1, 5))}
    if kind == "const":
        return {"const": rng.choice(["x", 7, None, [1, {"a": 2}]])}
    if kind in ("array", "object", "anyOf") and depth == 0:
        return {"type": "boolean"}
    if kind == "array":
        low = rng.randrange(3)
        return {
            "type": "array",
            "items": random_schema(rng, depth - 1),
            "minItems": low,
            "maxItems": low + rng.randrange(3),
        }
    if kind == "object":
        names = rng.sample(["a", "b c", "\u00fc", 'd"', "e"], rng.randrange(1, 5))
        properties = {name: random_schema(rng, depth - 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}
    return {"type": kind}


@pytest.mark.parametrize("seed", range(10))
def test_whatever_comes_of_a_schema_is_valid(grammars: Grammars, seed: int) -> None:
    rng, ended = random.Random(seed), 0
    for _ in range(20):
        schema = random_schema(rng)
        said = walk(grammars.compile(json_source(schema, "response_format")), rng)
        if said is not None:
            ended += 1
            jsonschema_rs.validator_for(schema).validate(json.loads(said))
    assert ended > 10


def test_expressions_choices_and_grammars(grammars: Grammars) -> None:
    rng = random.Random(0)
    for _ in range(20):
        said = walk(grammars.compile(Source("regex", "[A-C][a-z]{2,5} is [0-9]{2}", "p")), rng)
        assert said is not None
        assert said[0] in "ABC"
        assert said[-6:-2] == " is "
        assert walk(grammars.compile(choice_source(['a "b"', "c/\\"], "p")), rng) in ('a "b"', "c/\\")
        assert walk(grammars.compile(Source("lark", 'start: "a" | "b" "c"', "p")), rng) in ("a", "bc")


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (json_source({"type": "foo"}, "p"), "foo"),
        (json_source({"$ref": "#/q"}, "p"), "/q"),
        (json_source({"type": "integer", "minimum": 5, "maximum": 1}, "p"), "Unsatisfiable"),
        (json_source({"type": "string", "pattern": "(a"}, "p"), "unclosed group"),
        (Source("json", '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}', "p"), "nothing"),
        (Source("json", "{", "p"), ""),
        (Source("regex", "(", "p"), "unclosed group"),
        (Source("lark", "begin: 1", "p"), ""),
        (json_source({"patternProperties": {f"^k{i}[a-z]*$": True for i in range(1000)}}, "p"), "more than 2 seconds"),
        (Source("lark", "start: <[123456789]>", "p"), "123456789"),
        (Source("regex", "a" * 300_000, "p"), "at most 131072"),
    ],
    ids=str,
)
def test_what_is_no_grammar_is_refused_soon(grammars: Grammars, source: Source, named: str) -> None:
    begin = time.process_time()
    with pytest.raises(RequestError) as found:
        grammars.compile(source)
    assert named in str(found.value)
    assert found.value.param == "p"
    assert time.process_time() - begin < 10


def follow(grammar: Grammar, text: str) -> str:
    """How far a text goes, and whether it may end there."""
    way, tokens, end = grammar.start(), small_text().tokenizer.encode(text), small_text().tokenizer.id_of("<|im_end|>")
    for count, token in enumerate([*tokens, end]):
        if way.done:
            return small_text().tokenizer.decode(tokens[:count])
        allowed = np.unpackbits(way.mask().view(np.uint8), count=NUM_TOKENS, bitorder="little")
        if not allowed[token]:
            return small_text().tokenizer.decode(tokens[:count]) + ("" if count < len(tokens) else "...")
        way.note(token)
    return text


@pytest.mark.parametrize("name", FORMATS)
def test_calls_that_a_model_makes_of_itself_are_as_strict_tools_say(grammars: Grammars, name: str) -> None:
    tools, tokenizer, rng = FORMATS[name], small_text().tokenizer, random.Random(name)
    forced = grammars.compile(call_source(tools, [LOOK], tokenizer, only=None, parallel=False))
    call = next(filter(None, (walk(forced, rng) for _ in range(9))))
    loose = open_source(tools, [LOOK, WAIT], tokenizer, ThoughtFormat(), parallel=True)
    grammar = grammars.compile(loose)
    assert follow(grammar, "") == ""
    assert follow(grammar, call) == call
    assert follow(grammar, "Hello, [you] are <b> here") == "Hello, [you] are <b> here"
    if tools.begin:
        assert follow(grammar, "{x} I look:\n" + call) == "{x} I look:\n" + call
        assert len(follow(grammar, f"well {tools.begin}nothing of the kind")) < len(f"well {tools.begin}not")
    else:
        assert follow(grammar, '{"x": 1}') == '{"'


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].begin])
def test_an_answer_of_a_form_may_be_a_call_instead(grammars: Grammars, name: str) -> None:
    tools, tokenizer, rng = FORMATS[name], small_text().tokenizer, random.Random(name)
    forced = grammars.compile(call_source(tools, [LOOK], tokenizer, only=None, parallel=False))
    call = next(filter(None, (walk(forced, rng) for _ in range(9))))
    form = json_source({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], **CLOSED}, "p")
    grammar = grammars.compile(open_source(tools, [LOOK], tokenizer, ThoughtFormat(), parallel=False, answer=form))
    assert follow(grammar, call) == call
    assert follow(grammar, '{"a": 5}') == '{"a": 5}'
    assert follow(grammar, "Hello") == ""
    assert follow(grammar, "") == "..."


@pytest.mark.parametrize("text", ["{", '{"a":' * 20_000])
def test_what_is_no_json_is_no_schema(text: str) -> None:
    with pytest.raises(RequestError, match=r"no JSON|nested"):
        json_source(text, "p")


def test_a_schema_without_a_bottom() -> None:
    schema: dict[str, Any] = {}
    schema["a"] = schema
    with pytest.raises(RequestError, match="holds itself"):
        json_source(schema, "p")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("only", [None, "look"])
def test_a_call_that_has_to_be_made_is_made(grammars: Grammars, name: str, only: str | None) -> None:
    rng, tools = random.Random(name), FORMATS[name]
    types = {"look": LOOK["parameters"]["properties"], "wait": {}}
    parallel = only is None
    source = call_source(tools, [LOOK, WAIT], small_text().tokenizer, only=only, parallel=parallel)
    grammar, ended = grammars.compile(source), 0
    for _ in range(20):
        said = walk(grammar, rng)
        if said is None:
            continue
        ended += 1
        calls = parse(AnswerForm(tools, types), [said])
        assert calls, said
        assert parallel or len(calls) == 1
        for call in calls:
            assert isinstance(call, Call), said
            assert call.complete
            assert call.name in (("look",) if only else ("look", "wait"))
            if call.name == "look":
                jsonschema_rs.validator_for(LOOK["parameters"]).validate(json.loads(call.arguments))
    assert ended > 5


PLACE = {"type": "object", "properties": {"row": {"enum": ["up", "down"]}}, "required": ["row"]} | CLOSED
REFERRING: dict[str, Any] = {
    "$defs": {"Place": PLACE, "Places": {"type": "array", "items": {"$ref": "#/$defs/Place"}, "maxItems": 2}},
    "type": "object",
    "properties": {"at": {"$ref": "#/$defs/Place"}, "near": {"$ref": "#/$defs/Places"}},
    "required": ["at", "near"],
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_tools", [1, 2])
@pytest.mark.parametrize("hash_sign", ["#", ""], ids=["standard", "as-LiteLLM-has-it"])
def test_a_schema_may_refer_to_its_own_definitions(
    grammars: Grammars, name: str, num_tools: int, hash_sign: str
) -> None:
    schema = json.loads(json.dumps(REFERRING).replace("#/", f"{hash_sign}/"))
    functions = [{"name": f"look{i}", "parameters": schema} for i in range(num_tools)]
    source = call_source(FORMATS[name], functions, small_text().tokenizer, only=None, parallel=False)
    grammar, rng, ended = grammars.compile(source), random.Random(name), 0
    for said in filter(None, (walk(grammar, rng) for _ in range(5))):
        ended += 1
        form = AnswerForm(FORMATS[name], {f["name"]: schema["properties"] for f in functions})
        [call] = parse(form, [said])
        assert isinstance(call, Call)
        jsonschema_rs.validator_for({**REFERRING, **CLOSED}).validate(json.loads(call.arguments))
    assert ended > 2


@pytest.mark.parametrize(
    ("more", "others"),
    [
        ({}, False),
        (CLOSED, False),
        ({"additionalProperties": True}, True),
        ({"patternProperties": {"^b": {"type": "boolean"}}}, True),
        ({"allOf": [{"required": ["b"]}]}, True),
        ({"required": ["b"]}, True),
    ],
    ids=str,
)
def test_a_call_has_no_arguments_that_its_tool_does_not_list(
    grammars: Grammars, more: dict[str, Any], others: bool
) -> None:
    """Unless the schema says, somehow, that there are others."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, **more}
    function = {"name": "f", "parameters": schema}
    source = call_source(FORMATS["llama3"], [function], small_text().tokenizer, only=None, parallel=False)
    way = grammars.compile(source).start()
    said = '{"name": "f", "parameters": {"a": true, "b": true}}'
    allowed = []
    for token in small_text().tokenizer.encode(said):
        allowed.append(bool(np.unpackbits(way.mask().view(np.uint8), bitorder="little")[token]))
        if not allowed[-1]:
            break
        way.note(token)
    assert all(allowed) == others


OPTIONAL: dict[str, Any] = {
    "name": "look",
    "parameters": {
        "type": "object",
        "properties": {
            "first": {"type": "integer", "minimum": 1, "maximum": 3},
            "needed": {"$ref": "#/$defs/pace"},
            "maybe": {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]},
            "last": {"type": ["string", "null"], "pattern": "^[a-c]{2}$"},
        },
        "required": ["needed"],
        "additionalProperties": False,
        "$defs": {"pace": {"enum": ["fast", "slow", 7]}},
    },
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("required", [["needed"], [], ["last"], ["first", "maybe"]], ids=str)
def test_parameters_that_may_be_left_out_are_written_at_times(
    grammars: Grammars, name: str, required: list[str]
) -> None:
    rng, seen = random.Random(name), set[frozenset[str]]()
    tool = {**OPTIONAL, "parameters": {**OPTIONAL["parameters"], "required": required}}
    form = AnswerForm(FORMATS[name], {"look": tool["parameters"]["properties"]})
    source = call_source(FORMATS[name], [tool], small_text().tokenizer, only="look", parallel=False)
    grammar, valid = grammars.compile(source), jsonschema_rs.validator_for(tool["parameters"])
    for _ in range(30):
        said = walk(grammar, rng)
        assert said is not None
        [call] = parse(form, [said])
        assert isinstance(call, Call), said
        valid.validate(json.loads(call.arguments))
        seen.add(frozenset(json.loads(call.arguments)))
    assert len(seen) > 2
    assert {"first", "maybe"} <= frozenset().union(*seen)


@pytest.mark.parametrize("name", FORMATS)
def test_names_that_a_form_cannot_say(grammars: Grammars, name: str) -> None:
    tokenizer, tools = small_text().tokenizer, FORMATS[name]
    properties = {'a=">\n(': {"const": 1}, "b": {"const": 2}}
    tool: dict[str, Any] = {"name": "f\n> ", "parameters": {"type": "object", "properties": properties}}
    if tools.read is json_call:
        grammars.compile(call_source(tools, [tool], tokenizer, only=None, parallel=False))
        return
    with pytest.raises(RequestError, match=r"'f\\n> ' cannot be called"):
        call_source(tools, [tool], tokenizer, only=None, parallel=False)
    tool["name"] = "f"
    said = walk(grammars.compile(call_source(tools, [tool], tokenizer, only=None, parallel=False)), random.Random(0))
    [call] = parse(AnswerForm(tools, {"f": properties}), [said or ""])
    assert isinstance(call, Call)
    if name != "kimi":
        assert "a" not in call.arguments
        tool["parameters"]["required"] = ['a=">\n(']
        with pytest.raises(RequestError, match="cannot be written"):
            call_source(tools, [tool], tokenizer, only=None, parallel=False)


def test_a_tool_that_is_not_there() -> None:
    tokenizer = small_text().tokenizer
    with pytest.raises(RequestError, match="'g', which is none of the tools"):
        call_source(FORMATS["hermes"], [LOOK], tokenizer, only="g", parallel=False)
    with pytest.raises(RequestError, match="there are no tools"):
        call_source(FORMATS["hermes"], [], tokenizer, only=None, parallel=False)


def test_tokens_that_have_to_come_are_told_ahead(grammars: Grammars) -> None:
    """With them an answer is as valid, and `most` is kept to."""
    rng, end, source = (
        random.Random(0),
        small_text().tokenizer.id_of("<|im_end|>"),
        json_source(LOOK["parameters"], "p"),
    )
    for most in (1, 3, 31):
        way, tokens, told = grammars.compile(source).start(), list[int](), 0
        while not way.done:
            allowed = np.flatnonzero(np.unpackbits(way.mask().view(np.uint8), count=NUM_TOKENS, bitorder="little"))
            tokens.append(end if end in allowed else int(rng.choice(allowed.tolist())))
            way.note(tokens[-1])
            forced = list(way.ahead(most))
            assert len(forced) <= most
            for token in forced:
                assert not way.done
                way.note(token)
            tokens += forced
            told += len(forced)
        assert told >= 10
        text = small_text().tokenizer.decode([token for token in tokens if token != end])
        jsonschema_rs.validator_for(LOOK["parameters"]).validate(json.loads(text))


@pytest.mark.parametrize(
    "source", [json_source({"const": "a"}, "p"), Source("regex", "a/b", "p"), choice_source(["a"], "p")], ids=str
)
def test_behind_a_thought(grammars: Grammars, source: Source) -> None:
    way = grammars.compile(source.after_thought("</think>")).start()
    expected = {"json": '"a"', "regex": "a/b", "lark": "a"}[source.kind]
    for token in small_text().tokenizer.encode("why\n not</think>\n\n" + expected):
        assert not way.done
        way.note(token)
    assert way.done
    with pytest.raises(RequestError, match="cannot follow a thought"):
        Source("lark", 'start: "a"', "p", own=True).after_thought("</think>")


@pytest.mark.parametrize(
    "source",
    [
        json_source({"const": "a<tool_call>b"}, "p"),
        json_source({"enum": ["<|im_end|>", "</tool_call>"]}, "p"),
        choice_source(["x<|im_start|>y"], "p"),
        Source("regex", "a<tool_call>b", "p"),
    ],
    ids=lambda source: source.text[:20],
)
def test_text_that_looks_like_an_added_token_is_spelled(grammars: Grammars, source: Source) -> None:
    said = {walk(grammars.compile(source), random.Random(seed)) for seed in range(6)}
    assert said <= {'"a<tool_call>b"', '"<|im_end|>"', '"</tool_call>"', "x<|im_start|>y", "a<tool_call>b"}
    for seed in range(3):  # tokens that are forced, too
        way, rng, tokens = grammars.compile(source).start(), random.Random(seed), list[int]()
        while not way.done:
            allowed = np.flatnonzero(np.unpackbits(way.mask().view(np.uint8), bitorder="little")).tolist()
            tokens.append(rng.choice(allowed))
            way.note(tokens[-1])
            for token in way.ahead(31):
                tokens.append(token)
                way.note(token)
        assert not {2, 3, 4, 5} & set(tokens[:-1])


def test_an_answer_behind_a_thought_whose_end_is_a_token(grammars: Grammars) -> None:
    end = small_text().tokenizer.id_of("</tool_call>")
    source = json_source({"enum": [7]}, "p").after_thought("</tool_call>", end)
    assert follow(grammars.compile(source), "hmm\n</tool_call>\n7") == "hmm\n</tool_call>\n7"
    assert follow(grammars.compile(source), "hmm</tool_call>8") == "hmm</tool_call>"


def test_a_grammar_that_is_too_much_work_ends_its_answer(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_cache.api.text.grammars.MOST_S_AT_ONCE", 0.05)
    way = grammars.compile(Source("lark", "start: e\ne: e e | e e e | /[a-z ]/", "p", own=True)).start()
    token = small_text().tokenizer.encode("a")[0]

    def go_on() -> None:
        for _ in range(400):
            way.note(token)

    with pytest.raises(RequestError, match="too long to follow"):
        go_on()
