"""`hybrid-cache` with faults that requests ask for: `python -m tests.soak.faulty_server serve ...`.

A prompt that begins with three times one of these tokens, or is this text, does what it says.
"""

import time
from collections.abc import Callable

from hybrid_cache.api.cli.main import main
from hybrid_cache.api.text.text_engine import TextEngine
from hybrid_cache.device.batch import go_on
from hybrid_cache.device.worker import Hidden, Worker
from hybrid_cache.engine import async_engine
from hybrid_cache.engine.engine import Engine
from hybrid_cache.errors import OwnershipError
from hybrid_cache.tokens import Prompt
from hybrid_cache.work import Work

HANGS, FAILS, ENDS = 301, 302, 303  # the step never ends, it fails, it ends the engine
SLEEPS = 304  # the step takes two seconds
HANGING_TEXT = "a text that takes for ever"


class FaultyWorker(Worker):
    def run(self, work: Work, pause: Callable[[], None] = go_on) -> Hidden:
        begins = {rows.tokens[0] for rows in work.chunks if rows.start == 0 and len(set(rows.tokens[:3])) == 1}
        if HANGS in begins:
            time.sleep(10_000)
        if SLEEPS in begins:
            time.sleep(2)
        if ENDS in begins:
            raise OwnershipError("as asked")
        return super().run(work, pause)

    def _pass(self, work: Work, pause: Callable[[], None]) -> Hidden:
        hidden = super()._pass(work, pause)
        if any(rows.start == 0 and tuple(rows.tokens[:3]) == (FAILS,) * 3 for rows in work.chunks):
            raise ZeroDivisionError("as asked")
        return hidden


class FaultyEngine(Engine):
    def __init__(self, *models: object, **more: object) -> None:
        super().__init__(*models, worker=FaultyWorker, **more)  # type: ignore[arg-type]


if __name__ == "__main__":
    async_engine.Engine = FaultyEngine  # type: ignore[misc]
    whole = TextEngine.prompt

    async def prompt(self: TextEngine, asked: str | list[int], tenant: str, **options: bool) -> Prompt:
        if asked == HANGING_TEXT:
            await self.work.run(tenant, 10**6, lambda: time.sleep(10_000))
        return await whole(self, asked, tenant, **options)

    TextEngine.prompt = prompt  # type: ignore[method-assign]
    main()
