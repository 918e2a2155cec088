"""Records what an engine serves: takes it from the engine's thread in no time, and writes it down on one of its own.

What the thread is behind with is bounded. What does not fit is lost, and counted; the engine never waits.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from hybrid_cache.api.server.recording.events import Called, Choice, Happening, Pass, Served
from hybrid_cache.api.server.recording.header import Origin, header
from hybrid_cache.api.server.recording.lines import Line, PageWriter, Secret, encoded
from hybrid_cache.api.server.recording.options import RecordOptions
from hybrid_cache.api.server.recording.record_file import RecordFile
from hybrid_cache.api.server.recording.ring import Ring
from hybrid_cache.engine.listener import Nobody
from hybrid_cache.engine.sequence import Prefill, Sequence
from hybrid_cache.request import FinishReason

MOST_WAITING = 1 << 18  # pages of what is still to be written, 16M tokens, some 20 MiB
MOST_KNOWN = 1 << 18  # pages that a segment may name
MOST_RECENT = 4096  # requests that a tool may still be called for
SEGMENT_BYTES = 32 << 20  # of lines
LAST_S = 2.0  # to write what is left at the end
ASK_S = 1.0  # that whoever reads the memory waits for what is still to be written

logger = logging.getLogger("hybrid_cache.record")


@dataclass(slots=True)
class _Counts:
    written: int = 0  # lines
    lost: int = 0  # that there was no room for, or that failed
    unwritten: int = 0  # that are not in the file, as it had ended


class Recorder(Nobody):
    """A listener of one engine. `start` it before the engine, and `close` it after."""

    def __init__(self, origin: Origin, options: RecordOptions, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: the engine's. Raises ConfigError."""
        self.counts = _Counts()
        self._model = origin.name
        self._clock = clock
        self._since_s = clock()
        secret = Secret(options.key())
        self._header = header(origin, secret)
        self._pages = PageWriter(secret)
        self._file = RecordFile(options.file, options.limit_bytes, self._header) if options.file else None
        self._ring = Ring(options.memory_bytes) if options.memory_bytes else None
        self._open: dict[str, Served] = {}  # of the engine's thread, as the next ones
        self._recent: OrderedDict[str, tuple[int, str]] = OrderedDict()
        self._number = 0
        self._waiting: deque[Happening] = deque()
        self._weight = 0  # of those that wait
        self._lost = 0  # since the last line
        self._segment_bytes = 0
        self._wake = threading.Condition()
        self._busy = self._closing = False
        self._thread = threading.Thread(target=self._run, name="hybrid-cache-record", daemon=True)

    @property
    def has_memory(self) -> bool:
        return self._ring is not None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Writes what is left, and does not wait long for a disk that hangs."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(LAST_S)

    # On the engine's thread

    def prompted(self, sequence: Sequence) -> None:
        with self._unheard():
            self._served(sequence, self._clock())

    def ended(self, sequence: Sequence, finish: FinishReason | None) -> None:
        with self._unheard():
            served = self._open.get(sequence.request.id) or self._served(sequence, None)
            served.choices.append(Choice.of(sequence, finish, served.prompted_s, self._clock()))

    def _served(self, sequence: Sequence, prompted_s: float | None) -> Served:
        self._number += 1
        served = self._open[sequence.request.id] = Served.of(self._number, sequence, prompted_s)
        return served

    def closed(self, request_id: str) -> None:
        served = self._open.pop(request_id, None)
        if served is None or request_id.startswith("\0"):
            return
        self._recent[request_id] = served.number, served.namespace
        if len(self._recent) > MOST_RECENT:
            self._recent.popitem(last=False)
        self._put(served)

    def called(self, request_id: str, tool: str, seconds: float | None) -> None:
        if request_id in self._recent:
            self._put(Called(*self._recent.pop(request_id), tool, seconds, self._clock()))

    def ends(self, turn: Prefill) -> None:
        with self._unheard():
            self._put(Pass.of(turn, self._clock()))

    @contextmanager
    def _unheard(self) -> Iterator[None]:
        """What goes wrong here is none of the engine's business."""
        try:
            yield
        except Exception:
            logger.exception("what was served could not be recorded")
            with self._wake:
                self._lose(1)

    def _put(self, happening: Happening) -> None:
        with self._wake:
            if self._weight + happening.weight > MOST_WAITING and self._waiting:
                self._lose(1)
                return
            self._waiting.append(happening)
            self._weight += happening.weight
            self._wake.notify_all()

    def _lose(self, count: int) -> None:
        if not self.counts.lost:
            logger.warning("records are lost: more comes than can be written; see hybrid_cache_records_lost_total")
        self.counts.lost += count
        self._lost += count

    # On any thread

    def traffic(self, may: Callable[[str], bool], totals: Mapping[str, float]) -> Iterator[bytes]:
        """The header and the latest lines of the namespaces that are meant, once what is still to be written is there.

        Waits for that, up to a second. The header says how many lines were forgotten since the server started.
        totals: what the engine has counted, for the header
        """
        assert self._ring is not None
        with self._wake:
            self._wake.wait_for(lambda: not (self._waiting or self._busy), ASK_S)
        lines, num_forgotten = self._ring.lines(may)
        yield encoded({**self._header, "forgotten": num_forgotten, "lost": self.counts.lost, "totals": dict(totals)})
        yield from lines

    def families(self) -> Iterator[Metric]:
        """What is measured of it."""
        counts, prefix = self.counts, "hybrid_cache_records"
        yield CounterMetricFamily(prefix, "Lines of the record of what was served.", value=counts.written)
        yield CounterMetricFamily(prefix + "_lost", "Lines for which there was no time.", value=counts.lost)
        yield CounterMetricFamily(prefix + "_unwritten", "Lines after the end of the file.", value=counts.unwritten)
        if self._file is not None:
            size, stopped = self._file.num_bytes, bool(self._file.stopped)
            yield GaugeMetricFamily("hybrid_cache_record_bytes", "Size of the file of the record.", value=size)
            yield GaugeMetricFamily("hybrid_cache_record_stopped", "1: the file has ended early.", value=stopped)
        if self._ring is not None:
            size = self._ring.num_bytes
            yield GaugeMetricFamily("hybrid_cache_record_memory_bytes", "Latest lines in memory.", value=size)

    # On its own thread

    def _run(self) -> None:
        while batch := self._next():
            happenings, lost = batch
            lines = bytearray()
            for happening in happenings:
                try:
                    lines += self._written(happening)
                except Exception:
                    logger.exception("a line of the record could not be made")
                    lost += 1
                    self.counts.lost += 1
            if lost:
                lines += self._add("", {"lost": lost})
            if self._file is not None and not self._file.add(bytes(lines)):
                self.counts.unwritten += len(happenings)
            with self._wake:
                self._busy = False
                self._wake.notify_all()
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _next(self) -> tuple[list[Happening], int] | None:
        """What has come, and how much was lost of it; None at the end."""
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            happenings, self._waiting = list(self._waiting), deque()
            lost, self._lost, self._weight, self._busy = self._lost, 0, 0, True
            return happenings, lost

    def _written(self, happening: Happening) -> bytes:
        self._renew_segment()
        match happening:
            case Served():
                line = happening.line(self._pages, self._since_s, self._model)
            case Pass():
                line = happening.line(self._pages, self._since_s)
            case Called():
                line = happening.line(self._pages.secret, self._since_s)
        return self._add(happening.namespace, line)

    def _add(self, namespace: str, line: Line) -> bytes:
        data = encoded(line)
        self.counts.written += 1
        self._segment_bytes += len(data)
        if self._ring is not None:
            self._ring.add(namespace, data)
        return data

    def _renew_segment(self) -> None:
        full = self._segment_bytes > SEGMENT_BYTES or len(self._pages.known) > MOST_KNOWN
        if full or (self._ring is not None and self._ring.segment_full):
            self._segment_bytes = 0
            self._pages = replace(self._pages, known=set())
            if self._ring is not None:
                self._ring.new_segment()
