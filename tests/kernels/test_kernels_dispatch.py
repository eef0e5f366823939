"""Dispatch and combine within a node, with the windows of all ranks in this process."""

from itertools import chain

import interpreter  # noqa: F401  first: makes Triton's interpreter round as a GPU does
import pytest
import torch
from dsv3_ref.kernels import dispatch
from dsv3_ref.kernels.dispatch import Window, allocate_windows, row_words
from hypothesis import given
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = torch.float8_e4m3fn
BF16, FP32 = torch.bfloat16, torch.float32
FORMATS = {"fp8": (E4M3, 132, 5), "bf16": (BF16, 34, 0), "fp32": (FP32, 8, 3)}  # with d, more


def node_windows(members: int, capacity: int, channels: int, d: int, k: int) -> list[Window]:
    """Return the windows of a node for rows of d fp32 numbers and k more."""
    words = row_words(torch.empty(1, d), torch.empty(1, k))
    return allocate_windows(members, capacity, channels, words, DEVICE)


def run_dispatch(windows, x_r, more_r, sent_r):
    """Return for each rank the rows that it receives and the ranges of its channels."""
    for window, *sent in zip(windows, x_r, more_r, sent_r):
        window.begin_transfer()
        dispatch.dispatch_send(window, *sent)
    received = []
    for window, x, more in zip(windows, x_r, more_r):
        rows = window.empty_rows(x), window.empty_rows(more), window.empty_ranges()
        dispatch.dispatch_receive(window, *rows)
        received.append(rows)
    return received


def run_combine(windows, y_r, more_r, ranges_r, sent_r):
    """Return for each rank the sums of its tokens."""
    for window, *results in zip(windows, y_r, more_r, ranges_r):
        window.begin_transfer()
        dispatch.combine_send(window, *results)
    sums_r = []
    for window, y, more, sent in zip(windows, y_r, more_r, sent_r):
        sums = y.new_empty(len(sent), y.shape[1]), more.new_empty(len(sent), more.shape[1])
        dispatch.combine_receive(window, *sums, sent)
        sums_r.append(sums)
    return sums_r


def random_node(goes_r, dtype, d, k, capacity):
    """Return random tokens of each rank, what travels with them, and how many go where."""
    x_r = [torch.randn(len(goes), d).to(dtype).to(DEVICE) for goes in goes_r]
    more_r = [torch.rand(len(goes), k, device=DEVICE) for goes in goes_r]
    sent_r = [goes.cumsum(0).clamp(max=capacity).int().to(DEVICE) for goes in goes_r]
    return x_r, more_r, sent_r


def random_results(members, rows, dtype, d, k):
    """Return random results of each rank, in bf16 for tokens in FP8, and as many gradients."""
    dtype = BF16 if dtype == E4M3 else dtype
    y_r = [torch.randn(rows, d).to(dtype).to(DEVICE) for _ in range(members)]
    return y_r, [torch.randn(rows, k, device=DEVICE) for _ in range(members)]


def slow_rows(goes_r, capacity):
    """Return {row: (rank, token)} for each rank: its capacity of rows from rank 0, 1 …."""
    rows_r = []
    for member in range(len(goes_r)):
        rows = {}
        for source, goes in enumerate(goes_r):
            tokens = [n for n, to in enumerate(goes.tolist()) if to[member]]
            first = source * capacity
            rows |= {first + slot: (source, n) for slot, n in enumerate(tokens[:capacity])}
        rows_r.append(rows)
    return rows_r


def slow_sum(y_r, rows_r, source, n):
    """Return the sum of a token's results over the ranks, in fp32."""
    total = torch.zeros(y_r[0].shape[1], device=DEVICE)
    for y, rows in zip(y_r, rows_r):
        for row in (row for row, token in rows.items() if token == (source, n)):
            total += y[row].float()
    return total


@st.composite
def destinations(draw):
    """Draw which tokens of each rank go where; some ranks send or get nothing, some everything."""
    members = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    odds = torch.tensor([draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in range(members)])
    counts = [draw(st.integers(0, 9)) for _ in range(members)]
    return [torch.rand(n, members, generator=generator) < odds for n in counts]


def bits(x):
    return x.view(torch.uint8).tolist()


