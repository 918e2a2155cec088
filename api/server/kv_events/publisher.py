"""Publishes what requests may start from, as vLLM's KV events, on a thread of its own.

The engine's thread only writes notes into a journal. This one reads them, works out what they mean, and sends:

    endpoint          PUB     topic, number of the batch (8 bytes, big-endian, from 0), batch
    replay_endpoint   ROUTER  asked with ("", number of the first batch that is wanted), answers each of those kept as
                              ("", topic, number, batch), and last ("", "", -1, "")

All queues are bounded. Where something was lost to a reader, the numbers show it a gap, and it asks for a replay; where
the replay does not reach far enough back, everything is published anew behind an `AllBlocksCleared`.
"""

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from math import ceil, inf
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from hybrid_cache.api.server.kv_events.config import OPTION, KVEventsConfig
from hybrid_cache.api.server.kv_events.disk import LOOK_S, Disk
from hybrid_cache.api.server.kv_events.wire import MOST_BLOCKS, Event, Origin, event_of, sized
from hybrid_cache.cache.journal import Journal
from hybrid_cache.cache.resumable import Change, Cleared, Resumable
from hybrid_cache.errors import ConfigError

if TYPE_CHECKING:
    import zmq

NAME = "hybrid-cache-events"  # of the thread
RANK = 0
GATHER_S = 0.004  # that more notes are waited for once there is one
PART = 1 / 1000  # of a processor that batches take in a row: the next one waits for as long, and is larger
MOST_WAIT_S = 0.2
MOST_NOTES = 4096  # of one batch; several batches follow where there are more
MOST_EVENTS = 4 * MOST_BLOCKS
REPLAY_BYTES = 64 << 20  # of batches that are kept, beside their number
RENEW_S = 5.0  # at least between two publications of everything
LAST_MS = 200  # for what is not sent yet at the end
REQUEST_BYTES = 1024  # of one that asks for a replay
NUMBER_BYTES = 8
END = b"\xff" * NUMBER_BYTES  # -1

Namespace = Callable[[str], Origin | None]  # what is said of one; None where nothing is

logger = logging.getLogger("hybrid_cache.server")


@dataclass(slots=True)
class Counts:
    """What has happened since the start."""

    batches: int = 0
    stored: int = 0  # blocks
    removed: int = 0
    cleared: int = 0
    dropped: int = 0  # batches that a subscriber was too slow for
    replays: int = 0
    renewals: int = 0  # publications of everything


