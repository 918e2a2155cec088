"""Writes the folders beside this file, see README.md. Runs where auto-round and gptqmodel are installed.

python write.py sources DIR          plain folders, by transformers; from the root of the repository
python write.py auto-round DIR       GPTQ and AWQ folders of them, by auto-round
python write.py gptqmodel DIR        single matrices, and logits of what gptqmodel reads back from the folders
"""

import shutil
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
FORMATS = {
    "granite-gptq": ("granite", "auto_gptq", False),
    "falcon_h1-gptq": ("falcon_h1", "auto_gptq", True),
    "granite-awq": ("granite", "auto_awq", False),
    "falcon_h1-awq": ("falcon_h1", "auto_awq", False),
}
TOKENS = list(range(3, 80))
LAST = 4  # rows of logits that are kept
KEPT = ("config.json", "model.safetensors")


def sources(folder: Path) -> None:
    from hybrid_cache.models import loading
    from tests.models import checkpoints, quantizers

    for case in quantizers.CASES:
        out = checkpoints.save(checkpoints.reference(case), folder / case.name, torch.bfloat16)
        for name in ("tokenizer.json", "tokenizer_config.json"):  # auto-round wants one, and never uses it
            shutil.copy(loading.embedded_path() / name, out / name)


def auto_round(folder: Path) -> None:
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, (source, written, sym) in FORMATS.items():
        model = AutoModelForCausalLM.from_pretrained(folder / source, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(folder / source)
        rounding = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
        rounder = AutoRound(model, tokenizer, scheme="W4A16", group_size=32, sym=sym, **rounding)
        rounder.quantize_and_save(str(folder / name), format=written)
        (HERE / name).mkdir(exist_ok=True)
        for file in (path for path in (folder / name).rglob("*") if path.name in KEPT):
            shutil.copyfile(file, HERE / name / file.name)


def gptqmodel(folder: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    for name, (source, *_) in FORMATS.items():
        stored = load_file(HERE / name / "model.safetensors")
        read = {stem.removesuffix(".qweight") for stem in stored if stem.endswith(".qweight")}
        model = AutoModelForCausalLM.from_pretrained(folder / source, dtype=torch.float32).eval()
        state = {stem: tensor for stem, tensor in stored.items() if stem.rpartition(".")[0] not in read}
        state |= {f"{stem}.weight": _read_back(name, stem, stored) for stem in read}
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model(torch.tensor([TOKENS]), use_cache=False).logits[0, -LAST:]
        save_file({"logits": logits.contiguous()}, HERE / name / "expected.safetensors")
    save_file(matrices(), HERE / "gptqmodel.safetensors")


def _read_back(name: str, stem: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    """-> [out, in]"""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    words, zeros, scales = (stored[f"{stem}.{part}"] for part in ("qweight", "qzeros", "scales"))
    if name.endswith("awq"):
        return dequantize_gemm(words, zeros, scales.float(), 4, 32).T
    packed = TorchLinear(4, 32, False, False, words.shape[0] * 8, words.shape[1])
    packed.load_state_dict({"qweight": words, "qzeros": zeros, "scales": scales, "g_idx": stored[f"{stem}.g_idx"]})
    convert_gptq_v1_to_v2_format_module(packed, 4, torch.int32)
    packed.post_init()
    return packed.dequantize_weight().T


def matrices() -> dict[str, torch.Tensor]:
    """Of each number of bits, in both formats, with inputs in an order of their own."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    torch.manual_seed(5)
    tensors = {}
    for bits in (2, 3, 4, 8):
        linear = torch.nn.Linear(64, 32, bias=False)
        group = torch.randperm(64) // 16
        scales = 0.01 + 0.02 * torch.rand(32, 4).half().float()
        zeros = torch.randint(1, 1 << bits, (32, 4))
        packed = TorchLinear(bits, 16, False, True, 64, 32)
        packed.pack(linear, scales, zeros, group.int())
        packed.post_init()
        tensors[f"{bits}.weight"] = packed.dequantize_weight().T.half()
        for version in ("gptq_v2", "gptq"):
            if version == "gptq":
                convert_gptq_v2_to_v1_format_module(packed, QuantizeConfig(bits=bits, group_size=16, sym=False))
            parts = {name: getattr(packed, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
            tensors |= {f"{version}.{bits}.{name}": part for name, part in parts.items()}
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


if __name__ == "__main__":
    {"sources": sources, "auto-round": auto_round, "gptqmodel": gptqmodel}[sys.argv[1]](Path(sys.argv[2]))
