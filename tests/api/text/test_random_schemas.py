"""Models of random weights at temperature 1, with random schemas: whatever is finished is valid."""

import json
import sys
from collections import Counter
from functools import cache

import jsonschema_rs
import numpy as np
import pytest
import torch

from hybrid_cache.api.text.grammars import Grammar, Grammars, json_source
from hybrid_cache.bench.common.random_model import SMALL, random_model
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import RequestError
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.request import FailedOutput, FinishReason, Request, TokenOutput
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt
from tests.api.small_text import NUM_TOKENS, small_text
from tests.api.text.schemas import Schema, some_schemas

END = small_text().tokenizer.id_of("<|im_end|>") or 0


@cache
def grammars() -> Grammars:
    return Grammars(small_text().tokenizer, NUM_TOKENS, [END])


def compiled(schemas: list[Schema], counts: Counter[str]) -> dict[str, tuple[Schema, Grammar]]:
    """By number; those that are refused are counted."""
    found = {}
    for i, schema in enumerate(schemas):
        try:
            found[str(i)] = schema, grammars().compile(json_source(schema, "response_format"))
        except RequestError as error:
            counts[f"refused: {str(error)[:60]}"] += 1
            counts["refused"] += 1
    return found


def answers(asked: dict[str, tuple[Schema, Grammar]], most_tokens: int, counts: Counter[str]) -> dict[str, str]:
    """What a model says, where it comes to an end within so many tokens."""
    config = {**SMALL["granite"], "vocab_size": NUM_TOKENS}
    model, _ = random_model(config, select(), torch.float32)
    engine = Engine(model, EngineConfig(1 << 28, max_running=32, max_waiting=len(asked) + 1))
    for name, (_, grammar) in asked.items():
        prompt = np.random.default_rng(int(name)).integers(6, NUM_TOKENS, 20).astype(np.int32)
        sampling = SamplingParams(temperature=1.0, seed=int(name), max_tokens=most_tokens, stop_token_ids=(END,))
        engine.submit(Request(name, Prompt(prompt), sampling, make_constraint=grammar.start))
    said: dict[str, list[int]] = {name: [] for name in asked}
    ended = {}
    for name, output in engine.run_until_idle():
        if isinstance(output, FailedOutput):
            counts[f"given up: {output.why[:60]}"] += 1
        if isinstance(output, TokenOutput) and output.token is not None:
            said[name].append(output.token)
            if output.finish is FinishReason.STOP:
                ended[name] = small_text().tokenizer.decode(said[name], skip=(END,))
            elif output.finish is FinishReason.LENGTH:
                counts["unfinished"] += 1
    return ended


def finite(number: str) -> float:
    """The nearest that Python has: 1e400 is JSON, too."""
    return min(max(float(number), -sys.float_info.max), sys.float_info.max)


def fault(schema: Schema, text: str) -> str:
    try:
        jsonschema_rs.validator_for(schema).validate(json.loads(text, parse_float=finite))
    except (ValueError, jsonschema_rs.ValidationError) as error:
        return f"{text!r} is not of {json.dumps(schema)}: {error}"
    return ""


def check(count: int, seed: int, most_tokens: int) -> None:
    counts = Counter[str]()
    asked = compiled(some_schemas(count, seed), counts)
    ended = answers(asked, most_tokens, counts)
    faults = [found for name, text in ended.items() if (found := fault(asked[name][0], text))]
    counts["valid"] = len(ended) - len(faults)
    print(dict(counts), file=sys.stderr)
    assert not faults, "\n\n".join(faults[:5])
    assert counts["valid"] > 0.6 * count
    assert counts["refused"] < 0.2 * count


def test_whatever_is_finished_is_valid() -> None:
    check(20, seed=1, most_tokens=150)


@pytest.mark.slow
def test_whatever_is_finished_of_a_thousand_schemas_is_valid() -> None:
    check(1000, seed=2, most_tokens=600)
