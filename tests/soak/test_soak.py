"""The soaks themselves, short and small: that they run, see what is planted, and that what must always hold does."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
import torch

from hybrid_cache.api.server.launch import LoadOptions, load
from tests.soak import abandoned, aborts, attacks, connections, fair, folders, overload, prefix_tries, signals
from tests.soak.common import Options, Report, Scene, play, returned
from tests.soak.server import Server, get, metrics, num_files, resident_mib, serve
from tests.soak.volleys import volleys
from tests.soak.watch import Latencies, Probe, Sample, growth_after_warm_up, watching
from tests.soak.wire import exchange, post

HELD = ("nothing runs, waits or works", "open files above those before", "the server lives")
SMALL = Options(seconds=2.0, clients=6, cases=20, tokens=200)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve() as started:
        yield started


def kept(soak: Callable[[Scene], Awaitable[None]], server: Server, options: Options = SMALL) -> dict[str, bool]:
    """Which promises a soak found kept."""
    report = Report("short")
    play(soak, server, options, report)
    report.show()
    return {promise.name: promise.kept for promise in report.promises}


def test_a_short_overload_is_answered_and_returned(server: Server) -> None:
    found = kept(overload.overload, server)
    names = ("only 200, 429 and 503", "answers of 200", "samples of /metrics", "most of the budget taken")
    assert all(found[name] for name in (*names, "the same greedy answer afterwards", *HELD))


def test_a_few_aborts_leave_nothing_behind(server: Server) -> None:
    found = kept(aborts.aborts, server)
    assert all(found[name] for name in HELD)


def test_a_few_abandoned_prompts_and_wrong_bodies_end(server: Server) -> None:
    async def soak(scene: Scene) -> None:
        files = num_files(scene.server.pid)
        await abandoned.leave(scene)
        for name, path, body in abandoned.wrong_bodies(8192):
            await abandoned.refuse(scene, name, path, body)
        await returned(scene, files)

    found = kept(soak, server, Options(cases=2))
    assert all(kept for name, kept in found.items() if "200 or 4xx" in name)
    assert all(found[name] for name in ("16 wrong tools: MiB", *HELD))


def test_a_few_idle_half_open_and_slow_connections_end(server: Server) -> None:
    few = connections.Counts(idle=3, half_open=4, large=1, slow=2, streams=10)

    async def soak(scene: Scene) -> None:
        await connections.few_files(scene, few)
        await connections.others(scene, few)

    found = kept(soak, server, Options(seconds=1.0))
    names = ("few files: /health unanswered", "few files: bytes of log", "large: /health unanswered")
    assert all(
        found[name] for name in (*names, "slow: sequences still in the engine", "streams: only 200, 429 and 503", *HELD)
    )
    assert "half open: not closed in time" in found


def test_keys_paths_and_odd_texts_are_refused_or_served(server: Server) -> None:
    names = (
        "wrong forms of a key",
        "no key",
        "paths out of the models",
        "odd unicode in every text",
        "tokens that are none",
    )

    async def soak(scene: Scene) -> None:
        for volley in volleys(scene.server.key):
            if volley.name in names:
                await attacks.told(scene, volley.name, attacks.fire(scene, volley))
        for name, attack in attacks.OTHERS[:3]:
            await attacks.told(scene, name, attack(scene))

    found = kept(soak, server)
    assert len(found) == len(names) + 4
    assert all(found.values())


def test_no_prefix_is_found_by_another_over_http(server: Server) -> None:
    async def soak(scene: Scene) -> None:
        prefix_tries.promise(scene.report, "http", await prefix_tries.over_http(scene, 60), 1.0)

    assert all(kept(soak, server).values())


def test_no_prefix_is_found_by_another_in_the_books() -> None:
    tally = prefix_tries.on_books(400, seed=0)
    assert tally.crossings == 0 < min(tally.hits, tally.elsewhere)


def test_a_planted_crossing_is_seen() -> None:
    assert prefix_tries.on_books(400, seed=0, stored_as=lambda namespace: namespace.partition("/")[0]).crossings > 0


def test_fairness_is_measured_in_process_and_over_http(server: Server) -> None:
    torch.set_num_threads(1)
    report, counts = Report("fair"), fair.Counts(alone=2, flood=2, mixture=(200, 50))
    options = Options(cases=1, tokens=2000)
    with torch.inference_mode():
        fair.promise(report, "here", fair.measure_in_process(load(LoadOptions(threads=1)).model, options, counts))
    fair.promise(report, "there", asyncio.run(fair.measure_over_http(server, server, options, counts)))
    assert len(report.promises) == 6
    assert all(float(promise.value) > 0 for promise in report.promises)


def test_signals_at_random_moments_break_nothing() -> None:
    assert signals.run(rounds=2, seed=1) == []


def test_a_folder_that_leads_elsewhere_is_refused_in_one_line() -> None:
    folder = next(folder for folder in folders.FOLDERS if folder.name == "weights elsewhere")
    clear, said = folders.try_folder(folder, ())
    assert clear, said


def test_a_folder_that_is_served_is_told_apart() -> None:
    clear, said = folders.try_folder(folders.Folder("nothing wrong", lambda path: None, must_refuse=False), ())
    assert clear, said
    assert "answered 200" in said


def test_a_stall_counts_as_all_the_probes_that_it_delays() -> None:
    calm = [Probe(begun=i, seconds=0.01, status=200) for i in range(99)]
    assert Latencies.of(calm).p99 == 0.01
    stalled = Latencies.of([*calm, Probe(begun=100.0, seconds=10.0, status=200)])
    assert stalled.longest == 10.0
    assert stalled.p50 > 1


def test_a_server_that_stands_still_is_seen(server: Server) -> None:
    with watching(server) as watch:
        begin = time.monotonic()
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        stuck = watch.health(begin)
        server.process.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        assert stuck.longest > 1
        assert stuck.unanswered == 1
        assert watch.health(begin).longest > 1.2
        assert watch.health(begin).unanswered == 0


def test_growth_is_what_comes_after_warming_up() -> None:
    def samples(*sizes: float) -> list[Sample]:
        return [Sample(float(i), size, 8, {}) for i, size in enumerate(sizes)]

    assert growth_after_warm_up(samples(1, 50, 100, 100, 100, 100)) == 1
    assert growth_after_warm_up(samples(1, 50, 100, 110, 130, 150)) == 1.5


def test_a_broken_promise_breaks_a_report() -> None:
    report = Report("r")
    assert not report.kept
    report.at_most("a", 1.0, 1.0)
    assert report.kept
    report.at_least("b", 0.9, 1.0)
    assert not report.kept
    assert '"kept": false' in report.json()


def test_what_a_server_counts_is_read(server: Server) -> None:
    asyncio.run(exchange(server.port, post("/v1/completions", {"prompt": "Once", "max_tokens": 1}, key=server.key)))
    counts = metrics(server.port)
    assert counts["requests_running"] == 0
    assert counts["cache_budget_bytes"] == 64 << 20
    assert sum(value for name, value in counts.items() if name.startswith("cache_bytes.")) <= 64 << 20
    assert resident_mib(server.pid) > 50
    assert num_files(server.pid) > 3
    assert get(server.port, "/no/such/path")[0] in (401, 404)
