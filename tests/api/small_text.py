"""The text side of a small model: a byte-level tokenizer with a few words, and a chat template."""

import json
import tempfile
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hybrid_cache.api.text.tokenizer import TextModel

CONTROL = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"]
TOOL_MARKS = ["<tool_call>", "</tool_call>"]  # one token each, but text
NUM_TOKENS = 6 + 256 + 6
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@cache
def small_text() -> TextModel:
    """Specials first, then the 256 bytes, then `he ll hell hello`, two spaces, and ` w`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        token: i for i, token in enumerate([*CONTROL, *TOOL_MARKS, *alphabet, "he", "ll", "hell", "hello", "ĠĠ", "Ġw"])
    }
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "Ġ"), ("Ġ", "w")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in TOOL_MARKS])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>", "add_bos_token": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return TextModel.load(folder)
