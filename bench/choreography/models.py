"""What workflows run on: a model, its tokenizer, and a control that has attention only."""

from dataclasses import dataclass
from functools import cache

import torch

from hybrid_cache.api.server.launch import LoadOptions, load
from hybrid_cache.api.text.renderer import ChatRenderer
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.bench.common.random_model import MID_GRANITE, random_model
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.kernels.ops import Ops
from hybrid_cache.workflow import Renderer

GRANITE_150M = "granite-150m"


class ReadyRenderer:
    """Remembers what it has rendered, so that no contender pays for templates and tokenization."""

    def __init__(self, renderer: Renderer) -> None:
        self.closing = renderer.closing
        self.message = cache(renderer.message)
        self.opening = cache(renderer.opening)
        self.text = renderer.text


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and how messages become its tokens."""

    name: str
    model: HybridModel
    renderer: Renderer
    text: TextModel
    ops: Ops

    @property
    def has_states(self) -> bool:
        """Whether messages can be composed, and not just moved."""
        return self.model.fidelities == ("composed",)

    def num_tokens(self, text: str) -> int:
        return len(self.text.tokenizer.encode(text))


def open_subject(options: LoadOptions) -> Subject:
    """Raises HybridCacheError. `options.model` may be `GRANITE_150M`: random weights, made in memory."""
    if options.model != GRANITE_150M:
        loaded = load(options)
        text = TextModel.load(loaded.path)
        return Subject(loaded.name, loaded.model, ReadyRenderer(ChatRenderer(text)), text, loaded.ops)
    small = load(LoadOptions(backend=options.backend, threads=options.threads))
    text = TextModel.load(small.path)
    model, _ = random_model(MID_GRANITE, small.ops, torch.bfloat16)
    return Subject(f"{GRANITE_150M}, random weights", model, ReadyRenderer(ChatRenderer(text)), text, small.ops)


def attention_only(subject: Subject) -> Subject:
    """A Llama of random weights, with as many layers and about as many FLOPs a token, and the subject's tokenizer."""
    spec, vocab = subject.model.cache_spec, subject.model.vocab_size
    width, num_layers = spec.hidden_size, len(spec.layers)
    head = 64 if width >= 512 else 32
    heads = -(-width // head)
    kv_heads = next(n for n in range(-(-heads // 3), heads + 1) if heads % n == 0)
    attention = 2 * width * head * (heads + kv_heads)
    inner = 64 * round((subject.model.prefill_cost.per_token / 2 / num_layers - attention) / (3 * width) / 64)
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": max(64, inner),
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "max_position_embeddings": subject.model.max_length,
        "tie_word_embeddings": False,
    }
    model, _ = random_model(config, subject.ops, spec.hidden_dtype)
    return Subject("attention only, random weights", model, subject.renderer, subject.text, subject.ops)
