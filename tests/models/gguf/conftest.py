import pytest

from tests.models.case import ROPE, Case
from tests.models.checkpoints import reference, save
from tests.models.gguf.writer import write

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "layer_types": ["mamba", "attention"],
    "shared_intermediate_size": 64,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "rope_parameters": ROPE,
}
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|end|>"]
BYTES = [chr(c) for c in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144)]]
WORDS = ["Ġb", "Ġbu", "bo"]
MERGES = ["Ġ b", "Ġb u", "b o"]
TOKENS = [*SPECIAL, *BYTES, *WORDS]
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
VOCABULARY = {
    "tokenizer__ggml__model": "gpt2",
    "tokenizer__ggml__pre": "gpt-2",
    "tokenizer__ggml__tokens": TOKENS + [f"[PAD{i}]" for i in range(len(TOKENS), 304)],
    "tokenizer__ggml__token_type": [3] * 5 + [1] * (len(TOKENS) - 5) + [5] * (304 - len(TOKENS)),
    "tokenizer__ggml__merges": MERGES,
    "tokenizer__ggml__bos_token_id": 1,
    "tokenizer__ggml__eos_token_id": 2,
    "tokenizer__ggml__eot_token_id": 4,
    "tokenizer__ggml__add_bos_token": True,
    "tokenizer__chat_template": TEMPLATE,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small hybrid, as transformers writes it."""
    return save(reference(Case("small", "GraniteMoeHybrid", SMALL)), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def small(checkpoint, tmp_path_factory):
    """The same as a GGUF file, with a tokenizer."""
    return write(checkpoint, tmp_path_factory.mktemp("gguf") / "small-model.gguf", **VOCABULARY)
