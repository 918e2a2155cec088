"""How far a GGUF file is from the checkpoint that it was made from, in logits; the table of `docs/gguf.md`.

python -m tests.models.gguf.compare CHECKPOINT FILE...
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM

from hybrid_cache.kernels import dispatch
from hybrid_cache.models import loading
from hybrid_cache.models.tools import convert
from tests.models.driver import Driver

LENGTH = 150


def main(checkpoint: Path, files: list[Path]) -> None:
    vocab_size = loading.load_config(files[0])["vocab_size"]
    tokens = torch.randint(50, vocab_size - 48, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    before = of_transformers(checkpoint, tokens)
    for file in files:
        driver = Driver(loading.load(file, dtype="float32", ops=dispatch.select()))
        found = driver.logits(driver.prefill(tokens)[1])[:, : before.shape[1]]
        with TemporaryDirectory() as folder:
            out = Path(folder) / "decoded"
            convert.write(convert.prepare(file, dtype="float32"), out, shard_bytes=1 << 40)
            decoded = of_transformers(out, tokens)
        print(f"{file.name}: format {relative(found, before):.1e}, same weights {relative(found, decoded):.1e}")


@torch.no_grad()
def of_transformers(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by norm."""
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
