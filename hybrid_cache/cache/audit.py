"""Looks at the books from outside: statistics, and a proof that they are in order."""

from collections import Counter
from collections.abc import Iterable, Mapping

from hybrid_cache.cache.commands import Item
from hybrid_cache.cache.geometry import Kind
from hybrid_cache.cache.inputs import InputStore
from hybrid_cache.cache.keys import tokens_in
from hybrid_cache.cache.lease import Lease
from hybrid_cache.cache.messages import MessageStore
from hybrid_cache.cache.misses import Inquest
from hybrid_cache.cache.pool import Pool
from hybrid_cache.cache.tree import Kept, LayerInputs, Node, Outside, PromptEnd
from hybrid_cache.stats import CacheStats


def stats_of(
    pool: Pool,
    messages: MessageStore,
    inputs: InputStore,
    tokens: Mapping[str, int],
    inquest: Inquest,
    budget_bytes: int,
) -> CacheStats:
    """What the budget holds now, and what has happened since the start.

    tokens: of prompts, those that were in the cache (hit), that had pages but no state (kv_only), and all others (miss)
    """
    tree, stored = pool.tree, messages.stored.values()
    slot_bytes, page_bytes = pool.bytes_of(1, 0), pool.bytes_of(0, 1)
    input_items = sum(len(run.items) for run in inputs.runs)
    input_pages = input_items if pool.extra_kind is Kind.PAGE else 0
    ends = sum(isinstance(k, PromptEnd) for k in pool.slot_owner.values())
    checkpoints = len(pool.slot_owner) - ends - len(stored)
    message_items = [kind for message in stored for kind, _ in pool.items(message)]
    message_bytes = sum(pool.item_bytes[kind] for kind in message_items)
    end_pages = len(pool.page_owner) - tree.num_nodes - message_items.count(Kind.PAGE) - input_pages
    input_bytes = input_items * pool.item_bytes[pool.extra_kind]
    kv_bytes = tree.num_nodes * page_bytes
    checkpoint_bytes = checkpoints * slot_bytes
    end_bytes = ends * slot_bytes + end_pages * page_bytes
    free_bytes, used_bytes = pool.allocator.free_bytes, pool.allocator.used_bytes
    return CacheStats(
        budget_bytes=budget_bytes,
        free_bytes=free_bytes,
        kv_bytes=kv_bytes,
        checkpoint_bytes=checkpoint_bytes,
        prompt_end_bytes=end_bytes,
        message_bytes=message_bytes,
        input_bytes=input_bytes,
        working_bytes=used_bytes - kv_bytes - checkpoint_bytes - end_bytes - message_bytes - input_bytes,
        nodes=tree.num_nodes,
        checkpoints=checkpoints,
        prompt_ends=ends,
        messages=len(stored),
        hit_tokens=tokens["hit"],
        kv_only_tokens=tokens["kv_only"],
        miss_tokens=tokens["miss"],
        admissions=dict(pool.admissions),
        declines=dict(pool.declines),
        evictions=dict(pool.evictions),
        misses=dict(inquest.misses),
        missed_tokens=dict(inquest.tokens),
        compactions=pool.num_compactions,
        host_bytes=pool.host.used_bytes if pool.host else 0,
        host_stores=pool.host.num_stored if pool.host else 0,
        host_loads=pool.host.num_loaded if pool.host else 0,
        disk=pool.disk.stats if pool.disk else None,
    )


