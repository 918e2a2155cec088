"""Long texts on threads: in turn, and dropped when nobody waits."""

import asyncio
import threading
import time

import pytest

from hybrid_cache.api.text.text_work import LONG_TEXT, MOST_LATER, TextWork, still_wanted

LONG = LONG_TEXT + 1


class Held:
    """Work that waits for a word, and notes its order."""

    def __init__(self) -> None:
        self.word = threading.Event()
        self.begun = threading.Event()
        self.order: list[str] = []

    def hold(self) -> None:
        self.begun.set()
        assert self.word.wait(10)

    def note(self, name: str) -> None:
        self.order.append(name)


async def holding(work: TextWork, held: Held) -> "asyncio.Task[None]":
    task = asyncio.create_task(work.run("other", LONG, held.hold))
    await asyncio.to_thread(held.begun.wait, 10)
    return task


def test_short_work_is_done_at_once_and_long_work_elsewhere() -> None:
    async def test() -> None:
        work, here = TextWork(1), threading.get_ident()
        assert await work.run("", LONG_TEXT, threading.get_ident) == here
        assert await work.run("", LONG, threading.get_ident) != here

    asyncio.run(test())


def test_an_error_reaches_whoever_waits() -> None:
    async def test() -> None:
        def fails() -> None:
            raise ValueError("no")

        work = TextWork(1)
        with pytest.raises(ValueError, match="no"):
            await work.run("", LONG, fails)
        assert await work.run("", LONG, lambda: 7) == 7

    asyncio.run(test())


@pytest.mark.parametrize("kind", [StopIteration, KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_what_would_end_an_event_loop_is_an_error_of_the_work(kind: type[BaseException]) -> None:
    async def test() -> None:
        def fails() -> None:
            raise kind

        with pytest.raises(RuntimeError, match=kind.__name__):
            await asyncio.wait_for(TextWork(1).run("", LONG, fails), 10)

    asyncio.run(test())


def test_tenants_take_turns_and_short_texts_go_before_long_ones() -> None:
    async def test() -> None:
        work, held = TextWork(1), Held()
        first = await holding(work, held)
        texts = [("a", "a-long", 900_000), ("a", "a1", LONG), ("a", "a2", LONG), ("b", "b1", LONG)]
        tasks = [asyncio.create_task(work.run(t, size, lambda n=name: held.note(n))) for t, name, size in texts]
        await asyncio.sleep(0)
        held.word.set()
        await asyncio.gather(first, *tasks)
        assert held.order[-1] == "a-long"
        assert held.order.index("b1") <= 1
        assert work.num_waiting == 0

    asyncio.run(test())


def test_a_long_text_is_not_passed_by_what_comes_much_later() -> None:
    async def test() -> None:
        work, held = TextWork(1), Held()
        first = await holding(work, held)
        long = asyncio.create_task(work.run("", LONG + 10_000, lambda: held.note("long")))
        await asyncio.sleep(0.15)  # more than 10 µs a character
        late = asyncio.create_task(work.run("", LONG, lambda: held.note("late")))
        await asyncio.sleep(0)
        held.word.set()
        await asyncio.gather(first, long, late)
        assert held.order == ["long", "late"]

    asyncio.run(test())


def test_work_of_a_client_that_has_gone_is_dropped_or_ends() -> None:
    async def test() -> None:
        work, held = TextWork(1), Held()
        ended = threading.Event()

        def goes_on() -> None:
            held.begun.set()
            try:
                while True:
                    still_wanted()
                    time.sleep(0.001)
            finally:
                ended.set()

        running = asyncio.create_task(work.run("", LONG, goes_on))
        await asyncio.to_thread(held.begun.wait, 10)
        waiting = [asyncio.create_task(work.run("", LONG, lambda: held.note("never"))) for _ in range(100)]
        await asyncio.sleep(0.01)
        assert work.num_waiting == 100
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert work.num_waiting == 0
        running.cancel()
        assert await asyncio.to_thread(ended.wait, 10)
        assert await work.run("", LONG, lambda: 3) == 3
        assert held.order == []

    asyncio.run(test())


def test_an_event_loop_that_ends_leaves_the_threads_in_order() -> None:
    work, held = TextWork(1), Held()

    async def leaves() -> None:
        task = await holding(work, held)
        task.cancel()

    asyncio.run(leaves())
    held.word.set()
    assert asyncio.run(work.run("", LONG, lambda: 5)) == 5


def test_what_nobody_waits_for_comes_last_one_at_a_time_and_the_oldest_is_forgotten() -> None:
    async def test() -> None:
        work, held = TextWork(1), Held()
        holding_task = await holding(work, held)
        later = [
            asyncio.create_task(work.run_later(9, lambda i=i: held.note(f"later {i}") or i))  # type: ignore[misc]
            for i in range(MOST_LATER + 1)
        ]
        await asyncio.sleep(0)
        now = asyncio.create_task(work.run("", LONG, lambda: held.note("now")))
        await asyncio.sleep(0)
        held.word.set()
        results = await asyncio.gather(*later)
        await asyncio.gather(now, holding_task)
        assert results == [None, *range(1, MOST_LATER + 1)]
        assert held.order == ["now", *(f"later {i}" for i in range(1, MOST_LATER + 1))]

    asyncio.run(test())


def test_what_nobody_waits_for_leaves_a_thread_to_the_others() -> None:
    async def test() -> None:
        work, held = TextWork(2), Held()
        first = asyncio.create_task(work.run_later(9, held.hold))
        await asyncio.to_thread(held.begun.wait, 10)
        second = asyncio.create_task(work.run_later(9, lambda: held.note("second")))
        assert await asyncio.wait_for(work.run("", LONG, lambda: 7), 10) == 7
        assert held.order == []
        held.word.set()
        await asyncio.gather(first, second)
        assert held.order == ["second"]

    asyncio.run(test())
