"""Mutated requests to all routes of a running server, many at once: python -m tests.fuzz --cases 50000 --clients 12

Broken is: an answer of 5xx other than 503 with the code `server_overloaded`, an error that is not our JSON, a success
that is not JSON, no answer to a request that HTTP allows, a `/health` that takes longer than a second, the server's
end, a traceback of it, memory that grows. Prints the seed, and for each fault the fewest edits that make it again;
`--replay N N` sends only these numbers, one after the other.
"""

import asyncio
import sys
import time
from dataclasses import dataclass, field

from tests.fuzz.cases import Case, build, edits_of
from tests.fuzz.judge import fault_of
from tests.soak.common import HEALTH_S, Options, Scene, parse, run
from tests.soak.server import Server
from tests.soak.watch import growth_after_warm_up
from tests.soak.wire import exchange

MAX_GROWTH = 1.25  # of resident memory after the first half of the run
SHOWN = 20  # faults that are told in full
MOST_SHOWN = 4000  # characters of a traceback


@dataclass(slots=True)
class Ledger:
    """What has happened so far."""

    times: list[tuple[float, float, int]] = field(default_factory=list)  # begin, end, number
    statuses: dict[int, int] = field(default_factory=dict)
    faults: list[tuple[Case, str]] = field(default_factory=list)
    late: int = 0  # clients that left before their answer came


async def attempt(server: Server, case: Case) -> tuple[int, str | None]:
    """-> the status, and what is wrong with the answer."""
    begin = time.monotonic()
    key = server.keys[case.number % len(server.keys)] if server.keys else ""
    reply = await exchange(server.port, case.raw(key), leave_after_s=case.leave_after_s)
    left = not reply.status and time.monotonic() - begin > 0.95 * case.leave_after_s
    return (-1, None) if left else (reply.status, fault_of(case, reply))


async def fuzz(scene: Scene) -> None:
    """All cases of a seed; see the module docstring."""
    options, ledger = scene.options, Ledger()
    begin = time.monotonic()
    await asyncio.gather(*(_client(scene, ledger, i) for i in range(options.clients)))
    end = time.monotonic()
    await asyncio.sleep(0.3)  # a probe may still wait for its answer
    _tell(scene, ledger, end - begin)
    for case, fault in ledger.faults[:SHOWN]:
        print(f"FAULT seed {options.seed} case {case.number}: {fault}")
        print("  " + await _smallest(scene.server, options.seed, case.number))
    stalls = [p for p in scene.watch.probes(begin, end) if p.seconds > HEALTH_S]
    for probe in stalls[:SHOWN]:
        guilty = {n for b, e, n in ledger.times if b < probe.begun + probe.seconds and e > probe.begun}
        print(f"STALL of {probe.seconds:.2f} s, seed {options.seed}, among cases {sorted(guilty)}")
    scene.report.holds("no stall over 1 s", not stalls, f"{len(stalls)} stalls", "0")


async def _client(scene: Scene, ledger: Ledger, first: int) -> None:
    options = scene.options
    for number in range(first, options.cases, options.clients):
        case, begin = build(options.seed, number), time.monotonic()
        status, fault = await attempt(scene.server, case)
        ledger.times.append((begin, time.monotonic(), number))
        ledger.statuses[status] = ledger.statuses.get(status, 0) + 1
        if fault:
            ledger.faults.append((case, fault))
        if not scene.server.alive:
            return


def _tell(scene: Scene, ledger: Ledger, seconds: float) -> None:
    report, counts = scene.report, {str(status): count for status, count in sorted(ledger.statuses.items())}
    report.figure("cases", len(ledger.times))
    report.figure("cases a second", len(ledger.times) / seconds)
    report.figure("statuses (-1: the client left, 0: closed)", counts)
    report.figure("health", str(scene.watch.health()))
    report.figure("resident MiB, most", max((s.resident_mib for s in scene.watch.samples()), default=0.0))
    report.at_least("cases", len(ledger.times), scene.options.cases)
    report.holds("no wrong answer", not ledger.faults, f"{len(ledger.faults)} faults", "0")
    report.holds("some are answered, some refused", {200, 400} <= ledger.statuses.keys(), counts, "200 and 400")
    report.at_most("growth of resident memory", growth_after_warm_up(scene.watch.samples()), MAX_GROWTH)
    _, *tracebacks = scene.server.log.read_text(errors="replace").split("Traceback (most recent call last)")
    for text in tracebacks[:SHOWN]:
        print("TRACEBACK" + text[:MOST_SHOWN])
    report.holds("no traceback", not tracebacks, f"{len(tracebacks)} tracebacks", "0")


async def _smallest(server: Server, seed: int, number: int) -> str:
    """The case with as few edits as still make a fault, if it is one by itself."""
    keep = frozenset(edits_of(seed, number))
    if (await attempt(server, build(seed, number)))[1] is None:
        return f"not by itself: {build(seed, number).told}"
    for edit in sorted(keep):
        if server.alive and (await attempt(server, build(seed, number, keep - {edit})))[1] is not None:
            keep -= {edit}
    smallest = build(seed, number, keep)
    raw = smallest.raw(server.key)
    return f"{smallest.told}\n  {raw[:500]!r}" + (f" and {len(raw) - 500} bytes more" if len(raw) > 500 else "")


async def replay(scene: Scene) -> None:
    """Sends some cases, one after the other, and tells about each."""
    for number in scene.options.replay:
        begin = time.monotonic()
        status, fault = await attempt(scene.server, build(scene.options.seed, number))
        print(f"case {number}: status {status}, {time.monotonic() - begin:.2f} s, {fault or 'as it should be'}")
        scene.report.holds(f"case {number}", fault is None, fault or status, "no fault")


def main() -> int:
    options = parse(__doc__, Options(clients=12, cases=2000), "cases", "clients", "seed", "replay")
    return run(replay if options.replay else fuzz, options, "fuzz")


if __name__ == "__main__":
    sys.exit(main())
