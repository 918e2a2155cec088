"""KV events over real sockets: what readers get, what they can ask for, and what is said of bad settings."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import zmq

from hybrid_cache.api.server.app import create_app
from hybrid_cache.api.server.kv_events import config as settings
from hybrid_cache.api.server.kv_events.config import KVEventsConfig, parse
from hybrid_cache.api.server.kv_events.origins import Origins
from hybrid_cache.api.server.kv_events.publisher import Publisher
from hybrid_cache.api.server.kv_events.wire import MOST_BLOCKS, Origin, event_of, hash_of, sized
from hybrid_cache.api.server.serving import Variant, new_serving
from hybrid_cache.api.server.settings import ServerSettings
from hybrid_cache.api.server.tenants import salt_of_tenant, tenant_of
from hybrid_cache.api.text.tokenizer import TextModel
from hybrid_cache.cache.journal import Journal, Note
from hybrid_cache.cache.keys import Mark, keys_of
from hybrid_cache.cache.resumable import Resumable
from hybrid_cache.cache.tree import Checkpoint, CheckpointKind, PrefixTree
from hybrid_cache.config import EngineConfig
from hybrid_cache.engine.async_engine import AsyncEngine
from hybrid_cache.errors import ConfigError
from hybrid_cache.namespaces import namespace_of
from tests.api.cli.test_early import told
from tests.api.server.shadow import Shadow
from tests.api.servers import new_engine, over_the_wire
from tests.cache.driver import SPECS, fill, new_cache, tokens_of
from tests.fakes import SumModel

ANY = "tcp://127.0.0.1:*"
BEAT_S = 0.1
WAIT_MS = 10_000
NAMES = ("sum",)
OTHER = "other-model"


class Reader:
    """Subscribes as a router does."""

    def __init__(self, publisher: Publisher, **options: int) -> None:
        self._context = zmq.Context()
        self._live = self._context.socket(zmq.SUB)
        for name, value in options.items():
            self._live.setsockopt(getattr(zmq, name), value)
        self._live.setsockopt(zmq.SUBSCRIBE, b"")
        self._live.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        self._live.connect(publisher.endpoint)
        self._asking = self._context.socket(zmq.DEALER)
        self._asking.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        if publisher.replay_endpoint is not None:
            self._asking.connect(publisher.replay_endpoint)
        self.topic = publisher.config.topic.encode()
        self.shadow = Shadow()
        self.next = 0

    def close(self) -> None:
        self._context.destroy(0)

    def live(self) -> tuple[int, list[dict[str, Any]]]:
        """The next batch: its number, and its events."""
        number, _, events = self._next()
        return number, events

    def _next(self) -> tuple[int, float, list[dict[str, Any]]]:
        """With the time at which it was sent."""
        topic, number, batch = self._live.recv_multipart()
        assert topic == self.topic
        assert len(number) == 8
        return int.from_bytes(number, "big"), msgspec.msgpack.decode(batch)[0], events_of(batch)

    def replay(self, first: int) -> list[tuple[int, list[dict[str, Any]]]]:
        """All batches from a number on that are kept."""
        self._asking.send_multipart([b"", first.to_bytes(8, "big")])
        found = []
        while True:
            empty, topic, number, batch = self._asking.recv_multipart()
            assert empty == b""
            if number == b"\xff" * 8:
                assert (topic, batch) == (b"", b"")
                return found
            assert topic == self.topic
            found.append((int.from_bytes(number, "big"), events_of(batch)))

    def follow(self) -> None:
        """Reads all that has happened up to now, and asks for what was missed."""
        now_s, beats = time.time(), 0
        while beats < 2:  # after one of them, all is sent that was noted before
            number, sent_s, events = self._next()
            if number > self.next:
                for missed, earlier in self.replay(self.next):
                    if self.next <= missed < number:
                        assert missed == self.next
                        self.shadow.read(earlier)
                        self.next += 1
            if number == self.next:
                self.shadow.read(events)
                self.next += 1
            assert self.next > number
            beats += not events and sent_s > now_s


def events_of(batch: bytes) -> list[dict[str, Any]]:
    sent_s, events, rank = msgspec.msgpack.decode(batch)
    assert abs(sent_s - time.time()) < 60
    assert rank == 0
    return events  # type: ignore[no-any-return]


def config(**more: Any) -> KVEventsConfig:
    given = {"endpoint": ANY, "replay_endpoint": ANY, "heartbeat_s": BEAT_S, **more}
    return KVEventsConfig(enable_kv_cache_events=True, **given)


@contextmanager
def published(text: TextModel, engine: AsyncEngine, **more: Any) -> Iterator[tuple[httpx.Client, Publisher]]:
    publisher = Publisher(config(**more))
    app = create_app(
        engine, text, ServerSettings(NAMES, "fake", "models/sum", drain_timeout_s=1.0), publisher=publisher
    )
    with over_the_wire(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client, publisher


@contextmanager
def reading(publisher: Publisher, **options: int) -> Iterator[Reader]:
    reader = Reader(publisher, **options)
    try:
        yield reader
    finally:
        reader.close()


def complete(client: httpx.Client, prompt: list[int], **more: object) -> dict[str, Any]:
    body = {"model": "sum", "prompt": prompt, "max_tokens": 3, **more}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()  # type: ignore[no-any-return]


def cached_in(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def settle(engine: AsyncEngine) -> None:
    """Waits until nothing runs and nothing is computed for the cache."""
    for _ in range(1000):
        stats = engine.stats()
        if stats.running == stats.waiting == stats.cache.working_bytes == 0:
            return
        time.sleep(0.01)
    raise AssertionError(engine.stats())


def test_a_reader_knows_how_much_of_each_prompt_is_cached(sum_text: TextModel) -> None:
    """Of a cache that is too small for all of them, with aborts and conversations that go on."""
    generator = np.random.default_rng(3)
    engine = new_engine(budget_bytes=110 << 10)
    talks = [generator.integers(300, 900, 150).tolist() for _ in range(6)]
    hits = 0
    with published(sum_text, engine, publish_states=True) as (client, publisher), reading(publisher) as reader:
        for turn in range(60):
            talk = talks[int(generator.integers(len(talks)))]
            talk += generator.integers(300, 900, int(generator.choice([0, 5, 70, 130]))).tolist()
            del talk[int(generator.choice([len(talk), 140, 1000])) :]
            settle(engine)
            reader.follow()
            predicted = reader.shadow.cached_tokens(np.array(talk, np.int32))
            if turn % 7 == 6:
                body = {"model": "sum", "prompt": talk, "max_tokens": 2000, "stream": True, "ignore_eos": True}
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    next(answer.iter_lines())
                continue
            cached = cached_in(complete(client, talk))
            assert cached == predicted
            hits += cached > 0
        assert engine.stats().cache.num_evictions > 20
        assert hits > 20
        assert publisher.counts.removed > 20


def test_without_states_only_pages_are_said_and_a_conversation_that_goes_on_is_known(sum_text: TextModel) -> None:
    engine, prompt = new_engine(), list(range(300, 500))
    with published(sum_text, engine) as (client, publisher), reading(publisher) as reader:
        complete(client, prompt)
        for _ in range(3):
            settle(engine)
            reader.follow()
            assert {group for group, _ in reader.shadow.references} == {0}
            prompt += [7] * 100
            found = reader.shadow.pages_of(np.array(prompt, np.int32))
            assert cached_in(complete(client, prompt)) == found[-1][0] >= 192


def test_who_comes_late_asks_for_what_it_missed(sum_text: TextModel) -> None:
    engine, prompt = new_engine(), list(range(300, 500))
    with published(sum_text, engine, publish_states=True, topic="kv@pod@sum") as (client, publisher):
        complete(client, prompt)
        settle(engine)
        time.sleep(2 * BEAT_S)
        with reading(publisher) as reader:
            reader.follow()
            assert reader.shadow.cached_tokens(np.array([*prompt, 1], np.int32)) == 192
            assert reader.replay(0)[0] == (0, [{"type": "AllBlocksCleared"}])
            assert reader.replay(reader.next + 1000) == []
        assert publisher.counts.replays >= 2


def test_who_comes_too_late_for_a_replay_is_told_everything_anew(sum_text: TextModel) -> None:
    engine, prompt = new_engine(), list(range(300, 500))
    with published(sum_text, engine, publish_states=True, buffer_steps=2) as (client, publisher):
        complete(client, prompt)
        settle(engine)
        time.sleep(4 * BEAT_S)
        with reading(publisher) as reader:
            reader.live()
            assert len(reader.replay(0)) == 2
            while {"type": "AllBlocksCleared"} not in (batch := reader.live())[1]:
                pass
            reader.shadow.read(batch[1])
            reader.next = batch[0] + 1
            reader.follow()
            assert reader.shadow.cached_tokens(np.array([*prompt, 1], np.int32)) == 192
        assert publisher.counts.renewals == 1


def test_what_is_no_request_for_a_replay_is_passed_over(sum_text: TextModel) -> None:
    with published(sum_text, new_engine()) as (_, publisher), reading(publisher) as reader:
        for frames in ([b""], [b"", b"1"], [b"x", b"\0" * 8], [b"", b"\0" * 8, b""], [b"", b"\0" * 900]):
            reader._asking.send_multipart(frames)
        assert reader.replay(0)[0][0] == 0
        assert publisher.alive


def test_a_server_that_ends_says_that_nothing_is_there(sum_text: TextModel) -> None:
    engine = new_engine()
    with ExitStack() as open_readers:
        with published(sum_text, engine) as (client, publisher):
            reader = open_readers.enter_context(reading(publisher))
            complete(client, list(range(300, 500)))
            settle(engine)
            reader.follow()
            assert reader.shadow.references
        while (batch := reader.live()[1]) == []:
            pass
        assert batch == [{"type": "AllBlocksCleared"}]
    assert not publisher.alive
    again = Publisher(config(endpoint=publisher.endpoint, replay_endpoint=publisher.replay_endpoint))
    again.stop()  # the addresses are free


def chain(length: int, first: int = 0) -> Checkpoint:
    """A state behind so many pages."""
    tree = PrefixTree()
    keys = keys_of("x/", np.arange(first, first + 64 * length, dtype=np.int32))
    node = tree.root("x/")
    for place, key in enumerate(keys.pages):
        node = tree.insert(node, key, keys.names[place + 1], place, 0.0)
    return Checkpoint(node, 0, CheckpointKind.EXPLICIT)


@contextmanager
def running(**more: Any) -> Iterator[Publisher]:
    """A publisher without an engine; the journal is the test's."""
    publisher = Publisher(config(**more))
    publisher.start(lambda namespace: Origin(), grouped=True)
    try:
        yield publisher
    finally:
        publisher.stop()


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError


