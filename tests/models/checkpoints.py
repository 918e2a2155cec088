"""Small random checkpoints written by transformers' own classes, in which every layer matters."""

import copy
import json
import sys
from pathlib import Path

import torch
import transformers

from tests.models.case import Case, all_cases

CASES = all_cases()
FIRST_CASES = list({case.family: case for case in reversed(CASES)}.values())  # of each family
# A family for each set of kinds of layers that keep something, for quick runs of what takes seconds.
KINDS = ("Llama", "Mamba", "Mamba2", "Bamba", "Jamba", "RecurrentGemma", "Qwen3_5", "MiniMax", "Lfm2", "KimiLinear")
ONE_OF_A_KIND = [case for case in FIRST_CASES if case.family in KINDS]
LAST_NORMS = ("norm", "final_layernorm", "embedding_norm", "norm_f", "final_norm")


def reference(case: Case) -> torch.nn.Module:
    """transformers' model: matrices at 1 / sqrt(fan in), so that no layer fades; vectors away from 0 and 1."""
    torch.manual_seed(7)
    config = getattr(transformers, case.config_class)(**case.settings)
    model = getattr(transformers, case.model_class)(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "conv1d.weight" in name:
                p.normal_(0, 0.5)
            elif "embed" in name and p.dim() == 2:
                p.normal_(0, 1.0)
            elif p.dim() >= 2 and "A_log" not in name:
                p.normal_(0, p.shape[-1] ** -0.5)
            elif "dt_bias" in name:
                p.normal_(-2, 0.5)  # steps around 0.1: long ones make float32 itself lose digits
            elif name.endswith("bias"):
                p.normal_(0, 0.3)
            else:  # norms, A_log, D
                p.mul_(1 + 0.2 * torch.randn(p.shape))
        if config.tie_word_embeddings:
            last = next(getattr(model.base_model, name) for name in LAST_NORMS if hasattr(model.base_model, name))
            last.weight.mul_(config.hidden_size**-0.5)  # logits of size one, as without tying
    if case.prepare is not None:
        with torch.no_grad():
            case.prepare(model)
    return model


def save(model: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> Path:
    if dtype != model.dtype:
        model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(folder, **options)
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    """Sets fields of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def write_all(folder: Path) -> list[Path]:
    """One folder for each case, named after its first words."""
    paths = []
    for number, case in enumerate(CASES):
        name = f"{number}-{'-'.join(case.name.replace(',', '').split()[:3])}"
        paths.append(save(reference(case), folder / name))
        print(paths[-1])
    return paths


if __name__ == "__main__":  # python -m tests.models.checkpoints DIR
    write_all(Path(sys.argv[1]))
