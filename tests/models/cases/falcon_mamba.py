from tests.models.case import Case
from tests.models.cases.mamba import MAMBA, short_steps

CASES = [
    Case("falcon mamba, untied", "FalconMamba", {**MAMBA, "mixer_rms_eps": 1e-4}, prepare=short_steps),
    Case(
        "falcon mamba with biases and a wide inside, tied",
        "FalconMamba",
        {
            **MAMBA,
            "tie_word_embeddings": True,
            "use_bias": True,
            "use_conv_bias": False,
            "intermediate_size": 120,
            "expand": 16,
            "time_step_rank": 7,
        },
        prepare=short_steps,
    ),
    Case("falcon mamba of one layer", "FalconMamba", {**MAMBA, "num_hidden_layers": 1}, prepare=short_steps),
]
