"""What may be in a prefix tree: what requests gave to it. Approximate ones never do, nor those with the cache off."""

from hybrid_cache.cache.books import Books
from hybrid_cache.cache.keys import Mark, Name, keys_of
from hybrid_cache.tokens import TokenArray


class Given:
    """Everything that requests have given to the cache of one engine: nothing else may be found there."""

    def __init__(self) -> None:
        self._names: set[Name] = set()
        self._ends: set[Name] = set()

    def text(self, namespace: str, tokens: TokenArray) -> None:
        self._names.update(keys_of(namespace, tokens).names)

    def prompt(self, namespace: str, tokens: TokenArray, mark: Mark | None = None) -> None:
        """Its end may be kept, too, and where it has a mark also what comes before that."""
        self.text(namespace, tokens)
        keys = keys_of(namespace, tokens, mark)
        self._names.update(keys.names)
        self._ends.update(each.end_name for each in (keys, keys.stem) if each is not None)

    def foreign(self, cache: Books) -> str:
        """Names something in the tree that nobody gave; empty if there is nothing."""
        for node in cache.tree.nodes():
            if node.parent is not None and node.name not in self._names:
                return f"a page of tokens up to {node.num_tokens}, of a request that leaves nothing"
            if any(end.name not in self._ends for end in node.ends.values()):
                return f"the end of a prompt behind token {node.num_tokens}, of a request that leaves nothing"
        return ""