@given(destinations(), st.sampled_from([*FORMATS]), st.integers(1, 9), st.integers(1, 3))
def test_dispatch_and_combine_equal_the_slow_form(goes_r, name, capacity, channels):
    """Some loads exceed the capacity; the tokens that come last are then left out."""
    members, (dtype, d, k) = len(goes_r), FORMATS[name]
    windows, rows_r = node_windows(members, capacity, channels, d, k), slow_rows(goes_r, capacity)
    x_r, more_r, sent_r = random_node(goes_r, dtype, d, k, capacity)
    received = run_dispatch(windows, x_r, more_r, sent_r)
    for rows, (x, more, ranges) in zip(rows_r, received):
        for row, (source, n) in rows.items():
            assert bits(x[row]) == bits(x_r[source][n]) and bits(more[row]) == bits(
                more_r[source][n]
            )
        counts = [sum(source == i for source, _ in rows.values()) for i in range(members)]
        assert ranges[:, -1, 1].tolist() == counts
    y_r, dw_r = random_results(members, members * capacity, dtype, d, k)
    sums_r = run_combine(windows, y_r, dw_r, [ranges for *_, ranges in received], sent_r)
    for source, (o, dw) in enumerate(sums_r):
        for n in range(len(o)):
            assert torch.equal(o[n], slow_sum(y_r, rows_r, source, n).to(o.dtype))
            assert torch.equal(dw[n], slow_sum(dw_r, rows_r, source, n))


UNEVEN = [torch.tensor([[1, 0]] * 4 + [[0, 1]] * 5) > 0, torch.ones(3, 2) > 0]


def test_the_number_of_multiprocessors_does_not_change_the_results():
    results = []
    for channels in (1, 4):
        torch.manual_seed(0)
        windows = node_windows(2, 6, channels, 132, 5)
        x_r, more_r, sent_r = random_node(UNEVEN, E4M3, 132, 5, 6)
        received = run_dispatch(windows, x_r, more_r, sent_r)
        y_r, dw_r = random_results(2, 12, E4M3, 132, 5)
        sums_r = run_combine(windows, y_r, dw_r, [rows[2] for rows in received], sent_r)
        parts = [*chain.from_iterable(sums_r)]
        for (x, more, _), rows in zip(received, slow_rows(UNEVEN, 6)):
            parts += [x[[*rows]], more[[*rows]]]
        results.append([*map(bits, parts)])
    assert results[0] == results[1]


def test_transfers_use_the_halves_of_the_windows_in_turns():
    """Flags and rows that an earlier transfer left in the same half are not taken for new ones."""
    windows, rows_r = node_windows(2, 6, 2, 8, 0), slow_rows(UNEVEN, 6)
    for _ in range(3):
        x_r, more_r, sent_r = random_node(UNEVEN, FP32, 8, 0, 6)
        for rows, (x, *_) in zip(rows_r, run_dispatch(windows, x_r, more_r, sent_r)):
            assert all(torch.equal(x[row], x_r[source][n]) for row, (source, n) in rows.items())
    assert [int(window.transfer) for window in windows] == [3] * 2


def test_rows_of_more_columns_than_a_tile():
    goes_r = [torch.ones(2, 1, dtype=torch.bool)]
    x_r, more_r, sent_r = random_node(goes_r, FP32, 600, 1, 2)
    windows = node_windows(1, 2, 1, 600, 1)
    ((x, more, ranges),) = run_dispatch(windows, x_r, more_r, sent_r)
    assert torch.equal(x, x_r[0]) and torch.equal(more, more_r[0])
    ((o, _),) = run_combine(windows, [x], [more], [ranges], sent_r)
    assert torch.equal(o, x)


@pytest.mark.parametrize("x, message", [
    (torch.empty(1, 3, dtype=BF16), "a row of x must be a multiple of 4 bytes, not 3 bfloat16"),
    (torch.empty(1, 40), "rows of 40 words need .* bytes, not"),
])  # fmt: skip
def test_rows_that_do_not_fit_are_refused(x, message):
    (window,) = node_windows(1, 1, 1, 8, 0)
    sent = torch.ones(1, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        dispatch.dispatch_send(window, x.to(DEVICE), torch.empty(1, 0, device=DEVICE), sent)
