"""GGUF files of every family that we read compute what the checkpoint computes that they were made from."""

import pytest
import torch

from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from tests.models.case import ROPE, Case
from tests.models.cases.granitemoehybrid import GRANITE
from tests.models.cases.lfm2_moe import LFM2_MOE, spread_the_bias
from tests.models.cases.llama import LLAMA
from tests.models.checkpoints import CASES
from tests.models.driver import Driver
from tests.models.gguf.writer import write

LENGTH = 70
TOLERANCE = 2e-4  # of logits of size 1 to 10: A, and norms to which one was added, come back with another last bit
# What a GGUF file has no place for, or llama.cpp no computation.
UNSAID = (
    "bounded dt",
    "a norm before the gate",
    "silu",
    "sigmoids as they are",
    "rotary positions, biases, two groups",
    "falcon mamba, untied",
    "a window",
    "an MLP in some layers",
    "granite of one attention layer",
    "bamba of one attention layer",
    "stretched positions",
)
EXTRA = [
    Case(
        "granite of attention only, rotated",
        "GraniteMoeHybrid",
        {
            **GRANITE,
            "layer_types": ["attention"] * 4,
            "position_embedding_type": "rope",
            "rope_parameters": ROPE,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 3.0,
        },
    ),
    Case(
        "llama with the positions of Llama 3.1",
        "Llama",
        {
            **LLAMA,
            "head_dim": 32,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    Case("lfm2 moe, tied", "Lfm2Moe", {**LFM2_MOE, "tie_word_embeddings": True}, prepare=spread_the_bias),
]
FAMILIES = (
    *("Bamba", "FalconH1", "FalconMamba", "GraniteMoeHybrid", "Jamba", "Lfm2", "Lfm2Moe", "Llama", "Mamba", "Mamba2"),
    *("NemotronH", "Qwen3", "Qwen3Next", "Qwen3_5", "Qwen3_5Moe"),
)
SAID = [
    case
    for case in CASES
    if case.family in FAMILIES
    and not any(words in case.name for words in UNSAID)
    and (case.family != "Lfm2Moe" or case.settings["tie_word_embeddings"])
]


@pytest.mark.parametrize("case", SAID + EXTRA, ids=str)
def test_a_file_computes_what_its_checkpoint_computes(case, references, folders, tmp_path):
    file = write(folders(case), tmp_path / "model.gguf")
    tokens = torch.randint(case.settings["vocab_size"], (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
    driver = Driver(loading.load(file, ops=dispatch.select()))
    _, rows = driver.prefill(tokens)
    with torch.no_grad():
        expected = references(case)(torch.tensor([tokens]), use_cache=False).logits[0]
    torch.testing.assert_close(driver.logits(rows), expected, rtol=0, atol=TOLERANCE)
