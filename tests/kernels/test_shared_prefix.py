"""Schedules of shared decode work: each split of each row once, and together only what is the same."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid_cache.kernels import shared_prefix
from hybrid_cache.kernels.decode_schedule import PAGES_PER_SPLIT
from hybrid_cache.kernels.grid import TILE
from hybrid_cache.kernels.shared_prefix import schedule_shared

SPAN = PAGES_PER_SPLIT * TILE
on_a_busy_machine = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def decode_rows(draw):
    """-> page_table, lengths: rows branch off one another anywhere, at the first page or in the middle of a split."""
    tables, lengths, next_page = [], [], 1
    for _ in range(draw(st.integers(0, 7))):
        parent = draw(st.sampled_from([[], *tables]))
        kept = parent[: draw(st.integers(0, 14))]
        added = draw(st.integers(0 if kept else 1, 7))
        tables.append([*kept, *range(next_page, next_page + added)])
        lengths.append((len(tables[-1]) - 1) * TILE + draw(st.integers(1, TILE)))
        next_page += added
    return table_of(tables, draw(st.integers(0, 5))), np.array(lengths, np.int64)


def table_of(tables, more_columns=0):
    table = np.zeros((len(tables), max(map(len, tables), default=0) + more_columns), np.int64)
    for row, pages in zip(table, tables, strict=True):
        row[: len(pages)] = pages
    return table


def items_of(schedule):
    return [
        (int(s), schedule.rows[a:b].tolist())
        for s, a, b in zip(schedule.split, schedule.first, schedule.first[1:], strict=False)
    ]


def sharable(length, split):
    """The split ends before the row's last page."""
    return (split + 1) * PAGES_PER_SPLIT <= (length - 1) // TILE


def pages_of(table, row, split):
    return tuple(table[row, split * PAGES_PER_SPLIT : (split + 1) * PAGES_PER_SPLIT])


def check(schedule, table, lengths):
    covered = [(row, split) for split, rows in items_of(schedule) for row in rows]
    assert sorted(covered) == [(row, s) for row, n in enumerate(lengths) for s in range(-(-n // SPAN))]
    for split, rows in items_of(schedule):
        assert rows == sorted(rows)
        if len(rows) > 1:
            assert all(sharable(lengths[row], split) for row in rows)
            assert len({pages_of(table, row, split) for row in rows}) == 1


@on_a_busy_machine
@given(decode_rows())
def test_each_split_of_each_row_is_computed_once_and_shared_splits_agree_on_their_pages(rows):
    check(schedule_shared(*rows), *rows)


@on_a_busy_machine
@given(decode_rows())
def test_all_rows_with_the_same_full_pages_share(rows):
    table, lengths = rows
    groups = {}
    for row, length in enumerate(lengths):
        for split in range(-(-length // SPAN)):
            key = pages_of(table, row, split) if sharable(length, split) else row
            groups.setdefault((split, key), []).append(row)
    expected = sorted((split, members) for (split, _), members in groups.items())
    assert sorted(items_of(schedule_shared(table, lengths))) == expected


@on_a_busy_machine
@given(decode_rows(), st.integers(2, 5))
def test_small_groups_are_taken_apart(rows, min_rows):
    schedule = schedule_shared(*rows, min_rows=min_rows)
    check(schedule, *rows)
    large = [item for item in items_of(schedule_shared(*rows)) if len(item[1]) >= min_rows]
    assert [item for item in items_of(schedule) if len(item[1]) > 1] == large


@on_a_busy_machine
@given(decode_rows())
def test_equal_hashes_of_other_pages_do_no_harm(rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefix, "_sort_key", lambda pages, sharable, split, row: split)
        check(schedule_shared(*rows), *rows)


@on_a_busy_machine
@given(decode_rows(), st.integers(1, 4))
def test_blocks_cut_items_into_pieces_that_fit(rows, rows_per_block):
    schedule = schedule_shared(*rows)
    blocks = schedule.blocks(rows_per_block)
    assert all(1 <= count <= rows_per_block for _, _, count in blocks)
    found = [(split, row) for split, first, count in blocks for row in schedule.rows[first : first + count]]
    assert found == [(split, row) for split, members in items_of(schedule) for row in members]
    sizes = [len(members) for _, members in items_of(schedule)]
    assert len(blocks) == sum(-(-size // rows_per_block) for size in sizes)


def test_groups_form_a_hierarchy():
    system, tools, other = list(range(1, 5)), list(range(11, 15)), list(range(21, 25))
    tables = [[*system, *tools, 31, 32], [*system, *tools, 33], [*system, *other, 34], [*system, 35]]
    schedule = schedule_shared(table_of(tables), np.array([TILE * len(t) - 3 for t in tables]))
    assert items_of(schedule)[0] == (0, [0, 1, 2, 3])
    assert sorted(items_of(schedule)[1:4]) == [(1, [0, 1]), (1, [2]), (1, [3])]
    assert sorted(items_of(schedule)[4:]) == [(2, [0]), (2, [1]), (2, [2])]
    assert schedule.num_page_reads_saved == 4 * PAGES_PER_SPLIT


def test_a_page_that_is_still_being_written_is_not_shared():
    pages = list(range(1, PAGES_PER_SPLIT + 1))
    for length, num_items in ((SPAN - 1, 2), (SPAN, 2), (SPAN + 1, 3)):
        table = table_of([[*pages, 7], [*pages, 8]])
        assert schedule_shared(table, np.array([length, length])).num_items == num_items


def test_a_plan_is_sent_to_a_device_once():
    schedule = schedule_shared(table_of([[1, 2], [3]]), np.array([70, 2]))
    sent = schedule.on(torch.device("cpu"), 4)
    assert schedule.on(torch.device("cpu"), 4) is sent
    assert schedule.on(torch.device("cpu"), 5) is not sent
    assert sent.num_blocks == 2
    assert sent.data.tolist() == [*schedule.blocks(4).ravel(), *schedule.rows]
