"""A thousand clients that hang up after 10 to 400 ms: python -m tests.soak.aborts --cases 1000

Prompts of 5 to 1,500 words, one to three answers of up to 400 tokens, three in ten with a choreography. Afterwards the
server must hold nothing that it did not hold before.
"""

import asyncio
import sys
from random import Random

from tests.soak.common import Options, Scene, parse, returned, run
from tests.soak.prompts import talk
from tests.soak.server import num_files, resident_mib
from tests.soak.wire import exchange, post

WARM_UP = 0.1  # of the aborts, before memory is looked at for the first time
MAX_GROWTH_MIB = 64.0  # as much as the budget: the cache fills meanwhile
CHOREOGRAPHED = 0.3
DEFAULTS = Options(clients=16, cases=1000)


async def aborts(scene: Scene) -> None:
    options, server, report = scene.options, scene.server, scene.report
    files, warm = num_files(server.pid), round(options.cases * WARM_UP)
    await _abort(scene, range(warm))
    before = resident_mib(server.pid)
    num_late = await _abort(scene, range(warm, options.cases))
    await returned(scene, files)
    grown = resident_mib(server.pid) - before
    report.figure("answered before they left", num_late)
    report.figure("health", str(scene.watch.health()))
    report.at_least("aborts", options.cases - num_late, options.cases / 2)
    report.at_most("growth of resident memory after warm-up, MiB", grown, MAX_GROWTH_MIB)


async def _abort(scene: Scene, numbers: range) -> int:
    """-> how many were answered nevertheless."""
    gate = asyncio.Semaphore(scene.options.clients)

    async def one(number: int) -> bool:
        rng = Random(f"{scene.options.seed}/{number}")
        body: dict[str, object] = {"messages": talk(rng, rng.choice((5, 50, 300, 1500))), "max_tokens": 400}
        body |= {"n": rng.randint(1, 3), "stream": rng.random() < 0.5}
        if rng.random() < CHOREOGRAPHED:
            body["choreography"] = {"fidelity": rng.choice(("exact", "composed"))}
        raw = post("/v1/chat/completions", body, key=rng.choice(scene.server.keys))
        async with gate:
            return bool((await exchange(scene.server.port, raw, leave_after_s=rng.uniform(0.01, 0.4))).status)

    return sum(await asyncio.gather(*(one(number) for number in numbers)))


if __name__ == "__main__":
    sys.exit(run(aborts, parse(__doc__, DEFAULTS, "cases", "clients", "seed"), "aborts"))