def check_books(
    pool: Pool, messages: MessageStore, inputs: InputStore, leases: Iterable[Lease], scratch: int | None
) -> set[Item]:
    """Proves that every item has one owner, pins are those of the leases, and all queues hold what they should.

    -> all published items
    """
    nodes = list(pool.tree.nodes())
    taken: dict[Kind, list[int]] = {kind: [] for kind in Kind}
    for kind, item in _working_items(pool, messages, leases, scratch):
        taken[kind].append(item)
    fixed = {kind: set(items) for kind, items in taken.items()}
    _check_leases(pool, leases, nodes)
    in_tree = [node for node in nodes if node.parent is not None]
    fixed[Kind.PAGE].update(node.page for node in in_tree if node.pins)
    kept: set[Kept] = {k for node in nodes for k in (node.checkpoint, *node.ends.values()) if k is not None}
    kept |= set(messages.stored.values()) | set(inputs.stored.values())
    outside: list[Outside] = [*messages.stored.values(), *inputs.stored.values()]
    held: set[Kept] = {each for each in outside if each.holders}
    for kind, item in (each for m in held for each in pool.items(m)):
        fixed[kind].add(item)
    for k in kept:
        assert k.attached
        assert isinstance(k, LayerInputs) or pool.slot_owner[k.slot] is k
        assert all(kind is Kind.SLOT or pool.page_owner[item] is k for kind, item in pool.items(k))
    published = {(Kind.PAGE, node.page) for node in in_tree} | {each for k in kept for each in pool.items(k)}
    assert len(published) == len(in_tree) + sum(len(pool.items(k)) for k in kept)
    assert len(pool.slot_owner) == sum(not isinstance(k, LayerInputs) for k in kept)
    assert {run for run in inputs.runs} == set(inputs.stored.values())
    assert inputs.unwritten == {run for lease in leases for run in lease.inputs}
    slots = {item for kind, item in published if kind is Kind.SLOT}
    assert slots == pool.slot_owner.keys() | pool.extra_slots
    num_pages = sum(kind is Kind.PAGE for k in kept for kind, _ in pool.items(k))
    assert len(pool.page_owner) == len(in_tree) + num_pages
    for kind, item in published:
        taken[kind].append(item)
    assert all(len(set(items)) == len(items) for items in taken.values())
    pool.claims.check()
    if pool.host is not None:
        pool.host.check()
    pool.queues.check({node for node in in_tree if node.dead}, kept - held)
    pool.allocator.check({kind: set(items) for kind, items in taken.items()}, fixed)
    return published


def _working_items(pool: Pool, messages: MessageStore, leases: Iterable[Lease], scratch: int | None) -> list[Item]:
    """Items that leases, loans and messages in the making hold and nothing else does."""
    items = list(messages.loans)
    items += [each for message in messages.unwritten for each in pool.items(message)]
    for lease in leases:
        items += [each for run in lease.inputs for each in pool.items(run)]
        items += [(Kind.PAGE, page) for page in lease.pages[len(lease.nodes) :]]
        items += [(Kind.SLOT, slot) for slot in (lease.slot, *(r.slot for r in lease.reserved))]
    return items if scratch is None else [*items, (Kind.SLOT, scratch)]


def _check_leases(pool: Pool, leases: Iterable[Lease], nodes: list[Node]) -> None:
    """Nodes are pinned, and await a state, as the leases say."""
    pins, awaited = Counter[Node](), set[Node]()
    for lease in leases:
        pins.update([lease.root, *lease.nodes])
        awaited.update(r.node for r in lease.reserved if r.node)
        assert [n.page for n in lease.nodes] == lease.pages[: len(lease.nodes)]
        assert all(n.parent is p for p, n in zip([lease.root, *lease.nodes], lease.nodes, strict=False))
    for node in nodes:
        _check_node(pool, node)
        assert node.pins == pins.pop(node, 0)
        assert node.awaited == (node in awaited)
    assert not pins, "a lease's path has left the tree"


def _check_node(pool: Pool, node: Node) -> None:
    assert node.attached
    assert all(child.parent is node and child.key == key for key, child in node.children.items())
    if node.parent is None:
        assert not node.dead
        return
    assert pool.page_owner[node.page] is node
    assert node.namespace == node.parent.namespace or len(node.key) > len(tokens_in(node.key))
    assert node.num_tokens == node.parent.num_tokens + pool.tree.page_tokens
    assert node.pins <= node.parent.pins
