from tests.models.case import BASE, ROPE, Case

GEMMA = {
    **BASE,
    "num_hidden_layers": 4,
    "block_types": ["recurrent", "recurrent", "attention"],
    "attention_window_size": 50,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
}
del GEMMA["max_position_embeddings"]


def prepare(model):
    """Norms hold their weight less one; embeddings are multiplied by the root of the hidden size."""
    for name, p in model.named_parameters():
        if "norm" in name:
            p.normal_(0, 0.2)
    model.model.embed_tokens.weight.mul_(model.config.hidden_size**-0.5)


CASES = [
    Case(
        "recurrent gemma with grouped queries and a window shorter than a tile, tied",
        "RecurrentGemma",
        {**GEMMA, "tie_word_embeddings": True},
        prepare=prepare,
    ),
    Case(
        "recurrent gemma with a wide recurrence, a short convolution, biases and a low cap, untied",
        "RecurrentGemma",
        {
            **GEMMA,
            "block_types": ["attention", "recurrent"],
            "num_hidden_layers": 3,
            "lru_width": 102,
            "conv1d_width": 3,
            "attention_bias": True,
            "attention_window_size": 100,
            "num_key_value_heads": None,
            "intermediate_size": 101,
            "logits_soft_cap": 2.0,
        },
        prepare=prepare,
    ),
    Case(
        "recurrent gemma of one recurrent layer",
        "RecurrentGemma",
        {**GEMMA, "num_hidden_layers": 1, "block_types": ["recurrent"]},
        prepare=prepare,
    ),
    Case(
        "recurrent gemma of one attention layer",
        "RecurrentGemma",
        {**GEMMA, "num_hidden_layers": 1, "block_types": ["attention"]},
        prepare=prepare,
    ),
]
