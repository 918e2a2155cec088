"""Accuracy of a model folder by kind of question, with and without its recurrent state, through `transformers`.

    python -m hybrid_cache.models.training.evaluate MODEL_DIR [--seeds 3] [--each 100] [--json FILE]

Each dialogue is fresh and holds one question, at its end. It is right when the greedy reply, which must end by itself,
is a whole sentence with the expected value. The control sets all recurrent state (state-space state and convolution
window) to zero after the last message before the question; the attention cache stays. A kind whose score does not fall
under the control says nothing about the state-space layers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hybrid_cache.models.training.dialogues import KINDS, Dialogue, examined
from hybrid_cache.models.training.tokenizer import IM_END, Codec

MOST_NEW = 24
MESSAGES = (3, 8)


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of right answers over `num` dialogues; `whole` counts sentences that are right word for word."""

    kind: str
    seed: int
    num: int
    kept: float
    whole: float
    zeroed: float


def zero_state(cache: DynamicCache) -> None:
    """Forget everything but keys and values."""
    for layer in cache.layers:
        for states in ("conv_states", "recurrent_states"):
            for state in getattr(layer, states, {}).values():
                if state is not None:
                    state.zero_()


class Answerer:
    """Greedy answers of a model folder, one dialogue at a time, in fp32 arithmetic on its rounded weights."""

    def __init__(self, folder: Path) -> None:
        self.codec = Codec.load(folder)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def answer(self, dialogue: Dialogue, keep_state: bool = True) -> str:
        """What the model replies to the first question, read after all turns; a reply that does not end is cut."""
        codec = self.codec
        said = [t for turn in dialogue.turns for t in codec.turn(turn.role, turn.text)]
        asked = [*codec.turn("user", dialogue.questions[0].ask), *codec.opening("assistant")]
        cache = DynamicCache(config=self.model.config)
        self.logits(said, cache)
        if not keep_state:
            zero_state(cache)
        written: list[int] = []
        token = int(self.logits(asked, cache).argmax())
        while token != IM_END and len(written) < MOST_NEW:
            written.append(token)
            token = int(self.logits([token], cache).argmax())
        return str(codec.tokenizer.decode(written))

    def logits(self, tokens: list[int], cache: DynamicCache) -> Tensor:
        out = self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]  # type: ignore[no-any-return]


def has_value(reply: str, value: str) -> bool:
    """Whether a whole sentence names exactly this value: "14" is not in "The box holds 141 marbles now."."""
    sentence = reply.endswith(".") and reply[:1].isupper()
    return sentence and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", reply) is not None


def score(answerer: Answerer, kind: str, seed: int, num: int) -> Score:
    rng = Random(f"evaluation {seed} {kind}")
    dialogues = [examined(kind, rng, *MESSAGES) for _ in range(num)]
    kept = [answerer.answer(d) for d in dialogues]
    zeroed = [answerer.answer(d, keep_state=False) for d in dialogues]

    def share(marks: list[bool]) -> float:
        return sum(marks) / num

    questions = [d.questions[0] for d in dialogues]
    return Score(
        kind,
        seed,
        num,
        share([has_value(r, q.value) for r, q in zip(kept, questions, strict=True)]),
        share([r == q.answer for r, q in zip(kept, questions, strict=True)]),
        share([has_value(r, q.value) for r, q in zip(zeroed, questions, strict=True)]),
    )


def table(scores: list[Score]) -> str:
    """One line for each kind: mean over seeds, the seeds, and the control."""
    lines = ["| kind | right | by seed | word for word | state zeroed | fall |", "|---|---|---|---|---|---|"]
    for kind in dict.fromkeys(s.kind for s in scores):
        own = [s for s in scores if s.kind == kind]
        kept, whole, zeroed = (100 * sum(getattr(s, f) for s in own) / len(own) for f in ("kept", "whole", "zeroed"))
        seeds = ", ".join(f"{100 * s.kept:.1f}" for s in own)
        lines.append(f"| {kind} | {kept:.1f} | {seeds} | {whole:.1f} | {zeroed:.1f} | {kept - zeroed:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--each", type=int, default=100, help="dialogues for each kind and seed")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    answerer = Answerer(given.model)
    scores = []
    for seed in range(101, 101 + given.seeds):
        for kind in given.kinds:
            scores.append(score(answerer, kind, seed, given.each))
            s = scores[-1]
            print(f"seed {seed} {kind}: right {s.kept:.3f}, state zeroed {s.zeroed:.3f}", flush=True)
    least, most = MESSAGES
    print(f"\n{given.each} dialogues of {least}-{most} messages for each kind and seed, in percent\n\n{table(scores)}")
    if given.json:
        given.json.write_text(
            json.dumps([{f: getattr(s, f) for f in Score.__slots__} for s in scores], indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
