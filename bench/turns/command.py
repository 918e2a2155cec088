"""`hybrid-cache bench turns`: how much of an agent's next turn comes from the cache, by chat template.

A conversation of ten turns: the model thinks, calls tools, one or two at once, and answers. What it says is laid down
beforehand, token by token, as its template would have it, but JSON has other spaces. Each next prompt holds all of that
as the template writes earlier turns. Of its tokens, those before the new message could be in the cache.

    as it will be sent     the turn is committed as the next request will have it, which is what the server does
    as it was generated    the tokens of the answer are committed as they are

Twice: for a client that sends thoughts back, and for one that drops them. The model's weights do not matter here.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hybrid_cache.api.text.answer import Answer
from hybrid_cache.api.text.generation import Begin, End, GenerationSpec
from hybrid_cache.api.text.messages import Rendering, Talk
from hybrid_cache.api.text.next_turn import Said
from hybrid_cache.api.text.template import ChatTemplate
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.bench.common.terminal import progress_bar
from hybrid_cache.bench.turns.script import TOOLS, Script, Sizes, Traits, sent_back, unchanged, written
from hybrid_cache.config import EngineConfig
from hybrid_cache.device.batch import HybridModel
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.errors import HybridCacheError
from hybrid_cache.kernels.dispatch import select
from hybrid_cache.models.folders import resolve
from hybrid_cache.models.loading import embedded_path, load
from hybrid_cache.sampling import Mask, SamplingParams, mask_of

BUDGET_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt, in tokens."""

    prompt: int
    unchanged: int  # before the new message
    cached: int

    @property
    def share(self) -> float:
        return self.cached / self.unchanged


@dataclass(frozen=True, slots=True)
class Result:
    """One conversation. turns: all after the first"""

    template: str
    thoughts: bool  # the client sends them back
    expected: bool  # committed as it will be sent
    turns: tuple[Turn, ...]

    @property
    def share(self) -> float:
        """Cached tokens of those that did not change, over all turns."""
        return sum(turn.cached for turn in self.turns) / sum(turn.unchanged for turn in self.turns)


@dataclass(slots=True)
class Spoken:
    """A constraint that leaves one token at a time. See `sampling.Constraint`."""

    tokens: Sequence[int]
    vocab_size: int
    place: int = 0

    def start(self) -> "Spoken":
        return Spoken(self.tokens, self.vocab_size)

    def mask(self) -> Mask:
        return mask_of(np.arange(self.vocab_size) == self.tokens[self.place])

    def note(self, token: int) -> None:
        self.place += 1

    def ahead(self, most: int) -> Sequence[int]:
        return self.tokens[self.place : self.place + most]

    @property
    def done(self) -> bool:
        return self.place == len(self.tokens)