def test_a_long_prompt_comes_in_parts() -> None:
    long = chain(3 * MOST_BLOCKS + 5)
    with running() as publisher, reading(publisher) as reader:
        reader.follow()
        publisher.journal.came(long)
        sizes = []
        while not sizes or reader.shadow.references.total() < 3 * MOST_BLOCKS + 5:
            _, events = reader.live()
            reader.shadow.read(events)
            sizes += [len(event["block_hashes"]) for event in events]
        assert sizes == [MOST_BLOCKS] * 3 + [5]


def test_a_subscriber_that_never_reads_costs_a_bounded_queue_and_is_counted() -> None:
    place = chain(MOST_BLOCKS)
    with (
        running(hwm=2, publish_states=True) as publisher,
        reading(publisher) as reader,
        reading(publisher, RCVHWM=1, RCVBUF=4096) as sleeper,
    ):
        reader.follow()
        sleeper.live()
        for _ in range(400):
            publisher.journal.came(place)
            publisher.journal.went(place)
            if publisher.counts.dropped:
                break
            time.sleep(0.01)
        wait_for(lambda: publisher.counts.dropped > 0)
        reader.follow()  # the other one has, or asks for, all of it
        assert not reader.shadow.references
        assert publisher.alive


def test_changes_that_come_too_fast_are_told_as_a_whole() -> None:
    places = [chain(2, first) for first in range(8)]
    publisher = Publisher(config(max_queue_size=4))
    there = dict.fromkeys(places[:2])
    publisher.journal.begin(lambda: there)
    for place in places:
        there[place] = None
        publisher.journal.came(place)
    assert publisher.journal.num_overflows == 1
    assert len(publisher.journal) <= 1 + len(places)
    publisher.start(lambda namespace: Origin(), grouped=True)
    with reading(publisher) as reader:
        reader.follow()
        assert len(reader.shadow.references) == 16
    publisher.stop()


