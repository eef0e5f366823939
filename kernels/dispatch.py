"""Dispatch and combine within a node: kernels that write rows to other GPUs' memory (§3.2.2).

Each rank has a *window*: memory to which the other ranks of its node can write over NVLink. To
dispatch, a kernel reads a token once and writes it to the windows of all ranks that hold any of
its experts. To combine, it writes results to the windows of their tokens' ranks, which sum them in
fp32.

Each program of a kernel is a *channel*. It occupies one multiprocessor and carries the same tokens
out and back, so the number of programs is the number of multiprocessors for communication:

    sender, channel 1     writes rows to the windows of ranks 0, 1 …, then a flag to each of them
    receiver, channel 1   waits for this flag from rank 0 and copies its rows, then from rank 1 …

No host waits and nothing is counted first. A window has `capacity` rows for every rank of the
node, and the place of a row depends only on the tokens before it. Transfers use the two halves of
a window in turns, which needs no acknowledgment: a rank begins transfer t + 2 after it has
received t + 1, and every rank had read t before it sent t + 1. All ranks make the same transfers
in the same order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from dsv3_ref.kernels.launch import (
    BF16,
    FLOATS,
    FP32,
    INT32,
    INT64,
    AOTCase,
    check_tensor,
    dtype_name,
    on_its_device,
)
from torch import Tensor
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes; of rows in a window, so that a thread writes as many at once
HEADER_INTS = 3  # of a channel from one rank: the flag, its first row, the end of its rows
MAX_BLOCK, BLOCK_N = 512, 8  # words and rows of a tile
NUM_WARPS = 8


# ── Where things are ──
# half: the offset in bytes of the half that this transfer uses; source_bytes: of one rank's rows


@triton.jit
def half_offset(t, half_bytes):
    """Return the offset of the half of every window that transfer t uses."""
    return (t % 2) * half_bytes


@triton.jit
def channel_header(peers_ptr, member, source, half):
    """Return the place in a member's window for the header of this channel from a source."""
    start = (tl.load(peers_ptr + member) + half).to(tl.pointer_type(tl.int32))
    return start + (source * tl.num_programs(0) + tl.program_id(0)) * 3


@triton.jit
def rows_in_window(
    peers_ptr, member, source, half, source_bytes, MEMBERS: tl.constexpr, DTYPE: tl.constexpr
):
    """Return a pointer to the first row from a source in a member's window, after the headers."""
    header_bytes = tl.cdiv(MEMBERS * tl.num_programs(0) * 12, 16) * 16
    start = tl.load(peers_ptr + member) + half + header_bytes
    address = start + tl.cast(source, tl.int64) * source_bytes
    # the compiler cannot know this; without it a thread would access 4 bytes at a time
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def channel_tokens(n):
    """Return the first token of this channel and the end of its tokens, out of n."""
    channel, channels = tl.program_id(0), tl.num_programs(0)
    return n * channel // channels, n * (channel + 1) // channels


@triton.jit
def sent_before(sent_ptr, token, member, MEMBERS: tl.constexpr):
    """Return how many of the tokens before this one are sent to a member."""
    return tl.load(sent_ptr + (token - 1) * MEMBERS + member, mask=token > 0, other=0)


@triton.jit
def slots_of(sent_ptr, token, exists, member, MEMBERS: tl.constexpr):
    """Return the places of tokens among the rows for a member, and whether they go there."""
    slot = sent_before(sent_ptr, token, member, MEMBERS)
    goes = exists & (sent_before(sent_ptr, token + 1, member, MEMBERS) > slot)
    return slot.to(tl.int64)[:, None], goes[:, None]


# ── Readiness ──


@triton.jit
def raise_flag(flag_ptr, t):
    """Announce transfer t: who sees the flag also sees everything written before it."""
    tl.debug_barrier()  # all threads have written their part
    tl.atomic_xchg(flag_ptr, t, sem="release", scope="sys")


@triton.jit
def wait_for_flag(flag_ptr, t):
    """Wait until transfer t is announced."""
    while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys") != t:
        pass
    tl.debug_barrier()


# ── Dispatch ──