def turns(
    model: Annotated[
        str, typer.Argument(help="A model folder, or a name on the Hugging Face hub; the embedded model by default.")
    ] = "",
    chat_template: Annotated[
        list[Path] | None, typer.Option(help="Template files to use in place of the model's own; may be repeated.")
    ] = None,
    num_turns: Annotated[int, typer.Option("--turns", min=2, max=100, help="Turns of each conversation.")] = 10,
    system: Annotated[int, typer.Option(min=1, help="Words of the system message.")] = Sizes().system,
    result: Annotated[int, typer.Option(min=1, help="Words of a tool's result.")] = Sizes().result,
    answer: Annotated[int, typer.Option(min=1, help="Words of an answer, and of a question.")] = Sizes().answer,
    thought: Annotated[int, typer.Option(min=1, help="Words of a thought.")] = Sizes().thought,
    seed: Annotated[int, typer.Option(help="Seed of the conversation.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the model; 0 keeps torch's choice.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every turn to this file.")] = None,
) -> None:
    """Counts how much of an agent's next turn comes from the cache."""
    if threads:
        torch.set_num_threads(threads)
    sizes, results = Sizes(system, result, answer, thought), list[Result]()
    try:
        folder = resolve(model) if model else embedded_path()
        loaded, text = load(folder, ops=select("auto")), TextModel.load(folder)
        texts = [(path.stem, _with_template(text, path)) for path in chat_template or ()] or [(folder.name, text)]
        with progress_bar() as progress:
            for name, of in texts:
                results += asyncio.run(_compare(loaded, of, name, num_turns, sizes, seed, progress))
    except (HybridCacheError, OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(_table(results))
    if json_file:
        json_file.write_text(json.dumps([{**asdict(r), "share": r.share} for r in results], indent=2))


def _with_template(text: TextModel, path: Path) -> TextModel:
    template = ChatTemplate(path.read_text(encoding="utf-8"), text.tokenizer.named_tokens)
    return replace(text, chat_templates={"default": template})


async def _compare(
    model: HybridModel, text: TextModel, name: str, num_turns: int, sizes: Sizes, seed: int, progress: Progress
) -> list[Result]:
    results = []
    task = progress.add_task(name, total=4 * num_turns)
    for thoughts in (True, False):
        for expected in (True, False):
            engine = AsyncEngine(model, EngineConfig(budget_bytes=BUDGET_BYTES))
            engine.start()
            try:
                turns = await _converse(TextEngine.of(engine, text), num_turns, sizes, seed, thoughts, expected)
            finally:
                await engine.stop(0)
            results.append(Result(name, thoughts, expected, turns))
            progress.advance(task, num_turns)
    return results


async def _converse(
    text: TextEngine, num_turns: int, sizes: Sizes, seed: int, thoughts: bool, expected: bool
) -> tuple[Turn, ...]:
    chat, longest = text.chat, text.max_length
    traits = Traits.of(chat)
    script, rendering = Script(seed, sizes, traits), Rendering(tools=TOOLS if traits.tools else None)
    end = text.tokenizer.decode(chat.answer_end() or ())
    messages, count, turns = script.opening(), 0, list[Turn]()
    for number in range(num_turns):
        talk = Talk(tuple(messages), rendering)
        prompt = chat.conversation(messages, rendering, longest).prompt
        said = script.said(number)
        tokens = [*text.tokenizer.encode(written(chat, talk, said, text.thoughts, end)), text.eos_ids[0]]
        spec = GenerationSpec(
            prompt,
            SamplingParams(temperature=0, max_tokens=len(tokens)),
            form=text.answer_form(prompt, rendering.tools),
            grammar=Spoken(tokens, text.vocab_size),
            talk=talk if expected else None,
        )
        heard = Said()  # by the client
        async with await Answer.to(text, [spec]) as answer:
            async for events in answer:
                for event in events:
                    if not isinstance(event, Begin | End):
                        heard.take(event)
            cached = answer.usage.cached
        if count:
            turns.append(Turn(len(prompt.tokens), unchanged(chat, talk, count, longest), cached))
        await _until_committed(text)
        messages.append(sent_back(chat, talk, heard, thoughts=thoughts))
        count = len(messages)
        messages += script.following(heard)
    return tuple(turns)


async def _until_committed(text: TextEngine) -> None:
    """Waits as long as a tool would take."""
    while text.expecting:
        await asyncio.sleep(0.005)
    while text.engine.stats().committing:
        await asyncio.sleep(0.005)


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="Of the tokens before the new message, how many came from the cache")
    for heading in ("template", "client's thoughts", "last prompt", "as it will be sent", "worst turn", "as generated"):
        table.add_column(heading, justify="left" if heading in ("template", "client's thoughts") else "right")
    for ours, raw in zip(results[::2], results[1::2], strict=True):
        worst = min(turn.share for turn in ours.turns)
        table.add_row(
            ours.template,
            "kept" if ours.thoughts else "dropped",
            f"{ours.turns[-1].prompt:,}",
            f"{ours.share:.1%}",
            f"{worst:.1%}",
            f"{raw.share:.1%}",
        )
    shares = [r.share for r in results if r.expected]
    table.caption = f"median {median(shares):.1%}, least {min(shares):.1%}"
    return table
