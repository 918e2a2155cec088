"""Of a multimodal checkpoint we serve the text model."""

import json

import pytest
import torch

from hybrid_cache.errors import ModelError
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading, registry
from tests.models.case import Case
from tests.models.cases.qwen3_5 import QWEN3_5
from tests.models.cases.qwen3_5_moe import QWEN3_5_MOE
from tests.models.cases.qwen3_next import spread_norms_around_zero
from tests.models.driver import Driver

OPS = dispatch.select("torch")
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 96,
    "num_position_embeddings": 16,
}
CASES = [
    Case(
        f"{family} with eyes",
        family,
        {"text_config": text, "vision_config": VISION},
        model=f"{family}ForConditionalGeneration",
        prepare=spread_norms_around_zero,
    )
    for family, text in (("Qwen3_5", QWEN3_5), ("Qwen3_5Moe", QWEN3_5_MOE))
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


def test_text_gets_the_logits_of_the_whole_model(case, references, folders):
    model = loading.load(folders(case), ops=OPS)
    tokens = list(range(3, 80))
    with torch.no_grad():
        expected = references(case)(torch.tensor([tokens]), use_cache=False).logits[0]
    driver = Driver(model)
    torch.testing.assert_close(driver.logits(driver.prefill(tokens)[1]), expected, rtol=0, atol=1e-4)


def test_facts_are_those_of_the_text_model(case, folders):
    model = loading.load(folders(case), ops=OPS)
    info = loading.describe(loading.load_config(folders(case)))
    assert (info.cache_spec, info.prefill_cost) == (model.cache_spec, model.prefill_cost)


def test_the_text_config_alone_is_the_same_architecture(case, folders):
    config = loading.load_config(folders(case))
    text = config["text_config"]
    assert text["model_type"] == f"{config['model_type']}_text"
    assert registry.find(text["model_type"]) is registry.find(config["model_type"])
    assert loading.describe(text).shape == loading.describe(config).shape


def test_a_field_of_the_text_config_is_refused_under_its_full_name(case, folders):
    config = loading.load_config(folders(case))
    config["text_config"]["hidden_size"] = None
    with pytest.raises(ModelError, match=r"text_config\.hidden_size is missing"):
        loading.describe(json.loads(json.dumps(config)))
