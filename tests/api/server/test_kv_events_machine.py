"""Random requests, commits, evictions and aborts: an index that reads only KV events knows what each prompt finds."""

import hypothesis.strategies as st
import msgspec
from hypothesis import HealthCheck, settings
from hypothesis.stateful import initialize, rule

from hybrid_cache.api.server.kv_events.wire import Origin, event_of, hash_of, sized
from hybrid_cache.cache.journal import Journal
from hybrid_cache.cache.lease import Match
from hybrid_cache.cache.resumable import Change, Resumable
from hybrid_cache.tokens import TokenArray
from tests.api.server.shadow import Shadow
from tests.cache.test_cache_machine import CacheMachine


def origin(namespace: str) -> Origin:
    return Origin(None, namespace or None)


class EventMachine(CacheMachine):
    """The machine of the cache, with readers of its events who know all groups, or only the pages."""

    most = 1000
    journal: Journal | None = None

    @initialize(most=st.sampled_from([1, 2, 5, 1000]))
    def bound(self, most: int) -> None:
        self.most = most

    def tell(self) -> None:
        """The readers are told of all that has changed; they may come late."""
        if self.journal is None:
            self.calls = 0
            self.journal = Journal(self.wake, self.most)
            known = {states: states and not self.stateless for states in (True, False)}  # as it is published
            self.readers = {states: (Resumable(states=known[states]), Shadow()) for states in known}
            self.cache.pool.watch(self.journal)
        assert self.calls or not self.journal  # whoever sleeps until it is woken misses nothing
        while notes := self.journal.take(3):
            for resumable, shadow in self.readers.values():
                read(shadow, [*resumable.read(notes)], grouped=not self.stateless)
        self.calls = 0
        self.journal.sleep()
        assert not self.calls

    def useful_pages(self) -> set[int]:
        """Those that a state lies behind, looked for in the tree."""
        nodes = [n for n in self.cache.tree.nodes() if n.parent is not None and (self.stateless or n.checkpoint)]
        found = set[int]()
        for node in nodes:
            while node.parent is not None and (name := hash_of(node.name)) not in found:
                found.add(name)
                node = node.parent
        return found

    def wake(self) -> None:
        self.calls += 1

    @rule()
    def renew(self) -> None:
        self.tell()
        for resumable, shadow in self.readers.values():
            read(shadow, [*resumable.all()], grouped=not self.stateless)

    def check_match(self, match: Match, tokens: TokenArray) -> None:
        super().check_match(match, tokens)
        self.tell()
        root = None, match.namespace or None
        (resumable, shadow), (_, only_pages) = self.readers[True], self.readers[False]
        if not self.stateless or match.end is None:  # where pages are all that is said, nobody hears of a whole prompt
            assert shadow.cached_tokens(tokens, root) == match.length
        said = {name for group, name in only_pages.references if group == 0}
        assert said == self.useful_pages() == {name for group, name in shadow.references if group == 0}
        assert resumable.num_pages == len(said)
        found = shadow.pages_of(tokens, root)
        assert only_pages.pages_of(tokens, root) == found
        if match.end is None and found and found[-1][0] < len(tokens):
            assert match.length <= found[-1][0]
            if not only_pages.goes_on(found[-1][1]):  # a conversation that goes on where it ended
                assert match.length == found[-1][0]


def read(shadow: Shadow, changes: list[Change], *, grouped: bool) -> None:
    """As it comes over the wire."""
    events = [event_of(change, origin, grouped=grouped) for change in sized(changes)]
    shadow.read(msgspec.msgpack.decode(msgspec.msgpack.encode(events)))


EventMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEvents = EventMachine.TestCase
