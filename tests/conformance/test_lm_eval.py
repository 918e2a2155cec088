"""lm-eval's local-completions: what it computes is what the server says, and the same with the cache and without."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.conformance.conftest import MODEL, serving

WHY = "lm-eval takes hundreds of megabytes: make conformance"
lm_eval = pytest.importorskip("lm_eval", reason=WHY)
from datasets import Dataset  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support  # noqa: E402

CONTEXT = "You look into the boxes, one after the other, and say what you find in each of them. " * 8
DOCS = [
    {"text": f"{CONTEXT}In box {number} there is a", "choices": [" lamp", " pencil", " very old book"], "answer": 1}
    for number in range(3)
]


def dataset(**_: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(DOCS)}


def task(**config: Any) -> Any:
    shared = {"custom_dataset": dataset, "test_split": "test", "doc_to_text": "{{text}}"}
    return ConfigurableTask(config={**shared, **config})


def choice_task() -> Any:
    fields = {"doc_to_choice": "{{choices}}", "doc_to_target": "answer", "target_delimiter": ""}
    return task(task="boxes", output_type="multiple_choice", metric_list=[{"metric": "acc"}], **fields)


def generation_task() -> Any:
    until = {"until": ["\n", "lamp"], "max_gen_toks": 12}
    metrics = [{"metric": "exact_match"}]
    return task(
        task="words", output_type="generate_until", doc_to_target="x", generation_kwargs=until, metric_list=metrics
    )


def evaluated(url: str, of: Any, **more: Any) -> list[Any]:
    """What came of each request, document by document."""
    where = {"model": MODEL, "base_url": f"{url}/v1/completions", "max_retries": 1, **more}
    found = lm_eval.simple_evaluate("local-completions", model_args=where, tasks=[of], bootstrap_iters=0)
    [samples] = found["samples"].values()
    return [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


@pytest.fixture(scope="module")
def uncached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("uncached") / "log", "--no-prefix-cache") as url:
        yield url


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:
        yield client


def scored(client: openai.OpenAI, context: str, choice: str) -> tuple[float, bool]:
    """The log-probability of a choice, and whether the model likes no other tokens better."""
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 0, "echo": True, "logprobs": 1}
    logprobs: Any = client.completions.create(prompt=context + choice, **asked).choices[0].logprobs
    own = [i for i, offset in enumerate(logprobs.text_offset) if offset >= len(context)]
    best = all(logprobs.token_logprobs[i] == max(logprobs.top_logprobs[i].values()) for i in own)
    return sum(logprobs.token_logprobs[i] for i in own), best


def test_log_likelihoods(server: str, uncached: str, client: openai.OpenAI) -> None:
    found = evaluated(server, choice_task())
    expected = [[scored(client, doc["text"], choice) for choice in doc["choices"]] for doc in DOCS]
    assert [[tuple(response) for [response] in sample] for sample in found] == expected
    assert len({score for sample in expected for score, _ in sample}) > len(DOCS)
    assert evaluated(server, choice_task(), batch_size=4, num_concurrent=2) == found
    assert evaluated(uncached, choice_task()) == found


def test_generations(server: str, uncached: str, client: openai.OpenAI) -> None:
    found = evaluated(server, generation_task())
    for [[text]], doc in zip(found, DOCS, strict=True):
        asked: Any = {"model": MODEL, "prompt": doc["text"], "max_tokens": 12, "temperature": 0}
        whole = client.completions.create(**asked).choices[0].text
        assert text == whole.partition("\n")[0].partition("lamp")[0] != ""
    assert evaluated(server, generation_task(), batch_size=3) == found
    assert evaluated(uncached, generation_task()) == found


def test_the_tokenizer_is_the_servers(server: str) -> None:
    base = f"{server}/v1/completions"
    assert check_remote_tokenizer_support(base)
    tokenizer = RemoteTokenizer(base)
    assert tokenizer.decode(tokenizer.encode(CONTEXT)) == CONTEXT
    assert tokenizer.encode(tokenizer.eos_token) == [tokenizer.eos_token_id]