def test_what_went_while_nobody_listened_is_not_said_any_more() -> None:
    first, *others = (chain(2, start) for start in range(8))
    there, journal = {first: None}, Journal(lambda: None, most=1)
    journal.begin(lambda: there)
    resumable, shadow = Resumable(), Shadow()

    def hear() -> set[int]:
        changes = resumable.read(journal.take(1000))
        shadow.read([event_of(change, lambda namespace: Origin(), grouped=True) for change in changes])
        return {name for group, name in shadow.references if group == 0}

    assert hear() == {hash_of(node.name) for node in (first.node, first.node.parent) if node is not None}
    del there[first]
    journal.went(first)
    for place in others:
        there[place] = None
        journal.came(place)
    assert journal.num_overflows
    assert hear() == {hash_of(node.name) for each in others for node in (each.node, each.node.parent) if node}


def test_pages_of_a_model_without_states_come_and_go_one_by_one() -> None:
    cache = new_cache(SPECS["only attention"], pages=6)
    resumable, shadow, journal = Resumable(), Shadow(), Journal(lambda: None)
    cache.pool.watch(journal)
    for pages in ("aab", "aac", "bcd", "aab"):
        tokens = tokens_of(pages, 1)
        assert cache.match("", tokens).length == shadow.cached_tokens(tokens)
        fill(cache, tokens)
        changes = sized(resumable.read(journal.take(1000)))
        shadow.read([event_of(change, lambda namespace: Origin(), grouped=False) for change in changes])
        there = {hash_of(node.name) for node in cache.tree.nodes() if node.parent}
        assert {name for _, name in shadow.references} == there
    assert cache.stats().evictions["page"] > 0


