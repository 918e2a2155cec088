"""An index that knows of a cache only what its KV events say, as a router does."""

from collections import Counter
from typing import Any

from hybrid_cache.tokens import TokenArray

BLOCK = 64
FULL, MAMBA = "full_attention", "mamba"

Hash = int
Root = tuple[str | None, str | None]  # lora_name, cache_salt
Chain = tuple[Hash | Root, tuple[int, ...]]  # what comes before, and tokens


class Shadow:
    """Blocks by what comes before them and their tokens. Raises AssertionError for what readers do not forgive."""

    def __init__(self) -> None:
        self.references: Counter[tuple[int, Hash]] = Counter()  # of a group, in all media
        self.hashes: dict[tuple[int, Chain], Hash] = {}
        self.chains: dict[tuple[int, Hash], Chain] = {}
        self.media: set[tuple[str, int, Hash]] = set()
        self.grouped = False

    def read(self, events: list[dict[str, Any]]) -> None:
        read = {"BlockStored": self.store, "BlockRemoved": self.remove, "AllBlocksCleared": self.clear}
        for event in events:
            read[event["type"]](event)

    def clear(self, event: dict[str, Any]) -> None:
        assert event.keys() == {"type"}
        self.references.clear()
        self.hashes.clear()
        self.chains.clear()
        self.media.clear()

    def store(self, event: dict[str, Any]) -> None:
        group, tokens, before = event.get("group_idx", 0), event["token_ids"], event["parent_block_hash"]
        self.grouped |= "group_idx" in event
        assert event["block_hashes"]
        assert event["block_size"] == BLOCK
        assert event["lora_id"] is None
        medium = event["medium"]
        assert medium in ("GPU", "CPU", "STORAGE")
        assert all(0 <= each < 1 << 64 for each in event["block_hashes"])
        whole = len(event["block_hashes"]) * BLOCK
        assert len(tokens) == whole if group < 2 else whole - BLOCK <= len(tokens) <= whole
        assert event.get("kv_cache_spec_kind") in ((MAMBA,) if group else (FULL, None))
        before = (event["lora_name"], event.get("cache_salt")) if before is None else before
        for place, name in enumerate(event["block_hashes"]):
            chain = before, tuple(tokens[place * BLOCK : (place + 1) * BLOCK])
            assert (medium, group, name) not in self.media, f"stored twice: {medium} {group}"
            known = group == 1 or isinstance(before, tuple) or (medium, group, before) in self.media
            assert known, f"nothing before it: {medium} {group}"
            assert self.chains.get((group, name), chain) == chain, "one hash for two"
            self.references[group, name] += 1
            self.media.add((medium, group, name))
            self.hashes[group, chain], self.chains[group, name] = name, chain
            before = name

    def remove(self, event: dict[str, Any]) -> None:
        group = event.get("group_idx", 0)
        assert event["block_hashes"]
        for name in event["block_hashes"]:
            self.media.remove((event["medium"], group, name))
            self.references[group, name] -= 1
            if not self.references[group, name]:
                del self.references[group, name], self.hashes[group, self.chains.pop((group, name))]

    def cached_tokens(self, tokens: TokenArray, root: Root = (None, None)) -> int:
        """Tokens of a prompt that need not be computed, as all groups say together."""
        if self._knows_end(tokens, root):
            return len(tokens)
        pages = [(end, name) for end, name in self.pages_of(tokens, root) if end < len(tokens)]
        return max((end for end, name in pages if not self.grouped or self.references[1, name]), default=0)

    def pages_of(self, tokens: TokenArray, root: Root = (None, None)) -> list[tuple[int, Hash]]:
        """The blocks of a prompt that are published, as routers count them: tokens up to its end, and its hash."""
        return self._walk(0, tokens, root)

    def goes_on(self, name: Hash) -> bool:
        """Whether a block is published that follows this one."""
        return any(group == 0 and before == name for group, (before, _) in self.hashes)

    def _knows_end(self, tokens: TokenArray, root: Root) -> bool:
        known = [(0, root), *self._walk(2, tokens, root)]
        place, before = known[-1]
        return len(tokens) - place < BLOCK and (2, (before, tuple(tokens[place:].tolist()))) in self.hashes

    def _walk(self, group: int, tokens: TokenArray, root: Root) -> list[tuple[int, Hash]]:
        before: Hash | Root = root
        found, words = list[tuple[int, Hash]](), tokens.tolist()
        for start in range(0, len(words) - BLOCK + 1, BLOCK):
            name = self.hashes.get((group, (before, tuple(words[start : start + BLOCK]))))
            if name is None:
                break
            found.append((start + BLOCK, name))
            before = name
        return found
