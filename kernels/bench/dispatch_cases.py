"""Cases of dispatch and combine within a node, by the number of multiprocessors they may use.

All ranks of the node share one GPU, so this measures how fast a few multiprocessors copy rows; over
NVLink its bandwidth is a second limit.
"""

import torch
from dsv3_ref.kernels import dispatch
from dsv3_ref.kernels.bench.calls import randn
from dsv3_ref.kernels.bench.case import Calls, Case
from dsv3_ref.kernels.launch import BF16, E4M3, FP32, INT32, num_blocks
from torch import Tensor

Node = list[dispatch.Window]


def random_node(
    sms: int, members: int, n: int, d: int, dtype: torch.dtype, more: int
) -> tuple[Node, Tensor, Tensor, Tensor]:
    """Return windows, tokens and what travels with them by rank, and the tokens' destinations.

    Every token goes to each rank with a probability of one half, but to one at least.
    """
    x_rnd = randn(members, n, d).to(dtype)
    more_rnw = torch.randn(members, n, more, dtype=FP32)
    goes_rni = torch.rand(members, n, members) < 0.5
    goes_rni[..., 0] |= ~goes_rni.any(-1)
    words = dispatch.row_words(x_rnd[0], more_rnw[0])
    windows = dispatch.allocate_windows(members, n, sms, words, x_rnd.device)
    return windows, x_rnd, more_rnw, goes_rni


def cumulative_counts(goes_rni: Tensor) -> Tensor:
    """Return how many of a rank's tokens up to each one go to each member."""
    return goes_rni.cumsum(1).to(INT32)


def case_dispatch(sms: int, members: int, n: int, d: int) -> Case:
    """Return the case of sending FP8 tokens with scales to half of the ranks of a node."""
    more = num_blocks(d) + 16  # scales, and ids and weights of 8 experts

    def make() -> Calls:
        windows, x_rnd, more_rnw, goes_rni = random_node(sms, members, n, d, E4M3, more)
        sent_rni = cumulative_counts(goes_rni)
        x_rmd = x_rnd.new_zeros(members, members * n, d, dtype=BF16).to(E4M3)
        more_rmw = more_rnw.new_zeros(members, members * n, more)
        range_ricx = torch.stack([window.empty_ranges() for window in windows])

        def run() -> tuple[Tensor, ...]:
            for window, *sent in zip(windows, x_rnd, more_rnw, sent_rni):
                window.begin_transfer()
                dispatch.dispatch_send(window, *sent)
            for window, *received in zip(windows, x_rmd, more_rmw, range_ricx):
                dispatch.dispatch_receive(window, *received)
            return x_rmd, more_rmw

        def gather() -> tuple[Tensor, ...]:
            rows = [torch.zeros_like(x.view(members, members, n, -1), dtype=FP32)
                    for x in (x_rmd, more_rmw)]  # fmt: skip
            for (source, member), goes_n in by_pair(goes_rni):
                for out, x_rnw in zip(rows, (x_rnd, more_rnw)):
                    sent_md = x_rnw[source].float()[goes_n]
                    out[member, source, : len(sent_md)] = sent_md
            return tuple(x.flatten(1, 2) for x in rows)

        return run, {"torch": gather}

    row_bytes = d + 4 * more
    copies = members * n * members / 2
    # a token is read once and written to half of the ranks, which copy it out of their windows
    num_bytes = row_bytes * (members * n + 3 * copies)
    sizes = {"sms": sms, "ranks": members, "n": n, "d": d}
    return Case("dispatch", sizes, make, num_bytes)


def case_combine(sms: int, members: int, n: int, d: int) -> Case:
    """Return the case of sending bf16 results back to the ranks of the tokens, which sum them."""

    def make() -> Calls:
        windows, x_rnd, more_rnw, goes_rni = random_node(sms, members, n, d, BF16, 0)
        sent_rni = cumulative_counts(goes_rni)
        y_rmd = randn(members, members * n, d)
        more_rmw = more_rnw.new_zeros(members, members * n, 0)
        x_rmd = torch.empty_like(y_rmd)
        range_ricx = torch.stack([window.empty_ranges() for window in windows])
        for window, *sent in zip(windows, x_rnd, more_rnw, sent_rni):
            window.begin_transfer()
            dispatch.dispatch_send(window, *sent)
        for window, *received in zip(windows, x_rmd, more_rmw, range_ricx):
            dispatch.dispatch_receive(window, *received)
        o_rnd = torch.empty_like(x_rnd)

        def run() -> Tensor:
            for window, *results in zip(windows, y_rmd, more_rmw, range_ricx):
                window.begin_transfer()
                dispatch.combine_send(window, *results)
            for window, *sums in zip(windows, o_rnd, more_rnw, sent_rni):
                dispatch.combine_receive(window, *sums)
            return o_rnd

        def add() -> Tensor:
            total_rnd = torch.zeros_like(o_rnd, dtype=FP32)
            y_risd = y_rmd.view(members, members, n, d)
            for (source, member), goes_n in by_pair(goes_rni):
                count = goes_n.sum()
                total_rnd[source, goes_n] += y_risd[member, source, :count].float()
            return total_rnd.to(BF16)

        return run, {"torch": add}

    copies = members * n * members / 2
    sizes = {"sms": sms, "ranks": members, "n": n, "d": d}
    return Case("combine", sizes, make, 2 * d * (3 * copies + members * n))


def by_pair(goes_rni: Tensor) -> list[tuple[tuple[int, int], Tensor]]:
    """Return which tokens go from a rank to a member, for every pair."""
    pairs = torch.cartesian_prod(*[torch.arange(len(goes_rni))] * 2).tolist()
    return [((source, member), goes_rni[source, :, member]) for source, member in pairs]