def test_routers_learn_where_to_subscribe(sum_text: TextModel) -> None:
    with published(sum_text, new_engine(), topic="t") as (client, publisher):
        info, sources = client.get("/get_server_info").json(), client.get("/kv_event_sources").json()
        assert info["model_id"] == "sum"
        assert info["kv_block_size"] == 64
        assert sources["0"].items() >= {"transport": "zmq", "encoding": "msgpack", "schema_version": 1}.items()
        assert sources["0"]["endpoint"] == publisher.endpoint
        assert sources["0"]["replay_endpoint"] == publisher.replay_endpoint
        assert sources["0"]["topic"] == "t"
        assert not publisher.endpoint.endswith("*")
        assert "hybrid_cache_kv_events_up 1.0" in client.get("/metrics").text


def test_a_server_without_events_has_no_source(client: httpx.Client) -> None:
    assert client.get("/kv_event_sources").json() == {}
    assert client.get("/get_server_info").json()["kv_block_size"] == 64


def test_both_routes_need_a_key_where_there_are_some(sum_text: TextModel) -> None:
    app = create_app(new_engine(), sum_text, ServerSettings(NAMES, "fake", "m", api_keys=("k",)))
    with over_the_wire(app) as url:
        for path in ("/kv_event_sources", "/get_server_info"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.get(url + path, headers={"Authorization": "Bearer k"}).status_code == 200


def origins(text: TextModel, *, salted: bool = False, **more: Any) -> Origins:
    other = SumModel()
    other.fingerprint = OTHER
    engine = AsyncEngine(SumModel(), EngineConfig(budget_bytes=4 << 20), variants={"other": other})
    facts = ServerSettings(NAMES, "fake", "m", **more)
    return Origins(new_serving(engine, text, facts, [Variant("other", "m/other", text)]), salted=salted)


def test_blocks_are_named_by_model_and_salt(sum_text: TextModel) -> None:
    plain, salted = origins(sum_text), origins(sum_text, salted=True)
    ours, theirs = SumModel.fingerprint, OTHER
    assert plain(namespace_of("", ours)) == Origin(None, None)
    assert plain(namespace_of("", theirs)) == Origin("other", None)
    assert plain(namespace_of("", "unknown")) is None
    assert plain(namespace_of("", ours, "lane")) is None
    assert plain(namespace_of("secret", ours)) is None
    assert salted(namespace_of("secret", theirs)) == Origin("other", "secret")


def test_the_only_tenant_is_none_and_one_of_several_is_a_salt(sum_text: TextModel) -> None:
    namespace = namespace_of(salt_of_tenant(tenant_of("a"), None), SumModel.fingerprint)
    assert origins(sum_text, api_keys=("a",))(namespace) == Origin(None, None)
    assert origins(sum_text, api_keys=("a", "b"))(namespace) is None
    found = origins(sum_text, api_keys=("a", "b"), salted=True)(namespace)
    assert found is not None
    assert (found.cache_salt or "").startswith(tenant_of("a"))


def test_salted_blocks_come_in_batches_of_their_own(sum_text: TextModel) -> None:
    """vllm-router drops a batch with a field that it does not know."""
    engine, prompt = new_engine(), list(range(300, 500))
    with published(sum_text, engine, publish_salted=True) as (client, publisher), reading(publisher) as reader:
        reader.follow()
        complete(client, prompt)
        complete(client, prompt, cache_salt="mine")
        settle(engine)
        time.sleep(2 * BEAT_S)
        salts = [[event.get("cache_salt") for event in events] for _, events in reader.replay(0) if events]
        assert {salt for batch in salts for salt in batch} == {None, "mine"}
        assert all(len(set(batch)) == 1 for batch in salts)


def test_where_an_adapter_takes_over_its_blocks_bear_its_name_behind_those_of_the_base() -> None:
    keys = keys_of("base/", np.arange(256, dtype=np.int32), Mark(100, "adapter/"))
    tree = PrefixTree()
    node = tree.root("base/")
    for place, key in enumerate(keys.pages):
        node = tree.insert(node, key, keys.names[place + 1], place, 0.0, keys.namespace_of(place))
    notes = [Note(Checkpoint(node, 0, CheckpointKind.EXPLICIT), came=True)]
    changes = sized(Resumable(states=False).read(notes))
    base, adapter = (event_of(each, lambda namespace: Origin(namespace), grouped=True) for each in changes)
    assert (base["lora_name"], base["block_hashes"]) == ("base/", [hash_of(keys.names[1])])
    assert adapter["lora_name"] == "adapter/"
    assert adapter["parent_block_hash"] == hash_of(keys.names[1])
    assert adapter["token_ids"] == list(range(64, 256))  # without what the key of a page says of the mark


def test_hashes_are_the_same_everywhere() -> None:
    """A block's hash says all that comes before it, the model and the salt, and nothing of the process."""
    names = keys_of(namespace_of("", "model"), np.arange(128, dtype=np.int32)).names
    assert [hash_of(name) for name in names[1:]] == HASHES
    other = keys_of(namespace_of("salt", "model"), np.arange(128, dtype=np.int32)).names
    assert hash_of(other[1]) != HASHES[0]


HASHES = [16078281149933932221, 8584541705768766225]

BAD = {
    "no JSON": ("{", "must be a JSON object"),
    "a list": ("[]", "must be a JSON object"),
    "deep": ("[" * 100_000, "must be a JSON object"),
    "an unknown key": ('{"port": 1}', "'port' is not known"),
    "a number for a switch": ('{"enable_kv_cache_events": 1}', "must be bool"),
    "a switch for a number": ('{"hwm": true}', "hwm is 'True', must be int"),
    "too small": ('{"buffer_steps": 0}', "buffer_steps is 0, must be in [1, 10000000]"),
    "another publisher": ('{"publisher": "nats"}', "publisher is 'nats', must be zmq or null"),
    "another transport": ('{"endpoint": "http://x:1"}', "endpoint is 'http://x:1'"),
    "no port": ('{"endpoint": "tcp://x"}', "must end in a port"),
    "a port too high": ('{"replay_endpoint": "tcp://*:70000"}', "must end in a port of at most 65535"),
    "the same twice": ('{"endpoint": "tcp://*:1", "replay_endpoint": "tcp://*:1"}', "must differ"),
    "no beat": ('{"heartbeat_s": 0}', "heartbeat_s is 0, must be in [0.1, 3600]"),
    "no number": ('{"heartbeat_s": NaN}', "heartbeat_s is nan"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_bad_settings_are_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert said in str(caught.value)
    assert "--kv-events-config" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_bad_setting_is_said_before_anything_heavy_is_imported() -> None:
    said = told("serve", "--port", "0", "--kv-events-config", '{"hwm": 0}')
    assert "hwm is 0, must be in [1, 10000000]" in said


def test_vllms_own_example_is_taken() -> None:
    text = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://*:5557",
        "replay_endpoint": "tcp://*:5558",
        "topic": "",
    }
    found = parse(json.dumps(text))
    assert found.publishes
    assert not found.is_local
    assert not parse(None).publishes
    assert not parse('{"publisher": "zmq"}').publishes
    assert not parse('{"enable_kv_cache_events": true, "publisher": "null"}').publishes
    assert parse('{"enable_kv_cache_events": true}').is_local


def test_a_port_in_use_is_an_error_and_the_other_is_given_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            free = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"replay_endpoint .* cannot be listened on: Address already in use"):
            Publisher(config(endpoint=free, replay_endpoint=address))
    publisher = Publisher(config(endpoint=free))
    publisher.stop()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda name: None if name == "zmq" else find_spec(name))
    with pytest.raises(
        ConfigError, match=r"KV events need zmq, not installed here: pip install 'hybrid-cache\[events\]'"
    ):
        config()
