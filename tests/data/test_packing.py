"""Rows of samples: flags beside tokens, the first row with room, and a new order every epoch."""

import json
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_ref.config import UserError
from dsv3_ref.data import packing
from dsv3_ref.data.packing import (
    PackedDataset,
    find_cu_seqlens,
    first_fit,
    flag_sample,
    pack_rows,
    read_flags,
)

PAD = 9999


# ── Flags ──


@given(st.lists(st.tuples(st.integers(0, (1 << 29) - 1), st.booleans()), min_size=1, max_size=9))
def test_flags_are_read_as_they_were_written(sample):
    tokens, mask = zip(*sample)
    rows = read_flags(torch.tensor([flag_sample(tokens, mask)]))
    assert rows.tokens_bs.tolist() == [list(tokens)] and rows.mask_bs.tolist() == [list(mask)]
    assert rows.start_bs.tolist() == [[True] + [False] * (len(tokens) - 1)]
    assert max(flag_sample(tokens, mask)) < 1 << 31  # int32 holds them


@pytest.mark.parametrize("mask", [[True], [True] * 3], ids=len)
def test_a_mask_has_the_length_of_its_sample(mask):
    with pytest.raises(ValueError, match="argument 2 is (short|long)er"):
        flag_sample([5, 6], mask)


def test_samples_end_where_the_next_begins_and_at_the_end_of_a_row():
    start_bs = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    before = start_bs.clone()
    cu_seqlens = find_cu_seqlens(start_bs)
    assert cu_seqlens.tolist() == [0, 2, 4, 8, 9, 12] and cu_seqlens.dtype == torch.int32
    assert torch.equal(start_bs, before)


# ── The first row with room ──


@given(st.lists(st.integers(1, 10), max_size=30))
def test_an_item_is_placed_in_the_first_row_with_room(lengths):
    room, want = [], []
    for length in lengths:
        fits = [i for i, left in enumerate(room) if left >= length]
        if not fits:
            fits = [len(room)]
            room.append(10)
        room[fits[0]] -= length
        want.append(fits[0])
    assert first_fit(lengths, 10) == want


def test_rows_are_padded_and_the_longest_sample_is_named_if_it_does_not_fit():
    assert pack_rows([[1], [2, 2, 2], [3, 3]], 4, PAD) == [[2, 2, 2, 1], [3, 3, PAD, PAD]]
    assert pack_rows([[1] * 4], 4, PAD) == [[1] * 4] and pack_rows([], 4, PAD) == []
    with pytest.raises(UserError, match="a sample of 7 tokens does not fit a row of 4: "):
        pack_rows([[1], [2] * 7, [3] * 5], 4, PAD)


# ── Epochs ──


def dataset(seed: int = 3, n: int = 10) -> PackedDataset:
    """Return samples i, i, … of 2 or 3 tokens, in rows of 6."""
    return PackedDataset([[i] * (2 + i % 2) for i in range(n)], 6, seed, PAD)


def in_order(rows) -> list[list[int]]:
    """Return the rows of a batch in an order of their own."""
    return sorted(map(list, rows))


def test_samples_are_packed_a_chunk_at_a_time(monkeypatch):
    """With chunks of two, a row has at most two samples, and no chunk is lost."""
    monkeypatch.setattr(packing, "PACKING_CHUNK", 2)
    rows = dataset(n=9).rows
    assert len(rows) == 5
    assert sorted(len(set(row) - {PAD}) for row in rows) == [1, 2, 2, 2, 2]
    tokens = sorted(chain.from_iterable(rows))
    samples = [[i] * (2 + i % 2) for i in range(9)]
    assert [x for x in tokens if x != PAD] == sorted(chain.from_iterable(samples))


def test_an_epoch_has_its_rows_once_in_an_order_that_depends_on_the_seed():
    one, again = dataset(), dataset()
    other = dataset(seed=4)
    n = len(one.rows)
    first = one.next_batch(n)
    assert first.dtype == torch.int64 and first.shape == (n, 6)
    assert torch.equal(first, again.next_batch(n))
    assert not torch.equal(first, other.next_batch(n))
    assert in_order(first.tolist()) == in_order(again.rows)
    assert one.state_dict() == {"epoch": 0, "index": n}
    assert not torch.equal(one.next_batch(n), first)
    assert one.state_dict() == {"epoch": 1, "index": n}


def test_a_part_of_a_batch_takes_the_whole_batch():
    one, parts = dataset(), dataset()
    rows = one.next_batch(5)
    assert torch.equal(parts.next_part(5, 1, 3), rows[1:3])
    assert parts.next_part(3, 2, 2).shape == (0, 6)
    one.next_batch(3)
    assert torch.equal(parts.next_batch(4), one.next_batch(4))


def test_a_state_is_that_of_its_moment():
    one, other = dataset(), dataset()
    one.next_batch(len(one.rows) + 2)
    state = one.snapshot()
    rows = one.next_batch(6)
    assert state() == {"epoch": 1, "index": 2}
    other.load_state_dict(json.loads(json.dumps(other.merge_states([state(), {}]))))
    assert torch.equal(other.next_batch(6), rows)
