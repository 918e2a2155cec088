"""What may be in a prefix tree: what requests gave to it. Approximate ones never do, nor those with the cache off."""

from collections import defaultdict

from hybrid_cache.cache.tree import end_name, keys_of
from hybrid_cache.device.memory import HybridCache
from hybrid_cache.tokens import TokenArray


class Given:
    """Everything that requests have given to the cache of one engine: nothing else may be found there."""

    def __init__(self) -> None:
        self._names: dict[str, set[int]] = defaultdict(lambda: {0})
        self._ends: set[tuple[str, int]] = set()

    def text(self, namespace: str, tokens: TokenArray) -> None:
        self._names[namespace].update(keys_of(tokens).names)

    def prompt(self, namespace: str, tokens: TokenArray) -> None:
        """Its end may be kept, too."""
        self.text(namespace, tokens)
        keys = keys_of(tokens)
        self._ends.add((namespace, end_name(keys.names[-1] if keys.pages else 0, keys.tail)))

    def foreign(self, cache: HybridCache) -> str:
        """Names something in the tree that nobody gave; empty if there is nothing."""
        for node in cache.tree.nodes():
            if node.name not in self._names[node.namespace]:
                return f"a page of tokens up to {node.num_tokens}, of a request that leaves nothing"
            ends = (end_name(node.name, tail) for tail in node.ends)
            if any((node.namespace, name) not in self._ends for name in ends):
                return f"the end of a prompt behind token {node.num_tokens}, of a request that leaves nothing"
        return ""