@triton.jit
def copy_columns(
    from_ptr, from_offset, to_ptr, to_offset, exists, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy words 0 … WIDTH − 1 of the rows that start at these offsets."""
    for start in range(0, WIDTH, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        mask = exists[:, None] & (col < WIDTH)
        words = tl.load(from_ptr + from_offset[:, None] + col, mask=mask)
        tl.store(to_ptr + to_offset[:, None] + col, words, mask=mask)


@triton.jit
def fan_out_columns(
    from_ptr, peers_ptr, sent_ptr, token, exists, rank, half, source_bytes, FIRST: tl.constexpr,
    MEMBERS: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read the words of tokens once; write them to word FIRST … of the rows of all members."""
    for start in range(0, WIDTH, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        offset = token.to(tl.int64)[:, None] * WIDTH + col
        words = tl.load(from_ptr + offset, mask=exists[:, None] & (col < WIDTH))
        for member in range(MEMBERS):
            rows = rows_in_window(peers_ptr, member, rank, half, source_bytes, MEMBERS, tl.int32)
            slot, goes = slots_of(sent_ptr, token, exists, member, MEMBERS)
            tl.store(rows + (slot * ROW + FIRST + col), words, mask=goes & (col < WIDTH))


@triton.jit(do_not_specialize=["rank", "n"])
def _dispatch_send_kernel(
    peers_ptr, x_ptr, more_ptr, sent_ptr, transfer_ptr, rank, n, half_bytes, source_bytes,
    MEMBERS: tl.constexpr, ROW: tl.constexpr, X: tl.constexpr, MORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_MORE: tl.constexpr,
):  # fmt: skip
    """Write the tokens of this channel, out of n, to the windows of their experts' ranks."""
    t = tl.load(transfer_ptr)
    half = half_offset(t, half_bytes)
    first, last = channel_tokens(n)
    for start in range(first, last, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        exists = token < last
        fan_out_columns(
            x_ptr, peers_ptr, sent_ptr, token, exists, rank, half, source_bytes, 0, MEMBERS, ROW,
            X, BLOCK_X,
        )  # fmt: skip
        fan_out_columns(
            more_ptr, peers_ptr, sent_ptr, token, exists, rank, half, source_bytes, X, MEMBERS,
            ROW, MORE, BLOCK_MORE,
        )  # fmt: skip
    for member in range(MEMBERS):
        header = channel_header(peers_ptr, member, rank, half)
        tl.store(header + 1, sent_before(sent_ptr, first, member, MEMBERS))
        tl.store(header + 2, sent_before(sent_ptr, last, member, MEMBERS))
        raise_flag(header, t)


@triton.jit(do_not_specialize=["rank", "n"])
def _dispatch_receive_kernel(
    peers_ptr, x_ptr, more_ptr, range_ptr, transfer_ptr, rank, n, half_bytes, source_bytes,
    MEMBERS: tl.constexpr, ROW: tl.constexpr, X: tl.constexpr, MORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_MORE: tl.constexpr,
):  # fmt: skip
    """Copy the rows of this channel, at most n from each rank, out of the own window."""
    t = tl.load(transfer_ptr)
    half = half_offset(t, half_bytes)
    for i in range(MEMBERS):
        source = (rank + i) % MEMBERS  # the own rows are there first
        header = channel_header(peers_ptr, rank, source, half)
        wait_for_flag(header, t)
        first, last = tl.load(header + 1), tl.load(header + 2)
        own_range = range_ptr + (source * tl.num_programs(0) + tl.program_id(0)) * 2
        tl.store(own_range, first)
        tl.store(own_range + 1, last)
        rows = rows_in_window(peers_ptr, rank, source, half, source_bytes, MEMBERS, tl.int32)
        for start in range(first, last, BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            place, row = slot.to(tl.int64) * ROW, (source * n + slot).to(tl.int64)
            copy_columns(rows, place, x_ptr, row * X, slot < last, X, BLOCK_X)
            copy_columns(rows, place + X, more_ptr, row * MORE, slot < last, MORE, BLOCK_MORE)


# ── Combine ──


@triton.jit(do_not_specialize=["rank", "n"])
def _combine_send_kernel(
    peers_ptr, y_ptr, more_ptr, range_ptr, transfer_ptr, rank, n, half_bytes, source_bytes,
    MEMBERS: tl.constexpr, ROW: tl.constexpr, X: tl.constexpr, MORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_MORE: tl.constexpr,
):  # fmt: skip
    """Write the results of this channel, at most n for each rank, to the windows of these ranks."""
    t = tl.load(transfer_ptr)
    half = half_offset(t, half_bytes)
    for i in range(MEMBERS):
        member = (rank + i) % MEMBERS
        own_range = range_ptr + (member * tl.num_programs(0) + tl.program_id(0)) * 2
        first, last = tl.load(own_range), tl.load(own_range + 1)
        rows = rows_in_window(peers_ptr, member, rank, half, source_bytes, MEMBERS, tl.int32)
        for start in range(first, last, BLOCK_N):
            slot = start + tl.arange(0, BLOCK_N)
            place, row = slot.to(tl.int64) * ROW, (member * n + slot).to(tl.int64)
            copy_columns(y_ptr, row * X, rows, place, slot < last, X, BLOCK_X)
            copy_columns(more_ptr, row * MORE, rows, place + X, slot < last, MORE, BLOCK_MORE)
        raise_flag(channel_header(peers_ptr, member, rank, half), t)


@triton.jit
def sum_columns(
    out_ptr, peers_ptr, sent_ptr, token, exists, rank, half, source_bytes, FIRST: tl.constexpr,
    MEMBERS: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum numbers FIRST … of the rows of tokens over the members that they went to, in fp32."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for start in range(0, WIDTH, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        total = tl.zeros((token.shape[0], BLOCK), tl.float32)
        for member in range(MEMBERS):
            rows = rows_in_window(peers_ptr, rank, member, half, source_bytes, MEMBERS, dtype)
            slot, goes = slots_of(sent_ptr, token, exists, member, MEMBERS)
            mask = goes & (col < WIDTH)
            y = tl.load(rows + (slot * ROW + FIRST + col), mask=mask, other=0.0)
            total += y.to(tl.float32)
        offset = token.to(tl.int64)[:, None] * WIDTH + col
        tl.store(out_ptr + offset, total.to(dtype), mask=exists[:, None] & (col < WIDTH))


@triton.jit(do_not_specialize=["rank", "n"])
def _combine_receive_kernel(
    peers_ptr, o_ptr, more_ptr, sent_ptr, transfer_ptr, rank, n, half_bytes, source_bytes,
    MEMBERS: tl.constexpr, ROW: tl.constexpr, X: tl.constexpr, MORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_MORE: tl.constexpr,
):  # fmt: skip
    """Sum the results of the tokens of this channel, out of n, when all ranks have sent theirs."""
    t = tl.load(transfer_ptr)
    half = half_offset(t, half_bytes)
    for member in range(MEMBERS):
        wait_for_flag(channel_header(peers_ptr, rank, member, half), t)
    first, last = channel_tokens(n)
    numbers: tl.constexpr = 32 // o_ptr.dtype.element_ty.primitive_bitwidth  # per word
    for start in range(first, last, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        exists = token < last
        sum_columns(
            o_ptr, peers_ptr, sent_ptr, token, exists, rank, half, source_bytes, 0, MEMBERS,
            ROW * numbers, X * numbers, BLOCK_X,
        )  # fmt: skip
        sum_columns(
            more_ptr, peers_ptr, sent_ptr, token, exists, rank, half, source_bytes, X, MEMBERS,
            ROW, MORE, BLOCK_MORE,
        )  # fmt: skip


# ── Launching them ──


@dataclass(frozen=True)
class Window:
    """The memory to which the ranks of a node can write, as one of them sees it.

    Each of its two halves has a header for every channel from every rank, then `capacity` rows from
    every rank. It must be zero before the first transfer.
    """

    peers_i: Tensor  # the addresses of all windows, int64, (members,)
    rank: int  # among the members
    capacity: int  # rows from each rank
    channels: int  # programs, and therefore multiprocessors, of each kernel
    half_bytes: int
    transfer: Tensor  # the number of transfers of this rank so far, int32, (1,)
    memory: Tensor  # keeps the window allocated

    @property
    def members(self) -> int:
        """The number of ranks in the node."""
        return len(self.peers_i)

    def begin_transfer(self) -> None:
        """Count a transfer; the kernels that send and those that receive it read the number."""
        self.transfer.add_(1)

    def empty_rows(self, like: Tensor) -> Tensor:
        """Return rows for all that a rank may receive, of the width and dtype of others."""
        return like.new_empty(self.members * self.capacity, like.shape[1])

    def empty_ranges(self) -> Tensor:
        """Return a tensor for the rows of each channel from each rank, (members, channels, 2)."""
        return self.transfer.new_empty(self.members, self.channels, 2)


def row_words(*parts: Tensor) -> int:
    """Return the 4-byte words of a row in a window, which holds a row of each part."""
    return triton.cdiv(sum(x.shape[1] * x.element_size() for x in parts), ALIGNMENT) * 4


def half_window_bytes(members: int, capacity: int, channels: int, words: int) -> int:
    """Return the size of half a window whose rows have this many words."""
    headers = triton.cdiv(members * channels * HEADER_INTS * 4, ALIGNMENT) * ALIGNMENT
    return headers + members * capacity * words * 4


def allocate_windows(
    members: int, capacity: int, channels: int, words: int, device: torch.device | str
) -> list[Window]:
    """Return the windows of all ranks of a node in the memory of one device, to try the kernels."""
    half_bytes = half_window_bytes(members, capacity, channels, words)
    memory = torch.zeros(members, 2 * half_bytes, dtype=torch.uint8, device=device)
    windows = []
    for rank in range(members):
        peers_i = torch.tensor([window.data_ptr() for window in memory], device=device)
        transfer = torch.zeros(1, dtype=INT32, device=device)
        windows.append(Window(peers_i, rank, capacity, channels, half_bytes, transfer, memory))
    return windows


@on_its_device
def run_channels(
    x: Tensor, more: Tensor, index: Tensor, kernel: JITFunction, window: Window, n: int
) -> None:
    """Run a kernel with one program per channel on rows of x, each followed by a row of `more`.

    All kernels but the one that adds numbers take them as words, whatever their dtype.
    """
    check_tensor("x", x, (None, None))
    check_tensor("more", more, (len(x), None), (FP32, INT32))
    check_tensor("index", index, dtypes=(INT32,))
    words, row_bytes = row_words(x, more), x.shape[1] * x.element_size()
    width, rest = divmod(row_bytes, 4)
    need = half_window_bytes(window.members, window.capacity, window.channels, words)
    if rest:
        name = dtype_name(x.dtype)
        raise ValueError(f"a row of x must be a multiple of 4 bytes, not {x.shape[1]} {name}")
    if need > window.half_bytes:
        raise ValueError(f"rows of {words} words need {need:,} bytes, not {window.half_bytes:,}")
    meta = {"MEMBERS": window.members, "ROW": words, "X": width, "MORE": more.shape[1]}
    for name, size in (("X", width), ("MORE", more.shape[1])):
        meta[f"BLOCK_{name}"] = min(MAX_BLOCK, triton.next_power_of_2(max(1, size)))
    if kernel is not _combine_receive_kernel:
        x, more = x.view(INT32), more.view(INT32)
    kernel[window.channels,](
        window.peers_i, x, more, index, window.transfer, window.rank, n, window.half_bytes,
        window.capacity * words * 4, **meta, BLOCK_N=BLOCK_N, num_warps=NUM_WARPS,
    )  # fmt: skip


def dispatch_send(window: Window, x_nd: Tensor, more_nw: Tensor, sent_ni: Tensor) -> None:
    """Write each token to the windows of the members that it goes to.

    x_nd: rows of any dtype; more_nw: what travels with them, fp32 or int32. sent_ni: how many of
    the tokens up to each one go to each member, at most the capacity (int32).
    """
    run_channels(x_nd, more_nw, sent_ni, _dispatch_send_kernel, window, len(x_nd))


def dispatch_receive(window: Window, x_md: Tensor, more_mw: Tensor, range_icx: Tensor) -> None:
    """Fill rows r·capacity, r·capacity + 1 … of x and `more` with those that come from rank r.

    Other rows keep what they hold. range_icx becomes the rows of each channel, for the way back.
    """
    run_channels(x_md, more_mw, range_icx, _dispatch_receive_kernel, window, window.capacity)


def combine_send(window: Window, y_md: Tensor, more_mw: Tensor, range_icx: Tensor) -> None:
    """Write results, in the rows of `dispatch_receive`, to the windows of the tokens' ranks."""
    run_channels(y_md, more_mw, range_icx, _combine_send_kernel, window, window.capacity)


def combine_receive(window: Window, o_nd: Tensor, more_nw: Tensor, sent_ni: Tensor) -> None:
    """Fill o and `more`, in fp32, with the sums over the members that each token went to.

    o has the dtype in which the results were sent. Members are summed in fp32 and in their order.
    """
    check_tensor("o_nd", o_nd, dtypes=FLOATS)
    check_tensor("more_nw", more_nw, dtypes=(FP32,))
    run_channels(o_nd, more_nw, sent_ni, _combine_receive_kernel, window, len(o_nd))


# ── For the ahead-of-time compiler: V3's rows (FP8 out, bf16 back), 8 ranks per node ──


def channel_case(
    name: str, kernel: JITFunction, dtypes: tuple[torch.dtype, torch.dtype], x: int, more: int
) -> AOTCase:
    """Return the case of a kernel for rows of x and `more` words, of these dtypes."""
    words = triton.cdiv(x + more, 4) * 4
    meta = {"MEMBERS": 8, "ROW": words, "X": x, "MORE": more, "num_warps": NUM_WARPS}
    meta |= {"BLOCK_N": BLOCK_N, "BLOCK_X": MAX_BLOCK}
    meta["BLOCK_MORE"] = triton.next_power_of_2(max(1, more))
    args = INT64, *dtypes, INT32, INT32, 3, 4096, 2**32, 2**29
    return AOTCase(name, kernel, args, meta)


AOT_CASES = [
    channel_case("dispatch_send", _dispatch_send_kernel, (INT32, INT32), 1792, 72),
    channel_case("dispatch_receive", _dispatch_receive_kernel, (INT32, INT32), 1792, 72),
    channel_case("combine_send", _combine_send_kernel, (INT32, INT32), 3584, 8),
    channel_case("combine_receive", _combine_receive_kernel, (BF16, FP32), 3584, 8),
]
