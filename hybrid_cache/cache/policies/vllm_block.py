"""A state for every block of tokens, as vLLM does it."""

from collections.abc import Iterable

from hybrid_cache.cache.policies.base import Outline, Wish
from hybrid_cache.cache.policies.sglang_radix import ConsumedLRU, SGLangRadix
from hybrid_cache.cache.tree import CheckpointKind
from hybrid_cache.errors import ConfigError
from hybrid_cache.spec import AttentionSpec, CacheSpec, StateSpec

STEP = 16  # tokens; vLLM's attention blocks are multiples of it


def equal_page_tokens(spec: CacheSpec) -> int:
    """The shortest block whose KV in each attention layer takes at least the bytes of the largest layer's state.

    A multiple of 16, which also is the answer when there is no attention or no state to compare with.
    """
    states = [layer.conv_bytes + layer.state_bytes for layer in spec.layers if isinstance(layer, StateSpec)]
    rows = [layer.bytes_per_token for layer in spec.layers if isinstance(layer, AttentionSpec)]
    if not (states and rows):
        return STEP
    return -(-max(states) // (STEP * min(rows))) * STEP


def _at_least_one(block_tokens: int) -> int:
    if block_tokens < 1:
        raise ConfigError(f"block_tokens is {block_tokens}, must be at least 1")
    return block_tokens


class VLLMBlock(SGLangRadix):
    """A state at the end of every block; least recently used, with all blocks of a prompt used together.

    vLLM with its former cache mode that keeps all boundaries (`VLLMAlign` is today's) and, with longer blocks,
    the baseline "vLLM+" of the Marconi paper (arXiv 2411.19379, section 5). vLLM makes attention blocks so long that a
    block's KV in one layer takes as much as one layer's state, 528 tokens for Qwen3.5 (vllm-project/vllm issue 40696);
    `equal_page_tokens` is that rule. Blocks are rounded up to whole pages here, and pages of an unfinished block stay
    in the tree, though nobody can resume from them, until room is needed. A request frees its last block first, so of
    two blocks used at one time the deeper goes. vLLM shares one pool of equal blocks; here bytes are shared.
    """

    name = "vllm-block"

    def __init__(self, block_tokens: int) -> None:
        """Raises ConfigError for blocks of less than one token."""
        super().__init__()
        self._block_tokens = _at_least_one(block_tokens)

    def propose(self, outline: Outline) -> Iterable[Wish]:
        if outline.only_marked:
            return ()
        block = whole_pages(self._block_tokens, outline)
        first = outline.start // block + 1
        return [Wish(i * block, CheckpointKind.INTERIOR) for i in range(first, outline.num_tokens // block + 1)]


class VLLMAlign(ConsumedLRU):
    """One state a prompt, at the end of its last whole block, and one at that of its answer; least recently used.

    vLLM's "align" mode, its default for hybrid models from PR 25752 until shared-prefix junctions came (PR 37898). What
    is shorter than a block is never found, and two prompts that part after the last common block share nothing (issue
    45238). A request touches the one block that holds the state it resumes from, so states above it grow old. Blocks
    are as in `VLLMBlock`: `equal_page_tokens`, rounded up to whole pages. vLLM has one pool of equal blocks; here bytes
    are shared, and pages that no state needs go first.
    """

    name = "vllm-align"

    def __init__(self, block_tokens: int) -> None:
        """Raises ConfigError for blocks of less than one token."""
        super().__init__()
        self._block_tokens = _at_least_one(block_tokens)

    def propose(self, outline: Outline) -> Iterable[Wish]:
        block = whole_pages(self._block_tokens, outline)
        end = outline.num_tokens // block * block
        kind = CheckpointKind.TURN_END if outline.generated else CheckpointKind.MESSAGE_END
        return [Wish(end, kind)] if end > outline.start and not outline.only_marked else []


class VLLMFine(VLLMAlign):
    """A state where a prompt leaves an earlier one, at the end of a whole block, and one at its very end.

    vLLM as of version 0.33: `--prefix-match-unit` lets a hit end inside a block (PR 46384), and a junction is kept
    where the attention layers' hit goes further than the states' (PR 37898), rounded down to a block. A unit is a page
    here. Else as `VLLMAlign`.
    """

    name = "vllm-fine"

    def propose(self, outline: Outline) -> Iterable[Wish]:
        if outline.only_marked:
            return []
        block = whole_pages(self._block_tokens, outline)
        junction = outline.shared // block * block
        kind = CheckpointKind.TURN_END if outline.generated else CheckpointKind.MESSAGE_END
        places = {junction: CheckpointKind.BRANCH, outline.end: kind}
        return [Wish(position, places[position]) for position in sorted(places) if position > outline.start]


def whole_pages(block_tokens: int, outline: Outline) -> int:
    """A block rounded up to whole pages, in tokens."""
    return -(-block_tokens // outline.page_tokens) * outline.page_tokens