class Replay:
    """The latest batches, bounded in number and bytes."""

    def __init__(self, most: int, most_bytes: int = REPLAY_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._batches: deque[bytes] = deque()
        self._bytes = 0
        self.next = 0  # number of the batch to come

    @property
    def first(self) -> int:
        """The number of the oldest batch that is kept."""
        return self.next - len(self._batches)

    def add(self, batch: bytes) -> None:
        self._batches.append(batch)
        self._bytes += len(batch)
        self.next += 1
        while len(self._batches) > self._most or (self._bytes > self._most_bytes and len(self._batches) > 1):
            self._bytes -= len(self._batches.popleft())

    def since(self, number: int) -> Iterator[tuple[int, bytes]]:
        """Those from a number on, as far as they are kept."""
        start = max(number - self.first, 0)
        return enumerate(islice(self._batches, start, None), self.first + start)


class Publisher:
    """See the module docstring. `start` and `stop` belong to one thread."""

    def __init__(self, config: KVEventsConfig) -> None:
        """Takes its addresses. Raises ConfigError for one that cannot be listened on."""
        import zmq
        from msgspec.msgpack import Encoder

        self.config = config
        self.counts = Counts()
        self._encode = Encoder().encode
        self._context = zmq.Context(io_threads=1)
        self._replay = Replay(config.buffer_steps)
        self._sender = self._context.socket(zmq.PUB)
        self._sender.setsockopt(zmq.SNDHWM, config.hwm)
        self._sender.setsockopt(zmq.XPUB_NODROP, 1)  # it says when it would have to drop a batch for somebody
        self._answerer = self._context.socket(zmq.ROUTER)
        self._answerer.setsockopt(zmq.SNDHWM, config.buffer_steps + 16)
        self._answerer.setsockopt(zmq.MAXMSGSIZE, REQUEST_BYTES)
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._bell.setblocking(False)
        self.journal = Journal(self._wake, config.max_queue_size)
        self._stopping = False
        self._disk: Disk | None = None
        self._thread = threading.Thread(target=self._run, name=NAME, daemon=True)
        self._sent_s = time.monotonic()
        self._rests_until_s = self._looks_at_s = 0.0
        self._renewed_s = -RENEW_S
        self._wants_renewal = False
        try:
            self.endpoint = _bind(self._sender, "endpoint", config.endpoint)
            self.replay_endpoint = config.replay_endpoint and _bind(
                self._answerer, "replay_endpoint", config.replay_endpoint
            )
        except ConfigError:
            self._close(0)
            raise

    def start(self, origin: Namespace, *, grouped: bool, disk: Disk | None = None) -> None:
        """The journal must have been begun. origin: called on the publisher's thread
        grouped: the model has states, so that pages alone are not enough   disk: the tier below memory
        """
        self._origin_of = origin
        self._grouped = grouped
        self._disk = disk
        states = self.config.publish_states and grouped  # without groups, nothing could be told apart
        self._resumable = Resumable(self._may_know, states)
        if disk is not None:
            disk.open(self._may_know, states=states, stateless=not grouped)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Says that nothing is here any more, and gives the addresses back. Idempotent, and good without `start`."""
        if self._stopping:
            return
        self._stopping = True
        if self._thread.ident is None:
            return self._close(0)
        self._wake()
        self._thread.join(2 + LAST_MS / 1000)

    def source(self) -> dict[str, object]:
        """What a router has to know of it; see `GET /kv_event_sources`."""
        return {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "transport": "zmq",
            "encoding": "msgpack",
            "schema_version": 1,
            "data_parallel_rank": RANK,
            "endpoint": self.endpoint,
            "replay_endpoint": self.replay_endpoint,
            "topic": self.config.topic,
            "buffer_steps": self.config.buffer_steps,
            "hwm": self.config.hwm,
        }

    def families(self) -> Iterator[Metric]:
        """For /metrics."""
        counts, prefix = self.counts, "hybrid_cache_kv_events_"
        blocks = CounterMetricFamily(prefix + "blocks", "Blocks in KV events.", labels=["event"])
        blocks.add_metric(["stored"], counts.stored)
        blocks.add_metric(["removed"], counts.removed)
        yield blocks
        yield CounterMetricFamily(prefix + "batches", "Batches of KV events, empty ones too.", value=counts.batches)
        yield CounterMetricFamily(prefix + "cleared", "AllBlocksCleared events.", value=counts.cleared)
        yield CounterMetricFamily(
            prefix + "dropped_batches", "Batches that a subscriber was too slow for.", value=counts.dropped
        )
        yield CounterMetricFamily(
            prefix + "overflows",
            "Times that changes came too fast to be told singly.",
            value=self.journal.num_overflows,
        )
        yield CounterMetricFamily(prefix + "replays", "Replays that were asked for.", value=counts.replays)
        yield CounterMetricFamily(prefix + "renewals", "Times that everything was told anew.", value=counts.renewals)
        yield GaugeMetricFamily(prefix + "queue", "Changes that wait for being published.", value=len(self.journal))
        yield GaugeMetricFamily(prefix + "up", "Whether KV events are published.", value=float(self.alive))

    def _wake(self) -> None:
        """From any thread."""
        with suppress(OSError):  # it has been woken often enough, or has ended
            self._alarm.send(b"\0")

    # On the publisher's thread

    def _may_know(self, namespace: str) -> bool:
        return self._origin_of(namespace) is not None

    def _run(self) -> None:
        try:
            self._publish()
        except Exception:
            logger.exception("KV events are no longer published")
        finally:
            self._close(LAST_MS)

    def _publish(self) -> None:
        import zmq

        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        poller.register(self._answerer, zmq.POLLIN)
        self._tell()  # the first batch clears what readers know of an earlier server at these addresses
        while not self._stopping:
            due_s = (
                min(self._sent_s + self.config.heartbeat_s, self._rests_until_s, self._looks_at_s) - time.monotonic()
            )
            ready = {socket for socket, _ in poller.poll(ceil(max(due_s, 0) * 1000))}
            if self._bell.fileno() in ready:
                self._gather()
            if time.monotonic() >= self._rests_until_s:
                self._tell()
            if time.monotonic() >= self._looks_at_s:
                self._look()
            if self._answerer in ready:
                self._answer()
            if self._wants_renewal and time.monotonic() - self._renewed_s >= RENEW_S:
                self._renew()
            if time.monotonic() - self._sent_s >= self.config.heartbeat_s:
                self._send([])
        self._send_changes([Cleared()])

    def _gather(self) -> None:
        """Waits for more than the note that has woken it."""
        with suppress(BlockingIOError):
            self._bell.recv(4096)
        time.sleep(GATHER_S)
        self._rests_until_s = 0.0

    def _tell(self) -> None:
        """Sends what has changed, and looks again after a rest; when nothing has, it sleeps until it is woken."""
        began_s, first = time.thread_time(), self._replay.next
        while notes := self.journal.take(MOST_NOTES):
            self._send_changes(self._resumable.read(notes))
        if self._replay.next > first:
            rest_s = min((time.thread_time() - began_s) / PART, MOST_WAIT_S)
            self._rests_until_s = time.monotonic() + rest_s
        else:
            self._rests_until_s = inf
            self.journal.sleep()

    def _look(self) -> None:
        """Sends what has changed on the disk, a part at a time."""
        if self._disk is None:
            self._looks_at_s = inf
            return
        began_s = time.thread_time()
        self._send_changes(self._disk.changes())
        rest_s = min((time.thread_time() - began_s) / PART, MOST_WAIT_S) if self._disk.more else LOOK_S
        self._looks_at_s = time.monotonic() + rest_s

    def _renew(self) -> None:
        self._renewed_s, self._wants_renewal = time.monotonic(), False
        self.counts.renewals += 1
        self._send_changes(self._resumable.all())

    def _send_changes(self, changes: Iterable[Change]) -> None:
        """In as many batches as it takes."""
        events, num_blocks, salted = list[Event](), 0, False
        for change in sized(changes):
            if isinstance(change, Cleared) and self._disk is not None:
                self._disk.rewind()  # so its content is told anew as well
                self._looks_at_s = 0.0
            event = event_of(change, self._origin, grouped=self._grouped)
            if events and salted != ("cache_salt" in event):  # readers that do not know the field drop the batch
                self._send(events)
                events, num_blocks = [], 0
            salted = "cache_salt" in event
            num_blocks += self._count(event)
            events.append(event)
            if num_blocks >= MOST_BLOCKS or len(events) >= MOST_EVENTS:
                self._send(events)
                events, num_blocks = [], 0
        if events:
            self._send(events)

    def _origin(self, namespace: str) -> Origin:
        return self._origin_of(namespace) or Origin()

    def _count(self, event: Event) -> int:
        hashes = event.get("block_hashes", [])
        assert isinstance(hashes, list)
        self.counts.stored += len(hashes) if event["type"] == "BlockStored" else 0
        self.counts.removed += len(hashes) if event["type"] == "BlockRemoved" else 0
        self.counts.cleared += event["type"] == "AllBlocksCleared"
        return len(hashes)

    def _send(self, events: list[Event]) -> None:
        """A batch; those subscribers get none that are too slow. They see a gap, and may ask again."""
        import zmq

        number, batch = self._replay.next, self._encode([time.time(), events, RANK])
        self._replay.add(batch)
        frames = [self.config.topic.encode(), number.to_bytes(NUMBER_BYTES, "big"), batch]
        try:
            self._sender.send_multipart(frames, zmq.DONTWAIT)
        except zmq.Again:
            self.counts.dropped += 1
            self._sender.setsockopt(zmq.XPUB_NODROP, 0)  # to the others
            self._sender.send_multipart(frames, zmq.DONTWAIT)
            self._sender.setsockopt(zmq.XPUB_NODROP, 1)
        self.counts.batches += 1
        self._sent_s = time.monotonic()

    def _answer(self) -> None:
        """Replays what is kept; if that is not all that is asked for, everything is soon told anew."""
        import zmq

        client, *frames = self._answerer.recv_multipart()
        if len(frames) != 2 or frames[0] or len(frames[1]) != NUMBER_BYTES:
            return
        wanted = int.from_bytes(frames[1], "big", signed=True)
        self.counts.replays += 1
        self._wants_renewal |= max(wanted, 0) < self._replay.first
        topic = self.config.topic.encode()
        for number, batch in self._replay.since(wanted):
            self._answerer.send_multipart([client, b"", topic, number.to_bytes(NUMBER_BYTES, "big"), batch])
        self._answerer.send_multipart([client, b"", b"", END, b""], zmq.DONTWAIT)

    def _close(self, linger_ms: int) -> None:
        if self._disk is not None:
            self._disk.close()
        for each in (self._sender, self._answerer):
            each.close(linger_ms)
        self._context.term()
        self._alarm.close()
        self._bell.close()


@contextmanager
def publishing(config: KVEventsConfig) -> Iterator[Publisher | None]:
    """A publisher that has its addresses, and gives them back; None where nothing is to be published."""
    publisher = Publisher(config) if config.publishes else None
    try:
        yield publisher
    finally:
        if publisher is not None:
            publisher.stop()


def _bind(to: "zmq.Socket[bytes]", name: str, endpoint: str) -> str:
    """-> the address, with the port that was found where any was asked for."""
    import zmq

    asked = endpoint[: -len(":0")] + ":*" if endpoint.startswith("tcp://") and endpoint.endswith(":0") else endpoint
    try:
        to.bind(asked)
    except zmq.ZMQError as error:
        raise ConfigError(f"{OPTION}: {name} {endpoint!r} cannot be listened on: {error}") from None
    if not asked.endswith(":*"):
        return endpoint
    bound = to.getsockopt_string(zmq.LAST_ENDPOINT)
    return asked[:-1] + bound.rpartition(":")[2]
