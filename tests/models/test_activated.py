"""Activated adapters are those of PEFT: on from the same token, with the same logits; what cannot be is refused."""

import json
import warnings

import numpy as np
import pytest
import torch

from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import ModelError, UnsupportedModel
from hybrid_cache.kernels import dispatch
from hybrid_cache.models import adapters, loading
from hybrid_cache.request import PromptOutput, Request
from hybrid_cache.sampling import SamplingParams
from hybrid_cache.tokens import Prompt, last_occurrence
from tests.models import checkpoints
from tests.models.test_adapters import FIRST, GRANITE, adapter_for, edit_config, matrices, random_factors

OPS = dispatch.select("torch")
INVOCATION = (5, 6, 5)
TARGETS = ("q_proj", "v_proj", "o_proj", "in_proj")  # not "out_proj": PEFT refuses it in some of them
NUM_TOP = 5


def prompts(vocab):
    """Rows of tokens with invocations at the start, in the middle, at the end, overlapping, in part, several, none."""
    rng = np.random.default_rng(0)
    free = lambda n: rng.integers(10, vocab, n).tolist()  # noqa: E731
    found = [*INVOCATION]
    return {
        "start": found + free(70),
        "middle": free(67) + found + free(20),
        "on the grid": free(64) + found + free(6),
        "end": free(90) + found,
        "overlapping": [*free(30), 5, 6, 5, 6, 5, *free(9)],
        "several": free(10) + found + free(70) + found + free(4),
        "in part behind one": free(20) + found + free(30) + [5, 6],
        "in part": [*free(40), 5, 6],
        "none": free(50),
    }


def activated(folder, path, invocation=INVOCATION, **settings):
    chosen = {n: w for n, w in matrices(folder).items() if n.split(".")[-2] in TARGETS and "mamba.x_proj" not in n}
    targets = tuple(sorted({name.split(".")[-2] for name in chosen}))
    return adapter_for(
        folder, path, random_factors(chosen), **{"targets": targets, "invocation": invocation, **settings}
    )


def test_they_are_switched_on_where_peft_does() -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.variants import calculate_alora_offsets

    config = {"x": peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[*INVOCATION])}
    rng = np.random.default_rng(1)
    rows = [*prompts(100).values(), *(rng.integers(4, 8, rng.integers(1, 30)).tolist() for _ in range(300))]
    found = set()
    for row in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a prompt invokes nothing
            (theirs,) = calculate_alora_offsets(config, "x", torch.tensor([row]))
        ours = last_occurrence(np.array(row, np.int32), INVOCATION)
        assert ours == (None if theirs is None else len(row) - theirs)
        found.add(ours is None)
    assert found == {True, False}


@pytest.mark.parametrize("family", ["GraniteMoeHybrid", "Jamba", "Mamba2", "Bamba"])
def test_logits_are_those_of_peft(family, folders, tmp_path):
    """Within 1e-3: their products are rounded in another order, by a few ulps of float32 in each layer."""
    peft = pytest.importorskip("peft")
    folder = folders(FIRST[family])
    path = activated(folder, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one library about another
        theirs = peft.PeftModel.from_pretrained(checkpoints.reference(FIRST[family]).eval(), path).eval()
    base, model = loading.load(folder, ops=OPS), loading.load(folder, ops=OPS, adapter=path, merges=False)
    engine = Engine(base, EngineConfig(budget_bytes=64 << 20, verify=True), variants={"x": model})
    texts = prompts(base.vocab_size)
    for name, row in texts.items():
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs(input_ids=torch.tensor([row])).logits[0].float().log_softmax(-1)
        for prompt_logprobs in (NUM_TOP, None):
            sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=NUM_TOP, prompt_logprobs=prompt_logprobs)
            engine.submit(Request(name, Prompt(np.array(row, np.int32)), sampling, model="x"))
            outputs = [output for _, output in engine.run_until_idle()]
            scores = [outputs[-1].logprob]
            if prompt_logprobs:
                scores = [*next(o for o in outputs if isinstance(o, PromptOutput)).logprobs[1:], *scores]
            for place, score in enumerate(scores, start=len(row) - len(scores)):
                tokens, values = zip(*score.top, strict=True)
                torch.testing.assert_close(torch.tensor(values), expected[place][list(tokens)], atol=1e-3, rtol=1e-3)
    engine.check()
    with torch.no_grad(), theirs.disable_adapter():
        plain = theirs(input_ids=torch.tensor([texts["middle"]])).logits[0]
    with torch.no_grad():
        adapted = theirs(input_ids=torch.tensor([texts["middle"]])).logits[0]
    assert torch.allclose(plain[:67], adapted[:67], atol=1e-4)
    assert not torch.allclose(plain[67:], adapted[67:], atol=1e-2)


def test_what_is_written_is_what_is_read_and_names_the_model(folders, tmp_path):
    folder = folders(GRANITE)
    paths = [activated(folder, tmp_path / str(i), invocation) for i, invocation in enumerate(((5, 6, 5), (5, 6), ()))]
    assert [adapters.load(path).config.invocation for path in paths] == [(5, 6, 5), (5, 6), ()]
    models = [loading.load(folder, ops=OPS, adapter=path, merges=False) for path in paths]
    assert [model.invocation for model in models] == [(5, 6, 5), (5, 6), ()]
    assert len({model.fingerprint for model in models}) == 3


def test_what_is_activated_is_not_merged(folders, tmp_path):
    path = activated(folders(GRANITE), tmp_path / "adapter")
    with pytest.raises(UnsupportedModel, match=r"is activated by the tokens \[5, 6, 5\], and cannot be merged"):
        loading.load(folders(GRANITE), ops=OPS, adapter=path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"alora_invocation_tokens": "5"}, "must be at most 1024 tokens"),
        ({"alora_invocation_tokens": [5, "6"]}, "must be at most 1024 tokens"),
        ({"alora_invocation_tokens": [5, True]}, "must be at most 1024 tokens"),
        ({"alora_invocation_tokens": [-1]}, "must be at most 1024 tokens"),
        ({"alora_invocation_tokens": [1] * 1025}, "must be at most 1024 tokens"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is lm_head, which an activated adapter cannot replace"),
        ({"use_dora": True}, "use_dora is True"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes, why, folders, tmp_path):
    path = activated(folders(GRANITE), tmp_path / "adapter")
    edit_config(path, **changes)
    with pytest.raises(ModelError, match=why) as refused:
        adapters.load(path)
    assert "\n" not in str(refused.value)
    assert json.loads((path / adapters.CONFIG).read_text())["peft_type"] == "LORA"
