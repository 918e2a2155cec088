"""Accuracy of a model folder by kind of question, with and without its recurrent state, through `transformers`.

    python -m hybrid_cache.models.training.evaluate MODEL_DIR [--seeds 3] [--each 100] [--json FILE]

Each dialogue is fresh and holds one question, at its end. It is right when the greedy reply, which must end by itself,
is a whole sentence with the expected value. The control sets all recurrent state (state-space state and convolution
window) to zero after the last message before the question; the attention cache stays. A kind whose score does not fall
under the control says nothing about the state-space layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
from dataclasses import asdict, dataclass
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
    def read(self, dialogue: Dialogue) -> DynamicCache:
        """The model's memory after all turns of a dialogue."""
        cache = DynamicCache(config=self.model.config)
        self.logits([t for turn in dialogue.turns for t in self.codec.turn(turn.role, turn.text)], cache)
        return cache

    @torch.no_grad()
    def answer(self, ask: str, cache: DynamicCache) -> str:
        """What the model replies to a question, greedily; a reply that does not end is cut. Writes to the cache."""
        written: list[int] = []
        asked = [*self.codec.turn("user", ask), *self.codec.opening("assistant")]
        token = int(self.logits(asked, cache).argmax())
        while token != IM_END and len(written) < MOST_NEW:
            written.append(token)
            token = int(self.logits([token], cache).argmax())
        return str(self.codec.tokenizer.decode(written))

    def both(self, dialogue: Dialogue) -> tuple[str, str]:
        """The reply to the first question, and what it is when the recurrent state is zeroed before the question."""
        ask, kept = dialogue.questions[0].ask, self.read(dialogue)
        zeroed = copy.deepcopy(kept)
        zero_state(zeroed)
        return self.answer(ask, kept), self.answer(ask, zeroed)

    def logits(self, tokens: list[int], cache: DynamicCache) -> Tensor:
        """Appends the tokens to `cache` -> logits [V] of the last one."""
        out = self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]  # type: ignore[no-any-return]


def has_value(reply: str, value: str) -> bool:
    """Whether a whole sentence names exactly this value: "14" is not in "The box holds 141 marbles now."."""
    sentence = reply.endswith(".") and reply[:1].isupper()
    return sentence and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", reply) is not None


def score(answerer: Answerer, kind: str, seed: int, num: int) -> Score:
    rng = Random(f"evaluation {seed} {kind}")
    dialogues = [examined(kind, rng, *MESSAGES) for _ in range(num)]
    questions = [d.questions[0] for d in dialogues]
    kept, zeroed = zip(*map(answerer.both, dialogues), strict=True)
    return Score(
        kind,
        seed,
        num,
        kept=sum(has_value(r, q.value) for r, q in zip(kept, questions, strict=True)) / num,
        whole=sum(r == q.answer for r, q in zip(kept, questions, strict=True)) / num,
        zeroed=sum(has_value(r, q.value) for r, q in zip(zeroed, questions, strict=True)) / num,
    )


def mean(scores: list[Score], kind: str) -> Score:
    """Over the seeds; `num` is the number of dialogues in all, `seed` how many seeds."""
    own = [s for s in scores if s.kind == kind]
    shares = (sum(getattr(s, f) for s in own) / len(own) for f in ("kept", "whole", "zeroed"))
    return Score(kind, len(own), sum(s.num for s in own), *shares)


def table(scores: list[Score]) -> str:
    """One line for each kind: mean over seeds, the seeds, and the control."""
    lines = ["| kind | right | by seed | word for word | state zeroed | fall |", "|---|---|---|---|---|---|"]
    for kind in dict.fromkeys(s.kind for s in scores):
        m, seeds = mean(scores, kind), ", ".join(f"{100 * s.kept:.1f}" for s in scores if s.kind == kind)
        shares = f"{100 * m.kept:.1f} | {seeds} | {100 * m.whole:.1f} | {100 * m.zeroed:.1f}"
        lines.append(f"| {kind} | {shares} | {100 * (m.kept - m.zeroed):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=201, help="take others once these have been looked at")
    parser.add_argument("--each", type=int, default=100, help="dialogues for each kind and seed")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    answerer = Answerer(given.model)
    scores = []
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        for kind in given.kinds:
            scores.append(score(answerer, kind, seed, given.each))
            s = scores[-1]
            print(f"seed {seed} {kind}: right {s.kept:.3f}, state zeroed {s.zeroed:.3f}", flush=True)
    least, most = MESSAGES
    print(f"\n{given.each} dialogues of {least}-{most} messages for each kind and seed, in percent\n\n{table(scores)}")
    if given.json:
        kinds = {kind: asdict(mean(scores, kind)) for kind in given.kinds}
        given.json.write_text(json.dumps({"kinds": kinds, "scores": [asdict(s) for s in scores]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
